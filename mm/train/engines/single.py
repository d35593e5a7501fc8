"""One process: the plain case, and what the other engines are variations of."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mm.data.batch import PackedBatch
from mm.errors import ConfigError
from mm.models.system import Output, System
from mm.train.checkpoint import create_optimizer_state, model_tensors, optimizer_tensors
from mm.train.config import TrainConfig
from mm.train.distributed import World, resolve_device

Groups = list[dict[str, Any]]
T = TypeVar("T")
AUXILIARY = "auxiliary_routers"
"""The part of gradients that the model does without."""


class SingleEngine:
    """Holds the system and its optimizer, and does to them what a step asks for, in this order:

        prepare -> (forward, backward) per micro-batch -> clip -> update or discard

    Losses given to `backward` are divided by the counts of the whole step, over all ranks: gradients are summed.
    """

    kind = "single"
    group = False
    """Needs a process group even in one process."""

    system: System
    optimizer: torch.optim.Optimizer

    def __init__(self, world: World, train: TrainConfig) -> None:
        self.world, self.train = world, train
        self.device = resolve_device(train.device, world.local_rank)
        if world.ranks > 1 and self.kind == "single":
            raise ConfigError(
                f"train.engine.kind single is for one process, there are {world.ranks}; set fsdp or deepspeed"
            )

    def prepare(self, system: System, groups: Callable[[System], Groups], micro_batches: int) -> None:
        """Take over a system on the CPU. `groups` makes the optimizer's parameter groups once tensors are in place."""
        self.system = self.shard(system)
        self.optimizer = self.train.optimizer.build(groups(self.system))

    def shard(self, system: System) -> System:
        """Bring weights and buffers to where they stay."""
        return system.to(self.device)

    def autocast(self) -> Any:
        """The context that forward passes run in."""
        if self.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def forward(self, batch: PackedBatch) -> Output:
        with self.autocast():
            return self.system(batch)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function that uses parts of the system from outside its `forward`; every rank has to."""
        with self.autocast():
            return self.system.within(function, *args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients. `last`: this is the step's last micro-batch."""
        loss.backward()

    def clip(self, limit: float | None) -> dict[str, Tensor]:
        """Scale gradients to a global norm of at most `limit`; returns the norms before, by part, and `total`.

        No number is read back from the device. Parts are those of `part_of`; auxiliary routers have a norm of their
        own, so that the model does not notice them.
        """
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in self._trained():
            if parameter.grad is not None:
                parts.setdefault(part_of(name), []).append(_local(parameter.grad))
        # A CPU adds up float32 one by one, which is off by 1e-5 for large matrices.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        norms = [torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)) for grads in parts.values()]
        squares = self.sum_shards(torch.stack([norm.square().sum() for norm in norms]).to(self.device))
        return scale_down(parts, squares, limit)

    def sum_shards(self, values: Tensor) -> Tensor:
        """Sums over the ranks that hold one copy of the weights between them."""
        return values

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def update(self) -> None:
        """One optimizer step from the gradients, which are then gone."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Throw the gradients away."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """`model.NAME` and `optimizer.NAME.MOMENT`, for a checkpoint; sharded ones as they are."""
        return {
            **{f"model.{name}": tensor.detach() for name, tensor in model_tensors(self.system).items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()},
        }

    def tensors_to_load(self, saved: set[str]) -> dict[str, Tensor]:
        """The same, with optimizer state made for the parameters that have some in the checkpoint."""
        names = {name.removeprefix("optimizer.").rpartition(".")[0] for name in saved if name.startswith("optimizer.")}
        create_optimizer_state(self.optimizer, names)
        return self.tensors()

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors_to_load` gave has been filled."""

    def close(self) -> None:
        """Let go of what outlives the system, so that another engine can follow in this process."""

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that is in parts, on every rank."""
        return _whole(tensor)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part_of(name: str) -> str:
    """What a parameter's gradient counts to in the norms by part: the system's child that it is in (`vision`,
    `language`, …), `routers`, those of all layers, or `auxiliary_routers`."""
    if re.fullmatch(r"(.*\.)?sparsity\..*", name):
        return AUXILIARY
    return "routers" if re.fullmatch(r"(.*\.)?(router|depth_router)\..*", name) else name.partition(".")[0]


def scale_down(parts: dict[str, list[Tensor]], squares: Tensor, limit: float | None) -> dict[str, Tensor]:
    """Scale the gradients of parts, whose squared norms are [parts], to a norm of at most `limit` together.

    Auxiliary routers are scaled by themselves, and do not count to the `total` where there is anything else.
    """
    norms = dict(zip(parts, squares.sqrt(), strict=True))
    others = [square for name, square in zip(parts, squares, strict=True) if name != AUXILIARY]
    total = torch.stack(others).sum().sqrt() if others else norms[AUXILIARY]
    for name, grads in parts.items():
        if limit is not None and grads:
            norm = norms[name] if name == AUXILIARY else total
            torch._foreach_mul_(grads, torch.clamp(limit / (norm + 1e-6), max=1.0).to(grads[0]))
    return {**norms, "total": total}
