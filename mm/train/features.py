"""Frozen networks that need not run in training: what they say is computed ahead, and training reads it.

`encode` is `mm data encode`: it runs the tower, or the teacher, of each stage over the splits that the stage reads.
`Aside` is what remains of a tower in a run on its features: out of the system, on the CPU, never run in training. It is
held against the fingerprint of the features before the first step, and goes into every checkpoint, which is therefore
as whole as another run's. A teacher is no part of the system, and nothing remains of it: `attach_codes` holds it
against the fingerprint of its codes.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm.data.batch import MediaBatch
from mm.data.config import Split
from mm.data.features import (
    CODES,
    FEATURES,
    MOST_CODES,
    NAMES,
    Encode,
    Encoding,
    Role,
    describe,
    digest_tensors,
    find,
    medium_of,
    require_same_each_time,
)
from mm.data.layout import FeatureShape, Layout
from mm.data.media import Decoder
from mm.data.packed import PackedDataset
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.system import GenerativeSystem, System, Tower
from mm.models.teachers import Teacher
from mm.models.teachers.config import teacher_of
from mm.train import checkpoint
from mm.train.config import ParamRule, Run
from mm.train.distributed import resolve_device
from mm.train.stages import initial_tensors, take_over


class Teller(Protocol):
    """Who is told how encoding goes."""

    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...


@dataclass(slots=True)
class Aside:
    """A frozen tower that was taken out of its system."""

    medium: str
    tower: Tower
    module: nn.Module

    @classmethod
    def take(cls, system: System, medium: str) -> "Aside":
        """Raises `ConfigError` where the tower is trained, or there is none."""
        tower = tower_of(system, medium)
        module = getattr(system, tower.name)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                raise _is_trained(tower.name, name)
        setattr(system, tower.name, nn.Module())
        return cls(medium, tower, module.eval())

    def tensors(self) -> dict[str, Tensor]:
        """`model.NAME` of a checkpoint, on the CPU, to be saved or to be loaded into."""
        found = checkpoint.model_tensors(self.module)
        return {f"model.{self.tower.name}.{name}": tensor.detach() for name, tensor in found.items()}

    def attach(self, splits: dict[Split, PackedDataset], layout: Layout, run: Run) -> None:
        """Let splits be read with the features of this tower. Raises `DataError` where a split has none."""
        settings = _of_tower(self.tower, run)
        _attach(splits, layout, run, FEATURES, self.medium, settings, digest(self.module))

    @contextlib.contextmanager
    def back_in(self, system: System, device: torch.device) -> Iterator[None]:
        """The system takes raw media inside; every rank has to come."""
        placeholder = getattr(system, self.tower.name)
        setattr(system, self.tower.name, self.module.to(device))
        try:
            yield
        finally:
            setattr(system, self.tower.name, placeholder)
            self.module.to("cpu")


def attach_codes(splits: dict[Split, PackedDataset], layout: Layout, run: Run) -> None:
    """Let splits be read with the codes of the run's teacher.

    Raises `ConfigError` where it has none that fits, and `DataError` where a split has no codes of it.
    """
    teacher = _teacher(run, layout)
    settings, weights = _of_teacher(teacher)
    _attach(splits, layout, run, CODES, teacher.medium, settings, weights)


def _attach(
    splits: dict[Split, PackedDataset], layout: Layout, run: Run, role: Role, medium: str, settings: dict[str, Any],
    weights: str,
) -> None:  # fmt: skip
    for split, dataset in splits.items():
        origin = describe(layout, medium, _decoder(run, split), settings, weights)
        dataset.read_beside(find(dataset, role, origin))


@dataclass(frozen=True, slots=True)
class _Network:
    """A tower or a teacher that is to be run over media; see `describe` for `settings` and `weights`."""

    role: Role
    medium: str
    shape: FeatureShape
    settings: dict[str, Any]
    weights: str
    encode: Encode


def encode(
    config: Run,
    splits: list[Split],
    device: str | None,
    slice: tuple[int, int],
    teller: Teller,
) -> dict[str, dict[str, Any]]:
    """Compute what the stages of a run with `data.features` or `data.codes` read, where it is not there yet.

    Args:
        splits: only these; empty: all that there are.
        device: in place of `train.device`.
        slice: (i, n): every n-th packed shard, from the i-th on.

    Returns:
        By folder: `role`, `split`, `finished` (False while other slices have work left), `items`, `bytes`, and
        `unreadable` (items, once it is finished).

    Raises:
        ConfigError: no stage reads features or codes, a tower is trained, or there is no teacher.
        DataError: the disk has no room.
    """
    wanted = [run for run in config.stage_runs() if run.data.features or run.data.codes]
    if not wanted:
        raise ConfigError(
            "data.features and data.codes are false, so nothing would read what is computed; set data.features=true, "
            "or data.codes=true where there is a teacher"
        )
    for run in wanted:
        if not getattr(run.model, "trains", True):
            raise ConfigError(f"model.kind {run.model.kind} packs and loads data; it has no tower or teacher to run")
        if run.data.features:
            medium_of(run.model.layout())  # before anything is built
    found: dict[str, dict[str, Any]] = {}
    for run, network in chain(_teachers(config, device), _towers(config, device)):
        layout: Layout = run.model.layout()
        opened = open_splits(run.data, layout, run.seed, teller.packing)
        if missing := [split for split in splits if split not in opened]:
            raise ConfigError(f"--split {missing[0]}: the run has {', '.join(opened)}")
        on = resolve_device(device or run.train.device, 0)
        about = {"device": on.type, "versions": checkpoint.versions()}
        for split, dataset in opened.items():
            if splits and split not in splits:
                continue
            job = Encoding(
                dataset,
                layout,
                network.role,
                describe(layout, network.medium, _decoder(run, split), network.settings, network.weights),
                network.shape.width,
                network.encode,
                about,
                run.data.workers,
                teller.packing,
                network.shape.rows,
            )
            teller.event(_announced(split, job))
            finished = job.run(slice)
            found[str(job.folder)] = {
                "role": job.role.name, "split": split, "finished": finished, "items": job.items, "bytes": job.size,
                "unreadable": job.unreadable() if finished else None,
            }  # fmt: skip
    return found


def _announced(split: str, job: Encoding) -> str:
    what = job.role.name
    each = f"{job.size / max(1, job.items):,.0f} bytes" if job.items else "nothing"
    text = f"{split}: {job.items:,} {NAMES[job.medium]}, {each} of {what} each, {job.size:,} in all"
    return f"{text}, all there" if job.finished() else f"{text}, {job.missing():,} to be written: {job.folder}"


def _teachers(config: Run, device: str | None) -> Iterator[tuple[Run, _Network]]:
    """Every stage that reads codes, with its teacher."""
    for run in config.stage_runs():
        if run.data.codes:
            layout = run.model.layout()
            teacher = _teacher(run, layout)
            settings, weights = _of_teacher(teacher)
            coded = _coder(teacher, layout, resolve_device(device or run.train.device, 0))
            yield run, _Network(CODES, teacher.medium, FeatureShape(len(teacher.sizes)), settings, weights, coded)


def _teacher(run: Run, layout: Layout) -> Teacher:
    """The teacher that a run names. Raises `ConfigError` where it cannot be that of such media."""
    teacher: Teacher = teacher_of(run.model).build()
    require_same_each_time(layout, teacher.medium, CODES)
    teacher.check(layout)
    if max(teacher.sizes) > MOST_CODES:
        raise ConfigError(f"data.codes: {max(teacher.sizes):,} codes of a codebook; at most {MOST_CODES:,} are stored")
    return teacher


def _of_teacher(teacher: Teacher) -> tuple[dict[str, Any], str]:
    """Settings and digest."""
    settings = teacher.describe()
    return settings, settings.pop("weights")


def _coder(teacher: Teacher, layout: Layout, device: torch.device) -> Encode:
    def coded(media: MediaBatch) -> Tensor:
        return teacher.codes(media.to(device).items(), media.length.tolist(), layout).cpu()

    return coded


def _towers(config: Run, device: str | None) -> Iterator[tuple[Run, _Network]]:
    """Every stage that reads features, with its tower as the stage begins with it."""
    if not any(run.data.features for run in config.stage_runs()):
        return
    for run, system in _initial_systems(config):
        if run.data.features:
            medium = medium_of(run.model.layout())
            tower = tower_of(system, medium)
            weights = digest(getattr(system, tower.name))
            encoded = _encoder(system, medium, resolve_device(device or run.train.device, 0), run.train.precision)
            yield run, _Network(FEATURES, medium, tower.shape, _of_tower(tower, run), weights, encoded)


def _initial_systems(config: Run) -> Iterator[tuple[Run, System]]:
    """Every stage with its model as it starts, as far as frozen towers go.

    Raises `ConfigError` where a stage before, or the stage itself, trains a tower whose features are to be read.
    """
    before: System | None = None
    names = [(stage.name, stage.convert) for stage in config.stages] or [("", None)]
    trained: dict[str, str] = {}
    for run, (_, convert) in zip(config.stage_runs(), names, strict=True):
        train = run.train
        start = train.branch or train.init_from
        torch.manual_seed(run.seed)  # as the trainer does: a tower of random weights is that of the run
        system: System = run.model.build(before is None and start is None)
        if before is not None:
            take_over(system, checkpoint.model_tensors(before), convert, "the stage before")
        elif start is not None:
            tensors, where = initial_tensors(start)
            take_over(system, tensors, convert, where)
        for tower in getattr(system, "media_towers", {}).values():
            for name, _ in getattr(system, tower.name).named_parameters():
                if not _frozen(f"{tower.name}.{name}", train.params):
                    trained.setdefault(tower.name, name)
        if run.data.features:
            name = tower_of(system, medium_of(run.model.layout())).name
            if name in trained:
                raise _is_trained(name, trained[name])
        yield run, system
        before = system


def _frozen(name: str, rules: list[ParamRule]) -> bool:
    found = [rule.freeze for rule in rules if rule.freeze is not None and re.fullmatch(rule.match, name)]
    return bool(found and found[-1])


def _is_trained(name: str, parameter: str) -> ConfigError:
    return ConfigError(
        f"data.features: {name} is trained ({name}.{parameter}), so its features would be out of date after a step; "
        f'freeze it with train.params=[{{match: "{name}.*", freeze: true}}], or set data.features=false'
    )


def tower_of(system: System, medium: str) -> Tower:
    """The tower of a medium. Raises `ConfigError` where there is none."""
    towers = system.media_towers if isinstance(system, GenerativeSystem) else {}
    if medium not in towers:
        raise ConfigError(f"data.features: the model has no tower for {medium}s whose features could be read")
    return towers[medium]


def _of_tower(tower: Tower, run: Run) -> dict[str, Any]:
    return {**tower.settings, "precision": run.train.precision}


def _decoder(run: Run, split: Split) -> Decoder:
    return run.data.decoder if split == "train" else "exact"  # as evaluation always is


def _encoder(system: System, medium: str, device: torch.device, precision: str) -> Encode:
    assert isinstance(system, GenerativeSystem)
    getattr(system, system.media_towers[medium].name).eval().to(device)

    @torch.no_grad()
    def encoded(media: MediaBatch) -> Tensor:
        bf16 = precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return system.features(medium, media.to(device)).to(torch.bfloat16).cpu()

    return encoded


def digest(tower: nn.Module) -> str:
    """Of all weights and buffers of a module, to the last bit."""
    return digest_tensors(checkpoint.model_tensors(tower))
