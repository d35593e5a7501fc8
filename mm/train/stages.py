"""Stages: the parts of a run, each with its own data, freezing, schedule and length. A plain run is one stage.

A stage starts from the weights that the one before ended with, read from its last checkpoint, so that going from stage
to stage and resuming are the same thing. Where it keeps the optimizer, moments are read from there too.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.data.config import Split
from mm.data.features import ROLES, medium_of, require_any
from mm.data.layout import Layout
from mm.data.loader import PackedLoader
from mm.data.packed import PackedDataset
from mm.data.prepare import open_splits, skipped
from mm.errors import CheckpointError, ConfigError
from mm.models import released
from mm.models.system import System
from mm.settings import merge
from mm.train import checkpoint
from mm.train.config import LoraRule, Run, StageSettings, TrainConfig
from mm.train.distributed import World
from mm.train.lora import apply_lora, merge_lora, merged
from mm.train.schedules import DecayConfig, spans


@dataclass(slots=True)
class Stage:
    """One stage with its data opened."""

    number: int
    name: str
    """Empty in a run that has no stages."""
    config: Run
    convert: str | None
    carry_on: bool
    layout: Layout
    splits: dict[Split, PackedDataset]
    loader: PackedLoader
    first: int
    """Packs of the sequence that the stages before take, where it carries on."""
    steps: int
    """No more than the packs of a finite mixture are for."""
    packs_per_epoch: float
    other_data: int = 0
    """Steps of it that another run took on other data, where it branched off to data of its own."""
    keep_optimizer: bool = False
    schedule_first: int = 0
    """The step of its schedule that it begins with: not 0 where it counts on."""
    schedule_steps: int = 0
    """Of all stages that share the schedule."""

    @property
    def rows(self) -> int:
        """Packs in a step."""
        return self.loader.rows

    @property
    def behind(self) -> int:
        """Packs of the sequence that it and the stages before take."""
        return self.first + (self.steps - self.other_data) * self.rows


def open_stages(
    config: Run,
    world: World,
    pin_memory: bool,
    progress: Callable[[str, int], None],
    anew: tuple[int, int] = (0, 0),
) -> list[Stage]:
    """Check, pack and open the data of all stages.

    anew: the stage, and how many steps of it, that a branch has behind it when its data begin.
    """
    found: list[Stage] = []
    settings: list[StageSettings | None] = [*config.stages] or [None]
    for run, stage in zip(config.stage_runs(), settings, strict=True):
        found.append(_open(run, stage, found, world, pin_memory, progress, anew))
    counts_on = [stage is not None and stage.counts_on for stage in settings]
    over = spans(counts_on, [stage.steps for stage in found])
    for one, (first, steps) in zip(found, over, strict=True):
        one.schedule_first, one.schedule_steps = first, steps
        for key, text in one.config.train.schedule.problems(steps):
            raise ConfigError(f"train.schedule.{key}: {text}")
    return found


def _open(
    config: Run,
    settings: StageSettings | None,
    before: list[Stage],
    world: World,
    pin_memory: bool,
    progress: Callable[[str, int], None],
    anew: tuple[int, int],
) -> Stage:
    if not getattr(config.model, "trains", True):
        raise ConfigError(f"model.kind {config.model.kind} packs and loads data; it has nothing to train")
    data, train = config.data, config.train
    skip = skipped(data)
    layout: Layout = config.model.layout()
    if data.features:
        medium_of(layout)
    splits = open_splits(data, layout, config.seed, progress)
    for dataset in splits.values():
        dataset.drop(skip)
        for role in ROLES:
            if getattr(data, role.name):
                require_any(dataset, role)
    if config.evaluation.every and "validation" not in splits:
        raise ConfigError(f"evaluation.every: {data.packed} has no validation split; set evaluation.every=0")
    if train.best and not config.evaluation.every:
        raise ConfigError("train.best: nothing is evaluated; set evaluation.every")
    _check_named(config, list(splits["train"].about["ledger"]))
    loader = PackedLoader(
        splits["train"],
        layout,
        rows=train.batch_tokens // data.context_length,
        micro_batch=train.micro_batch,
        seed=config.seed,
        mixture=data.mixture,
        rank=world.rank,
        ranks=world.ranks,
        isolate_segments=data.isolate_segments,
        workers=data.workers,
        quarantine=data.max_bad_fraction > 0,
        decoder=data.decoder,
        pin_memory=pin_memory,
        together=_together(config),
        by_modality=_by_modality(config, layout),
    )
    packs = len(splits["train"]) / int(splits["train"].about["settings"]["visits"])
    name, convert, carry_on = (settings.name, settings.convert, settings.carry_on) if settings else ("", None, False)
    first = 0
    if carry_on:
        _check_carries_on(name, before, config, splits["train"])
        first = before[-1].behind
    over, other = len(before) < anew[0], anew[1] if len(before) == anew[0] else 0
    steps = count_steps(train, None if over else loader.mixture.total(), loader.rows, packs, first, other)
    kept = settings is not None and settings.keep_optimizer
    other = steps if over else other
    return Stage(len(before), name, config, convert, carry_on, layout, splits, loader, first, steps, packs, other, kept)


def _together(config: Run) -> int:
    """Rows that experts choose from together."""
    routing = getattr(config.model, "routing", None)
    return (routing and routing.routing_rows) or 1


def _by_modality(config: Run, layout: Layout) -> bool:
    """Whether a row's work is that of its text and picture tokens: experts of each, or codes in place of a tower."""
    experts = getattr(config.model, "experts", None)
    return (experts is not None and len(experts.groups) > 1) or (config.data.codes and layout.image is not None)


