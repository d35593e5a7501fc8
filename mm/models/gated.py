"""Gated cross-attention in a causal language model, and the resampler in front of it (Flamingo, 2204.14198 3).

Blocks stand before chosen decoder layers and are part of these, so that a layer is sharded, recomputed and compiled
together with its block. What they look at, `MediaSeen`, travels as an explicit keyword argument, `media`, through
transformers' model into each layer, and is therefore there again when a checkpointed layer is recomputed.

Positions that stand side by side and see the same media are a run. Runs of like length are gathered into padded groups,
each one attention call without a mask: padding is of queries alone, which nobody reads. So the price of cross-attention
goes by what is seen, and nothing of the size of all positions times all media is ever made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.attention import GROWTH
from mm.models.experts import layers_of

if TYPE_CHECKING:
    from mm.models.systems.cosmo.config import CosmoConfig

HEADS, HEAD_WIDTH = 8, 64


@dataclass(frozen=True)
class MediaSeen:
    """Which media each of N flat positions sees.

    latents: [M, K, D], of all media in the order in which they stand in the batch.
    first, last: int64 [N]: a position sees the media from `first` to before `last`; none where these are equal.
    scope: int64 [N], the segment of each position, 0 for padding; in a batch of one row as in its `segment_ids`.
    blind: bool [N], positions that weigh all that they see alike, or None.
    left: where the unimodal half leaves what it gives, [N, D], if it is asked to.
    """

    latents: Tensor
    first: Tensor
    last: Tensor
    scope: Tensor
    blind: Tensor | None = None
    left: list[Tensor] | None = None

    def select(self, places: Tensor) -> "MediaSeen":
        """That of some positions, int64 [n]."""
        blind = None if self.blind is None else self.blind[places]
        kept = {name: getattr(self, name)[places] for name in ("first", "last", "scope")}
        return replace(self, **kept, blind=blind, left=None)

    def after(self, scopes: Tensor) -> "MediaSeen":
        """That of one further position of each of some segments, int64 [n]: it sees what the segment's last one sees,
        and nothing where there is no such segment."""
        where = torch.arange(len(self.scope), device=self.scope.device)
        own = (self.scope == scopes[:, None]) & (self.scope > 0)
        seen = self.select(torch.where(own, where, 0).amax(1))
        return replace(seen, last=torch.where(own.any(1), seen.last, seen.first))

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each group of S like-long runs that see C media each: positions [S, T] (0 where padded), which of these
        S * T are real, int64 [n], and media [S, C]."""
        new = torch.ones_like(self.first, dtype=torch.bool)
        new[1:] = (self.first[1:] != self.first[:-1]) | (self.last[1:] != self.last[:-1])
        start = new.nonzero()[:, 0]
        length = torch.diff(start, append=torch.tensor([len(new)], device=start.device))
        first, media = self.first[start], (self.last - self.first)[start]
        some = media > 0
        start, length, first, media = start[some], length[some], first[some], media[some]
        groups = []
        for runs, positions, real in _grouped(start, length, media):
            each = torch.arange(int(media[runs[0]]), device=start.device)
            groups.append((positions, real.flatten().nonzero()[:, 0], first[runs, None] + each))
        return groups


def see(latents: Tensor, places: Tensor, segment_ids: Tensor, immediate: bool, faithful: bool = False) -> MediaSeen:
    """What positions see of the media of their own segment.

    Args:
        latents: [M, K, D]; places: int64 [M], the flat position of each medium's token, -1 where it has none (dummies).
        segment_ids: [B, L].
        immediate: the last medium at or before a position alone; else all media up to it.
        faithful: without `immediate`, positions before the first medium of their segment weigh all of its media alike.
            The release masks their scores with the lowest number there is, all of them, and softmax does that.
    """
    order = torch.argsort(places, stable=True)
    latents, places = latents[order], places[order]
    scope = scopes(segment_ids)
    start, end = ends(scope)
    here = torch.arange(len(scope), device=scope.device)
    before = torch.searchsorted(places, start)
    last = torch.searchsorted(places, here, right=True)
    first = torch.maximum(before, last - 1) if immediate else before
    blind = None
    if faithful and not immediate:
        blind = last == before
        last = torch.where(blind, torch.searchsorted(places, end, right=True), last)
    real = scope > 0
    return MediaSeen(latents, torch.where(real, first, 0), torch.where(real, last, 0), scope, blind)


def scopes(segment_ids: Tensor) -> Tensor:
    """[B, L] to int64 [B * L]: a number for each segment of the batch, 0 for padding, those of the first row as they
    are."""
    rows, length = segment_ids.shape
    row = torch.arange(rows, device=segment_ids.device)[:, None]
    return torch.where(segment_ids > 0, row * (length + 1) + segment_ids, 0).flatten()


