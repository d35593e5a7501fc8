"""Expert parallelism: the experts of a group divided over ranks; tokens go to the rank of their expert and back.

Each rank chooses among its own tokens, as it would without; then an all-to-all takes them to where their expert is, and
another one brings back what it made of them (GShard, Lepikhin et al., 2006.16668). So no number of a step changes: an
expert works on the tokens of all ranks at once, and its gradient is the sum that it would have been.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mm.errors import ConfigError
from mm.models.experts import ExpertGroup, expert_ffn

Counts = list[list[int]]
"""Tokens for each expert, by rank."""


class ExpertParallel:
    """Runs groups whose weights are DTensors, `Shard(0)` over a mesh with one axis, in place of `expert_ffn`.

    Every rank of the mesh has to call it as often as the others, with tokens or without.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()

    def divide(self, group: ExpertGroup, name: str) -> None:
        """Give a group the experts of this rank, and let it run here. Raises `ConfigError` where they do not divide."""
        if group.experts % self.ranks:
            raise ConfigError(
                f"train.engine.expert_parallel {self.ranks} does not divide the {group.experts} experts of {name}"
            )
        for key, whole in [*group.named_parameters(recurse=False)]:
            own = distribute_tensor(whole.detach(), self.mesh, [Shard(0)], src_data_rank=None)
            setattr(group, key, nn.Parameter(own, requires_grad=whole.requires_grad))
        group.parallel = self

    def __call__(self, x: Tensor, counts: list[int], group: ExpertGroup, known: dict[str, Counts], name: str) -> Tensor:
        """What the experts, all of them, give of this rank's tokens.

        Args:
            x: [sum of counts, D], the tokens of the first expert first. counts: of each expert.
            known: the counts of all ranks by the group's `name`, where they have been asked for before: a batch asks
                once, since it sends as many tokens in every layer.

        Returns:
            [sum of counts, D].
        """
        if name not in known:
            known[name] = self._everyone(counts)
        each = len(counts) // self.ranks
        arriving = [one[self.rank * each :][:each] for one in known[name]]  # by rank and expert
        sent = [sum(counts[first : first + each]) for first in range(0, len(counts), each)]
        received = [sum(one) for one in arriving]
        if torch.is_autocast_enabled(x.device.type):  # as the products will have it, and half as much to send
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = _transposed(self._exchange(x, received, sent), arriving)
        by_expert = [list(own) for own in zip(*arriving, strict=True)]
        gate_up, down = (cast(DTensor, weight).to_local() for weight in (group.gate_up, group.down))
        given = expert_ffn(x, [sum(own) for own in by_expert], gate_up, down, group.act)
        return self._exchange(_transposed(given, by_expert), sent, received)

    def _everyone(self, counts: list[int]) -> Counts:
        """The counts of every rank. In host memory: the sizes of what is sent are needed there."""
        own = torch.tensor(counts)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own, group=self.group)
        return [one.tolist() for one in found]

    def _exchange(self, x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """Rows of x, so many for each rank, for the rows that each rank has for this one."""
        return wait_tensor(all_to_all_single_autograd(x.contiguous(), received, sent, self.group))


def _transposed(x: Tensor, sizes: list[list[int]]) -> Tensor:
    """Pieces along the first axis that lie row by row of `sizes`, put column by column."""
    pieces = x.split([size for row in sizes for size in row])
    width = len(sizes[0])
    return torch.cat([pieces[row * width + column] for column in range(width) for row in range(len(sizes))])
