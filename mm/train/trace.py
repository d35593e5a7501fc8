"""One training step without its numbers: how many FLOPs it takes, and how many bytes of tensors live at its peak.

The real model, loss, backward pass and optimizer run on fake tensors, which have shape and type but no memory. Integers
stay real: they decide shapes by their values (which positions bear loss, how long segments are, which ones a router
chooses), and they are small. So a model of any size is traced in seconds on any machine, and a new system needs no
formula of its own.
"""

import contextlib
import copy
import math
import weakref
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mm.data.batch import MediaBatch, PackedBatch
from mm.models.system import PooledSystem, System
from mm.train.config import TrainConfig
from mm.train.flops import register
from mm.train.params import parameter_groups

aten = torch.ops.aten
KINDS = ("weights", "gradients", "optimizer", "casts", "activations")
ORDERS = (aten.sort.default, aten.sort.stable, aten.topk.default)
"""Operators that give values and where they stood."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a step of one micro-batch takes on one device.

    flops: by phase: `forward`, `backward`, `recompute`; and of an `update`, such as products of whole matrices.
    peak: bytes by kind when their sum is largest. `casts`: copies of weights in another precision; `activations`: all
        that is not kept between steps, the batch included.
    busiest: bytes by kind when those of activations are most.
    gradients: bytes of all gradients, once they are there.
    """

    flops: dict[str, int]
    peak: dict[str, int]
    busiest: dict[str, int]
    gradients: int

    def moments(self, accumulates: bool) -> list[dict[str, int]]:
        """When memory may be at its peak. `accumulates`: gradients of micro-batches before are there all the time."""
        if accumulates:
            return [{**self.busiest, "gradients": self.gradients}]
        return [self.peak, self.busiest]


def trace_step(system: System, batch: PackedBatch, train: TrainConfig, several: bool = False) -> Trace:
    """Run one micro-batch and the update.

    Args:
        system: on the meta device, adapted, frozen and checkpointed as it will be; it is left as it is.
        batch: on the CPU, its media's values and features on the meta device.
        several: it is one of several micro-batches of a step, so that a `PooledSystem` runs it twice.
    """
    register()
    mode, live, flops = FakeTensorMode(allow_non_fake_inputs=True), _Live(), _Flops()
    system = _without_memory(system, mode).train()
    with mode, _Hybrid(), live, flops:
        for module in (system, *system.teachers):
            for tensor in (*module.parameters(), *module.buffers()):
                live.note(tensor, "weights")
        optimizer = train.optimizer.build(parameter_groups(system, train.params, 0.0))
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda one: live.note(one.grad, "gradients"))
        live.restart()
        batch = _on_device(batch)
        loss = _loss(system, batch, train.precision, several, flops)
        flops.phase = "backward"
        loss.backward()
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        peak, busiest = live.peak, live.busiest
        # The first update makes the optimizer's state, which is there from then on; the second is like all others.
        flops.phase = "update"
        optimizer.step()
        for tensor in tree_leaves(list(optimizer.state.values())):
            if isinstance(tensor, Tensor):
                live.note(tensor, "optimizer")
        kept = {"optimizer": live.now["optimizer"]}
        live.restart()
        flops.counts["update"] = 0
        optimizer.step()
    peak = max({**peak, **kept}, live.peak, key=lambda moment: sum(moment.values()))
    return Trace(flops.counts, peak, {**busiest, **kept}, live.now["gradients"])


def _loss(system: System, batch: PackedBatch, precision: str, several: bool, flops: "_Flops") -> Tensor:
    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            return system(batch)

    losses: dict[str, Tensor] = {}
    if isinstance(system, PooledSystem) and several:
        flops.phase = "recompute"
        with torch.no_grad():  # for the features of the whole step, before gradients are known
            forward()
        flops.phase = "forward"
    output = forward()
    if isinstance(system, PooledSystem):
        losses = system.pooled_losses(output.features)
    return torch.stack([system.weights[name] * one for name, one in {**output.losses, **losses}.items()]).sum()


