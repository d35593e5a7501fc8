"""Training killed again and again goes on as if nothing had happened; a spike in the data is survived.

`MM_SOAK_KILLS`: how often a run is killed (a fifth of that on two ranks), half of the times inside a save.
`MM_SOAK_SEED`: when.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

KILLS = int(os.environ.get("MM_SOAK_KILLS", "3"))
SEED = int(os.environ.get("MM_SOAK_SEED", "0"))
OVERRIDES = ("data.test=[]", "data.validation=[]", "train.save_every=2")
STEPS_AN_ATTEMPT = 5
"""More than an attempt can take before it is killed."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_inside_a_save(event: int) -> None:
    """At so many events of writing checkpoints from now on; a save has about 45.

    They are every 16th block of a tensor file, and whatever is opened, made, renamed or removed in the folder.
    """
    import mm.train.storage as storage

    seen = blocks = 0

    def happens() -> None:
        nonlocal seen
        seen += 1
        time.sleep(0.001)  # so that training steps fall into the time of a save
        if seen == event:
            die()

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and "checkpoints" in str(arguments[0]):
            happens()

    crc32 = storage.zlib.crc32

    def block(data: Any, value: int = 0) -> int:
        nonlocal blocks
        blocks += 1
        if blocks % 16 == 0:
            happens()
        return crc32(data, value)

    storage.zlib = SimpleNamespace(crc32=block)  # type: ignore[attr-defined]
    sys.addaudithook(audit)


