"""DeepSpeed ZeRO behind the interface of the other engines: optimizer state (1), gradients (2), weights (3) in parts.

DeepSpeed reduces, partitions and gathers; torch's own optimizer, handed to it, computes, so that numbers are torch's.
What it keeps to itself is reached where it lies: each rank's part of a parameter's gradient, weights and moments is a
slice of a flat tensor. So the norm is known before the update, a step can be left out, and a checkpoint holds whole
tensors by name, as every other engine's does.
"""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from mm.data.batch import PackedBatch
from mm.errors import ConfigError
from mm.models.system import Output, System
from mm.train.checkpoint import model_tensors
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.engines.config import BUCKET, REFUSED, DeepSpeedConfig
from mm.train.engines.single import Groups, SingleEngine, T, part_of, scale_down

OWNED = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch",
    "managed_gradient_accumulation": "train.batch_tokens and train.micro_batch",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.precision (fp32 or bf16; there is no fp16)",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
    "gradient_allreduce_op": "the trainer, which sums gradients",
    "gradient_predivide_factor": "the trainer, which sums gradients",
    "prescale_gradients": "the trainer, which sums gradients",
    "zero_optimization.stage": "train.engine.stage",
    "zero_optimization.offload_optimizer.device": "train.engine.offload_optimizer",
    "zero_optimization.compute_grad_norm": "train.engine.stage",
    "zero_optimization.memory_efficient_linear": "train.activation_checkpointing",
}
"""Keys of DeepSpeed's config that may not be set in `raw`, and what sets them."""

ABSENT = ("tensor_parallel", "expert_parallel", "pipeline", "sequence_parallel_size", "data_parallel_size")
"""Keys of parallelism that there is not: ranks differ in their data only."""

ELEMENTWISE = (torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam)
"""Optimizers (and their subclasses, such as AdamW) that treat numbers one by one: ZeRO hands them flat tensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, and how this rank takes part in reading and writing it."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The whole tensor; every rank has to call this."""
    write: Callable[[Tensor], None]
    """Take over this rank's part, or all, of a whole tensor."""


