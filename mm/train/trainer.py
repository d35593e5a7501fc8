"""The loop: the same for every system, readable in one sitting.

A step takes the next R rows of the loader's endless sequence, R = batch_tokens / context_length. The counts of
loss-bearing terms are summed over the whole step before the first forward pass, and every micro-batch's sum of losses
is divided by that, so 1 x 8, 2 x 4 and 8 x 1 rows give the same update.

What a run writes: `config.yaml`, `run.json`, `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and at the
end `eval.json`, `samples.json` and `samples/`.
"""

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from mm.data.batch import MODALITIES, PackedBatch
from mm.data.config import Split
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import PackedDataset, read_ids
from mm.data.prepare import open_splits
from mm.errors import CheckpointError, ConfigError, DataError, MMError
from mm.models.attention import choose_implementation
from mm.models.system import GenerativeSystem, System
from mm.train import checkpoint, evaluate
from mm.train.config import Run
from mm.train.metrics import MetricsLog, read_metrics
from mm.train.params import parameter_groups

# What may differ between a run and its continuation. Everything else decides what the numbers are.
MAY_CHANGE = (
    "out", "data.workers", "data.cache", "data.remote_cache", "data.skip_ids", "train.max_steps", "train.epochs",
    "train.optimizer.lr", "train.micro_batch",
    "train.device", "train.log_every", "train.save_every", "train.keep", "evaluation",
)  # fmt: skip

# What a run that has not begun to train may have left in its folder.
RUN_FILES = {
    ".config.yaml", "config.yaml", ".data.json", "data.json", ".run.json", "run.json", "metrics.jsonl", "tensorboard",
    "checkpoints",
}  # fmt: skip


class Watcher(Protocol):
    """Who is told how the run goes; the command line shows a progress display."""

    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None: ...


class Interrupted(MMError):
    """Ctrl-C or SIGTERM: the run was saved and can be resumed."""


