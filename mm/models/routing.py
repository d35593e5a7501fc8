"""Routing: what the routers of a forward pass must know of its positions, and how they choose.

The rows of a batch are one row of N positions by then (`mm.models.backbone`). Each position belongs to a group of
experts, by its modality, and to a pool, the rows that are chosen from together; padding belongs to none. A `Routing` is
made once a batch and travels as an explicit keyword argument through transformers' model into each layer, so it is
there again when a checkpointed layer is recomputed.

Two ways to choose. In training each expert takes the tokens of a pool that it scores highest ("expert choice",
Zhou et al., 2202.09368; MoMa, 2407.21770 2.2), which looks ahead: whether a token is taken depends on those behind it.
Where there must be no looking ahead, auxiliary routers say of each token alone whether it would have been.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.sample import keyed_seed

Routers = Mapping[str, Mapping[str, Any]]
"""Auxiliary routers by layer and group, modules from [n, D] to scores [n, experts]."""


@dataclass(frozen=True, slots=True)
class Share:
    """The positions that are chosen from: int64 [n], pool after pool, and how many of them each pool has."""

    places: Tensor
    sizes: list[int]

    def choose(self, scores: Tensor, capacity: float) -> Tensor:
        """int64 [E, K], of scores [n, E]: for each column the numbers, among the n, of the highest of every pool.

        Of a pool of b positions each column takes `taken(b, capacity)`. Of equal scores the first position's is higher.
        """
        columns = scores.detach().T.contiguous()
        chosen, start = [], 0
        for size in self.sizes:
            order = columns[:, start : start + size].sort(dim=1, descending=True, stable=True).indices
            chosen.append(order[:, : taken(size, capacity)] + start)
            start += size
        return torch.cat(chosen, dim=1)


def taken(size: int, capacity: float) -> int:
    """How many of so many positions an expert takes: the share rounded, at least one, where there are any."""
    return min(size, max(1, round(size * capacity)))


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise on the scores of routers, drawn for a row from its key: the same however a step is split.

    Gumbel-Sigmoid is sigmoid(z + G' - G''), and the difference of two Gumbel variables is logistic (variance pi^2 / 3).
    """

    scale: float
    keys: list[int]
    """Of each row of the batch."""

    def draw(self, router: str, places: Tensor, positions: int, width: int) -> Tensor:
        """float32 [n, width], of places int64 [n] among all `positions` of the batch."""
        drawn = []
        for key in self.keys:
            generator = torch.Generator(places.device).manual_seed(keyed_seed("router", key, router))
            size = positions // len(self.keys), width
            drawn.append(torch.rand(size, generator=generator, device=places.device))
        return self.scale * torch.logit(torch.cat(drawn)[places], eps=1e-7)


@dataclass(frozen=True)
class Routing:
    """See the module.

    group: int64 [N], the number of its group in `groups`, -1 for padding. pool: int64 [N], in rising order.
    origin: int64 [N], where a position is in the batch; they differ where a layer runs on some positions only.
    positions: of the batch. auxiliary: the routers to go by; None: experts choose. keep: remember what auxiliary
    routers are to learn from. records: what routers leave behind, by the layer's number and the group; notes: numbers,
    by name. A layer that is recomputed leaves the same again. asked: what ranks have told each other where experts are
    divided over ranks (`mm.train.engines.expert_parallel`).
    """

    groups: tuple[str, ...]
    group: Tensor
    pool: Tensor
    pools: int
    origin: Tensor
    positions: int
    auxiliary: Routers | None = None
    noise: Noise | None = None
    keep: bool = False
    records: dict[tuple[str, str], "Record"] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def shares(self) -> list[Share]:
        """The positions of each group. Their numbers are asked of the device, once."""
        key = (self.group + 1) * self.pools + self.pool
        order = torch.argsort(key, stable=True)
        sizes = torch.bincount(key, minlength=(len(self.groups) + 1) * self.pools).tolist()
        shares, start = [], sum(sizes[: self.pools])  # behind the padding
        for first in range(self.pools, len(sizes), self.pools):
            own = sizes[first : first + self.pools]
            shares.append(Share(order[start : start + sum(own)], own))
            start += sum(own)
        return shares

    @cached_property
    def everyone(self) -> Share:
        """All positions but padding."""
        real = (self.group >= 0).nonzero()[:, 0]
        return Share(real, torch.bincount(self.pool[real], minlength=self.pools).tolist())

    def select(self, places: Tensor) -> "Routing":
        """That of some positions, int64 [n] in rising order; it shares the records and notes."""
        chosen = {name: getattr(self, name)[places] for name in ("group", "pool", "origin")}
        return replace(self, asked={}, **chosen)


@dataclass(frozen=True, slots=True)
class Record:
    """What a router did in a forward pass.

    hidden: [N, D] that it looked at, without a gradient, where auxiliary routers are to learn from it, else None.
    places: int64 [n] of the positions that it chose from. member: bool [n, E], which of them each expert took.
    """

    hidden: Tensor | None
    places: Tensor
    member: Tensor


class Router(nn.Linear):
    """Scores of tokens [n, D], one a column: [n, experts]. At least in float32, whatever autocast and sharding say."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype))


class AuxiliaryRouter(nn.Module):
    """Says of a token alone whether the experts would take it: [n, D] to [n, experts], yes above 0 (MoMa 2.4)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.inner, self.outer = Router(width, width // 2), Router(width // 2, experts)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(hidden)))