def ends(scope: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last position, int64 [N] each, of the run of equal numbers that each of N positions is in."""
    changes = scope[1:] != scope[:-1]
    here = torch.arange(len(scope), device=scope.device)
    start, end = here.clone(), here.clone()
    start[1:] = torch.where(changes, here[1:], 0)
    end[:-1] = torch.where(changes, here[:-1], len(scope) - 1)
    return start.cummax(0).values, end.flip(0).cummin(0).values.flip(0)


def _grouped(start: Tensor, length: Tensor, kind: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs of one kind and like length together: their numbers [S], positions [S, T] (0 where padded), and which of
    these are real [S, T]. All arguments are int64 [runs]."""
    if not len(start):
        return
    order = torch.argsort(kind * (length.max() + 1) + length, stable=True)
    kinds, lengths = torch.stack([kind, length])[:, order].tolist()
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or kinds[i] != kinds[first] or lengths[i] > GROWTH * lengths[first]:
            runs = order[first:i]
            steps = torch.arange(lengths[i - 1], device=start.device)
            real = steps < length[runs, None]
            yield runs, torch.where(real, start[runs, None] + steps, 0), real
            first = i


@torch.compiler.disable  # it depends on the batch, and would be compiled anew for each
def attend(query: Tensor, key: Tensor, value: Tensor, seen: MediaSeen, scale: float) -> Tensor:
    """Each position's attention to the latents that it sees, zeros where it sees none.

    Args:
        query: [N, H, d]; key, value: [M, K, H, d]. scale: what scores are multiplied by.

    Returns:
        [N, H, d].
    """
    # Under autocast what a norm gives is float32, beside bfloat16 from products.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = torch.zeros_like(query)
    if not seen.groups:
        # Projections before this get a gradient of zero, as on other ranks they get one.
        return out + 0.0 * (query.sum() + key.sum() + value.sum())
    if seen.blind is not None:
        query = query.masked_fill(seen.blind[:, None, None], 0)
    found, places = [], []
    for positions, real, media in seen.groups:
        q = rearrange(query[positions], "s t h d -> s h t d")
        k, v = (rearrange(one[media], "s c k h d -> s h (c k) d") for one in (key, value))
        part = F.scaled_dot_product_attention(q, k, v, scale=scale)
        found.append(rearrange(part, "s h t d -> (s t) h d")[real])
        places.append(positions.flatten()[real])
    return out.index_put((torch.cat(places),), torch.cat(found))


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear, without biases in the linear ones."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )


class CrossAttention(nn.Module):
    """Hidden states [1, N, D] look at media; what is to be added to them, [1, N, D]."""

    def __init__(self, width: int, media_width: int, ratio: int, scale: float) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH // ratio
        self.scale = scale
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, media: MediaSeen) -> Tensor:
        query = rearrange(self.to_q(self.norm(hidden)), "1 n (h d) -> n h d", h=HEADS)
        key, value = rearrange(self.to_kv(media.latents), "m k (two h d) -> two m k h d", two=2, h=HEADS)
        out = attend(query, key, value, media, self.scale)
        return self.to_out(rearrange(out, "n h d -> 1 n (h d)"))


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward layer, each behind a gate that is shut at first: x + tanh(gate) * f(x).

    Args:
        ratio: what inner widths are divided by, heads of cross-attention too; there are 8 all the same.
        scale: of the scores.
    """

    def __init__(self, width: int, media_width: int, ratio: int, scale: float) -> None:
        super().__init__()
        self.attn = CrossAttention(width, media_width, ratio, scale)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, 4 * width // ratio)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, media: MediaSeen) -> Tensor:
        """[1, N, D] to [1, N, D]."""
        hidden = hidden + torch.tanh(self.attn_gate) * self.attn(hidden, media)
        return hidden + torch.tanh(self.ff_gate) * self.ff(hidden)


class PerceiverAttention(nn.Module):
    """Latents [B, K, D] look at media [B, T, D] and at themselves; what is to be added to them."""

    def __init__(self, width: int, heads: int = HEADS) -> None:
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        query = rearrange(self.to_q(latents), "b k (h d) -> b h k d", h=self.heads)
        both = torch.cat([self.norm_media(media), latents], dim=1)
        key, value = rearrange(self.to_kv(both), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(out, "b h k d -> b k (h d)"))

    def of_runs(self, media: Tensor, latent: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """The same for one latent [1, D], and for each of n runs of media [P, D], int64 [n] their first positions and
        lengths: [n, D]. Each module runs once, whatever the runs are, so with sharded weights no rank waits."""
        latent = self.norm_latents(latent)
        query = rearrange(self.to_q(latent), "1 (h d) -> h 1 d", h=self.heads)
        both = torch.cat([self.norm_media(media), latent])
        key, value = rearrange(self.to_kv(both), "t (two h d) -> two t h d", two=2, h=self.heads)
        found, order = [], []
        for runs, positions, real in _grouped(start, length, torch.zeros_like(start)):
            places = F.pad(positions, (0, 1), value=len(media))  # the latent itself
            mask = F.pad(real, (0, 1), value=True)[:, None, None]
            k, v = (rearrange(one[places], "s t h d -> s h t d") for one in (key, value))
            out = F.scaled_dot_product_attention(query.expand(len(runs), -1, -1, -1), k, v, mask)
            found.append(rearrange(out, "s h 1 d -> s (h d)"))
            order.append(runs)
        return self.to_out(torch.cat(found)[torch.cat(order).argsort()])


class ResamplerLayer(nn.Sequential):
    """Attention and a feed-forward layer of the resampler, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(PerceiverAttention(width, heads), feed_forward(width, 4 * width))

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:  # type: ignore[override]
        attention, feed = self
        latents = latents + attention(media, latents)
        return latents + feed(latents)