@dataclass(slots=True)
class Progress:
    """What a run has behind it; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    modalities: dict[str, int] = field(default_factory=dict)
    """Tokens by modality."""
    seconds: float = 0.0
    bad: list[tuple[str, str]] = field(default_factory=list)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def make_autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


class Trainer:
    """One run, in one process.

        Trainer(config, watcher).run(resume=True)

    Raises `MMError`s for what the user can put right, before anything is built wherever possible.
    """

    def __init__(self, config: Run, watcher: Watcher) -> None:
        self.config = config
        self.watcher = watcher
        self.out = Path(config.out)
        self.rows = config.train.batch_tokens // config.data.context_length
        self.progress = Progress()
        self._stop_signal: int | None = None

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train to the last step, evaluate, and return what `eval.json` holds.

        Raises `Interrupted` after Ctrl-C or SIGTERM, with everything saved.
        """
        if not getattr(self.config.model, "trains", True):
            raise ConfigError(f"model.kind {self.config.model.kind} packs and loads data; it has nothing to train")
        skip = read_ids(self.config.data.skip_ids.expanduser()) if self.config.data.skip_ids else frozenset[str]()
        newest = self._open_run_folder(resume)
        layout: Layout = self.config.model.layout()
        splits = open_splits(self.config.data, layout, self.config.seed, self.watcher.packing)
        for dataset in splits.values():
            dataset.drop(skip)
        self._write_json("data.json", {split: dataset.about for split, dataset in splits.items()})
        self._build(layout, splits, weights=newest is None)
        self._write_config()
        if newest is not None:
            self._restore(newest)
        self._write_json("run.json", self._description())
        with self._signals():
            if self.progress.step < self.steps:
                self._train()
            return self._finish()

    def _open_run_folder(self, resume: bool) -> Path | None:
        """Refuse a folder with another run in it; returns the newest checkpoint to go on from, if any.

        A run that never got to a logged step or a checkpoint is none: its folder is simply used again.
        """
        checkpoints = self.out / "checkpoints"
        found = checkpoint.complete(checkpoints)
        if found or read_metrics(self.out / "metrics.jsonl"):
            if not resume:
                raise ConfigError(
                    f"{self.out}: holds a run already; go on with --resume, or choose another with out=DIR"
                )
            self._check_same_run(yaml.safe_load((self.out / "config.yaml").read_text()))
        elif self.out.is_dir() and any(path.name not in RUN_FILES for path in self.out.iterdir()):
            raise ConfigError(f"{self.out}: is not empty and not a run; choose another folder with out=DIR")
        self.out.mkdir(parents=True, exist_ok=True)
        for left in checkpoints.glob(f".{checkpoint.PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        return found[-1] if found else None

    def _write_config(self) -> None:
        partial = self.out / ".config.yaml"
        partial.write_text(yaml.safe_dump(self.config.resolved(), sort_keys=False, allow_unicode=True))
        partial.replace(self.out / "config.yaml")

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        changed = [
            key
            for key in _differences(saved, self.config.resolved())
            if not any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)
        ]
        if changed:
            raise CheckpointError(
                f"{self.out}: cannot resume with another {', '.join(changed[:4])}; set it back as in "
                f"{self.out / 'config.yaml'}, or start a new run with out=DIR"
            )

    def _build(self, layout: Layout, splits: dict[Split, PackedDataset], weights: bool) -> None:
        config, train = self.config, self.config.train
        self.layout, self.splits = layout, splits
        self.device = resolve_device(train.device)
        torch.manual_seed(config.seed)
        self.watcher.event(f"building {config.model.kind} on {self.device}")
        self.system: System = config.model.build(weights).to(self.device)
        groups = parameter_groups(self.system, train.params, train.optimizer.weight_decay)
        self.optimizer: torch.optim.Optimizer = train.optimizer.build(groups)
        self.autocast = make_autocast(train.precision, self.device)
        data = config.data
        self.loader = PackedLoader(
            splits["train"],
            layout,
            rows=self.rows,
            micro_batch=train.micro_batch,
            seed=config.seed,
            mixture=data.mixture,
            isolate_segments=data.isolate_segments,
            workers=data.workers,
            quarantine=data.max_bad_fraction > 0,
            decoder=data.decoder,
            pin_memory=self.device.type == "cuda",
        )
        self._loader_state = self.loader.state_dict()
        self.steps = self._count_steps()
        if config.evaluation.every and "validation" not in splits:
            raise ConfigError(f"evaluation.every: {config.data.packed} has no validation split; set evaluation.every=0")
        if config.evaluation.every and not isinstance(self.system, GenerativeSystem):
            raise ConfigError(
                f"evaluation.every: a {config.model.kind} model has no caption loss; set evaluation.every=0"
            )
        used = self.rows * config.data.context_length
        if used != train.batch_tokens:
            self.watcher.event(
                f"train.batch_tokens {train.batch_tokens:,} rounded down to {self.rows} rows, {used:,} tokens"
            )

    def _restore(self, newest: Path) -> None:
        state = checkpoint.load(newest, self.system, self.optimizer)
        self.progress = Progress(**state["progress"])
        self.loader.load_state_dict(state["loader"])
        self._loader_state = state["loader"]
        self.watcher.event(f"resuming after step {self.progress.step} from {newest}")

    def _train(self) -> None:
        config = self.config.train
        log = MetricsLog(self.out, self.progress.step)
        steps = self.loader.steps(self.steps - self.progress.step)
        timer = _Timer()
        try:
            while self.progress.step < self.steps:
                with timer.waiting():
                    step_batches = [batch.to(self.device) for batch in next(steps)]
                self._check_bad(step_batches)
                row = self._step(step_batches)
                step = self.progress.step = self.progress.step + 1
                self._loader_state = self.loader.state_dict()
                timer.add(row["step_tokens"])
                last = step == self.steps
                evaluated = self._due(step, self.config.evaluation.every)
                if evaluated:
                    with timer.excluded():
                        row["validation_loss"] = self._validation_loss()
                if last or evaluated or self._due(step, config.log_every):
                    row = {"step": step, **row, **timer.read()}
                    self.progress.seconds += row.pop("seconds")
                    log.write({**row, "elapsed": round(self.progress.seconds, 3)})
                    self.watcher.step(row, self.steps)
                stopping = self._stop_signal is not None
                if last or stopping or self._due(step, config.save_every):
                    with timer.excluded():
                        self._save()
                if stopping and not last:
                    raise Interrupted(self._resume_hint())
        except DataError:
            # What was learned is worth keeping: damaged data is found late, and the run can go on once it is mended.
            if self.progress.step:
                self._save()
            raise
        finally:
            log.close()

    def _step(self, batches: list[PackedBatch]) -> dict[str, Any]:
        """One optimizer step over the micro-batches of a step; returns what is logged of it."""
        counts = _totals([self.system.counts(batch) for batch in batches])
        sums = dict.fromkeys(counts, 0.0)
        for batch in batches:
            with self.autocast():
                output = self.system(batch)
            terms = [self.system.weights[name] * loss / max(counts[name], 1) for name, loss in output.losses.items()]
            torch.stack(terms).sum().backward()
            for name, loss in output.losses.items():
                sums[name] += float(loss.detach())
        factor = self.config.train.schedule.factor(self.progress.step, self.steps)
        peak = self.config.train.optimizer.lr
        for group in self.optimizer.param_groups:
            group["lr"] = peak * factor * group["lr_scale"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.config.train.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise MMError(
                f"step {self.progress.step + 1}: the gradient is not finite (loss {sums}); lower train.optimizer.lr or "
                f"see the samples of this step: {batches[0].ids[0][:3]} …; the last checkpoint is untouched"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        tokens = sum(batch.tokens for batch in batches)
        positions = sum(batch.input_ids.numel() for batch in batches)
        self.progress.tokens += tokens
        self.progress.loss_tokens += sum(counts.values())
        for kind, number in MODALITIES.items():
            found = sum(int(((b.modality == number) & (b.segment_ids > 0)).sum()) for b in batches)
            self.progress.modalities[kind] = self.progress.modalities.get(kind, 0) + found
        sources = self.loader.state_dict()["mixture"]["sources"]
        means = {name: total / max(counts[name], 1) for name, total in sums.items()}
        return {
            "loss": sum(self.system.weights[name] * mean for name, mean in means.items()),
            **({f"loss/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}),
            "lr": peak * factor,
            "grad_norm": norm,
            "epoch": round(self._epoch(), 4),
            "tokens": self.progress.tokens,
            "loss_tokens": self.progress.loss_tokens,
            **{f"tokens/{kind}": count for kind, count in self.progress.modalities.items() if count},
            **{f"tokens_from/{name}": one["tokens"] for name, one in sources.items() if len(sources) > 1},
            "pack_fill": round(tokens / positions, 5),
            "step_tokens": tokens,
        }

    def _count_steps(self) -> int:
        """Steps of the run: as set, or so many epochs, and no more than the mixture has packs for."""
        train, packs = self.config.train, self._packs_per_epoch()
        steps = train.max_steps or math.ceil((train.epochs or 1) * packs / self.rows)
        total = self.loader.mixture.total()
        if total is not None and steps > (most := math.ceil(total / self.rows)):
            if train.max_steps:
                raise ConfigError(
                    f"train.max_steps {steps} takes {steps * self.rows:,} packs, data.mixture ends after {total:,}: "
                    f"set at most {most} steps, or raise mixture.max_epochs"
                )
            return most
        return steps

    def _packs_per_epoch(self) -> float:
        train = self.splits["train"]
        return len(train) / int(train.about["settings"]["visits"])

    def _epoch(self) -> float:
        """Passes over the packed set, by packs: with weights each source has epochs of its own."""
        return (self.progress.step + 1) * self.rows / self._packs_per_epoch()

    def _validation_loss(self) -> float:
        assert isinstance(self.system, GenerativeSystem)
        self.system.eval()
        batches = self._passes("validation")
        loss = evaluate.caption_loss(self.system, batches, self.autocast)
        self.system.train()
        return loss

    def _passes(self, split: Split) -> Iterator[PackedBatch]:
        data = self.config.data
        rows = self.config.evaluation.micro_batch
        quarantine = data.max_bad_fraction > 0
        return one_pass(self.splits[split], self.layout, rows, data.isolate_segments, quarantine)

    def _check_bad(self, batches: list[PackedBatch]) -> None:
        """Count what was quarantined while loading, and end the run when it is too much."""
        new = [bad for batch in batches for bad in batch.bad]
        if not new:
            return
        self.progress.bad += new
        self._write_json("quarantine.json", [{"id": id, "reason": reason} for id, reason in self.progress.bad])
        seen = {id for id, _ in self.progress.bad}
        total = sum(counts["segments"] for counts in self.splits["train"].about["ledger"].values())
        if len(seen) > self.config.data.max_bad_fraction * total:
            raise DataError(
                f"{len(seen)} of {total} samples are unreadable, more than data.max_bad_fraction = "
                f"{self.config.data.max_bad_fraction:g}; see {self.out / 'quarantine.json'}; the latest: {new[-1][1]}"
            )

    def _save(self) -> None:
        state = {
            "loader": self._loader_state,
            "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            "config": self.config.resolved(),
        }
        folder = self.out / "checkpoints"
        checkpoint.save(folder, self.progress.step, self.system, self.optimizer, state, self.config.train.keep)

    def _finish(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "test" in self.splits and isinstance(self.system, GenerativeSystem):
            settings = self.config.evaluation
            about = {
                "step": self.progress.step,
                "seed": self.config.seed,
                "evaluation": settings.model_dump(mode="json"),
            }
            if (self.out / "eval.json").exists():
                saved: dict[str, Any] = json.loads((self.out / "eval.json").read_text())
                if about.items() <= saved.items():
                    self.watcher.event(f"{self.out} is complete: nothing is left to do")
                    return saved
            self.watcher.event("evaluating on the test split")
            result = evaluate.final_evaluation(
                self.system,
                self.layout,
                self.splits["train"],
                self.splits["test"],
                micro_batch=settings.micro_batch,
                candidates=settings.candidates,
                isolate_segments=self.config.data.isolate_segments,
                quarantine=self.config.data.max_bad_fraction > 0,
                seed=self.config.seed,
                autocast=self.autocast,
                stop=self._raise_if_stopped,
            )
            self._write_samples(settings.samples)
            result = {**about, **result}
            self._write_json("eval.json", result)
        return result

    def _write_samples(self, count: int) -> None:
        assert isinstance(self.system, GenerativeSystem)
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        rows = []
        found = evaluate.caption_samples(self.system, self.layout, self.splits["test"], count, self.config.seed)
        for number, (sample, picture) in enumerate(found):
            name = f"samples/{number:04d}.{picture.ext}"
            (self.out / name).write_bytes(picture.read())
            rows.append({**sample, "image": name})
        self._write_json("samples.json", rows)

    def _description(self) -> dict[str, Any]:
        parts = {
            name: {
                "total": sum(p.numel() for p in part.parameters()),
                "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
            }
            for name, part in self.system.named_children()
        }
        return {
            "versions": checkpoint.versions(),
            "parameters": parts,
            "device": str(self.device),
            "attention": choose_implementation(self.device),
            "threads": torch.get_num_threads(),
            "steps": self.steps,
            "rows": self.rows,
            "date": time.strftime("%Y-%m-%d"),
        }

    def _write_json(self, name: str, value: Any) -> None:
        partial = self.out / f".{name}"
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        partial.replace(self.out / name)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _resume_hint(self) -> str:
        return f"stopped after step {self.progress.step} of {self.steps}, all saved in {self.out}; go on with --resume"

    def _raise_if_stopped(self) -> None:
        if self._stop_signal is not None:
            raise Interrupted(self._resume_hint())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the step end and saves; a second one ends at once."""

        def note(number: int, frame: Any) -> None:
            self._stop_signal = number
            self.watcher.event("stopping after this step; again to stop at once")
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            with contextlib.suppress(ValueError):  # signals belong to the main thread; a library user may be elsewhere
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Timer:
    """Tokens per second and the share of time spent waiting for data, since they were last read."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._excluded, self._tokens = time.perf_counter(), 0.0, 0.0, 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start - self._excluded, 1e-9)
        row = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "data_wait": round(self._waited / seconds, 5),
            "seconds": seconds,
        }
        self._reset()
        return row


def _totals(counts: list[dict[str, Any]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            totals[name] = totals.get(name, 0) + int(count)
    return totals


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted keys at which two resolved configs differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            key
            for name in sorted({*a, *b})
            for key in _differences(a.get(name), b.get(name), f"{path}.{name}".strip("."))
        ]
    return [] if a == b else [path]
