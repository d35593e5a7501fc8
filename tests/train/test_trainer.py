"""The trainer: the split of a step changes nothing, a killed run goes on bit for bit, a save is whole or absent."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import status_of

from mm import cli
from mm.config import RunConfig, load_config
from mm.errors import CheckpointError, ConfigError
from mm.train import checkpoint
from mm.train.metrics import MetricsLog, read_metrics
from mm.train.run_folder import RunFolder
from mm.train.signals import Interrupted
from mm.train.stages import Stage
from mm.train.trainer import Trainer


class Silent:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def event(self, text: str) -> None:
        self.events.append(text)

    def packing(self, what: str, count: int) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None:
        self.rows.append(row)

    def stage(self, name: str) -> None: ...


def run(config: RunConfig, resume: bool = False) -> tuple[Trainer, dict[str, Any]]:
    trainer = Trainer(config, Silent())
    return trainer, trainer.run(resume)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


NO_TEST = ("data.test=[]", "data.validation=[]")


@pytest.fixture
def split_runs(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    def train(micro_batch: int, optimizer: str) -> dict[str, torch.Tensor]:
        overrides = (
            f"train.micro_batch={micro_batch}", "train.batch_tokens=1024", "train.max_steps=3", *NO_TEST,
            f"out={tmp_path / f'{micro_batch}'}", f"train.optimizer={optimizer}", "train.schedule.kind=constant",
            "train.schedule.warmup=0",
        )  # fmt: skip
        trainer, _ = run(load_config(tiny(), overrides))
        return {name: p.detach().clone() for name, p in trainer.system.named_parameters()}

    return train


def test_1x8_2x4_and_8x1_give_the_same_parameters(split_runs: Callable[..., dict[str, torch.Tensor]]) -> None:
    """AdamW at eps 1e-6: at 1e-8 the zero gradient of a key bias is amplified noise (docs/design.md, decision 20)."""
    adamw = "{kind: adamw, lr: 1e-3, eps: 1e-6}"
    whole, half, single = (split_runs(n, adamw) for n in (8, 4, 1))
    for name in whole:
        for other in (half, single):
            torch.testing.assert_close(other[name], whole[name], rtol=1e-5, atol=2e-6, msg=name)


def test_1x8_2x4_and_8x1_give_the_same_gradients(tiny_config: Callable[..., RunConfig]) -> None:
    from mm.data.loader import PackedLoader
    from mm.data.prepare import open_splits

    config = tiny_config()
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    torch.manual_seed(0)
    system = config.model.build()

    def gradients(micro_batch: int) -> torch.Tensor:
        system.zero_grad()
        batches = list(PackedLoader(dataset, layout, rows=micro_batch).batches(8 // micro_batch))
        total = sum(int(system.counts(batch)["next_token"]) for batch in batches)
        for batch in batches:
            (system(batch).losses["next_token"] / total).backward()
        return torch.cat([p.grad.flatten() for p in system.parameters() if p.grad is not None]).double()

    whole = gradients(8)
    for micro_batch in (4, 2, 1):
        assert float((gradients(micro_batch) - whole).norm() / whole.norm()) < 1e-6


def test_reported_loss_is_the_mean_over_learned_tokens(tiny_config: Callable[..., RunConfig]) -> None:
    """Step 1 against a loop over single packs with the initial weights."""
    from mm.data.batch import collate
    from mm.data.loader import source_infos
    from mm.data.mixture import Mixture, MixtureConfig

    trainer, _ = run(tiny_config("train.max_steps=1", "train.optimizer.lr=1e-12", "model.vision.crop=1", *NO_TEST))
    dataset = trainer.splits["train"]
    mixture = Mixture(source_infos(dataset), MixtureConfig(), 0)
    order = [mixture.next().pack for _ in range(4)]
    outputs = [trainer.system(collate([dataset.read(order[i])], trainer.layout, 128)) for i in range(4)]
    expected = sum(float(o.losses["next_token"]) for o in outputs) / sum(int(o.counts["next_token"]) for o in outputs)
    (row,) = read_metrics(trainer.out / "metrics.jsonl")
    assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert row["loss_tokens"] == sum(int(o.counts["next_token"]) for o in outputs)
    tokens = sum(dataset.index["tokens"][order[i]].as_py() for i in range(4))
    assert row["tokens"] == tokens and row["pack_fill"] == pytest.approx(tokens / 512, abs=1e-5)


def test_a_run_writes_what_the_documents_say(tiny_config: Callable[..., RunConfig]) -> None:
    trainer, result = run(tiny_config("evaluation.every=4"))
    out = trainer.out
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    wanted = {"step", "loss", "lr", "tokens", "tokens_per_second", "pack_fill", "data_wait", "grad_norm", "epoch"}
    assert all(wanted <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8]
    saved = json.loads((out / "eval.json").read_text())
    assert saved == result
    assert saved["match_chance"] == 1 / 4 and saved["test_items"] == 93 and 0 <= saved["match_accuracy"] <= 1
    assert [p.name for p in checkpoint.complete(out / "checkpoints")] == ["step-00000004", "step-00000008"]
    assert load_config(out / "config.yaml") == trainer.config
    assert len(json.loads((out / "samples.json").read_text())) == 2
    assert any((out / "tensorboard").iterdir())
    # Asked again, it finds the run complete and changes nothing.
    before = (out / "metrics.jsonl").read_bytes()
    _, result = run(trainer.config, resume=True)
    assert result == saved and (out / "metrics.jsonl").read_bytes() == before


def test_stopped_by_a_signal_and_resumed_equals_never_stopped(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """SIGINT between saves; the second part runs with another number of workers."""
    trainer, _ = run(tiny_config(f"out={tmp_path / 'whole'}", *NO_TEST))

    class StopAtSix(Silent):
        def step(self, row: dict[str, Any], steps: int) -> None:
            if row["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)

    parts = tiny_config(f"out={tmp_path / 'parts'}", *NO_TEST)
    with pytest.raises(Interrupted, match=r"after step 7 of 8.*--resume"):
        Trainer(parts, StopAtSix()).run()
    resumed, _ = run(load_config(tmp_path / "parts/config.yaml", ("data.workers=1", "data.test=[]")), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for (name, a), (_, b) in zip(resumed.system.named_parameters(), trainer.system.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("when", ["before", "during"])
def test_an_evaluation_that_a_signal_left_out_is_made_up(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, when: str, step: int
) -> None:
    """It is best, and decides whether the run ends, as in a run that nobody stopped."""
    settings = ("data.test=[]", "evaluation.every=4", "train.best={patience: 1}", "train.optimizer.lr=1e-3")

    class Stopped(Trainer):
        evaluated = 0

        def _validate(self, stage: Stage) -> dict[str, float]:
            self.evaluated += 1
            if when == "during" and self.progress.step == step:
                self.signals.seen = signal.SIGTERM
            return super()._validate(stage)

        def _next(self, steps: Any) -> Any:
            if when == "before" and self.progress.step == step - 1:
                self.signals.seen = signal.SIGTERM
            return super()._next(steps)

    whole, _ = run(tiny_config(f"out={tmp_path / 'whole'}", *settings))
    config = tiny_config(f"out={tmp_path / 'parts'}", *settings)
    stopped = Stopped(config, Silent())
    with pytest.raises(Interrupted, match=f"after step {step} of 8"):
        stopped.run()
    assert stopped.evaluated == step // 4 - (when == "before") and stopped.progress.unevaluated
    resumed, _ = run(config, resume=True)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    timed = ("elapsed", "data_wait", "memory_gb")
    kept = [
        [{k: v for k, v in row.items() if k not in timed and "_per_second" not in k} for row in one] for one in rows
    ]
    assert kept[0] == kept[1] and sum("validation_loss" in row for row in kept[0]) == 2
    assert resumed.progress.best == whole.progress.best and resumed.progress.stale == whole.progress.stale
    best = [checkpoint.pointed(tmp_path / name / "checkpoints", "best") for name in ("whole", "parts")]
    assert best[0] is not None and best[1] is not None and best[0].name == best[1].name
    again, _ = run(config, resume=True)
    assert "was left at" in str(resumed.watcher.events)  # type: ignore[attr-defined]
    assert "was left at" not in str(again.watcher.events)  # type: ignore[attr-defined]


def test_a_best_that_was_lost_on_the_way_to_the_disk_is_forgotten(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Evaluations since then count on from those before it."""
    config = tiny_config(f"out={tmp_path / 'run'}", "data.test=[]", "evaluation.every=2", "train.best={patience: 9}")
    values = iter([3.0, 1.0, 2.0, 2.5])

    class Lost(Trainer):
        def _validate(self, stage: Stage) -> dict[str, float]:
            return {"validation_loss": next(values)}

    trainer = Lost(config, Silent())
    ended, failures = checkpoint.Checkpoints.ended, [OSError(28, "No space left on device")]

    def failing(self: checkpoint.Checkpoints) -> Any:
        found = ended(self)
        return failures.pop() if failures and trainer.progress.stale == 2 else found  # of the save of 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "ended", failing)
        trainer.run()
    assert not failures
    assert (trainer.progress.best, trainer.progress.stale) == (3.0, 3)


