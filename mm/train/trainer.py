"""The loop: the same for every system, engine and number of processes, readable in one sitting.

A run is one stage or several. Each stage builds its model, hands it to the engine, and takes steps over the loader's
endless sequence of packs; what a step does is `mm.train.step`, what is written where `mm.train.run_folder`. Every
process runs this same loop; what they have to agree on (counts, a signal, damaged data) is one sum before each step.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mm.data.batch import MODALITIES, PackedBatch
from mm.data.config import Split
from mm.data.features import medium_of
from mm.data.layout import Layout
from mm.data.loader import one_pass
from mm.data.packed import PackedDataset, names_of
from mm.errors import ConfigError, DataError, MMError
from mm.models.attention import choose_implementation
from mm.models.system import GenerativeSystem, System
from mm.train import checkpoint, evaluate
from mm.train.accelerators import peak_flops
from mm.train.blocks import checkpoint_activations, compile_blocks, find_blocks
from mm.train.checkpoint import Checkpoints
from mm.train.config import Run
from mm.train.distributed import RankFailed, World
from mm.train.ema import EMA
from mm.train.engines.single import SingleEngine
from mm.train.estimate import estimate
from mm.train.features import Aside, attach_codes
from mm.train.guard import Guard
from mm.train.lora import apply_lora
from mm.train.metrics import MetricsLog, Throughput, check_trackers
from mm.train.moments import take_moments
from mm.train.params import freeze, parameter_groups
from mm.train.profile import Profiler
from mm.train.progress import Progress
from mm.train.run_folder import RunFolder
from mm.train.signals import Interrupted, Signals
from mm.train.stages import Stage, by_part, check_rates, initial_tensors, open_stages, take_over, trained_system
from mm.train.step import Counted, Done, Stepper, count, counted

SETTLE = 60
"""Seconds that a run which fails waits for a checkpoint that is being written."""
DISK = 1800
"""Seconds at least that ranks which have written their part of a checkpoint wait for the others."""


class Watcher(Protocol):
    """Who is told how the run goes; the command line shows a progress display."""

    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None: ...

    def stage(self, name: str) -> None: ...


class Unwatched:
    """Of all ranks but the first."""

    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None: ...

    def stage(self, name: str) -> None: ...


class _Stopped(Exception):
    """An evaluation was left, because the run is to stop."""


class Trainer:
    """One run.

        Trainer(config, watcher).run(resume=True)

    In each process of several, as torchrun starts them, or in one. Raises `MMError`s for what the user can put right,
    before anything is built wherever possible.
    """

    def __init__(self, config: Run, watcher: Watcher, world: World | None = None) -> None:
        self.config = config
        self.world = World.from_environment() if world is None else world
        self.watcher = watcher if self.world.main else Unwatched()
        self.folder = RunFolder(Path(config.out))
        self.progress = Progress()
        self.signals = Signals()
        self._last: tuple[bool, dict[str, Any] | None] = False, None
        """What the last save was of: whether it was the best, and the loader's state if not the present one."""
        self._otherwise: tuple[float | None, int] = None, 0
        """`progress.best` and `stale`, had the last evaluation that was the best not been it."""

    @property
    def out(self) -> Path:
        return self.folder.path

    @property
    def system(self) -> System:
        return self.engine.system

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train to the last step, evaluate, and return what `eval.json` holds.

        Raises `Interrupted` after Ctrl-C or SIGTERM, with everything saved.
        """
        train = self.config.train
        deterministic = torch.are_deterministic_algorithms_enabled()
        if train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        check_trackers(train.trackers)
        engine: SingleEngine = train.engine.build(self.world, train)
        failed = True
        try:
            newest, self.stages = self.world.in_turn(lambda: self._prepare(resume, engine.device.type == "cuda"))
            self.world.start(engine.device, train.hang_timeout, engine.group)
            newest = self.world.gather(newest)[0]
            self.checkpoints = Checkpoints(
                self.folder.checkpoints,
                keep=train.keep,
                keep_every=train.keep_every,
                asynchronous=train.async_save,
                ranks=self.world.ranks,
                rank=self.world.rank,
                timeout=max(train.hang_timeout, DISK),
            )
            with self.signals.caught(self.watcher.event):
                try:
                    result = self._run(newest)
                except Exception:
                    self.checkpoints.settle(SETTLE)
                    raise
            failed = False
            return result
        except Interrupted:
            failed = False
            raise
        finally:
            torch.use_deterministic_algorithms(deterministic)
            self.world.stop(failed)
            self.folder.let_go()

    def _prepare(self, resume: bool, pin_memory: bool) -> tuple[Path | None, list[Stage]]:
        """Everything that is checked and packed before processes meet; rank 0 comes here first."""
        newest = self.folder.open(self.config, resume, self.watcher.event) if self.world.main else None
        self.branched = self.folder.branch_point(self.config)
        anew = self.branched if self.config.train.branch_data == "anew" else None
        taken = (anew["stage"], anew["stage_step"]) if anew else (0, 0)
        return newest, open_stages(self.config, self.world, pin_memory, self.watcher.packing, taken)

    def _run(self, newest: Path | None) -> dict[str, Any]:
        first = 0
        if newest is not None:
            state = checkpoint.read_state(newest)
            reached = Progress(**state["progress"])
            check_rates(self.stages, state)
            finished, own = self._finished(reached), self.folder.holds(newest)
            owing = own and reached.unevaluated
            first = reached.stage + (finished and not owing and reached.stage + 1 < len(self.stages))
            if not own:
                if finished and first == reached.stage:
                    raise ConfigError(f"train.branch: {newest} is the end of that run; raise train.max_steps to go on")
                self.watcher.event(f"branching off from {newest} after step {reached.step}")
        self.start = newest
        if self.world.main:
            data = {stage.name: {split: d.about for split, d in stage.splits.items()} for stage in self.stages}
            self.folder.write_json("data.json", data if self.config.stages else data[""])
            self.folder.write_config(self.config)
        for stage in self.stages[first:]:
            if self.progress.step:
                self.engine.close()
            self._enter(stage, newest)
            if self.progress.unevaluated or not self._finished(self.progress):
                self._train(stage)
            self._wait(stage)
            newest = self.folder.checkpoints / f"{checkpoint.PREFIX}{self.progress.step:08d}"
        try:
            return self._finish(stage)
        finally:
            self.checkpoints.close()

    def _finished(self, progress: Progress) -> bool:
        """Whether its stage is."""
        return progress.ended or progress.stage_step >= self.stages[progress.stage].steps

    def _enter(self, stage: Stage, newest: Path | None) -> None:
        """Build a stage's model and optimizer; fill them from a checkpoint of this stage, or of what it starts from."""
        config, train = stage.config, stage.config.train
        if stage is not self.stages[0] and "stepper" in vars(self):
            for name in ("engine", "stepper", "ema", "aside"):  # what the stage before had on the device
                vars(self).pop(name, None)
            gc.collect()  # modules are in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.stage, self.layout, self.splits = stage, stage.layout, stage.splits
        state = checkpoint.read_state(newest) if newest else None
        same = state is not None and state["progress"]["stage"] == stage.number
        torch.manual_seed(config.seed)
        self.engine: SingleEngine = train.engine.build(self.world, train)
        self.world.at(self.progress.step, "building")
        if stage.name:
            self.watcher.stage(stage.name)
        self.watcher.event(
            f"building {config.model.kind} on {self.engine.device}"
            + (f", {self.world.ranks} processes, {self.engine.kind}" if self.world.ranks > 1 else "")
        )
        system: System = config.model.build(newest is None and train.init_from is None)
        if not same:
            self._initialise(system, stage, newest)
        rules = [*train.params, *apply_lora(system, train.lora)]
        freeze(system, rules)
        self.aside: Aside | None = None
        if config.data.features:
            self.aside = Aside.take(system, medium_of(stage.layout))
            self.layout = stage.layout = replace(stage.layout, features={self.aside.medium: self.aside.tower.shape})
        blocks = find_blocks(system, train.blocks)
        checkpoint_activations(system, train.activation_checkpointing, blocks)
        if train.compile:
            compile_blocks(blocks)
        self.engine.prepare(
            system,
            lambda prepared: parameter_groups(prepared, rules, train.optimizer.weight_decay),
            stage.loader.micro_batches,
        )
        self.ema = EMA(self.system, train.ema) if train.ema else None
        self.guard = Guard(train.guard)
        sources = list(stage.splits["train"].about["ledger"])
        self.stepper = Stepper(self.engine, stage.layout, self.guard, config.seed, train.clip_norm, sources)
        if same:
            assert newest is not None
            self._restore(stage, newest)
            self.watcher.event(f"resuming after step {self.progress.step} from {newest}")
        elif newest is not None:
            self._go_on(stage, newest)
        elif train.init_optimizer:
            assert train.init_from is not None
            folder = checkpoint.find(train.init_from.expanduser())
            self.watcher.event(take_moments(self.engine, stage, folder))
        if self.aside:
            self.aside.attach(stage.splits, stage.layout, config)
            self.watcher.event(f"the features of {self.aside.tower.name} are read, and it does not run")
        if config.data.codes:
            attach_codes(stage.splits, stage.layout, config)
            self.watcher.event("the codes of the teacher are read, and it does not run")
        if self.world.main:
            self.folder.write_json("run.json", self._description())
        used = stage.rows * config.data.context_length
        if used != train.batch_tokens:
            self.watcher.event(
                f"train.batch_tokens {train.batch_tokens:,} rounded down to {stage.rows} rows, {used:,} tokens"
            )
        steps = stage.steps - stage.other_data
        if train.epochs and steps * stage.rows < train.epochs * stage.packs_per_epoch:
            self.watcher.event(f"train.epochs {train.epochs:g} cut to {steps} steps, where data.mixture ends")

    def _initialise(self, system: System, stage: Stage, newest: Path | None) -> None:
        """Weights of the stage before, or of `train.init_from`."""
        if newest is not None:
            before = trained_system(self.stages[stage.number - 1].config, newest, ema=False)
            tensors, where = checkpoint.model_tensors(before), str(newest)
            was = self._own(Progress(**checkpoint.read_state(newest)["progress"]), newest)
            self.progress = replace(
                was, stage=stage.number, stage_step=0, ended=False, offending=[], best=None, stale=0
            )
        elif stage.config.train.init_from is not None:
            tensors, where = initial_tensors(stage.config.train.init_from)
        else:
            return
        left = take_over(system, tensors, stage.convert, where)
        self.watcher.event(f"weights from {where}")
        for line in by_part(left):
            self.watcher.event(line)

    def _go_on(self, stage: Stage, newest: Path) -> None:
        """What a stage takes over from the one before besides weights."""
        if stage.carry_on and self._data_anew(newest):
            self.watcher.event("the data begin anew")
        elif stage.carry_on:
            loader = checkpoint.read_state(newest)["loader"]
            # Steps to be passed over were counted in rows of the stage before.
            stage.loader.load_state_dict({**loader, "passed_over": []})
            self.watcher.event(f"the data go on behind {loader['mixture']['position']:,} packs")
        if stage.keep_optimizer:
            self.watcher.event(take_moments(self.engine, stage, newest, self.ema))

    def _restore(self, stage: Stage, folder: Path) -> None:
        tensors = self.engine.tensors_to_load(set(checkpoint.described(folder)))
        tensors |= self.ema.tensors() if self.ema else {}
        tensors |= self.aside.tensors() if self.aside else {}
        state = checkpoint.load(folder, tensors)
        self.engine.loaded(tensors)
        self.progress = self._own(Progress(**state["progress"]), folder)
        if self._data_anew(folder):
            self.watcher.event("the data begin anew")
        else:
            stage.loader.load_state_dict(state["loader"])
            self.guard.load_state_dict(state["guard"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    def _data_anew(self, folder: Path) -> bool:
        """Whether a checkpoint is that of another run, on other data."""
        return self.config.train.branch_data == "anew" and not self.folder.holds(folder)

    def _own(self, progress: Progress, folder: Path) -> Progress:
        """Without what was only of the run that this one branches off from: its evaluations, and of its data what was
        bad."""
        if not self.folder.holds(folder):
            progress.best, progress.stale, progress.unevaluated = None, 0, False
        if self._data_anew(folder):
            progress.bad, progress.offending = [], []
        return progress

    def _train(self, stage: Stage) -> None:
        train = stage.config.train
        log = self._open_log(stage)
        peak = peak_flops(self.engine.device, train.precision)
        timer = Throughput(self.engine.device, peak and peak * self.world.ranks)
        flops = self._flops_per_token(stage) if peak and self.world.main else 0.0
        steps = stage.loader.steps(stage.steps - self.progress.stage_step)
        self._timer = timer
        try:
            if self.progress.unevaluated:
                with timer.excluded():
                    self._make_up(stage, log)
            with Profiler(train.profile, self.out / "profile", self.world.rank) as profiler:
                while not self._finished(self.progress):
                    with timer.excluded():
                        profiler.step(self.progress.step + 1)
                    self._behind = stage.loader.state_dict()
                    with timer.waiting():
                        batches, error = self._next(steps)
                    totals = self._agree(stage, batches, error)
                    if not batches:
                        self.watcher.event("the data came to its end before the last step")
                        self.progress.ended = True
                        self._save(stage)
                        break
                    position = stage.schedule_first + self.progress.stage_step
                    self.system.begin_step(position, stage.schedule_steps)
                    lr = train.optimizer.lr * train.schedule.factor(position, stage.schedule_steps)
                    done = self.stepper(batches, totals, self.progress.step, lr)
                    if not done.verdict.accept and self._skipped(stage, batches, totals, done):
                        log = self._reopen(log, stage)
                        steps = stage.loader.steps(stage.steps - self.progress.stage_step)
                        timer.read()
                        continue
                    if done.verdict.accept and self.ema:
                        self.ema.update()
                    self.progress.advance(totals, self._learned(totals), done.verdict.accept)
                    timer.add(totals.tokens, self._learned(totals), flops * totals.tokens)
                    if self._after(stage, log, timer, totals, done, lr):
                        break
        finally:
            if log is not None:
                log.close()

    def _after(
        self, stage: Stage, log: MetricsLog | None, timer: Throughput, totals: Counted, done: Done, lr: float
    ) -> bool:
        """Evaluate, log and save what is due after a step; whether the stage ends here."""
        step, train = self.progress.step, stage.config.train
        row, best = self._row(stage, totals, done, lr), False
        self.progress.unevaluated = due = _due(step, stage.config.evaluation.every)
        if due and not self.signals.agreed:  # else there may be no time for more than saving
            with timer.excluded():
                best = self._evaluate(stage, row)
        last = self.progress.stage_step == stage.steps or self.progress.ended
        if last or due or _due(step, train.log_every):
            row |= self.stepper.shares() | timer.read()
            self.progress.seconds += row.pop("seconds")
            if log is not None and (problem := log.write({**row, "elapsed": round(self.progress.seconds, 3)})):
                self.watcher.event(problem)
            self.watcher.step(row, step - self.progress.stage_step + stage.steps)
        if last or self.signals.agreed or best or _due(step, train.save_every):
            with timer.excluded():
                self._save(stage, best)
        complete = last and stage.number + 1 == len(self.stages) and not self.progress.unevaluated
        if self.signals.agreed and not complete:
            self._wait(stage)
            raise Interrupted(self._resume_hint(), self.signals.agreed)
        return last

    def _evaluate(self, stage: Stage, row: dict[str, Any]) -> bool:
        """Put the evaluation that is due into a row of the log; whether it is the best. A signal leaves it due."""
        try:
            row |= self._validate(stage)
            best = self._is_best(row, stage)
        except _Stopped:
            return False
        except Exception as error:
            if isinstance(error, MMError) or self.world.ranks == 1:  # all ranks are here
                self._save_before_leaving(stage)
            raise
        self.progress.unevaluated = False
        rule = stage.config.train.best
        self.progress.ended = rule is not None and 0 < rule.patience <= self.progress.stale
        return best

    def _make_up(self, stage: Stage, log: MetricsLog | None) -> None:
        """The evaluation that was due where the run was left."""
        if not stage.config.evaluation.every:
            self.progress.unevaluated = False
            return
        row: dict[str, Any] = {"step": self.progress.step}
        self.watcher.event(f"evaluating step {self.progress.step}, which the run was left at before it could be")
        best = self._evaluate(stage, row)
        if self.signals.agreed:
            raise Interrupted(self._resume_hint(), self.signals.agreed)
        if log is not None and (problem := log.amend(row)):
            self.watcher.event(problem)
        self._save(stage, best)

    def _next(self, steps: Iterator[list[PackedBatch]]) -> tuple[list[PackedBatch], Exception | None]:
        """The micro-batches of a step; none at the end of the data, or with the reason why they cannot be read."""
        self.world.at(self.progress.step + 1, "waiting for data")
        try:
            return next(steps, []), None
        except Exception as error:  # of whatever kind: the model is as good as it was
            return [], error

    def _agree(self, stage: Stage, batches: list[PackedBatch], error: Exception | None) -> Counted:
        """The step's counts over all ranks, and whether a rank was told to stop, cannot read its data or wants the
        last checkpoint to be written again."""
        self.world.at(self.progress.step + 1, "counting")
        bad = [[id, reason] for batch in batches for id, reason in batch.bad]
        own = [*self.signals.counts(), float(error is not None), float(len(bad))]
        own.append(float(self.checkpoints.to_be_repeated()))
        own += count(self.system, batches, self.stepper.sources)
        interrupt, terminate, failed, damaged, unsaved, *values = self.world.sum(own)
        self.signals.agree((interrupt, terminate))
        if failed:
            # What was learned is worth keeping: damaged data is found late, and the run can go on once it is mended.
            self._save_before_leaving(stage, self._behind)
            raise error or RankFailed("another rank cannot read its data")
        if unsaved:
            self._save(stage, loader=self._behind)
        if damaged:
            self._check_bad(stage, [one for rank in self.world.gather(bad) for one in rank])
        self.world.at(self.progress.step + 1, "computing")
        return counted(self.system, values, self.stepper.sources)

    def _check_bad(self, stage: Stage, new: list[list[str]]) -> None:
        """Count what was quarantined while loading, and end the run when it is too much."""
        self.progress.bad += new
        rows = [{"id": id, "reason": reason} for id, reason in self.progress.bad]
        self._note(lambda: self.folder.write_json("quarantine.json", rows))
        dropped = stage.splits["train"].dropped
        seen = {id for id, _ in self.progress.bad if not names_of(id) & dropped}
        total = sum(counts["segments"] for counts in stage.splits["train"].about["ledger"].values())
        if len(seen) > stage.config.data.max_bad_fraction * total:
            self._save_before_leaving(stage, self._behind)
            raise DataError(
                f"{len(seen)} of {total} samples are unreadable, more than data.max_bad_fraction = "
                f"{stage.config.data.max_bad_fraction:g}; see {self.out / 'quarantine.json'}; the latest: {new[-1][1]}"
            )

    def _skipped(self, stage: Stage, batches: list[PackedBatch], totals: Counted, done: Done) -> bool:
        """Write down that a step was left out; rewinds when there were too many in a row, and says whether it did."""
        ids = [row for batch in batches for row in batch.ids]
        everyone = [row for rank in self.world.gather(ids) for row in rank]
        # The sequence stands behind the step that was just handed out.
        self.progress.offending.append(stage.loader.state_dict()["step"] - 1)
        rewind = self.guard.should_rewind
        step = self.progress.step + 1
        event = self.guard.event(step, done.verdict, done.loss, done.norms.get("total"), everyone)
        self._note(lambda: self.folder.append("guard.jsonl", [{**event, "action": "rewind" if rewind else "skip"}]))
        self.watcher.event(f"step {step}: no update, {done.verdict.reason} (its samples: guard.jsonl)")
        if rewind:
            self._rewind(stage)
        return rewind

    def _rewind(self, stage: Stage) -> None:
        """Back to the newest checkpoint of this stage, and past the packs of the steps that were skipped just now."""
        if (failure := self.checkpoints.ended()) is not None:
            self.watcher.event(f"the last checkpoint could not be written ({failure}): back to the one before")
        branched = self.start if stage.config.train.branch_data == "carry_on" else None
        newest = self.world.gather(checkpoint.newest(self.folder.checkpoints) or branched)[0]
        usable = newest is not None and checkpoint.read_state(newest)["progress"]["stage"] == stage.number
        if self.guard.exhausted or not usable:
            raise MMError(
                f"step {self.progress.step + 1}: {self.guard.skipped} steps in a row had a loss or gradient far out of "
                "range, "
                + (
                    f"after {self.guard.rewinds} rewinds"
                    if usable
                    else "with no checkpoint of this stage to go back to"
                )
                + f"; see {self.out / 'guard.jsonl'}: lower train.optimizer.lr, or look at these samples"
            )
        assert newest is not None
        offending, rewinds = self.progress.offending, self.guard.rewinds
        self._restore(stage, newest)
        self.guard.rewinds = rewinds
        self.guard.rewind(self.guard.state_dict())
        stage.loader.pass_over(offending)
        self.watcher.event(f"rewound to step {self.progress.step}; passing over {len(offending)} steps of data")

    def _flops_per_token(self, stage: Stage) -> float:
        """Of the model's own operations, without what is computed again: what MFU is about. 0 where it is not known."""
        self.watcher.event("counting the operations of a step, for MFU")
        try:
            found = estimate(stage.config, self.world.ranks)
        except Exception as error:  # a system of a user's own need not run without data; that is no reason not to train
            self.watcher.event(f"no MFU: the operations cannot be counted ({type(error).__name__}: {error})")
            return 0.0
        counts = found["flops_per_step"]
        tokens = sum(number for kind, number in found["tokens_per_step"].items() if kind in MODALITIES)
        return (counts["forward"] + counts["backward"]) / tokens

    def _open_log(self, stage: Stage) -> MetricsLog | None:
        if not self.world.main:
            return None
        return MetricsLog(self.out, self.progress.step, stage.config.train.trackers, self.config.resolved())

    def _reopen(self, log: MetricsLog | None, stage: Stage) -> MetricsLog | None:
        if log is not None:
            log.close()
        return self._open_log(stage)

    def _learned(self, totals: Counted) -> int:
        return int(sum(totals.losses[name] for name in self.system.learned))

    def _row(self, stage: Stage, totals: Counted, done: Done, lr: float) -> dict[str, Any]:
        """What is logged of a step."""
        progress = self.progress
        sources = stage.loader.state_dict()["mixture"]["sources"]
        scales = {group["lr_scale"] for group in self.engine.optimizer.param_groups}
        return {
            "step": progress.step,
            **({"stage": stage.number} if len(self.stages) > 1 else {}),
            "loss": done.loss,
            **({f"loss/{name}": mean for name, mean in done.losses.items()} if len(self.system.weights) > 1 else {}),
            **{f"loss_from/{name}": mean for name, mean in done.sources.items()},
            "lr": lr,
            **({f"lr/x{scale:g}": lr * scale for scale in sorted(scales)} if len(scales) > 1 else {}),
            "grad_norm": done.norms.get("total"),
            **{f"grad_norm/{part}": norm for part, norm in done.norms.items() if part != "total"},
            **done.metrics,
            **({} if done.verdict.accept else {"skipped": True}),
            "epoch": round((progress.stage_step - stage.other_data) * stage.rows / stage.packs_per_epoch, 4),
            "tokens": progress.tokens,
            "loss_tokens": progress.loss_tokens,
            **{f"tokens/{kind}": number for kind, number in progress.modalities.items() if number},
            **{f"tokens_from/{name}": one["tokens"] for name, one in sources.items() if len(sources) > 1},
            "pack_fill": round(totals.tokens / totals.positions, 5),
            "step_tokens": totals.tokens,
        }

    def _validate(self, stage: Stage) -> dict[str, float]:
        self.system.eval()
        with self._averaged():
            sources = list(stage.splits["validation"].about["ledger"])
            found = evaluate.means(self.engine, stage.layout, self._pass(stage, "validation"), sources)
        self.system.train()
        several = {**(found.losses if len(self.system.weights) > 1 else {}), **found.metrics}
        return {
            "validation_loss": found.loss,
            **{f"validation_loss/{name}": loss for name, (loss, _) in found.sources.items() if len(found.sources) > 1},
            **{f"validation/{name}": value for name, value in several.items()},
        }

    def _pass(self, stage: Stage, split: Split) -> Iterator[PackedBatch]:
        data, rows = stage.config.data, stage.config.evaluation.micro_batch
        quarantine = data.max_bad_fraction > 0
        world = self.world
        batches = one_pass(
            stage.splits[split], stage.layout, rows, data.isolate_segments, quarantine, world.rank, world.ranks
        )
        while True:
            world.at(self.progress.step, "evaluating")
            batch: PackedBatch | None = None
            error: Exception | None = None
            try:
                batch = next(batches, None)
            except Exception as problem:
                error = problem
            # All have as many batches, and leave together.
            failed, *came = world.sum([float(error is not None), *self.signals.counts()])
            if failed:
                raise error or RankFailed(f"another rank cannot read its data of the {split} split")
            if self.signals.agree(came):
                raise _Stopped
            if batch is None:
                return
            yield batch

    def _averaged(self) -> Any:
        return self.ema.swapped() if self.ema else contextlib.nullcontext()

    def _is_best(self, row: dict[str, Any], stage: Stage) -> bool:
        best = stage.config.train.best
        if best is None:
            return False
        if best.metric not in row:
            raise ConfigError(f"train.best.metric {best.metric}: not measured; there is {', '.join(sorted(row))}")
        before = self.progress.best, self.progress.stale + 1
        if better := self.progress.judge(row[best.metric], best.better == "lower"):
            self._otherwise = before
        return better

    def _save(self, stage: Stage, best: bool = False, loader: dict[str, Any] | None = None) -> None:
        """`loader`: its state, where that is not the present one."""
        self.world.at(self.progress.step, "saving")
        if (failure := self.checkpoints.ended()) is not None:
            self.watcher.event(f"the checkpoint before could not be written ({failure}); trying this one")
            if self._last[0] and not best:  # what was best is lost
                self.progress.best, stale = self._otherwise
                self.progress.stale += stale
        self._last = best, loader
        state = {
            "progress": {**asdict(self.progress), "seconds": self.progress.seconds + self._timer.seconds},
            "schedule": [stage.schedule_first, stage.schedule_steps],
            "loader": stage.loader.state_dict() if loader is None else loader,
            "guard": self.guard.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "engine": self.engine.kind,
            "config": self.config.resolved(),
        }
        tensors = {**self.engine.tensors(), **(self.ema.tensors() if self.ema else {})}
        if self.aside and self.world.main:
            tensors |= self.aside.tensors()
        self.checkpoints.save(self.progress.step, tensors, state, best)
        self.world.at(self.progress.step, "saved")

    def _wait(self, stage: Stage) -> None:
        """Until the last save is on the disk."""
        self.checkpoints.insist(lambda: self._save(stage, *self._last), self.watcher.event)

    def _note(self, write: Callable[[], None]) -> None:
        """On rank 0, what the run can do without: a full disk is no reason to end."""
        if self.world.main:
            try:
                write()
            except OSError as error:
                self.watcher.event(f"{error.filename or self.out}: {error.strerror}")

    def _save_before_leaving(self, stage: Stage, loader: dict[str, Any] | None = None) -> None:
        if self.progress.stage_step:
            self._save(stage, loader=loader)
            self._wait(stage)

    def _finish(self, stage: Stage) -> dict[str, Any]:
        """Evaluate on the test split."""
        if "test" not in stage.splits:
            return {}
        config, settings = stage.config, stage.config.evaluation
        about = {"step": self.progress.step, "seed": config.seed, "evaluation": settings.model_dump(mode="json")}
        saved = self.world.gather(self.folder.evaluation(about) if self.world.main else None)[0]
        if saved is not None:
            self.watcher.event(f"{self.out} is complete: nothing is left to do")
            return saved
        self.watcher.event("evaluating on the test split")
        with self._averaged():
            result = evaluate.final_evaluation(
                self.engine,
                stage.layout,
                stage.splits["train"],
                stage.splits["test"],
                micro_batch=settings.micro_batch,
                candidates=settings.candidates,
                isolate_segments=config.data.isolate_segments,
                quarantine=config.data.max_bad_fraction > 0,
                seed=config.seed,
                stop=self._raise_if_stopped,
            )
            if isinstance(self.system, GenerativeSystem):
                self._write_samples(stage, settings.samples)
        result = {**about, **result}
        if self.world.main:
            self.folder.write_json("eval.json", result)
        return result

    def _write_samples(self, stage: Stage, count: int) -> None:
        with self._on_pictures(stage) as (layout, test):
            found = evaluate.caption_samples(self.engine, layout, test, count, stage.config.seed)
        if self.world.main and found:
            self.folder.write_samples(found)

    @contextlib.contextmanager
    def _on_pictures(self, stage: Stage) -> Iterator[tuple[Layout, PackedDataset]]:
        """The layout and the test split as they are without features, and the model's tower in its place."""
        if self.aside is None:
            yield stage.layout, stage.splits["test"]
            return
        test = PackedDataset(stage.splits["test"].folder)
        test.drop(stage.splits["test"].dropped)
        with self.aside.back_in(self.system, self.engine.device):
            yield replace(stage.layout, features={}), test

    def _description(self) -> dict[str, Any]:
        aside = [(self.aside.tower.name, self.aside.module)] if self.aside else []
        parts = {
            name: {
                "total": sum(p.numel() for p in part.parameters()),
                "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
            }
            for name, part in [*self.system.named_children(), *aside]
        }
        return {
            "versions": checkpoint.versions(),
            "parameters": parts,
            "device": str(self.engine.device),
            "engine": self.engine.kind,
            "ranks": self.world.ranks,
            "attention": choose_implementation(self.engine.device),
            "threads": torch.get_num_threads(),
            "steps": self.progress.step - self.progress.stage_step + self.stage.steps,
            "rows": self.stage.rows,
            "date": time.strftime("%Y-%m-%d"),
            **({"branch": self.branched} if self.branched else {}),
        }

    def _resume_hint(self) -> str:
        steps = self.progress.step - self.progress.stage_step + self.stage.steps
        return f"stopped after step {self.progress.step} of {steps}, all saved in {self.out}; go on with --resume"

    def _raise_if_stopped(self) -> None:
        """Of the evaluation at the end: on one rank a signal may have come, and all have to leave together."""
        self.world.at(self.progress.step, "evaluating")
        self.signals.agree(self.world.sum(self.signals.counts()))
        if self.signals.agreed:
            raise Interrupted(self._resume_hint(), self.signals.agreed)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
