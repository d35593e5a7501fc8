"""Packed attention: many documents in one row, none sees another; causal, or bidirectional (encoders).

Registered once with transformers' AttentionInterface under `mm_packed`, so every causal language model with standard
attention takes packed rows. Which positions belong together travels as an explicit keyword argument, `packing`, through
the model into the attention of each layer, and is therefore there again when a checkpointed layer is recomputed.

Three implementations of one function, equal in outputs and gradients (tests/models/test_attention.py):

- segments (CPU): segments of like length are gathered into padded groups, each one SDPA call. Padding goes to the
  right, where a causal query never looks and others are kept from looking by a mask, so this is exact; grouping by
  length keeps the padding under a third.
- flex (GPU, without dropout): `flex_attention` with a block mask from the segment numbers; not seen running on a GPU
  yet.
- dense: SDPA under a full [N, N] mask: the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "mm_packed"
GROWTH = 1.3  # lengths within this factor share a group


@dataclass(frozen=True)
class Packing:
    """Which of N flat positions attend to each other.

    scope: int64 [N], equal numbers attend to each other; 0 is padding, which attends to nothing and gives zeros.
    causal: to what stands before alone, or to what stands behind as well.
    """

    scope: Tensor
    implementation: str
    causal: bool = True

    def select(self, places: Tensor) -> "Packing":
        """That of some positions, int64 [n] in rising order."""
        return _ready(replace(self, scope=self.scope[places]))

    def padding(self) -> "Packing":
        """That of one position that belongs to nothing."""
        return _ready(replace(self, scope=torch.zeros_like(self.scope[:1])))

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """`packed_attention`, for a layer of a model. One that decodes has a memory of its own (`mm.models.decode`)."""
        return packed_attention(query, key, value, self, scale, dropout)

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """For each group of like-long segments: positions [S, M] (0 where padded) and which of them are real [S, M]."""
        place = (self.scope > 0).nonzero()[:, 0]  # of a scope there may be padding between two positions
        scope = self.scope[place]
        starts = torch.ones_like(scope, dtype=torch.bool)
        starts[1:] = scope[1:] != scope[:-1]
        start = starts.nonzero()[:, 0]
        length = torch.diff(start, append=torch.tensor([len(scope)], device=scope.device))
        order = torch.argsort(length, stable=True)
        start, length = start[order], length[order]
        groups = []
        lengths = length.tolist()
        first = 0
        for i in range(1, len(lengths) + 1):
            if i == len(lengths) or lengths[i] > GROWTH * lengths[first]:
                steps = torch.arange(lengths[i - 1], device=scope.device)
                here = steps < length[first:i, None]
                at = (start[first:i, None] + steps).clamp(max=len(place) - 1)
                groups.append((torch.where(here, place[at], 0), here))
                first = i
        return groups

    @cached_property
    def longest(self) -> int:
        """Positions in the longest scope."""
        counts = torch.unique(self.scope[self.scope > 0], return_counts=True)[1]
        return int(counts.max()) if len(counts) else 0

    @cached_property
    def dense_mask(self) -> Tensor:
        """bool [N, N]: query i may look at key j."""
        n = len(self.scope)
        same = (self.scope[:, None] == self.scope[None, :]) & (self.scope > 0)[:, None]
        past = torch.arange(n, device=self.scope.device)
        return same & (past[:, None] >= past[None, :]) if self.causal else same

    @cached_property
    def block_mask(self) -> Any:
        """flex_attention's mask, made once a batch."""
        from torch.nn.attention.flex_attention import create_block_mask

        scope, causal = self.scope, self.causal

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (scope[q] == scope[k]) & (scope[q] > 0)
            # A padding query sees itself, so that its row of scores is not empty; its output is zeroed afterwards.
            return (same & (q >= k) if causal else same) | (q == k)

        # Compiled, the mask is made block by block; eagerly all N x N positions would be there at once.
        n, on_gpu = len(scope), scope.is_cuda
        return create_block_mask(visible, None, None, n, n, device=str(scope.device), _compile=on_gpu)