def killed(at_fsync: int, at_step: int, command: list[str]) -> None:
    """`mm train` that ends in a call of fsync, or before a step."""
    import mm.train.step as step

    calls, fsync, call = 0, checkpoint.fsync, step.Stepper.__call__

    def counted(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at_fsync:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(path)

    def stepped(self: Any, batches: Any, totals: Any, number: int, lr: Any) -> Any:
        if number == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, batches, totals, number, lr)

    checkpoint.fsync, step.Stepper.__call__ = counted, stepped  # type: ignore[method-assign,assignment]
    raise SystemExit(cli.main(command))


def test_killed_before_the_first_save_and_inside_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """SIGKILL at step 2 (nothing saved yet), inside the second save, between saves: losses are equal bit for bit."""
    run(load_config(tiny(), (f"out={tmp_path / 'whole'}", *NO_TEST, "train.save_every=2")))
    out = tmp_path / "killed"
    command = ["train", str(tiny()), f"out={out}", *NO_TEST, "train.save_every=2", "--resume"]
    for at_fsync, at_step in ((-1, 1), (3, -1), (-1, 5)):
        assert status_of(killed, at_fsync, at_step, command) == -signal.SIGKILL
    assert checkpoint.complete(out / "checkpoints")[-1].name == "step-00000004"
    run(load_config(tiny(), (f"out={out}", *NO_TEST, "train.save_every=2")), resume=True)
    assert losses(out) == losses(tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".*"))


def test_checkpoints_hold_no_pickle(tiny_config: Callable[..., RunConfig]) -> None:
    trainer, _ = run(tiny_config("train.max_steps=1", *NO_TEST))
    (saved,) = checkpoint.complete(trainer.out / "checkpoints")
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


def test_an_existing_run_is_not_overwritten(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config("train.max_steps=1", *NO_TEST)
    run(config)
    with pytest.raises(ConfigError, match="holds a run already"):
        run(config)
    with pytest.raises(CheckpointError, match=r"cannot resume with another train\.batch_tokens"):
        run(tiny_config("train.max_steps=1", "train.batch_tokens=1024", *NO_TEST), resume=True)
    run(tiny_config("train.max_steps=2", *NO_TEST), resume=True)
    assert len(losses(Path(config.out))) == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_for_a_while_ends_no_run(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """It fails the first two saves, of which one is the best, and rows of the log; the run is as any other."""
    settings = ("data.test=[]", "evaluation.every=2", "train.save_every=2", "train.best={patience: 9}", "train.keep=9")
    whole, _ = run(tiny_config(f"out={tmp_path / 'whole'}", *settings))
    commit, append = checkpoint.Checkpoints._commit, MetricsLog._append
    calls = {"commit": 0, "append": 0}

    def full(what: str, real: Callable[..., Any], *args: Any) -> Any:
        calls[what] += 1
        if calls[what] <= 2:
            raise OSError(28, "No space left on device", "x")
        return real(*args)

    monkeypatch.setattr(checkpoint.Checkpoints, "_commit", lambda *args: full("commit", commit, *args))
    monkeypatch.setattr("builtins.open", failing_open(calls))
    monkeypatch.setattr("mm.train.checkpoint.PAUSES", (0, 0, 0))
    monkeypatch.setattr("mm.train.checkpoint.PATIENCE", 0)
    trainer, _ = run(tiny_config(f"out={tmp_path / 'run'}", *settings, f"train.async_save={str(asynchronous).lower()}"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and calls["append"] > 2 and append
    said = trainer.watcher.events  # type: ignore[attr-defined]
    assert sum("could not be written (" in one for one in said) == 2
    assert sum("its rows wait until they can be written" in one for one in said) == 1
    newest = checkpoint.newest(tmp_path / "run/checkpoints")
    assert newest is not None and newest.name == "step-00000008"
    best = checkpoint.pointed(tmp_path / "run/checkpoints", "best")
    assert best is not None and trainer.progress.best == whole.progress.best


def failing_open(calls: dict[str, int]) -> Callable[..., Any]:
    """The log cannot be opened to be written to, twice."""

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("run/metrics.jsonl") and mode == "r+b":
            calls["append"] += 1
            if calls["append"] <= 2:
                raise OSError(28, "No space left on device", str(path))
        return real(path, mode, *args, **kwargs)

    real = open
    return opened


def test_a_folder_in_which_another_process_trains_is_left_alone(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unfinished checkpoint, too."""
    config = tiny_config()
    partial = Path(config.out) / "checkpoints/.step-00000001.partial"
    partial.mkdir(parents=True)
    hold = "import sys, fcntl; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on x'); "
    hold += "f.flush(); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(Path(config.out) / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        monkeypatch.setattr("mm.train.run_folder.LEASE", 1)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"process 7 on x is training in it; wait"):
                run(config, resume)
        assert partial.exists()
        other.communicate()
    folder = RunFolder(Path(config.out))
    assert folder.open(config, False) is None and not partial.exists()


def test_a_foreign_folder_is_not_written_to(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and not a run"):
        run(tiny_config(f"out={tmp_path / 'mine'}"))


def test_bf16_trains(tiny_config: Callable[..., RunConfig]) -> None:
    trainer, _ = run(tiny_config("train.precision=bf16", "train.max_steps=6", *NO_TEST))
    assert losses(trainer.out)[-1][1] < losses(trainer.out)[0][1]
    assert all(p.dtype == torch.float32 for p in trainer.system.parameters())


def test_epochs_count_passes_over_the_packed_set(tiny_config: Callable[..., RunConfig]) -> None:
    trainer, _ = run(tiny_config("train.max_steps=null", "train.epochs=2", *NO_TEST))
    assert trainer.stage.steps == -(-len(trainer.splits["train"]) // 4)  # two visits are two epochs
    assert read_metrics(trainer.out / "metrics.jsonl")[-1]["epoch"] == pytest.approx(2, abs=0.2)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": float("nan")})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None}]


def test_saved_config_is_plain_yaml(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config()
    assert yaml.safe_load(yaml.safe_dump(config.resolved())) == config.resolved()


def test_counters_of_a_finite_run_are_the_packers(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One epoch and no more, its last step not full: every token is seen once, and padding rows count nothing."""
    once = ("data.visits=1", "data.mixture={max_epochs: {emoji: 1}}", "train.max_steps=null", "train.epochs=3")
    trainer, _ = run(tiny_config(*once, "train.batch_tokens=640", "train.micro_batch=5", *NO_TEST))
    train = trainer.splits["train"]
    assert trainer.stage.steps == -(-len(train) // 5) and len(train) % 5
    (ledger,) = train.about["ledger"].values()
    last = read_metrics(trainer.out / "metrics.jsonl")[-1]
    assert last["tokens"] == ledger["segment_tokens"] and last["loss_tokens"] == ledger["loss_tokens"]
    assert last["tokens/text"] == ledger["text_tokens"] and last["tokens/image"] == ledger["image_tokens"]
    with pytest.raises(ConfigError, match=r"data\.mixture ends after .*set at most"):
        run(tiny_config("data.mixture={max_epochs: {emoji: 1}}", "train.max_steps=99", f"out={tmp_path}/no", *NO_TEST))