def _without_memory(system: System, mode: FakeTensorMode) -> System:
    """A copy with fake tensors on the CPU in place of those on the meta device; tied ones stay tied, and numbers that a
    system keeps as integers, off that device, stay real."""
    _ = system.teachers  # read, so that they are copied too
    system = copy.deepcopy(system)
    made: dict[int, Tensor] = {}
    with mode:
        for module in (one for whole in (system, *system.teachers) for one in whole.modules()):
            for tensors in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers)):
                for name, tensor in tensors.items():
                    if tensor is None or not (tensor.is_meta or tensor.is_floating_point()):
                        continue
                    if id(tensor) not in made:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    tensors[name] = made[id(tensor)]
    return system


def _on_device(batch: PackedBatch) -> PackedBatch:
    """The batch with fake media, which count as being there."""

    def there(media: MediaBatch) -> MediaBatch:
        def like(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

        features = None if media.features is None else like(media.features)
        return replace(media, values=like(media.values), features=features)

    return replace(batch, media={kind: there(media) for kind, media in batch.media.items()})


class _Hybrid(TorchDispatchMode):
    """Above a FakeTensorMode: operators on real tensors alone run for real, and so do factories of integers. Where fake
    numbers are put in order, an order is made up."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with no_dispatch():
                return func(*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [part for index in args[1] for part in _as_numbers(index)], *args[2:])
        out = func(*args, **kwargs)
        if not tensors and isinstance(out, Tensor) and not out.is_floating_point():
            with no_dispatch():
                return func(*args, **kwargs)
        if func in ORDERS:
            given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
            dim = given.get("dim", -1)
            return out[0], _spread(out[1].shape, dim, args[0].shape[dim])
        return out


def _spread(shape: torch.Size, dim: int, size: int) -> Tensor:
    """An order of `size` values without numbers, int64 of this shape: wherever it is cut off along `dim`, what stands
    before the cut is spread evenly over all there is, in steps of the golden section."""
    step = next(n for n in count(max(1, round(size * (math.sqrt(5) - 1) / 2))) if math.gcd(n, size) <= 1)
    along = [1] * len(shape)
    along[dim] = -1
    with no_dispatch():
        order = torch.arange(shape[dim]) * step % max(size, 1)
        return order.view(along).expand(shape).clone()


def _as_numbers(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the numbers of its true places, so that the shape of what it picks is known."""
    if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
        return (index,)
    with no_dispatch():
        return index.nonzero(as_tuple=True)


class _Live(TorchDispatchMode):
    """Keeps count of the bytes of storages that are alive, by kind.

    `peak`: when their sum was largest; `busiest`: when those of activations were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(KINDS, 0)
        self.restart()
        self._known: dict[int, tuple[str, int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        kind = "casts" if func is aten._to_copy.default and self.kind(args[0]) == "weights" else "activations"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.kind(tensor) is None:
                self.note(tensor, kind)
        return out

    def restart(self) -> None:
        """Forget peaks before now."""
        self.peak, self.busiest = dict(self.now), dict(self.now)

    def kind(self, tensor: Tensor) -> str | None:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[0] if known else None

    def note(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as this kind until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        self._known[key] = (kind, storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))
        self.now[kind] += storage.nbytes()
        if self.now["activations"] > self.busiest["activations"]:
            self.busiest = dict(self.now)
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _forget(self, key: int) -> None:
        if known := self._known.pop(key, None):
            self.now[known[0]] -= known[1]


class _Flops(TorchDispatchMode):
    """Counts FLOPs by phase. In a backward pass only recomputation has gradients enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("forward", "backward", "recompute", "update"), 0)
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                if (whole := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return whole
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            recomputed = self.phase == "backward" and torch.is_grad_enabled()
            self.counts["recompute" if recomputed else self.phase] += formula(*args, **kwargs, out_val=out)
        return out
