"""Pictures with captions and music in one run: trains, goes on bit for bit, closes its ledger, and runs on ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from music_run import MODEL as MUSIC
from music_run import RATE, samples, wave
from ranks import Ranks
from tiny_run import TINY
from whole_runs import StopAt, weights

from mm.config import RunConfig, load_config
from mm.data.check import check
from mm.data.inspect import summary
from mm.data.packed import PackedDataset
from mm.errors import ConfigError
from mm.hub import load
from mm.train.features import encode
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.trainer import Trainer, Unwatched

STEADY = ("train.optimizer={kind: adamw, lr: 2e-3, eps: 1e-6}", "train.schedule={kind: constant, warmup: 0}")


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 recordings of 20 to 79 frames, and one that is no sound."""
    folder = tmp_path_factory.mktemp("music")
    for number in range(60):
        soundfile.write(folder / f"{number:02d}.wav", wave(number, samples(20 + 7 * number % 60)), RATE)
    (folder / "60.wav").write_bytes(b"RIFF and nothing more")
    return folder


@pytest.fixture
def joint(tiny: Callable[..., Path], music: Path) -> Path:
    source = {"kind": "recordings", "path": str(music), "name": "music", "min_seconds": 0.2}
    data = {name: [*TINY["data"]["sources"], source] for name in ("sources", "validation", "test")}
    return tiny(
        data={**TINY["data"], **data, "max_bad_fraction": 0.1, "mixture": {"weights": {"emoji": 2, "music": 1}}},
        model={"kind": "joint", "parts": {"vlm": TINY["model"], "music": MUSIC}, "weights": {"music": 0.2}},
        evaluation={"every": 4},
    )


def config(path: Path, out: Path, *overrides: str) -> RunConfig:
    return load_config(path, (*STEADY, f"out={out}", *overrides))


def rows(out: Path) -> list[dict[str, Any]]:
    """Without what is measured by the clock."""
    clocked = ("elapsed", "per_second", "data_wait", "memory")
    found = read_metrics(out / "metrics.jsonl")
    return [{key: one for key, one in row.items() if not any(name in key for name in clocked)} for row in found]


def test_it_trains_is_stopped_and_goes_on_bit_for_bit(joint: Path, tmp_path: Path) -> None:
    steps = ("train.max_steps=8", "train.save_every=3")
    whole = Trainer(config(joint, tmp_path / "whole", *steps), Unwatched())
    result = whole.run()
    with pytest.raises(Interrupted, match=r"after step 5 of 8"):
        Trainer(config(joint, tmp_path / "parts", *steps), StopAt(4)).run()
    resumed = Trainer(load_config(tmp_path / "parts/config.yaml", ("data.workers=2",)), Unwatched())
    assert resumed.run(resume=True) == result
    found, again = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert found == again and len(found) == 8
    for (name, a), (_, b) in zip(whole.system.named_parameters(), resumed.system.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # Both parts learn, from both sources, by the weights that were asked for.
    for name in ("vlm/next_token", "music/codes", "music/cqt", "music/feature_penalty"):
        seen = [row[f"loss/{name}"] for row in found if f"loss/{name}" in row]
        assert np.mean(seen[-3:]) < np.mean(seen[:3]), name
    last = found[-1]
    assert last["tokens/audio"] == last["tokens_from/music"]
    assert abs(last["tokens_from/music"] / last["tokens"] - 1 / 3) < 128 / last["tokens"] + 1e-9
    assert {"grad_norm/vlm", "grad_norm/music"} <= last.keys()
    # What is held out is measured for both.
    saved = json.loads((tmp_path / "whole/eval.json").read_text())
    assert {"test_vlm/next_token", "test_music/codes", "test_music/cqt"} <= saved.keys()
    assert [row["step"] for row in found if "validation_loss" in row] == [4, 8]
    # A part of the run by its name, with a layout that writes.
    system, layout, _ = load(tmp_path / "whole", "cpu")
    assert torch.equal(system.vlm.connector.mlp[0].weight, whole.system.vlm.connector.mlp[0].weight)
    assert layout.media() == ("image", "audio")


def test_the_ledger_closes(joint: Path, tmp_path: Path) -> None:
    """One epoch: what was packed is what was trained on, tokens by medium and source; one recording is left out."""
    once = (
        "data.visits=1", "data.mixture={max_epochs: {emoji: 1, music: 1}}", "train.max_steps=null", "train.epochs=2",
        "data.test=[]", "data.validation=[]", "evaluation.every=0",
    )  # fmt: skip
    trainer = Trainer(config(joint, tmp_path / "run", *once), Unwatched())
    trainer.run()
    dataset = PackedDataset(trainer.splits["train"].folder)
    found = summary(dataset)
    assert found["ledger_open"] == [] and list(check(dataset)) == []
    ledger = found["ledger"]
    assert ledger["music"]["quarantined"] == 1 and ledger["music"]["samples"] == 61
    assert ledger["music"]["text_tokens"] == ledger["emoji"]["audio_tokens"] == 0
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    for kind in ("text", "image", "audio"):
        assert last[f"tokens/{kind}"] == sum(one[f"{kind}_tokens"] for one in ledger.values()), kind
    for name, one in ledger.items():
        assert last[f"tokens_from/{name}"] == one["segment_tokens"], name


def trained(path: Path, out: Path, *overrides: str) -> dict[str, float]:
    trainer = Trainer(config(path, out, "data.validation=[]", "evaluation.every=0", *overrides), Unwatched())
    result = trainer.run()
    return {name: value for name, value in result.items() if isinstance(value, float)}


def test_two_ranks_equal_one(joint: Path, ranks: Ranks, tmp_path: Path) -> None:
    """With weights in parts, and micro-batches of a row, so that ranks are often at different kinds of data."""
    steps = ("train.max_steps=4", "train.micro_batch=1")
    expected = trained(joint, tmp_path / "one", *steps)
    found = ranks.run(trained, 2, joint, tmp_path / "two", *steps, "train.engine={kind: fsdp}")
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-4)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss/vlm/next_token", "loss/music/codes", "loss/music/cqt", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=5e-6, msg=name)


def test_codes_may_lie_beside_the_data(joint: Path, tmp_path: Path) -> None:
    """The same losses as with a teacher that runs in the step; rows without sound have none."""
    steps, coded = ("train.max_steps=3", "data.validation=[]", "data.test=[]", "evaluation.every=0"), "data.codes=true"
    Trainer(config(joint, tmp_path / "asked", *steps), Unwatched()).run()
    (found,) = encode(config(joint, tmp_path / "read", *steps, coded), [], "cpu", (0, 1), Unwatched()).values()
    assert found["role"] == "codes" and found["items"] == 120 and found["finished"]
    Trainer(config(joint, tmp_path / "read", *steps, coded), Unwatched()).run()
    asked, read = ([row["loss"] for row in rows(tmp_path / out)] for out in ("asked", "read"))
    assert asked == pytest.approx(read, rel=1e-6)


def test_features_are_refused(joint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.features"):
        Trainer(config(joint, tmp_path / "run", "data.features=true"), Unwatched()).run()
