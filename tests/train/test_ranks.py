"""Runs of several processes: the same losses as one, resumed at another world size, ended when a rank is missing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, Ranks
from whole_runs import train, weights

from mm.errors import DataError
from mm.train import checkpoint
from mm.train.distributed import HUNG, RankFailed, World
from mm.train.metrics import read_metrics

NO_TEST = ("data.test=[]", "data.validation=[]")
STEADY = ("train.optimizer={kind: adamw, lr: 1e-3, eps: 1e-6}",)
FSDP = ("train.engine={kind: fsdp}",)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def close(a: Path, b: Path) -> None:
    torch.testing.assert_close(losses(a), losses(b), rtol=1e-5, atol=0)
    found, expected = weights(a), weights(b)
    # DeepSpeed gives a (zero) state to parameters that never had a gradient, too.
    assert found.keys() >= expected.keys() and all("featurizer.norm" in name for name in found.keys() - expected.keys())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_stopped_and_resumed_with_other_processes_and_engines(
    tiny: Callable[..., Path], ranks: Ranks, tmp_path: Path
) -> None:
    """1 process, then 2 sharded, 4 hybrid, 2 under ZeRO 2, 1: as one run of one process, with evaluation."""
    path, data = tiny(), ("data.test=[]", "evaluation.every=4", "train.batch_tokens=640", "train.micro_batch=1")
    parts = tmp_path / "parts"
    kinds = [
        (1, "{kind: single}"), (2, "{kind: fsdp}"), (4, "{kind: fsdp, shard_size: 2}"),
        (2, "{kind: deepspeed, stage: 2}"), (1, "{kind: single}"),
    ]  # fmt: skip
    for number, (processes, engine) in enumerate(kinds):
        steps = 2 * (number + 1)
        schedule = ("train.schedule={kind: constant, warmup: 0}",)
        ranks.run(
            train, processes, path,
            (*STEADY, *data, *schedule, f"train.max_steps={steps}", f"train.engine={engine}", f"out={parts}"), True,
        )  # fmt: skip
    ranks.run(train, 1, path, (*STEADY, *data, *schedule, "train.max_steps=10", f"out={tmp_path / 'steady'}"))
    close(parts, tmp_path / "steady")
    held_out = [
        [row.get("validation_loss") for row in read_metrics(f / "metrics.jsonl")] for f in (parts, tmp_path / "steady")
    ]
    torch.testing.assert_close([x for x in held_out[0] if x], [x for x in held_out[1] if x], rtol=1e-5, atol=0)


def test_torchrun_runs_the_command_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As documented; with SIGTERM in between, and with the whole evaluation at the end."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mm", "train",
        str(tiny()), f"out={out}", *FSDP, "--resume",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, "train.max_steps=2000"], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(losses(out)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None, said
    step = checkpoint.read_state(newest)["step"]
    assert step == len(losses(out)) >= 3 and "stopped after step" in said
    done = subprocess.run([*command, f"train.max_steps={step + 2}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == step + 2 and "match_accuracy" in done.stdout and done.stdout.count("run:") == 1


def damaged(path: Path, overrides: tuple[str, ...]) -> str:
    """Rank 1 cannot read its data at step 3."""
    from mm.data.loader import PackedLoader

    steps = PackedLoader.steps

    def broken(self: PackedLoader, count: int) -> Any:
        for number, batches in enumerate(steps(self, count)):
            if number == 2 and self._rank == 1:
                raise DataError("shard 7: damaged")
            yield batches

    PackedLoader.steps = broken  # type: ignore[method-assign]
    try:
        train(path, overrides)
    except (DataError, RankFailed) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        PackedLoader.steps = steps  # type: ignore[method-assign]
    return "nothing"


def test_damaged_data_on_one_rank_ends_all_and_saves(tiny: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = ranks.run(damaged, 2, tiny(), (*FSDP, *NO_TEST, f"out={out}"))
    assert found == ["RankFailed: another rank cannot read its data", "DataError: shard 7: damaged"]
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"
    # Once it is mended the run goes on with the step that could not be read.
    ranks.run(train, 2, tiny(), (*FSDP, *NO_TEST, f"out={out}"), True)
    ranks.run(train, 2, tiny(), (*FSDP, *NO_TEST, f"out={tmp_path / 'steady'}"))
    assert losses(out) == losses(tmp_path / "steady")


def unreadable(path: Path, overrides: tuple[str, ...]) -> str:
    """Rank 1 cannot read its second batch of validation."""
    import mm.train.trainer as trainer

    one_pass = trainer.one_pass

    def broken(*args: Any) -> Any:
        for number, batch in enumerate(one_pass(*args)):
            if number == 1 and args[-2] == 1:
                raise DataError("shard 7: damaged")
            yield batch

    trainer.one_pass = broken  # type: ignore[assignment]
    try:
        train(path, overrides)
    except (DataError, RankFailed) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.one_pass = one_pass
    return "nothing"


def test_damaged_data_to_validate_with_end_all_and_save(
    tiny: Callable[..., Path], ranks: Ranks, tmp_path: Path
) -> None:
    options = (*FSDP, "data.test=[]", "evaluation.every=3", "evaluation.micro_batch=1", f"out={tmp_path / 'run'}")
    found = ranks.run(unreadable, 2, tiny(), options)
    of = "RankFailed: another rank cannot read its data of the validation split"
    assert found == [of, "DataError: shard 7: damaged"]
    newest = checkpoint.newest(tmp_path / "run/checkpoints")
    assert newest is not None and newest.name == "step-00000003"


def failing_in_turn() -> str:
    world = World.from_environment()

    def prepare() -> str:
        if world.rank == 0:
            raise DataError("nothing to pack")
        return "packed"

    try:
        return world.in_turn(prepare)
    except (DataError, RankFailed) as error:
        return f"{type(error).__name__}: {error}"


def test_who_prepares_first_and_fails_ends_the_others(ranks: Ranks) -> None:
    found = ranks.run(failing_in_turn, 2, seconds=30)
    assert found[0] == "DataError: nothing to pack"
    assert found[1] in ("RankFailed: rank 0: DataError", "RankFailed: rank 0 has ended")


def missing(path: Path, overrides: tuple[str, ...], said: Path) -> None:
    """Rank 1 does not come to step 3."""
    from mm.train.step import Stepper

    sys.stderr = open(f"{said}.{os.environ['RANK']}", "w")
    call = Stepper.__call__

    def stuck(self: Stepper, batches: Any, totals: Any, step: int, lr: float) -> Any:
        if step == 2 and self.world.rank == 1:
            time.sleep(600)
        return call(self, batches, totals, step, lr)

    Stepper.__call__ = stuck  # type: ignore[method-assign]
    train(path, overrides)


def test_a_rank_that_does_not_come_is_named(tiny: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    settings = (*FSDP, *NO_TEST, "train.hang_timeout=10", f"out={tmp_path / 'run'}")
    with pytest.raises(RankError, match=f"ended with status {HUNG}"):
        ranks.run(missing, 2, tiny(), settings, tmp_path / "said", seconds=100)
    said = "".join((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert "no progress for 10 s on rank" in said and "did not come: rank 1 (step 3, computing" in said
    assert "in stuck (test_ranks.py:" in said
