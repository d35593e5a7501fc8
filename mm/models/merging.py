"""Token merging (ToMe, 2210.09461): the tokens that are most like another one become one with it.

Bipartite soft matching: tokens at even places look for the token at an odd place that is most like them, and the r that
found the likest are merged into it. So it takes one product, one sort and one sum, and as many tokens go in every item
of a batch. All here are pure functions of tensors (section 3 and appendix D of the paper; facebookresearch/ToMe,
`tome/merge.py`). Tokens in front that are `protected` (class token, registers) neither merge nor are merged into, and
stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def schedule(r: int, inflect: float, blocks: int) -> list[int]:
    """How many tokens each block merges away: r in the mean, in a straight line from r (1 - inflect) to
    r (1 + inflect), rounded down (`parse_r` of ToMe)."""
    first = int(r * (1 - inflect))
    step = 2 * (r - first) / max(blocks - 1, 1)
    return [int(first + step * block) for block in range(blocks)]


def counts(features: int, rs: Sequence[int]) -> list[int]:
    """Of so many unprotected tokens, those that are left behind each block: it merges at most half of them."""
    left = []
    for r in rs:
        features -= min(r, features // 2)
        left.append(features)
    return left


@dataclass(frozen=True)
class Merge:
    """Which of N tokens become one.

    order: int64 [B, N], the tokens in a new order: the protected ones, those at even places that stay, those at odd
        places, and at the end the r that are merged away. into: int64 [B, r], where each of these goes in that order.
    """

    order: Tensor
    into: Tensor

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Merged tokens, in the order of `order`, and how many tokens at the beginning each now stands for.

        Args:
            x: [B, N, D]. size: [B, N], how many each stood for before: the mean is weighted by it. None: the plain mean
            of the tokens as they are, as SimVLG takes it.

        Returns:
            [B, N - r, D], and [B, N - r] or None.
        """
        own = torch.ones_like(self.order) if size is None else size
        of_kept, of_gone = self._split(own.gather(1, self.order))
        total = of_kept.scatter_add(1, self.into, of_gone)
        kept, gone = self._split(_rows(x, self.order))
        wide = torch.promote_types(x.dtype, torch.float32)
        # Shares of what was merged, and exactly 1 where nothing was.
        mean = kept * (of_kept.to(wide) / total)[..., None]
        gone = gone * (of_gone.to(wide) / total.gather(1, self.into))[..., None]
        mean.scatter_add_(1, self.into[..., None].expand(-1, -1, x.shape[2]), gone)
        return mean.to(x.dtype), None if size is None else total

    def sources(self, source: Tensor) -> Tensor:
        """Where tokens of the beginning are now, int64 [B, N0], from where they were before."""
        kept = self.order.shape[1] - self.into.shape[1]
        places = torch.arange(kept, device=self.order.device).expand(len(self.order), -1)
        now = torch.empty_like(self.order).scatter(1, self.order, torch.cat([places, self.into], dim=1))
        return now.gather(1, source)

    def _split(self, ordered: Tensor) -> tuple[Tensor, Tensor]:
        gone = self.into.shape[1]
        kept, merged = ordered.split([ordered.shape[1] - gone, gone], dim=1)
        return kept, merged


@torch.no_grad()
def match(metric: Tensor, r: int, protected: int) -> Merge:
    """The r tokens to merge away, at most half of the unprotected ones, and into which: the likest by cosine.

    Two differences from the release: rows of norm 0 are like no other (there they give NaN), and the tokens that stay
    are in their old order without a class token too (there, by how alike they are).

    Args:
        metric: [B, N, C], what tokens are compared by: keys, averaged over heads. protected: tokens in front.
    """
    places = torch.arange(metric.shape[1], device=metric.device)
    r = min(r, (len(places) - protected) // 2)
    if r <= 0:
        return Merge(places.expand(len(metric), -1), places.new_empty(len(metric), 0))
    first, second = protected + protected % 2, protected + 1 - protected % 2
    even, odd = places[first::2], places[second::2]
    with torch.autocast(metric.device.type, enabled=False):  # in bfloat16 far too many would be equally alike
        unit = F.normalize(metric.float(), dim=2)
        best, partner = (unit[:, first::2] @ unit[:, second::2].mT).max(dim=2)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    gone, kept = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    front = torch.cat([places[:protected].expand(len(metric), -1), even[kept]], dim=1)
    into = partner.gather(1, gone) + front.shape[1]
    return Merge(torch.cat([front, odd.expand(len(metric), -1), even[gone]], dim=1), into)


def unmerge(x: Tensor, source: Tensor) -> Tensor:
    """[B, T, D] to [B, N0, D]: every token of the beginning gets what it was merged into, by its source [B, N0]."""
    return _rows(x, source)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D] at index [B, M]: [B, M, D]. Whole rows are copied, where `gather` copies number by number."""
    first = x.shape[1] * torch.arange(len(x), device=x.device)
    return x.flatten(0, 1).index_select(0, (index + first[:, None]).flatten()).unflatten(0, index.shape)
