"""torch FSDP2: weights, gradients and optimizer state in parts, whole only around the block that needs them.

Applied from outside, by name: a model file knows nothing of it. Reductions sum, because losses are already divided by
the counts of the whole step. The blocks and units are gathered one by one; the rest (embeddings and head of a language
model, tied or not) is one outermost unit that stays gathered through a step.
"""

import re
import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mm.errors import ConfigError
from mm.models.system import System
from mm.train.blocks import find_blocks
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.engines.config import FSDPConfig
from mm.train.engines.single import SingleEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FSDPEngine(SingleEngine):
    """See the module; `shard_size` chooses between full and hybrid sharding."""

    kind = "fsdp"
    group = True

    def __init__(self, world: World, train: TrainConfig) -> None:
        super().__init__(world, train)
        self.config: FSDPConfig = train.engine
        size = self.config.shard_size or world.ranks
        if world.ranks % size:
            raise ConfigError(f"train.engine.shard_size {size} does not divide the {world.ranks} processes of the run")
        self.shape = (world.ranks // size, size)

    def shard(self, system: System) -> System:
        if self.shape[0] == 1:
            mesh = init_device_mesh(self.device.type, (self.shape[1],), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(self.device.type, self.shape, mesh_dim_names=("replicate", "shard"))
        self.mesh = mesh
        named = [(name, module) for name, module in system.named_modules() if name]
        self._check_patterns([name for name, _ in named])
        units = {name for name, _ in named if any(re.fullmatch(pattern, name) for pattern in self.config.units)}
        units |= set(find_blocks(system, self.train.blocks))
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.config.cpu_offload else OffloadPolicy()
        )
        # Innermost first: a unit takes the parameters that no unit inside it has.
        for name, module in reversed(named):
            if name in units:
                fully_shard(
                    module,
                    mesh=mesh,
                    reshard_after_forward=self.config.reshard_after_forward,
                    mp_policy=self._precision(name, self.train.precision),
                    offload_policy=offload,
                )
        # The outermost unit stays in float32: its embeddings are the residual stream, as without sharding.
        fully_shard(
            system,
            mesh=mesh,
            reshard_after_forward=False,
            mp_policy=self._precision("", "fp32"),
            offload_policy=offload,
        )
        for module in system.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(system, "within")
        # Towers return reshaped tensors, and nothing here changes one in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return system

    def _precision(self, name: str, default: str) -> MixedPrecisionPolicy:
        for rule in self.config.precision:
            if re.fullmatch(rule.match, name):
                default = rule.weights
        # Activations are autocast's business, in every engine alike.
        return MixedPrecisionPolicy(DTYPES[default], reduce_dtype=torch.float32, cast_forward_inputs=False)

    def _check_patterns(self, names: list[str]) -> None:
        for rule in self.config.precision:
            if not any(re.fullmatch(rule.match, name) for name in names):
                raise ConfigError(f"train.engine.precision: {rule.match!r} matches no module")

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.shape[0] > 1:
            # Copies are summed once a step; inside a copy every micro-batch is, so that whole gradients are never kept.
            self.system.set_requires_all_reduce(last)  # type: ignore[operator]
        loss.backward()

    def tensors(self) -> dict[str, Tensor]:
        # After an evaluation the outermost unit is still gathered, and its parameters are not the shards.
        for module in self.system.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().tensors()

    def sum_shards(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.mesh.get_group("shard"))
        return values
