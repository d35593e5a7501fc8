"""Optimizers of whole matrices, where matrices are in parts: each belongs to one rank, which steps it for all.

An all-to-all brings gradients and weights to the owners, an optimizer that knows nothing of sharding steps whole plain
tensors there, and a second all-to-all takes the new weights to wherever they lie. So the numbers are those of one
process with as many threads, bit for bit, and the state of a matrix is whole, on its owner alone: checkpoints hold it
by name, whatever the number of ranks. Work is divided by matrices, as in Megatron-LM's layer-wise optimizer and Dion
(microsoft/dion).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

ROUND = 1 << 27
"""Bytes of weights, and as many of gradients, that an owner takes in at a time; a larger matrix comes alone."""

Groups = list[dict[str, Any]]
Place = tuple[tuple[int, int], ...]
"""Where a part lies in the whole: first and size, by axis."""


def owned(groups: Groups, build: Callable[[Groups], Optimizer]) -> Optimizer:
    """`build(groups)`, or where weights are DTensors the same on whole matrices, each on the rank that owns it.

    Args:
        groups: As `parameter_groups` gives them.
        build: Makes an optimizer of such groups. It has to skip parameters without a gradient, since `step` is called
            for some at a time, and to bear groups without parameters, since a rank may own nothing. A parameter has
            its shape all the time, and numbers during `step` only.
    """
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        return Owned(groups, build)
    return build(groups)


def assign(shapes: Sequence[torch.Size], ranks: int) -> list[int]:
    """The owner of each matrix [m, n], or stack [E, m, n]: the dearest first, by m^2 n + m n^2, to who has least."""
    costs = [math.prod(shape) * sum(shape[-2:]) for shape in shapes]
    owners, loads = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda one: -costs[one]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
    parameter: nn.Parameter
    """This rank's part of it, a DTensor."""
    owner: int
    whole: nn.Parameter | None
    """On its owner."""
    places: list[Place]
    """Of the part of each rank."""
    givers: list[int]
    """Ranks whose parts make up the whole: of several with the same part, the first."""

    @property
    def bytes(self) -> int:
        return self.parameter.numel() * self.parameter.element_size()


class Owned(Optimizer):
    """See the module. Every rank has to step at the same time, with gradients of the same parameters.

    `state[parameter]` is on the owner what the optimizer inside keeps of it, and elsewhere nothing.
    """

    def __init__(self, groups: Groups, build: Callable[[Groups], Optimizer]) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        parameters = [parameter for group in groups for parameter in group["params"]]
        owners = assign([parameter.shape for parameter in parameters], self.ranks)
        self._matrices = [
            _matrix(parameter, owner, owner == self.rank, places)
            for parameter, owner, places in zip(parameters, owners, _places(parameters), strict=True)
        ]
        matrices = iter(self._matrices)
        inner = []
        for group in groups:
            own = [(name, next(matrices).whole) for name in group["names"]]
            names, wholes = [name for name, one in own if one is not None], [one for _, one in own if one is not None]
            inner.append({**group, "params": wholes, "names": names})
        self.inner = build(inner)
        super().__init__(groups, self.inner.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key not in ("params", "names")})
        for matrices in _rounds([one for one in self._matrices if one.parameter.grad is not None]):
            self._take_in(matrices)
            own = [(one.parameter, one.whole) for one in matrices if one.whole is not None]
            if own:
                self.inner.step()
            self._give_back(matrices)
            for parameter, whole in own:
                self.state[parameter] = self.inner.state[whole]
                whole.data, whole.grad = _without_memory(whole), None

    def _take_in(self, matrices: list[_Matrix]) -> None:
        """Whole weights and gradients, to the owners."""
        sent: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        received: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for one in matrices:
            if self.rank in one.givers:
                assert one.parameter.grad is not None
                sent[one.owner] += [_local(one.parameter), _local(one.parameter.grad)]
            if one.whole is not None:
                one.whole.data = torch.empty(one.whole.shape, dtype=one.whole.dtype, device=one.whole.device)
                one.whole.grad = torch.empty_like(one.whole)
                for rank in one.givers:
                    received[rank] += [_part(one.whole, one.places[rank]), _part(one.whole.grad, one.places[rank])]
        _exchange(sent, received, _local(matrices[0].parameter))

    def _give_back(self, matrices: list[_Matrix]) -> None:
        """The new weights, to every rank that has a part of them."""
        sent: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        received: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for one in matrices:
            received[one.owner].append(_local(one.parameter))
            if one.whole is not None:
                for rank, place in enumerate(one.places):
                    sent[rank].append(_part(one.whole, place))
        _exchange(sent, received, _local(matrices[0].parameter))


def _matrix(parameter: nn.Parameter, owner: int, mine: bool, places: list[Place]) -> _Matrix:
    sizes = {place: math.prod(size for _, size in place) for place in places}
    givers = [rank for rank, place in enumerate(places) if sizes[place] and places.index(place) == rank]
    assert sum(sizes[places[rank]] for rank in givers) == parameter.numel(), "parts make up the whole"
    whole = nn.Parameter(_without_memory(parameter)) if mine else None
    return _Matrix(parameter, owner, whole, places, givers)


def _places(parameters: list[nn.Parameter]) -> list[list[Place]]:
    """Where the parts of each parameter lie, by rank. Asked for, and not worked out from placements: whatever these
    are, and over whatever mesh."""
    mine: list[Place] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            (chunk,) = parameter.__create_chunk_list__()
            mine.append(tuple(zip(chunk.offsets, chunk.sizes, strict=True)))
        else:
            mine.append(tuple((0, size) for size in parameter.shape))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [list(by_rank) for by_rank in zip(*everyone, strict=True)]


def _rounds(matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
    """As many at a time as owners may take in, all of one type."""
    for dtype in dict.fromkeys(one.parameter.dtype for one in matrices):
        left = [one for one in matrices if one.parameter.dtype == dtype]
        while left:
            taken: Counter[int] = Counter()
            now: list[_Matrix] = []
            later: list[_Matrix] = []
            for one in left:
                first = not taken[one.owner]
                taken[one.owner] += one.bytes
                (now if first or taken[one.owner] <= ROUND else later).append(one)
            yield now
            left = later


def _exchange(sent: list[list[Tensor]], received: list[list[Tensor]], like: Tensor) -> None:
    """An all-to-all of tensors by rank, copied to where they go, in the order in which they are sent."""
    out = torch.cat([like.new_empty(0), *(one.reshape(-1) for to in sent for one in to)])
    targets = [one for source in received for one in source]
    sizes = [sum(one.numel() for one in source) for source in received]
    arrived = out.new_empty(sum(sizes))
    dist.all_to_all_single(arrived, out, sizes, [sum(one.numel() for one in to) for to in sent])
    start = 0
    for target in targets:
        target.copy_(arrived[start : start + target.numel()].view(target.shape))
        start += target.numel()


def _part(whole: Tensor, place: Place) -> Tensor:
    return whole.detach()[tuple(slice(first, first + size) for first, size in place)]


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _without_memory(like: Tensor) -> Tensor:
    """A tensor of the whole shape that takes none."""
    return _local(like).new_zeros(()).expand(like.shape)