def kill_at_a_moment(steps: int, seconds: float) -> None:
    """So long after the start of the attempt's step of this number."""
    from mm.train.step import Stepper

    real, left = Stepper.__call__, steps

    def call(self: Any, *arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
        left -= 1
        return real(self, *arguments)

    Stepper.__call__ = call  # type: ignore[method-assign]


def arm(rng: np.random.Generator, inside: bool) -> None:
    if inside:
        kill_inside_a_save(int(rng.integers(1, 90)))
    else:
        kill_at_a_moment(int(rng.integers(0, 3)), float(rng.uniform(0, 0.05)))


def train(arguments: list[str]) -> None:
    """`mm train --resume`; ends the process."""
    from mm.cli import main

    raise SystemExit(main(["train", *arguments, "--resume"]))


def check_newest(folder: Path) -> None:
    """There is none yet, or it is whole, every byte of it."""
    from mm.train import checkpoint
    from mm.train.checkpoint_tools import verify

    newest = checkpoint.newest(folder)
    assert newest is None or not any(verify(newest, lambda what, count: None).values())


def attempt(seed: int, inside: bool, arguments: list[str]) -> None:
    arm(np.random.default_rng(seed), inside)
    train(arguments)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    from mm.train.metrics import read_metrics

    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from ranks import status_of

    config = tiny(train={**_tiny_train(), "max_steps": STEPS_AN_ATTEMPT * (KILLS + 1)})
    whole, out = ([str(config), f"out={tmp_path / name}", *OVERRIDES] for name in ("whole", "killed"))
    assert status_of(train, whole) == 0
    rng, found = np.random.default_rng(SEED), []
    for number in range(KILLS):
        inside = number % 2 == 0
        assert status_of(attempt, int(rng.integers(1 << 32)), inside, out) == -signal.SIGKILL
        found.append([path.name for path in (tmp_path / "killed/checkpoints").glob(".*")])
        check_newest(tmp_path / "killed/checkpoints")
    assert status_of(train, out) == 0
    cut = [one for one in found if any(name.endswith(".partial") for name in one)]
    assert cut, "no kill fell into a save"
    print(f"{len(found)} kills, {len(cut)} of them left a half-written checkpoint")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def _tiny_train() -> dict[str, Any]:
    from tiny_run import TINY

    return dict(TINY["train"])


def run_trainer(config: str, out: str, *overrides: str) -> None:
    from mm.config import load_config
    from mm.train.trainer import Trainer, Unwatched

    Trainer(load_config(config, (f"out={out}", *OVERRIDES, *overrides)), Unwatched()).run(resume=True)


def test_a_killed_rank_ends_the_run_and_it_goes_on_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, ranks: Any
) -> None:
    """Two ranks under fsdp, started by torchrun; one of them is killed."""
    kills = max(1, KILLS // 5)
    train = {**_tiny_train(), "max_steps": STEPS_AN_ATTEMPT * (kills + 1), "engine": {"kind": "fsdp"}}
    config, whole, out = str(tiny(train=train)), tmp_path / "whole", tmp_path / "killed"
    ranks.run(run_trainer, 2, config, str(whole))
    rng = np.random.default_rng(SEED)
    for number in range(kills):
        victim = f"{rng.integers(2)},{number % 2},{rng.integers(1 << 32)}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, victim]
        command += [config, f"out={out}", *OVERRIDES]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
        check_newest(out / "checkpoints")
    ranks.run(run_trainer, 2, config, str(out))
    assert losses(out) == losses(whole)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Positions in the sequence of packs whose targets are all the same, wrong token. Empty at first."""
    from mm.data import loader

    real, positions = loader._Make.__call__, set[int]()

    def make(self: Any, request: Any, allocate: Any) -> Any:
        rows = real(self, request, allocate)
        for row, (_, position) in enumerate(request.draws):
            if position in positions:
                labels = rows.arrays["labels"]
                labels[row] = np.where(labels[row] >= 0, 3000, labels[row])
        return rows

    monkeypatch.setattr(loader._Make, "__call__", make)
    yield positions


def test_a_spike_is_skipped_rewound_and_passed_over(
    tiny: Callable[..., Path], tmp_path: Path, planted: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad step is skipped; three in a row are passed over, and then it is as if they had never been in the data."""
    from mm.config import load_config
    from mm.data.loader import PackedLoader, source_infos
    from mm.data.mixture import Mixture
    from mm.train.trainer import Trainer, Unwatched

    def run(out: str) -> Trainer:
        overrides = ("train.max_steps=36", "train.save_every=10", "train.guard.window=16", *OVERRIDES[:2])
        trainer = Trainer(load_config(tiny(), (f"out={tmp_path / out}", *overrides)), Unwatched())
        trainer.run()
        return trainer

    rows = 4  # of a step
    places = {step: range(rows * step, rows * step + rows) for step in (15, 24, 25, 26)}
    planted |= {position for place in places.values() for position in place}
    spiked = run("spiked")
    events = [json.loads(line) for line in (tmp_path / "spiked/guard.jsonl").read_text().splitlines()]
    assert [(event["step"], event["action"]) for event in events] == [
        (16, "skip"), (25, "skip"), (26, "skip"), (27, "rewind"),
    ]  # fmt: skip
    dataset = spiked.splits["train"]
    mixture = Mixture(source_infos(dataset), spiked.config.data.mixture, spiked.config.seed)
    order = [mixture.next().pack for _ in range(rows * 30)]  # type: ignore[union-attr]
    for event, place in zip(events, places.values(), strict=True):
        samples = [[segment.id for segment in dataset.read(order[n]).segments] for n in place]
        assert sorted(event["ids"]) == sorted(samples), "the event names the step's samples"
        assert event["grad_norm"] > event["threshold"] and "standard deviations" in event["reason"]
    assert spiked.progress.step == 36 and spiked.progress.skipped == 1

    class Passing(PackedLoader):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.pass_over((24, 25, 26))

    planted.intersection_update(places[15])
    monkeypatch.setattr("mm.train.stages.PackedLoader", Passing)
    run("without")
    assert losses(tmp_path / "spiked") == losses(tmp_path / "without")
    assert losses(tmp_path / "spiked")[-1][1] < losses(tmp_path / "spiked")[0][1] - 0.5


if __name__ == "__main__":
    rank, inside, seed = map(int, sys.argv[1].split(","))
    if int(os.environ["RANK"]) == rank:
        arm(np.random.default_rng(seed), bool(inside))
    train(sys.argv[2:])