def choose_implementation(device: torch.device) -> str:
    """`segments` on the CPU (flex has no CPU backward), `flex` on a GPU."""
    return "flex" if device.type == "cuda" else "segments"


def packing(
    segment_ids: Tensor, isolate_segments: bool = True, implementation: str | None = None, causal: bool = True
) -> Packing:
    """The scope of every position of flattened rows.

    Args:
        segment_ids: [B, L], 0 = padding.
        isolate_segments: False lets a row's segments see those before them (Open-Qwen2VL's published training).
        causal: False lets every position of a segment see all of it.
    """
    rows, length = segment_ids.shape
    number = segment_ids.long() if isolate_segments else (segment_ids > 0).long()
    row = torch.arange(rows, device=segment_ids.device)[:, None]
    scope = torch.where(number > 0, row * (length + 1) + number, 0).reshape(-1)
    return _ready(Packing(scope, implementation or choose_implementation(segment_ids.device), causal))


def _ready(made: Packing) -> Packing:
    if made.implementation == "flex":
        made.block_mask  # noqa: B018  made here, once: torch.compile cannot trace the cache from inside a layer
    return made


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside each scope.

    Args:
        query: [1, H, N, D]; key, value: [1, H_kv, N, D], H a multiple of H_kv.

    Returns:
        [1, H, N, D], zeros at padding.
    """
    # Under autocast rotary embeddings leave float32 queries and keys beside bfloat16 values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # flex_attention has no dropout.
    implementation = "segments" if dropout and packing.implementation == "flex" else packing.implementation
    return IMPLEMENTATIONS[implementation](query, key, value, packing, scale, dropout)


def _segments(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None, dropout: float) -> Tensor:
    out = q.new_zeros(q.shape[2], q.shape[1], v.shape[3])  # n h d
    if not packing.groups:
        # Nothing but padding: projections before this get a gradient of zero, as on the other ranks they get one.
        return (out + 0.0 * (q.sum() + k.sum() + v.sum())).transpose(0, 1)[None]
    for positions, real in packing.groups:
        part_q, part_k, part_v = (x[0][:, positions].transpose(0, 1) for x in (q, k, v))  # s h m d
        # A causal query never looks at the padding to its right; others have to be kept from it, where there is any.
        mask = None if packing.causal or bool(real.all()) else real[:, None, None, :]
        part = F.scaled_dot_product_attention(
            part_q,
            part_k,
            part_v,
            mask,
            is_causal=packing.causal,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out = out.index_put((positions[real],), part.transpose(1, 2)[real])
    return out.transpose(0, 1)[None]


def _flex(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None, dropout: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled(flex_attention) if q.is_cuda else flex_attention
    out = run(q, k, v, block_mask=packing.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out * (packing.scope > 0)[:, None]


def _dense(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None, dropout: float) -> Tensor:
    mask = packing.dense_mask
    everyone = mask | ~mask.any(1)[:, None]  # a row without any key would be NaN; its output is zeroed below
    out = F.scaled_dot_product_attention(
        q, k, v, everyone, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out * (packing.scope > 0)[:, None]


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing, float | None, float], Tensor]] = {
    "segments": _segments,
    "flex": _flex,
    "dense": _dense,
}

_compiled_functions: dict[Any, Any] = {}


def _compiled(function: Any) -> Any:
    if function not in _compiled_functions:
        # Wrapped, so that selective activation checkpointing sees one operation, whose output it keeps.
        _compiled_functions[function] = torch.compile(function, options={"wrap_inductor_compiled_regions": True})
    return _compiled_functions[function]


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns [1, N, H, D]. Refuses what packed attention does not do."""
    window = options.get("sliding_window")
    if window is not None and packing.longest > window:
        raise ValueError(f"segments of {packing.longest} tokens are longer than the sliding window of {window}")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"packed attention has no {name}")
    out = packing.attend(module, query, key, value, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """What transformers' mask functions call for our name: the scope is in `packing`, no mask is materialised."""
    return None


def register() -> str:
    """Make `attn_implementation=NAME` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _for_transformers)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME
