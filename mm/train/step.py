"""One optimizer step: the same for every system, engine and number of ranks.

The counts of loss-bearing terms are summed over micro-batches and ranks before the first forward pass, and every sum of
losses is divided by that; gradients are summed. So 1 x 8, 2 x 4 and 8 x 1 rows, on any number of ranks, give the same
update. Numbers come back from the device once a step, just before the update, because the guard decides by them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from mm.data.batch import MODALITIES, PackedBatch, with_dummies
from mm.data.layout import Layout
from mm.data.sample import keyed_seed
from mm.errors import ConfigError
from mm.models.system import PooledSystem, System
from mm.train.distributed import World
from mm.train.engines.single import SingleEngine
from mm.train.guard import Guard, Verdict


@runtime_checkable
class ExtraPass(Protocol):
    """An optimizer that now and then needs gradients beside those of its updates: of the loss on labels that the model
    draws, or at other weights."""

    def check(self, engine: SingleEngine) -> None:
        """Raise `ConfigError` where it cannot have them. Asked before the first step."""
        ...

    def due(self, step: int) -> bool:
        """Whether it needs some after the update of this step; not asked where the guard skipped it."""
        ...

    def extra(self, passes: "Passes") -> None:
        """Ask for them. Every rank has to ask for the same; weights are to be afterwards what they were before."""
        ...

    def shares(self) -> dict[str, Tensor]:
        """To be logged, by name: numbers [2] of this rank's part of the weights, how many and of how many. Asked only
        after `extra`, in a step that is logged."""
        ...


@dataclass(frozen=True, slots=True)
class Passes:
    """Further gradients of a step's micro-batches. Each call throws away what is in `.grad`, and leaves there its own,
    summed over micro-batches and ranks. All calls draw the same dropout."""

    stepper: "Stepper"
    batches: list[PackedBatch]
    step: int

    @property
    def seed(self) -> int:
        return self.stepper.seed

    def first(self, share: float) -> "Passes":
        """Of the first micro-batches alone; at least one."""
        return replace(self, batches=self.batches[: max(1, math.ceil(round(share * len(self.batches), 9)))])

    def loss(self) -> None:
        """Of the loss, as for an update, with the weights as they are now."""
        self._begin()
        self.stepper._gradients(self.batches, self._totals(), self.step)

    def drawn(self) -> float:
        """Of the loss on labels that the model draws; returns n, by which grad^2 has to be multiplied to be in
        expectation the diagonal of the Gauss-Newton matrix of the loss.

        With one objective of weight 1 it is the gradient of the mean of n terms. With several each has the root of its
        factor in the loss, times the same number: labels are drawn term by term, so it is squares that add up.
        """
        self._begin()
        stepper, totals = self.stepper, self._totals().losses
        weights = {name: weight for name, weight in stepper.engine.system.weights.items() if weight}
        terms = sum(totals[name] for name in weights)
        if not terms:
            return 0.0
        factors = {name: math.sqrt(weight / max(totals[name], 1) / terms) for name, weight in weights.items()}
        system = stepper.engine.system
        for index, batch in enumerate(stepper._moved(self.batches)):
            keys = [keyed_seed(self.seed, "extra", self.step, ids) for ids in batch.ids]
            generators = [torch.Generator(stepper.device).manual_seed(key) for key in keys]
            losses = stepper.engine.call(system.drawn_losses, batch, generators)
            loss = torch.stack([factors[name] * losses[name] for name in weights]).sum()
            stepper.engine.backward(loss, index == len(self.batches) - 1)
        return terms

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients down to this norm; returns what it was, on the device."""
        return self.stepper.engine.clip(limit)["total"]

    def sum_shards(self, values: Tensor) -> Tensor:
        """Sums over the ranks that hold one copy of the weights between them, on the device."""
        return self.stepper.engine.sum_shards(values.to(self.stepper.device))

    def _begin(self) -> None:
        self.stepper.engine.discard()
        torch.manual_seed(keyed_seed(self.seed, "extra dropout", self.step, self.stepper.world.rank))

    def _totals(self) -> "Counted":
        system, world = self.stepper.engine.system, self.stepper.world
        return counted(system, world.sum(count(system, self.batches, [])), [])


