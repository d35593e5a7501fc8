"""Frozen towers that need not run: their features are computed ahead, and training reads those.

`encode` is `mm data encode`: it runs the tower of each stage over the splits that the stage reads. `Aside` is what
remains of the tower in a run on features: out of the system, on the CPU, never run in training. It is held against the
fingerprint of the features before the first step, and goes into every checkpoint, which is therefore as whole as
another run's.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm.data.batch import MediaBatch
from mm.data.config import Split
from mm.data.features import Encode, Encoding, describe, find, medium_of
from mm.data.layout import Layout
from mm.data.media import Decoder
from mm.data.packed import PackedDataset
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.system import GenerativeSystem, System, Tower
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
        weights = digest(self.module)
        for split, dataset in splits.items():
            dataset.read_features(find(dataset, _described(run, split, layout, self.medium, self.tower, weights)))

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


def encode(
    config: Run,
    splits: list[Split],
    device: str | None,
    slice: tuple[int, int],
    teller: Teller,
) -> dict[str, dict[str, Any]]:
    """Compute the features that the stages of a run with `data.features` read, where they are not there yet.

    Args:
        splits: only these; empty: all that there are.
        device: in place of `train.device`.
        slice: (i, n): every n-th packed shard, from the i-th on.

    Returns:
        By folder: `finished` (False while other slices have work left), `items`, `bytes`.

    Raises:
        ConfigError: no stage reads features, or a tower is trained.
        DataError: the disk has no room.
    """
    wanted = [run for run in config.stage_runs() if run.data.features]
    if not wanted:
        raise ConfigError("data.features is false, so nothing would read features; set data.features=true")
    for run in wanted:
        if not getattr(run.model, "trains", True):
            raise ConfigError(f"model.kind {run.model.kind} packs and loads data; it has no tower to run")
        medium_of(run.model.layout())  # before anything is built
    found: dict[str, dict[str, Any]] = {}
    for run, system in _initial_systems(config):
        if not run.data.features:
            continue
        layout: Layout = run.model.layout()
        medium = medium_of(layout)
        tower = tower_of(system, medium)
        opened = open_splits(run.data, layout, run.seed, teller.packing)
        if missing := [split for split in splits if split not in opened]:
            raise ConfigError(f"--split {missing[0]}: the run has {', '.join(opened)}")
        weights = digest(getattr(system, tower.name))
        on = resolve_device(device or run.train.device, 0)
        about = {"device": on.type, "versions": checkpoint.versions()}
        for split, dataset in opened.items():
            if splits and split not in splits:
                continue
            job = Encoding(
                dataset,
                layout,
                _described(run, split, layout, medium, tower, weights),
                tower.width,
                _encoder(system, medium, on, run.train.precision),
                about,
                run.data.workers,
                teller.packing,
            )
            teller.event(_announced(split, job))
            finished = job.run(slice)
            found[str(job.folder)] = {"split": split, "finished": finished, "items": job.items, "bytes": job.size}
    return found


def _announced(split: str, job: Encoding) -> str:
    each = f"{job.size / max(1, job.items):,.0f} bytes" if job.items else "nothing"
    text = f"{split}: {job.items:,} {job.medium}s, {each} of features each, {job.size:,} in all"
    return f"{text}, all there" if job.finished() else f"{text}, {job.missing():,} to be written: {job.folder}"


def _initial_systems(config: Run) -> Iterator[tuple[Run, System]]:
    """Every stage with its model as it starts, as far as frozen towers go.

    Raises `ConfigError` where a stage before, or the stage itself, trains a tower whose features are to be read.
    """
    before: System | None = None
    names = [(stage.name, stage.convert) for stage in config.stages] or [("", None)]
    trained: dict[str, str] = {}
    for run, (_, convert) in zip(config.stage_runs(), names, strict=True):
        train = run.train
        torch.manual_seed(run.seed)  # as the trainer does: a tower of random weights is that of the run
        system: System = run.model.build(before is None and train.init_from is None)
        if before is not None:
            take_over(system, checkpoint.model_tensors(before), convert, "the stage before")
        elif train.init_from is not None:
            tensors, where = initial_tensors(train.init_from)
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


def _described(run: Run, split: Split, layout: Layout, medium: str, tower: Tower, weights: str) -> dict[str, Any]:
    decoder: Decoder = run.data.decoder if split == "train" else "exact"  # as evaluation always is
    return describe(layout, medium, decoder, {**tower.settings, "precision": run.train.precision}, weights)


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
    found = hashlib.sha256()
    for name, tensor in sorted(checkpoint.model_tensors(tower).items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
