"""MERT in real runs: recordings of all lengths in a folder, masks and noises drawn by row, in one process and two."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from music_run import HUBERT, MODEL, ROW, wav
from ranks import Ranks
from whole_runs import StopAt, train, weights

from mm.config import load_config
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.trainer import Trainer

DROPPED = {**MODEL, "encoder": {"config": {**HUBERT, "layerdrop": 0.3}}}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` with 24 recordings of 0.2 to 1.4 s; `held_out/` with 6."""
    folder = tmp_path_factory.mktemp("music")
    for split, count in (("train", 24), ("held_out", 6)):
        (folder / split / "by_nobody").mkdir(parents=True)
        for number in range(count):
            path = folder / split / ("by_nobody" if number % 2 else ".") / f"{number:02d}.wav"
            path.write_bytes(wav(100 + number, 4800 + 1237 * number))
    return folder


def written(recordings: Path, folder: Path, cache: Path, **sections: Any) -> Path:
    """The config of a run of six steps, three rows each."""

    def source(split: str) -> list[dict[str, Any]]:
        return [{"kind": "recordings", "path": str(recordings / split), "min_seconds": 0.1}]

    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": source("train"), "validation": source("held_out"), "test": source("held_out"),
            "context_length": ROW, "cache": str(cache), "workers": 0,
        },
        "model": DROPPED,
        "train": {
            "max_steps": 6, "batch_tokens": 3 * ROW, "micro_batch": 1, "device": "cpu", "save_every": 3,
            "optimizer": {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.98], "eps": 1e-6},
            "schedule": {"kind": "constant", "warmup": 0},
        },
        **sections,
    }  # fmt: skip
    path = folder / "music.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def music(recordings: Path, tmp_path: Path, cache: Path) -> Callable[..., Path]:
    return lambda **sections: written(recordings, tmp_path, cache, **sections)


OBJECTIVES = ("codes", "cqt", "feature_penalty")


def test_it_learns_and_is_evaluated(music: Callable[..., Path], tmp_path: Path) -> None:
    result = train(music(evaluation={"every": 20}), ("train.max_steps=40", "train.save_every=40"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 40
    for row in rows:
        terms = [row[f"loss/{name}"] for name in OBJECTIVES]
        assert row["loss"] == pytest.approx(terms[0] + terms[1] + 10 * terms[2], rel=1e-5)
        assert 0.3 < row["masked_frames"] < 0.9 and 0 <= row["mixed_clips"] <= 1
    assert sum(row["mixed_clips"] for row in rows) / 40 == pytest.approx(0.45, abs=0.15), "half, but for clips alone"
    first, last = (
        [sum(row[key] for row in some) / 10 for key in ("loss/codes", "code_accuracy")]
        for some in (rows[:10], rows[-10:])
    )
    assert last[0] < first[0] - 0.3 and last[1] > first[1]
    held_out = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in held_out] == [20, 40]
    chance = math.log(6) + math.log(4)
    assert held_out[0]["validation/codes"] < chance - 0.3 and held_out[0]["validation/mixed_clips"] == 0
    # The test split is the validation split here, and masks are those of the samples: nothing else is drawn.
    assert result["test_loss"] == held_out[1]["validation_loss"]
    assert json.loads((tmp_path / "run/eval.json").read_text()) == result


def test_stopped_and_resumed_is_bit_for_bit_the_same(music: Callable[..., Path], tmp_path: Path) -> None:
    """With dropout, and another number of workers."""
    some = {**DROPPED, "encoder": {"config": {**HUBERT, "layerdrop": 0.3, "hidden_dropout": 0.1}}}
    path, whole, parts = music(model=some), tmp_path / "whole", tmp_path / "parts"
    train(path, (f"out={whole}",))

    with pytest.raises(Interrupted):
        Trainer(load_config(path, (f"out={parts}",)), StopAt(3)).run()
    train(path, (f"out={parts}", "data.workers=1"), resume=True)
    names = ("loss", "grad_norm", "code_accuracy", "mixed_clips")
    found, expected = (
        [[row[name] for name in names] for row in read_metrics(folder / "metrics.jsonl")] for folder in (parts, whole)
    )
    assert found == expected and len(found) == 6
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


SPLIT_ALL = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""Else stage 3 keeps what is below 100,000 numbers whole: the whole of a tiny model."""
WITHOUT_TEST = ("data.test=[]", "evaluation.every=3")


@pytest.fixture(scope="module")
def expected(recordings: Path, cache: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, a row at once."""
    folder = tmp_path_factory.mktemp("expected")
    ranks.run(train, 1, written(recordings, folder, cache), WITHOUT_TEST)
    return folder / "run"


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ("train.micro_batch=3",)),
        (1, ("train.activation_checkpointing.mode=full",)),
        (2, ("train.engine={kind: fsdp}",)),
        (2, ("train.engine={kind: fsdp, shard_size: 1}", "train.micro_batch=3")),
        (2, (f"train.engine={{kind: deepspeed, stage: 3, raw: {SPLIT_ALL}}}",)),
    ],
    ids=["at once", "recomputed", "fsdp", "copies", "zero 3"],
)  # fmt: skip
def test_however_a_step_is_split_the_run_is_the_same(
    processes: int, overrides: tuple[str, ...], music: Callable[..., Path], ranks: Ranks, expected: Path, tmp_path: Path
) -> None:
    """Ranks have other numbers of clips, of other lengths, and one of them a row of padding."""
    found = tmp_path / "run"
    ranks.run(train, processes, music(), (*WITHOUT_TEST, *overrides))
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    assert len(rows) == len(others) == 6
    for row, other in zip(rows, others, strict=True):
        for name in ("loss", *(f"loss/{name}" for name in OBJECTIVES)):
            assert row[name] == pytest.approx(other[name], rel=1e-5), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), row["step"]
        assert row.get("validation_loss", 0) == pytest.approx(other.get("validation_loss", 0), rel=1e-5)
    ours, theirs = weights(found), weights(expected)
    for name, tensor in theirs.items():
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bf16_is_that_of_one_process(
    norm_first: bool, music: Callable[..., Path], ranks: Ranks, tmp_path: Path
) -> None:
    """Sharded weights are gathered in bfloat16, beside a residual stream in float32."""
    settings = ("data.test=[]", "train.precision=bf16", f"model.encoder.config.do_stable_layer_norm={norm_first}")
    for folder, processes, engine in (("one", 1, "single"), ("two", 2, "fsdp")):
        own = (f"train.engine={{kind: {engine}}}", f"out={tmp_path / folder}")
        ranks.run(train, processes, music(), (*settings, *own))
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-2)
