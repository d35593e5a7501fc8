"""torch FSDP2: weights, gradients and optimizer state in parts, whole only around the block that needs them.

Applied from outside, by name: a model file knows nothing of it. Reductions sum, because losses are already divided by
the counts of the whole step. The blocks and units are gathered one by one; the rest (embeddings and head of a language
model, tied or not) is one outermost unit that stays gathered through a step.

With `expert_parallel` the experts of a layer are on several ranks and are not gathered over these: they are in parts
over the other ranks only, as a second group of the layer's unit. Whatever the mesh, a parameter is a DTensor of its
whole shape, so norms, averages and checkpoints need not know.
"""

import re
import warnings
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from mm.errors import ConfigError
from mm.models.experts import ExpertGroup
from mm.models.system import System
from mm.train.blocks import find_blocks
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.engines.config import FSDPConfig
from mm.train.engines.expert_parallel import ExpertParallel
from mm.train.engines.single import SingleEngine

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FSDPEngine(SingleEngine):
    """See the module; `shard_size` chooses between full and hybrid sharding."""

    kind = "fsdp"
    group = True

    def __init__(self, world: World, train: TrainConfig) -> None:
        super().__init__(world, train)
        self.config: FSDPConfig = train.engine
        self.copies = self.config.copies(world.ranks)
        self.size = world.ranks // self.copies

    def shard(self, system: System) -> System:
        """Unit by unit, so that no device ever holds the whole."""
        self.mesh = self._mesh(shard=self.size)
        placements = self._place_experts(system)
        named = [(name, module) for name, module in system.named_modules() if name]
        units = self._units([name for name, _ in named]) | set(find_blocks(system, self.train.blocks))
        self._check_precision(units)
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.config.cpu_offload else OffloadPolicy()
        )
        # Innermost first: a unit takes the parameters that no unit inside it has.
        for name, module in reversed(named):
            if name in units:
                fully_shard(
                    module,
                    mesh=self.mesh,
                    reshard_after_forward=self.config.reshard_after_forward,
                    shard_placement_fn=placements.get,
                    mp_policy=self._precision(name, self.train.precision),
                    offload_policy=offload,
                )
        # The outermost unit stays in float32: its embeddings are the residual stream, as without sharding.
        fully_shard(
            system,
            mesh=self.mesh,
            reshard_after_forward=False,
            shard_placement_fn=placements.get,
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

    def _mesh(self, **sizes: int) -> DeviceMesh:
        """All ranks along named axes, `replicate` among them where there are several copies of the weights."""
        if self.copies > 1:
            sizes = {"replicate": self.copies, **sizes}
        return init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def _place_experts(self, system: System) -> "dict[nn.Parameter, Shard | ShardPlacementResult]":
        """Divide experts over ranks where they are to be, and say how the weights of all are put in parts: along which
        axis, and over which ranks if not over all. Other weights are along their first axis."""
        groups = {name: one for name, one in system.named_modules() if isinstance(one, ExpertGroup)}
        over = self.config.expert_parallel
        divided = {name for name, group in groups.items() if over > 1 and group.router is not None}
        if over > 1 and not divided:
            raise ConfigError("train.engine.expert_parallel: the model has no group of several experts; leave it out")
        if divided:
            # torch 2.11, which is enough for everything else, has no units over two meshes.
            from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
            from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info

            mesh = self._mesh(part=self.size // over, expert=over)
            held = mesh["part"] if self.copies == 1 else mesh["replicate", "part"]
            parts = cast(FSDPMeshInfo, _get_mesh_info(held))
            parallel = ExpertParallel(mesh["expert"])
        placements: dict[nn.Parameter, Shard | ShardPlacementResult] = {}
        for name, group in groups.items():
            if name in divided:
                parallel.divide(group, name)
            for key, weight in group.named_parameters(recurse=False):
                # Along the first axis few experts would be padded to as many as there are ranks. FSDP pads no other.
                axes, ranks = ((1, 2), self.size // over) if name in divided else ((0, 1, 2), self.size)
                axis = next((axis for axis in axes if weight.shape[axis] % ranks == 0), 0)
                if name not in divided:
                    placements[weight] = Shard(axis)
                elif axis:
                    placements[weight] = ShardPlacementResult(Shard(axis), parts)
                else:
                    raise ConfigError(
                        f"train.engine: {name}.{key} is {list(weight.shape)}: neither axis behind the first divides "
                        f"over the {ranks} ranks that share an expert; set another expert_parallel or shard_size"
                    )
        return placements

    def _precision(self, name: str, default: str) -> MixedPrecisionPolicy:
        for rule in self.config.precision:
            if re.fullmatch(rule.match, name):
                default = rule.weights
        # Activations are autocast's business, in every engine alike.
        return MixedPrecisionPolicy(DTYPES[default], reduce_dtype=torch.float32, cast_forward_inputs=False)

    def _units(self, names: list[str]) -> set[str]:
        """Those of `train.engine.units`. Raises `ConfigError` for a pattern that matches nothing; the default may."""
        found = {pattern: {name for name in names if re.fullmatch(pattern, name)} for pattern in self.config.units}
        default = FSDPConfig.model_fields["units"].default
        if self.config.units != default and (nothing := [one for one, some in found.items() if not some]):
            raise ConfigError(f"train.engine.units: {nothing[0]!r} matches no module")
        return set().union(*found.values())

    def _check_precision(self, units: set[str]) -> None:
        for rule in self.config.precision:
            if not any(re.fullmatch(rule.match, name) for name in ("", *units)):
                raise ConfigError(
                    f"train.engine.precision: {rule.match!r} matches nothing that is gathered as one: the blocks of "
                    "train.blocks, what train.engine.units names, and '' for all the rest"
                )

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.copies > 1:
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
        # Over all ranks at once, so that all have the same bits to decide by, whatever copy they are of.
        dist.all_reduce(values)
        return values if self.copies == 1 else values / self.copies