class DeepSpeedEngine(SingleEngine):
    """See the module. A parameter that gets no gradient has one of zeros: unlike torch, it is decayed all the same."""

    kind = "deepspeed"
    group = True

    def __init__(self, world: World, train: TrainConfig) -> None:
        super().__init__(world, train)
        self.config: DeepSpeedConfig = train.engine
        self.stage = int(self.config.stage)
        if reason := REFUSED.get(train.optimizer.kind):
            raise ConfigError(f"train.optimizer.kind {train.optimizer.kind} under deepspeed: it {reason}")
        if self.config.offload_optimizer and self.stage == 0:
            raise ConfigError(
                "train.engine.offload_optimizer needs stage 1, 2 or 3: at stage 0 DeepSpeed keeps the optimizer's "
                "state beside the weights"
            )
        self._settings(1)

    def prepare(self, system: System, groups: Callable[[System], Groups], micro_batches: int) -> None:
        deepspeed = _load(self.device)
        self.system = system.to(self.device)
        self.optimizer = self.train.optimizer.build(groups(self.system))
        if not isinstance(self.optimizer, ELEMENTWISE):
            raise ConfigError(
                f"train.optimizer.kind {self.train.optimizer.kind}: under deepspeed optimizers see flat pieces of "
                "parameters, and this one is none of torch's that go by element; use adamw, or train.engine.kind fsdp"
            )
        # DeepSpeed puts flat tensors in the place of the groups' parameters.
        self._names = super()._trained()
        os.environ.setdefault("LOCAL_RANK", str(self.world.local_rank))
        # DeepSpeed finds tensors in dicts and not in an Output: its hooks, all of them between these two, see a dict.
        self._inside = False
        system.register_forward_hook(lambda module, args, output: _opened(output))
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=system, optimizer=self.optimizer, config=self._settings(micro_batches)
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"train.engine: DeepSpeed refuses its config: {_in_one_line(error)}") from None
        system.register_forward_hook(lambda module, args, output: output if self._inside else Output(**output))
        self._zero: Any = self.deepspeed.optimizer
        """DeepSpeed's optimizer around torch's; torch's own at stage 0."""

    def _settings(self, micro_batches: int) -> dict[str, Any]:
        """DeepSpeed's config: ours, and `raw` over it. Raises `ConfigError`."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        elif self.stage in (1, 2):
            zero["compute_grad_norm"] = False  # `clip` has
        if self.train.activation_checkpointing.mode == "selective":
            # DeepSpeed's linear layer adds its bias in place, to the very product that is kept: wrong gradients.
            zero["memory_efficient_linear"] = False
        generated = {
            "train_micro_batch_size_per_gpu": self.train.micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": 0.0,
            # Stage 3 can only average; `backward` makes that a sum.
            "gradient_allreduce_op": "mean" if self.stage == 3 else "sum",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # torch's AdamW has a kernel for the CPU too; DeepSpeed's own needs a compiler.
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.train.precision == "bf16":
            # No module's gradients are reduced in bfloat16 unless `raw` names its class.
            generated["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        for key in _keys(self.config.raw):
            if key in OWNED:
                raise ConfigError(f"train.engine.raw: {key} is set by {OWNED[key]}; remove it here")
            if key in ABSENT:
                raise ConfigError(f"train.engine.raw: {key}: there is data parallelism only; remove it")
        return _merged(generated, self.config.raw)

    def forward(self, batch: PackedBatch) -> Output:
        self._inside = True
        try:
            return Output(**self.deepspeed(batch))
        finally:
            self._inside = False

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        # At stage 3, what DeepSpeed's own forward does: weights that a module uses outside of its forward, such as the
        # positions of timm's towers, are gathered when they are asked for.
        found: list[Any] = [module._parameters for module in self.system.modules()] if self.stage == 3 else []
        tables = [table for table in found if hasattr(table, "_in_forward")]  # a module that came later has none
        for table in tables:
            table._in_forward = True
        try:
            return super().call(function, *args, **kwargs)
        finally:
            for table in tables:
                table._in_forward = False

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.world.ranks if self.stage == 3 else loss, scale_wrt_gas=False)

    def clip(self, limit: float | None) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().clip(limit)
        if self.config.offload_optimizer and self.stage < 3:
            self._zero._wait_for_offload_copies()
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in self._names:
            some = parts.setdefault(part_of(name), [])
            if (grad := self._own_gradient(parameter)) is not None:
                some.append(grad)
        squares = torch.stack([_squares(some, self.device) for some in parts.values()])
        return scale_down(parts, self.world.sum_tensor(squares), limit)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return self._names

    def _own_gradient(self, parameter: Any) -> Tensor | None:
        """This rank's part of a gradient, summed over ranks; None where it has no part. Not a copy."""
        if self.stage == 3:
            return self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0]
        fragment = parameter._hp_mapping
        return None if fragment is None else fragment.get_lp_grad_fragment(parameter._index_in_param_group)

    def update(self) -> None:
        self.deepspeed.step()
        self._clear()

    def discard(self) -> None:
        """What DeepSpeed does at an overflow, without its counting of them."""
        if self.stage == 0:
            self.deepspeed.zero_grad()
        elif self.stage == 3:
            self._zero._pre_step()
            self._zero._partition_all_parameters()
            self._zero._overflow_clean_up(1.0)
        else:
            self._zero.zero_grad(set_to_none=True)
            self._zero.micro_step_id = -1
            if self.config.offload_optimizer:
                self._zero.reset_cpu_buffers()
                self._zero._offload_accumulated_param_ids = set()
            else:
                for number in range(len(self._zero.bit16_groups)):
                    self._zero.averaged_gradients[number] = self._zero.all_grad_tensors[number] = None
        self._clear()

    def _clear(self) -> None:
        """Zero the buffers that DeepSpeed keeps between steps and only overwrites where there is a new gradient."""
        if self.stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        if self.config.offload_optimizer:
            for _, flat in self._flats():
                flat.grad.zero_()
            for kept in getattr(self._zero, "accumulated_grads_in_cpu", {}).values():
                kept.zero_()

    def _flats(self) -> list[tuple[list[nn.Parameter], Any]]:
        """What the optimizer updates, each with the parameters that it holds parts of."""
        if self.stage == 0:
            return [([parameter], parameter) for _, parameter in self._names]
        if self.stage == 3:
            return list(zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True))
        return list(zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True))

    def _place(self, parameter: Any) -> tuple[int, int, int]:
        """Where this rank's part of a parameter is: first number in the flat tensor, first in the parameter, count."""
        if self.stage == 0:
            return 0, 0, parameter.numel()
        if self.stage == 3:
            _, start, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = self.world.rank * count
            return start, first, max(0, min(count, parameter.ds_numel - first))
        fragment = parameter._hp_mapping
        if fragment is None:
            return 0, 0, 0
        own, whole = fragment.hp_fragment_address, fragment.lp_fragment_address
        return own.start, whole.start, own.numel

    def tensors(self) -> dict[str, Tensor]:
        """Each of the tensors on one rank, in host memory, evenly by size; every rank has to call this."""
        kept: dict[str, Tensor] = {}
        for name, owner, stored in self._owned(self._stored()):
            whole = stored.read()
            if owner == self.world.rank:
                kept[name] = whole.detach().cpu()
        return kept

    def tensors_to_load(self, saved: set[str]) -> dict[str, Tensor]:
        """Of the tensors that are in the checkpoint, those that this rank reads for all."""
        names = {name for name in saved if name.startswith("optimizer.")}
        if names:
            self._zero_state()
        self._loading = {k: v for k, v in self._stored().items() if k in names or not k.startswith("optimizer.")}
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype)
            for name, owner, stored in self._owned(self._loading)
            if owner == self.world.rank
        }

    @torch.no_grad()
    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Hand on what each rank read, one tensor at a time; every rank has to call this."""
        if self.stage == 3:
            self._zero._partition_all_parameters()
        for name, owner, stored in self._owned(self._loading):
            if owner == self.world.rank:
                whole = tensors[name].to(self.device)
            else:
                whole = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
            dist.broadcast(whole, owner)
            stored.write(whole)

    def _owned(self, stored: dict[str, Stored]) -> Iterator[tuple[str, int, Stored]]:
        """Each tensor with its rank: the one that has least so far."""
        loads = [0] * self.world.ranks
        for name, one in stored.items():
            owner = loads.index(min(loads))
            loads[owner] += one.shape.numel() * one.dtype.itemsize
            yield name, owner, one

    def _stored(self) -> dict[str, Stored]:
        """All that a checkpoint holds of the system and the optimizer, in the same order on every rank."""
        flat_of = {id(parameter): flat for parameters, flat in self._flats() for parameter in parameters}
        stored: dict[str, Stored] = {}
        for name, tensor in model_tensors(self.system).items():
            stored[f"model.{name}"] = self._stored_weight(tensor, flat_of.get(id(tensor)))
        for name, parameter in self._names:
            flat = flat_of[id(parameter)]
            for key, value in self._state(flat).items():
                stored[f"optimizer.{name}.{key}"] = self._stored_state(parameter, flat, value)
        return stored

    def _stored_weight(self, tensor: Any, flat: Tensor | None) -> Stored:
        if self.stage < 3 or not hasattr(tensor, "ds_tensor"):

            def write(whole: Tensor) -> None:
                tensor.copy_(whole)
                if flat is not None and self.stage > 0:
                    self._write_part(flat, self._place(tensor), whole)

            return Stored(tensor.shape, tensor.dtype, lambda: tensor, write)
        part: Tensor = tensor.ds_tensor
        first = self.world.rank * part.numel()
        place = (0, first, max(0, min(part.numel(), tensor.ds_numel - first)))
        shape: torch.Size = tensor.ds_shape

        def write_parts(whole: Tensor) -> None:
            self._write_part(part, place, whole)
            if flat is not None:  # the same memory, unless offloaded
                self._write_part(flat, self._place(tensor), whole)

        return Stored(shape, tensor.dtype, lambda: self._whole(part, place, shape), write_parts)

    def _stored_state(self, parameter: nn.Parameter, flat: Tensor, value: Tensor) -> Stored:
        if value.ndim == 0 and flat.ndim > 0:
            # A count of steps, of all parameters of the flat tensor: they have all had as many.
            def write(whole: Tensor) -> None:
                value.copy_(value.maximum(whole))

            return Stored(value.shape, value.dtype, value.clone, write)
        place = self._place(parameter)
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return Stored(
            shape,
            value.dtype,
            lambda: self._whole(value, place, shape),
            lambda whole: self._write_part(value, place, whole),
        )

    def _whole(self, flat: Tensor, place: tuple[int, int, int], shape: torch.Size) -> Tensor:
        """A tensor put together from the parts of all ranks, on the device."""
        if self.stage == 0:
            return flat
        start, first, count = place
        whole = torch.zeros(math.prod(shape), dtype=flat.dtype, device=self.device)
        whole[first : first + count] = flat.detach().view(-1)[start : start + count]
        return self.world.sum_tensor(whole).view(shape)

    @staticmethod
    def _write_part(flat: Tensor, place: tuple[int, int, int], whole: Tensor) -> None:
        start, first, count = place
        flat.detach().view(-1)[start : start + count] = whole.view(-1)[first : first + count].to(flat.device)

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        return {key: value for key, value in self.optimizer.state.get(flat, {}).items() if isinstance(value, Tensor)}

    def _zero_state(self) -> None:
        """Optimizer state of zeros, made by a step with a rate of 0 where there is none yet."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["weight_decay"], group["params"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"], group["params"] = 0.0, 0.0, []
        for _, flat in self._flats():
            if not self._state(flat):
                grad, flat.grad = flat.grad, torch.zeros_like(flat)
                groups[0]["params"] = [flat]
                self.optimizer.step()
                flat.grad = grad
            for value in self._state(flat).values():
                value.zero_()
        for group, (lr, decay, parameters) in zip(groups, before, strict=True):
            group["lr"], group["weight_decay"], group["params"] = lr, decay, parameters

    def close(self) -> None:
        """Let go of DeepSpeed; the system is of no more use. Another engine can then follow in this process."""
        self.deepspeed.destroy()
        _reset(importlib.import_module("deepspeed"))