class PerceiverResampler(nn.Module):
    """Any number of features [n, T, D] to `latents` + 1 of each medium, [n, 1 + latents, D]; the first is no more than
    another latent, which is kept apart for a contrastive objective."""

    def __init__(self, width: int, latents: int, depth: int, heads: int = HEADS) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1 + latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


class TextQuery(nn.Module):
    """One learned latent that looks at the hidden states of a text: its vector for a contrastive objective."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, width))
        self.attn = PerceiverAttention(width)
        self.ff = feed_forward(width, 4 * width)
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """Hidden states [N, D] and n texts, int64 [n] their first positions and lengths, to [n, D]."""
        texts = len(start)
        if not texts:  # it runs, as on other ranks, and gives nothing
            start, length = start.new_zeros(1), length.new_ones(1)
        first = length.cumsum(0) - length
        places = torch.repeat_interleave(start - first, length)
        places = places + torch.arange(len(places), device=places.device)
        latent = self.latent + self.attn.of_runs(hidden[places], self.latent, first, length)
        latent = latent + self.ff(latent)
        return self.norm(latent)[:texts]


def insert_gated(language: Any, config: "CosmoConfig", media_width: int) -> None:
    """Put gated blocks before layers of the upper half of a causal language model of transformers.

    They are `layer.gated`, before layers `unimodal`, `unimodal` + `interval`, …; and what the unimodal half gives is
    left in `MediaSeen.left` where that is asked for.

    Raises `ConfigError` where the model's layers are not known, or where no upper half is left.
    """
    layers = layers_of(getattr(language.base_model, "decoder", language), "language")  # OPT's are one further in
    if config.unimodal >= len(layers):
        raise ConfigError(
            f"model.unimodal {config.unimodal}: the language model has {len(layers)} layers, and some have to be left "
            "that look at pictures"
        )
    width = language.config.hidden_size
    scale = (HEAD_WIDTH if config.faithful else HEAD_WIDTH // config.ratio) ** -0.5
    for number in range(config.unimodal, len(layers), config.interval):
        layer: Any = layers[number]
        with torch.device(next(layer.parameters()).device):
            layer.gated = GatedBlock(width, media_width, config.ratio, scale)
        layer.forward = partial(_gated, layer, layer.forward)
    # A hook on the module's call and not a part of `forward`: a recomputed block repeats its `forward` alone, so
    # nothing is left twice. It is the layer's own output tensor, before what engines do with it in their hooks, so
    # gradients of the text and of the layers above meet in it, and a sharded layer's backward pass begins once both are
    # there.
    layers[config.unimodal - 1 - config.faithful].register_forward_hook(_leave, with_kwargs=True)


def _gated(
    layer: Any, forward: Callable[..., Any], hidden_states: Tensor, *args: Any, media: MediaSeen | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """`forward` of a layer behind its gated block."""
    if media is None:
        raise ValueError("a model with gated cross-attention needs `media` in its call")
    return forward(layer.gated(hidden_states, media), *args, **kwargs)


def _leave(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
    media: MediaSeen | None = kwargs.get("media")
    if media is not None and media.left is not None:
        media.left.append((out[0] if isinstance(out, tuple) else out)[0])