def _check_named(config: Run, sources: list[str]) -> None:
    """Raise `ConfigError` where settings of the model name a source that is not there: what they want of it would be
    over nothing, and nothing else would say so."""
    missing = [name for name in getattr(config.model, "named_sources", ()) if name not in sources]
    if missing:
        raise ConfigError(
            f"model: {', '.join(missing)} is not among the sources of the training set, which are {', '.join(sources)}"
        )


def _check_carries_on(name: str, before: list[Stage], config: Run, train: PackedDataset) -> None:
    """Raise `ConfigError` where a stage's sequence of packs is not that of the stage before it."""
    if not before:
        raise ConfigError(f"stages: {name}.carry_on: there is no stage before whose data it could go on with")
    last = before[-1]
    sets = [one.about["provenance"]["fingerprint"] for one in (last.splits["train"], train)]
    if sets[0] != sets[1]:
        raise ConfigError(
            f"stages: {name}.carry_on: its data are another packed set ({train.folder}) than those of {last.name} "
            f"({last.splits['train'].folder}); give both the same settings of data and layout, or set carry_on=false"
        )
    if last.config.data.mixture != config.data.mixture:
        raise ConfigError(
            f"stages: {name}.carry_on: its data.mixture is another than that of {last.name}; mix by a schedule above "
            "the stages, whose steps count on, or set carry_on=false"
        )


def count_steps(
    train: TrainConfig, total: int | None, rows: int, packs_per_epoch: float, first: int = 0, other_data: int = 0
) -> int:
    """As set, or so many epochs, and no more than there are packs for (`total`, of a finite mixture) from `first` on.
    Of these steps `other_data` take no packs; epochs begin behind them.

    Raises `ConfigError`.
    """
    # Rounded first: 1.1 epochs of 10 packs are 11.000000000000002.
    steps = train.max_steps or other_data + math.ceil(round((train.epochs or 1) * packs_per_epoch / rows, 9))
    if total is None or steps <= (most := other_data + math.ceil(max(0, total - first) / rows)):
        return steps
    if train.max_steps or most == other_data:
        wanted = f"max_steps {steps}" if train.max_steps else f"epochs {train.epochs or 1:g}"
        before = f", {first:,} of them in stages before" if first else ""
        raise ConfigError(
            f"train.{wanted} takes {(steps - other_data) * rows:,} packs, data.mixture ends after {total:,}{before}: "
            f"set at most {most} steps, or raise mixture.max_epochs"
        )
    return most


def settings_of(state: dict[str, Any]) -> dict[str, Any]:
    """The `train` section of the stage that a checkpoint with this state is of."""
    saved = state["config"]
    own = saved["stages"][state["progress"]["stage"]]["train"] if saved["stages"] else {}
    return merge(saved["train"], own)


def check_rates(stages: list[Stage], state: dict[str, Any]) -> None:
    """Raise `ConfigError` where the rate would jump behind a checkpoint with this state: a stage that is over has
    another length now, or the last step would have had another rate. A decay over all steps may be stretched."""
    progress = state["progress"]
    stage, rest = stages[progress["stage"]], stages[progress["stage"] + 1 :]
    now = (stage.schedule_first, stage.schedule_steps)
    was = tuple(state["schedule"])
    cut = bool(rest) and rest[0].schedule_first > 0 and progress["stage_step"] > stage.steps
    if was[0] != now[0] or cut:
        raise ConfigError(
            f"train.max_steps (or epochs) of a stage up to {stage.name}: is another than when it ended, and the "
            "schedule goes on from there; set it as it was, or train.branch to an older checkpoint, in a run of its own"
        )
    schedule = stage.config.train.schedule
    before = type(schedule).model_validate(settings_of(state)["schedule"])
    taken = now[0] + progress["stage_step"]
    rates = before.factor(taken - 1, was[1]), schedule.factor(taken - 1, now[1])
    if rates[0] != rates[1] and not isinstance(schedule, DecayConfig):
        raise ConfigError(
            f"train.schedule: would change the rate of step {taken - 1}, and {taken} have been taken; let it fall at "
            f"{taken} or later (train.max_steps, train.schedule.anneal), or set train.branch to an older checkpoint, "
            "in a run of its own"
        )


