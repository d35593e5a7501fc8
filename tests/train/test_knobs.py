"""Settings of a run, through the whole trainer: each does what it says, and such a run resumes as if never stopped."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import mm
from mm.config import RunConfig
from mm.data.batch import MediaBatch, PackedBatch
from mm.data.loader import one_pass
from mm.errors import ConfigError, MMError
from mm.models import attention
from mm.models.system import GenerativeSystem, Output
from mm.train import checkpoint
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.step import Stepper
from mm.train.trainer import Trainer, Unwatched

NO_TEST = ("data.test=[]", "data.validation=[]")
Config = Callable[..., RunConfig]


def run(config: RunConfig, resume: bool = False) -> Trainer:
    trainer = Trainer(config, Unwatched())
    trainer.run(resume)
    return trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


LORA = 'train.lora=[{match: "language.*(q|v)_proj", rank: 2, dropout: 0.1}]'
DROPOUT = "model.language.config.attention_dropout=0.2"
KNOBS = {
    "averages": ("train.ema=0.9",),
    "adapters": (LORA,),
    "recomputed": ("train.activation_checkpointing.mode=full", DROPOUT),
    "chosen": ("train.activation_checkpointing.mode=selective", DROPOUT),
    "deterministic": ("train.deterministic=true", DROPOUT),
    "rates": ('train.params=[{match: "vision.*", lr_scale: 0.1}, {match: "connector.*", freeze: true}]',),
    "written at once": ("train.async_save=false", "train.keep=1", "train.keep_every=3"),
}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_stopped_run_goes_on_bit_for_bit(knob: str, tiny_config: Config, tmp_path: Path) -> None:
    settings = (*KNOBS[knob], *NO_TEST, "train.max_steps=6")
    run(tiny_config(*settings, f"out={tmp_path / 'whole'}"))

    class Stop(Unwatched):
        def step(self, row: dict[str, Any], steps: int) -> None:
            trainer.signals.seen = 2 if row["step"] == 3 else 0

    trainer = Trainer(tiny_config(*settings, f"out={tmp_path / 'parts'}"), Stop())
    with pytest.raises(Interrupted):
        trainer.run()
    run(tiny_config(*settings, f"out={tmp_path / 'parts'}"), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    newest = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    whole, parts = (checkpoint.read_state(one)["files"] for one in newest if one is not None)
    assert whole == parts  # checksums of every tensor: weights, moments, averages
    torch.use_deterministic_algorithms(False)


def test_recomputing_changes_nothing(tiny_config: Config, tmp_path: Path) -> None:
    plain = tiny_config(*NO_TEST, DROPOUT, f"out={tmp_path / 'plain'}")
    full = tiny_config(*NO_TEST, *KNOBS["recomputed"], f"out={tmp_path / 'full'}")
    run(plain), run(full)
    assert losses(tmp_path / "plain") == losses(tmp_path / "full")


def test_averages_are_what_is_evaluated_and_loaded(tiny_config: Config) -> None:
    trainer = run(tiny_config("train.ema=0.9", "evaluation.every=8", "evaluation.samples=0", "evaluation.candidates=2"))
    system, _, _ = mm.load(trainer.out)
    averages = trainer.ema.averages
    assert averages and all(torch.equal(dict(system.named_parameters())[name], one) for name, one in averages.items())
    evaluated = json.loads((trainer.out / "eval.json").read_text())["caption_loss"]

    def measured(system: GenerativeSystem) -> float:
        outputs = [system.eval()(batch) for batch in one_pass(trainer.splits["test"], trainer.layout, 8)]
        return sum(float(one.losses["next_token"].detach()) for one in outputs) / sum(
            int(one.counts["next_token"]) for one in outputs
        )

    assert measured(system) == pytest.approx(evaluated, rel=1e-5)  # type: ignore[arg-type]
    assert measured(trainer.system) != pytest.approx(evaluated, rel=1e-4)  # type: ignore[arg-type]


def test_adapters_are_merged_where_a_model_is_loaded(tiny_config: Config) -> None:
    trainer = run(tiny_config(LORA, *NO_TEST, "train.optimizer.lr=1e-2"))
    system, _, _ = mm.load(trainer.out)
    assert not any("lora" in name for name, _ in system.named_parameters())
    batch = next(trainer.stage.loader.batches(1))
    trainer.system.eval()
    torch.testing.assert_close(system.token_losses(batch), trainer.system.token_losses(batch), rtol=1e-4, atol=1e-4)


def test_the_best_is_kept_and_the_run_ends_when_nothing_gets_better(tiny_config: Config) -> None:
    """With a rate of nothing no evaluation improves on the first."""
    trainer = run(
        tiny_config(
            "data.test=[]", "evaluation.every=1", "train.optimizer={kind: adamw, lr: 1e-30, weight_decay: 0}",
            "train.best={metric: validation_loss, patience: 2}", "train.keep=1",
        )
    )  # fmt: skip
    assert [row["step"] for row in rows(trainer.out)] == [1, 2, 3]
    best = checkpoint.pointed(trainer.out / "checkpoints", "best")
    assert best is not None and best.name == "step-00000001"
    before = losses(trainer.out)
    run(trainer.config, resume=True)
    assert losses(trainer.out) == before  # ended is ended
    with pytest.raises(ConfigError, match=r"train\.best\.metric bleu: not measured; there is .*validation_loss"):
        run(tiny_config("data.test=[]", "evaluation.every=1", "train.best.metric=bleu", f"out={trainer.out}-2"))


def test_the_best_needs_evaluations_and_is_no_loss_that_is_not_finite(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"train\.best: nothing is evaluated"):
        run(tiny_config("data.test=[]", "train.best.metric=validation_loss"))
    losses = iter([math.nan, 3.0, 4.0, 2.0])
    monkeypatch.setattr(Trainer, "_validate", lambda *_: {"validation_loss": next(losses)})
    settings = ("data.test=[]", "evaluation.every=1", "train.max_steps=4", "train.keep=1", "train.best={patience: 3}")
    trainer = run(tiny_config(*settings))
    best = checkpoint.pointed(trainer.out / "checkpoints", "best")
    assert best is not None and best.name == "step-00000004" and trainer.progress.best == 2.0


def poisoned(monkeypatch: pytest.MonkeyPatch, positions: set[int], value: float) -> None:
    """The loss of the packs at these positions of the sequence is far off, whenever they come."""
    forward, call = GenerativeSystem.forward, Stepper.__call__
    bad: set[str] = set()
    drawn = {"steps": 0}

    def step(self: Stepper, batches: list[PackedBatch], totals: Any, number: int, lr: float) -> Any:
        if drawn["steps"] in positions:
            bad.update(repr(batch.ids) for batch in batches)
        drawn["steps"] += 1
        return call(self, batches, totals, number, lr)

    def spoilt(self: GenerativeSystem, batch: PackedBatch) -> Output:
        output = forward(self, batch)
        if repr(batch.ids) in bad:
            return Output({name: loss * value for name, loss in output.losses.items()}, output.counts)
        return output

    monkeypatch.setattr(Stepper, "__call__", step)
    monkeypatch.setattr(GenerativeSystem, "forward", spoilt)


GUARD = "train.guard={window: 8, sigmas: 20, rewind_after: 2, max_rewinds: 1}"


@pytest.mark.parametrize("value", [1000.0, float("nan")])
def test_a_spike_is_skipped(value: float, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {6}, value)
    trainer = run(tiny_config(*NO_TEST, GUARD, "train.max_steps=12"))
    (event,) = map(json.loads, (trainer.out / "guard.jsonl").read_text().splitlines())
    assert event["step"] == 7 and event["action"] == "skip" and event["ids"]
    assert [row["step"] for row in rows(trainer.out) if row.get("skipped")] == [7]
    assert trainer.progress.skipped == 1 and trainer.progress.step == 12
    assert all(bool(torch.isfinite(p).all()) for p in trainer.system.parameters())


def test_spikes_in_a_row_rewind_and_are_passed_over(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {6, 7}, 1000.0)
    trainer = run(tiny_config(*NO_TEST, GUARD, "train.max_steps=12", "train.save_every=4"))
    events = [json.loads(line) for line in (trainer.out / "guard.jsonl").read_text().splitlines()]
    assert [(event["step"], event["action"]) for event in events] == [(7, "skip"), (8, "rewind")]
    assert [row["step"] for row in rows(trainer.out)] == list(range(1, 13))
    state = checkpoint.read_state(checkpoint.newest(trainer.out / "checkpoints"))  # type: ignore[arg-type]
    assert state["loader"]["passed_over"] == [6, 7] and state["loader"]["step"] == 14
    assert trainer.progress.skipped == 0  # what was rewound is undone


def test_spikes_without_end_end_the_run(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, set(range(6, 99)), 1000.0)
    with pytest.raises(MMError, match=r"2 steps in a row had a loss or gradient far out of range.*after 1 rewinds"):
        run(tiny_config(*NO_TEST, GUARD, "train.max_steps=20"))


class Reads(TorchDispatchMode):
    """Counts what makes a GPU's host wait: numbers read back, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item"):
            self.count[name] = self.count.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def unseen(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(self: Any) -> Any:
        with _disable_current_modes():
            return function(self)

    return call


def test_numbers_are_read_back_once_a_step(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the guard and the log need comes in one copy, which here is no read of single numbers at all."""
    # What differs on a GPU: attention does not group segments on the host, and batches were counted before the copy.
    monkeypatch.setattr(attention, "choose_implementation", lambda device: "dense")
    for kind in (PackedBatch, MediaBatch):
        monkeypatch.setattr(kind, "__post_init__", unseen(kind.__post_init__))
    monkeypatch.setattr(MediaBatch, "stacked", unseen(MediaBatch.stacked))  # asks shapes, which are on the host
    counts = []
    call = Stepper.__call__

    def counted(self: Stepper, *arguments: Any) -> Any:
        with Reads() as reads:
            done = call(self, *arguments)
        counts.append(reads.count)
        return done

    monkeypatch.setattr(Stepper, "__call__", counted)
    run(tiny_config(*NO_TEST, "train.max_steps=3", "train.micro_batch=1"))
    assert counts == [{}, {}, {}]