@dataclass(slots=True)
class Counted:
    """Numbers of a step that are known before it runs, from batches in host memory; summed over ranks."""

    losses: dict[str, float]
    """N_k by objective."""
    modalities: dict[str, int]
    """Tokens by modality, without padding."""
    sources: dict[str, int]
    """Loss-bearing tokens by source."""
    positions: int
    """Padding included."""

    @property
    def tokens(self) -> int:
        return sum(self.modalities.values())


@dataclass(slots=True)
class Done:
    """What a step gave; the same on all ranks."""

    loss: float
    verdict: Verdict
    losses: dict[str, float] = field(default_factory=dict)
    """Means by objective, of those that have terms."""
    sources: dict[str, float] = field(default_factory=dict)
    """Mean loss of the first objective by source."""
    norms: dict[str, float] = field(default_factory=dict)
    """Of gradients before clipping, by part, and `total`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the system, means over the step; none of what has nothing in it."""


def count(system: System, batches: list[PackedBatch], sources: list[str]) -> list[float]:
    """What `counted` reads, of this rank: a flat list, so that one sum over ranks does for all of it."""
    by_objective = {name: 0.0 for name in system.weights}
    modalities = torch.zeros(len(MODALITIES), dtype=torch.int64)
    by_source = torch.zeros(len(sources), dtype=torch.int64)
    for batch in batches:
        for name, number in system.counts(batch).items():
            by_objective[name] += float(number)
        modalities += torch.bincount(batch.modality[batch.segment_ids > 0], minlength=len(MODALITIES))
        if len(sources) > 1:
            by_source.index_add_(0, _numbers(batch, sources), system.row_counts(batch))
    positions = sum(batch.input_ids.numel() for batch in batches)
    return [*by_objective.values(), *modalities.tolist(), *by_source.tolist(), positions]


def counted(system: System, values: list[float], sources: list[str]) -> Counted:
    """The sums over ranks of what `count` gave, by name."""
    left = iter(values)
    losses = {name: next(left) for name in system.weights}
    modalities = {kind: int(next(left)) for kind in MODALITIES}
    by_source = {name: int(next(left)) for name in sources}
    return Counted(losses, modalities, by_source, int(next(left)))


def _numbers(batch: PackedBatch, sources: list[str]) -> Tensor:
    """int64 [B]: the source of each row; packs are of one source, and a row of padding counts as the first's."""
    return torch.tensor([sources.index(name) if name else 0 for name in batch.sources])


