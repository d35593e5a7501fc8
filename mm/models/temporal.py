"""What joins the frames of a clip: attention over time in the blocks of a tower, or merging across frames behind it.

SimVLG's attention (`TemporalAttention`; arXiv 2310.03291, github yiren-jian/EVLGen, `lavis/models/eva_vit_g.py`) looks
from each place of a frame at the same place of the others, and the mean over frames then makes one picture of the clip.
Neither knows which frame came first. `TemporalMerge` is ours and not published: it keeps the order.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.merging import match


class TemporalAttention(nn.Module):
    """x + alpha * A x at each place, with A from queries and keys of the frames, and x itself for values.

    The scale is that of the release: 1 / sqrt(hidden), not of a head's width. `alpha` is 0 in the beginning, so that
    the tower is what it was; it has one axis (the release's has none), because sharding takes no numbers without.
    """

    def __init__(self, width: int, hidden: int = 256, heads: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"model.video.temporal attention: features of {width} numbers do not divide into {heads} heads; choose "
                "another tower, or `temporal: mean`"
            )
        self.heads, self.scale = heads, hidden**-0.5
        self.query, self.key = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[n * frames, T, D], frame by frame of each clip, to the same shape."""
        tracks = rearrange(x, "(n f) t d -> (n t) f d", f=frames)
        query, key, value = (
            rearrange(one, "n f (h d) -> n h f d", h=self.heads)
            for one in (self.query(tracks), self.key(tracks), tracks)
        )
        found = F.scaled_dot_product_attention(query, key, value.to(query.dtype), scale=self.scale)
        return x + self.alpha * rearrange(found, "(n t) h f d -> (n f) t (h d)", t=x.shape[1])


class TemporalMerge(nn.Module):
    """The features of all frames of a clip, merged until there are as many as of one frame.

    Which features merge is decided by what they show, as in ToMe and weighted by what each was made from; what stands
    still becomes one feature, what moves stays apart. When it was is added to each feature before: an embedding of its
    frame, learned and 0 in the beginning, of which a merged feature has the mean. The class token, if there is one, is
    the mean over frames.
    """

    def __init__(self, width: int, frames: int, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token
        self.frame = nn.Parameter(torch.zeros(frames, width))

    def forward(self, features: Tensor) -> Tensor:
        """[n, F, T, D] to [n, T, D]."""
        timed = features + self.frame[:, None]
        front = timed[:, :, : self.class_token].mean(1)
        # Frame by frame at each place, so that the first matching is between frames next to each other.
        by_place = partial(rearrange, pattern="n f t d -> n (t f) d")
        tokens, content = (by_place(one[:, :, self.class_token :]) for one in (timed, features))
        left, size = features.shape[2] - self.class_token, tokens.new_ones(tokens.shape[:2])
        while (more := tokens.shape[1] - left) > 0:
            merge = match(content, more, protected=0)
            tokens, _ = merge.merge(tokens, size)
            content, merged = merge.merge(content, size)
            assert merged is not None
            size = merged
        return torch.cat([front, tokens], dim=1)