def trained_system(config: Run, folder: Path, ema: bool = True) -> System:
    """The model of a checkpoint, on the CPU and whole, with adapters merged; `config` is that of its stage.

    `ema`: with the averaged weights, where the run keeps them.
    """
    system = config.model.build(weights=False)
    apply_lora(system, config.train.lora)
    checkpoint.load(folder, {f"model.{name}": t.detach() for name, t in checkpoint.model_tensors(system).items()})
    if ema and config.train.ema:
        averages = {f"ema.{name}": p.detach() for name, p in system.named_parameters()}
        saved = checkpoint.described(folder)
        checkpoint.load(folder, {name: tensor for name, tensor in averages.items() if name in saved})
    if config.train.lora:
        merge_lora(system)
    return system


def take_over(system: System, tensors: dict[str, Tensor], convert: str | None, where: str) -> list[str]:
    """Load tensors of another model into this one, by name; returns what was not taken over, for people to read.

    Position embeddings of vision towers are resampled when their number differs. Raises `CheckpointError` for any
    other difference in shape, and `ConfigError` when `convert` cannot be imported.
    """
    tensors = system.adopt(tensors) if convert is None else _function(convert)(tensors, system)
    own = checkpoint.model_tensors(system)
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != tensor.shape:
            found = _resampled(system, name, found, tensor, where)
        taken[name] = found
    if not taken:
        raise CheckpointError(
            f"{where}: none of its tensors has the name of one of this model's: {next(iter(tensors), 'nothing')} "
            f"there, {next(iter(own))} here; a stage's `convert` can rename them"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    return [
        *(f"{name} begins as random values: not in {where}" for name in own if name not in taken),
        *(f"{name} of {where} has no place in this model" for name in tensors if name not in own),
    ]


def by_part(left: Sequence[str]) -> list[str]:
    """What `take_over` returns, in a line for each part of a model."""
    parts: dict[tuple[str, str], list[str]] = {}
    for line in left:
        name, _, what = line.partition(" ")
        parts.setdefault((name.partition(".")[0], what), []).append(name)
    return [
        f"{some[0]} {what}" + (f", and so for {len(some) - 1} more of {part}" if len(some) > 1 else "")
        for (part, what), some in parts.items()
    ]


def _resampled(system: nn.Module, name: str, old: Tensor, new: Tensor, where: str) -> Tensor:
    # timm [1, T, D], open_clip [T, D]
    if name.endswith(("pos_embed", "positional_embedding")) and old.shape[-1] == new.shape[-1]:
        from timm.layers import resample_abs_pos_embed

        for prefix in range(min(6, old.shape[-2], new.shape[-2])):  # a class token, up to four registers
            side, before = math.isqrt(new.shape[-2] - prefix), math.isqrt(old.shape[-2] - prefix)
            if side**2 + prefix == new.shape[-2] and before**2 + prefix == old.shape[-2]:
                grid = old.view(1, *old.shape[-2:])
                return resample_abs_pos_embed(grid, [side, side], [before, before], prefix).view(new.shape)
    raise CheckpointError(
        f"{where}: {name} is {list(old.shape)}, this model's {list(new.shape)}; a stage's `convert` can change it"
    )


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"stages.convert {path!r} cannot be imported ({error}); expected package.module:function"
        ) from None


def initial_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights that `train.init_from` names, of a run (its adapters merged), a checkpoint or a release, and where
    they were found.

    Raises `CheckpointError`.
    """
    if (release := released.find(path)) is not None:
        return released.tensors_of(release), str(path)
    folder = checkpoint.find(path.expanduser())
    rules = settings_of(checkpoint.read_state(folder)).get("lora", [])
    return merged(model_tensors_of(folder), [LoraRule.model_validate(rule) for rule in rules]), str(folder)


def model_tensors_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of any model, whole, on the CPU."""
    saved = checkpoint.open_reader(folder).tensors
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in saved.items()
        if name.startswith("model.")
    }
    checkpoint.load(folder, tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