class Stepper:
    """Runs steps on an engine. `sources` are the names that losses are told apart by."""

    def __init__(
        self, engine: SingleEngine, layout: Layout, guard: Guard, seed: int, clip_norm: float | None, sources: list[str]
    ) -> None:
        self.engine, self.layout, self.guard = engine, layout, guard
        self.seed, self.clip_norm, self.sources = seed, clip_norm, sources
        self.device, self.world = engine.device, engine.world
        # One for all steps: memory that was freed is used again on the stream that it was taken on alone.
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.extra = engine.optimizer if isinstance(engine.optimizer, ExtraPass) else None
        if self.extra is not None and engine.kind == "deepspeed":
            raise ConfigError("train.optimizer: one that takes extra passes needs train.engine.kind single or fsdp")
        if self.extra is not None:
            self.extra.check(engine)
        self._asked: ExtraPass | None = None
        """The optimizer, where it had extra passes in the last step."""

    def __call__(self, batches: list[PackedBatch], totals: Counted, step: int, lr: float) -> Done:
        """Step number `step`, from 0 on. The update is left out when the guard says so."""
        # What dropout draws is a function of (seed, step, rank): nothing has to be saved, and a resumed run goes on.
        torch.manual_seed(keyed_seed(self.seed, "dropout", step, self.world.rank))
        sums = self._gradients(batches, totals, step)
        norms = self.engine.clip(self.clip_norm)
        names, values = [*sums, *(("norm", part) for part in norms)], [*sums.values(), *norms.values()]
        found = dict(zip(names, torch.stack([value.float() for value in values]).tolist(), strict=True))
        done = self._read(found, totals)
        done.verdict = self.guard.judge(done.loss, done.norms.get("total"))
        self.engine.set_lr(lr)
        self._asked = None
        if done.verdict.accept:
            self.engine.update()
            if self.extra is not None and self.extra.due(step):
                self._asked = self.extra
                self.extra.extra(Passes(self, batches, step))
                self.engine.discard()
        else:
            self.engine.discard()
        return done

    def _gradients(self, batches: list[PackedBatch], totals: Counted, step: int) -> dict[tuple[str, str], Tensor]:
        """Run all micro-batches; returns sums over them and over ranks, on the device."""
        sums: dict[tuple[str, str], Tensor] = {}

        def add(kind: str, name: str, value: Tensor) -> None:
            key = (kind, name)
            sums[key] = sums[key] + value.detach() if key in sums else value.detach().clone()

        system, pooled = self.engine.system, None
        if isinstance(system, PooledSystem) and len(batches) > 1:
            pooled = self._pool(system, self._features(batches), totals)
        weights = system.weights
        for index, batch in enumerate(self._moved(batches)):
            self.world.at(step + 1, f"micro-batch {index + 1} of {len(batches)}")
            output = self.engine.forward(batch)
            if isinstance(system, PooledSystem) and pooled is None:
                features = {name: value.detach() for name, value in output.features.items()}
                pooled = self._pool(system, [features], totals)
            terms = [weights[name] * loss / max(totals.losses[name], 1) for name, loss in output.losses.items()]
            if pooled is not None:
                terms += [(output.features[name] * grad).sum() for name, grad in pooled.gradients[index].items()]
            self.engine.backward(torch.stack(terms).sum(), index == len(batches) - 1)
            for name, loss in output.losses.items():
                add("loss", name, loss)
            for name, value in output.metrics.items():
                number = output.metric_counts.get(name)
                if number is None:
                    number = output.counts[system.counted_by(name)]
                add("metric", name, value * number)
                add("weight", name, number.to(value))
            if len(self.sources) > 1 and output.rows:
                rows = next(iter(output.rows.values()))
                numbers = _numbers(batch, self.sources).to(rows.device, non_blocking=True)
                add("source", "", rows.new_zeros(len(self.sources)).index_add_(0, numbers, rows))
        flat = torch.cat([torch.zeros(0, device=self.device), *(value.reshape(-1).float() for value in sums.values())])
        parts = self.world.sum_tensor(flat).split([value.numel() for value in sums.values()])
        sums = {
            (kind, self.sources[i] if kind == "source" else name): part[i]
            for (kind, name), part in zip(sums, parts, strict=True)
            for i in range(len(part))
        }
        if pooled is not None:  # computed alike on every rank
            sums |= {("loss", name): loss for name, loss in pooled.losses.items()}
        return sums

    def _read(self, found: dict[tuple[str, str], float], totals: Counted) -> Done:
        def of(kind: str) -> dict[str, float]:
            return {name: value for (one, name), value in found.items() if one == kind}

        system = self.engine.system
        losses = {name: value / max(totals.losses[name], 1) for name, value in of("loss").items()}
        counts = of("weight")
        return Done(
            loss=sum(system.weights[name] * mean for name, mean in losses.items()),
            verdict=Verdict(True, ""),
            losses={name: mean for name, mean in losses.items() if totals.losses[name]},
            sources={name: v / totals.sources[name] for name, v in of("source").items() if totals.sources[name]},
            norms=of("norm"),
            metrics={name: value / counts[name] for name, value in of("metric").items() if counts[name]},
        )

    def shares(self) -> dict[str, float]:
        """What the optimizer has to say of its state, for a step that is logged: every rank has to ask.

        Nothing, and at no cost, but for a step that had extra passes: so a resumed run logs the same.
        """
        if self._asked is None:
            return {}
        numbers = {name: number.to(self.device) for name, number in self._asked.shares().items()}
        sums = {name: self.engine.sum_shards(number).tolist() for name, number in numbers.items()}
        return {name: some / whole for name, (some, whole) in sums.items() if whole}

    def _features(self, batches: list[PackedBatch]) -> list[dict[str, Tensor]]:
        """Of the items of each micro-batch, without a graph; they run again to hand gradients on."""
        before = _rng_state(self.device)
        with torch.no_grad():
            features = [self.engine.forward(batch).features for batch in self._moved(batches)]
        _set_rng_state(self.device, before)
        return features

    def _pool(self, system: PooledSystem, features: list[dict[str, Tensor]], totals: Counted) -> "_Pooled":
        """Gradients of objectives over all items of the step, of whatever micro-batch and rank (GradCache, 2101.06983).

        features: of this rank's micro-batches, which are gathered from all ranks.
        """
        items = [len(next(iter(one.values()))) for one in features]
        together = {name: torch.cat([one[name].float() for one in features]) for name in features[0]}
        everyone, by_rank = gather_items(self.world, together)
        for value in everyone.values():
            value.requires_grad_()
        # A rank works out what its own items contribute, whose gradients reach those of all ranks.
        first = sum(by_rank[: self.world.rank])
        own = slice(first, first + sum(items))
        losses = system.pooled_losses(everyone, own)
        weighted = [system.weights[name] * loss / max(totals.losses[name], 1) for name, loss in losses.items()]
        gradients = torch.autograd.grad(torch.stack(weighted).sum(), list(everyone.values()))
        split = [self.world.sum_tensor(grad)[own].split(items) for grad in gradients]
        by_batch = [{name: split[n][i] for n, name in enumerate(everyone)} for i in range(len(items))]
        return _Pooled(by_batch, {name: self.world.sum_tensor(loss.detach()) for name, loss in losses.items()})

    def _moved(self, batches: list[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches on the device, each copied while the one before it is at work."""
        # On several ranks every tower runs on each. On one, a tower without media in the whole step still gets a
        # gradient, of zero, so that its weights take the step (decay, momentum) that they take on several.
        met = {kind for batch in batches for kind in batch.media}
        if self.world.ranks > 1:
            batches = [with_dummies(batch, self.layout) for batch in batches]
        elif not met.issuperset(self.layout.media()):
            batches = [with_dummies(batches[0], self.layout), *batches[1:]]
        if self.device.type != "cuda":
            yield from (batch.to(self.device) for batch in batches)
            return
        ahead: tuple[PackedBatch, Any] | None = None
        for batch in [*batches, None]:
            ready = ahead
            if batch is not None:
                assert self.copies is not None
                with torch.cuda.stream(self.copies):
                    moved = batch.to(self.device, non_blocking=True)
                ahead = (moved, self.copies.record_event())
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready[1])
                ready[0].record_stream(torch.cuda.current_stream(self.device))
                yield ready[0]


def gather_items(world: World, items: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """Tensors with one entry an item, [n, …], of all ranks one behind the other; and how many items each rank gave."""
    sizes = world.gather(len(next(iter(items.values()))))
    if world.ranks == 1:
        return items, sizes
    gathered = {}
    for name, value in items.items():
        padded = torch.cat([value, value.new_zeros(max(sizes) - len(value), *value.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered[name] = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return gathered, sizes


@dataclass(slots=True)
class _Pooled:
    gradients: list[dict[str, Tensor]]
    losses: dict[str, Tensor]


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