def _load(device: torch.device) -> Any:
    """DeepSpeed for a device, without its chatter, and as if for the first time in this process."""
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is CUDA's compiler and no GPU
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed.[a-z_]*` is deprecated", category=FutureWarning)
    # Else DeepSpeed compiles a collective of its own for CPUs, for minutes, which nothing in training calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _reset(deepspeed)
    return deepspeed


def _reset(deepspeed: Any) -> None:
    """Forget process groups and undo what DeepSpeed has changed in torch and in its own modules."""
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._release_process_group_references()
    zero = deepspeed.runtime.zero
    zero.parameter_offload.FWD_MODULE_STACK.clear()
    # Modules and parameters are numbered through the life of a process, and ranks compare the numbers.
    zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)
    zero.partition_parameters.Init.param_id = 0
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    original = getattr(zero.partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, computed as in one process; of no tensors, 0."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=dtype) if tensors else [torch.zeros((), dtype=dtype)]
    return torch.stack(list(norms)).square().sum().to(device)


def _opened(output: Output) -> dict[str, Any]:
    return {field.name: getattr(output, field.name) for field in fields(output)}


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(under[key], over[key]) for key in under.keys() & over.keys() if _dicts(under[key], over[key])}
    return {**under, **over, **both}


def _dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _in_one_line(error: ValueError | AssertionError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
