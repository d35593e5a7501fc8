"""Tagging from a folder, a table and a published checkpoint, in one command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from music_run import HUBERT, RATE
from ranks import Ranks

from mm.cli import main
from mm.config import load_config
from mm.hub import load
from mm.models.released.mert import write
from mm.models.systems.mert.config import MertConfig
from mm.train.trainer import Trainer, Unwatched

CONFIG = Path(__file__).parents[2] / "configs/mert/tag.yaml"
GENRES, TAGS = ("low", "high"), ("deep;dark", "bright")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder in the released layout."""
    torch.manual_seed(0)
    config = MertConfig.model_validate({"kind": "mert", "encoder": {"config": HUBERT}, "weights": {"codes": 0}})
    folder = tmp_path_factory.mktemp("release")
    write(config.build(), folder)
    return folder


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones below 300 Hz and above 1.5 kHz, half of them in noise, of 0.3 to 0.7 s."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "audio").mkdir()
    lines = ["file,genre,tags,split"]
    for number in range(48):
        rng = np.random.default_rng(number)
        time = np.arange(int(RATE * rng.uniform(0.3, 0.7))) / RATE
        high, noisy = number % 2, number // 2 % 2
        tone = np.sin(2 * np.pi * (rng.uniform(1500, 2500) if high else rng.uniform(120, 300)) * time)
        soundfile.write(folder / f"audio/{number}.wav", 0.3 * tone + 0.1 * noisy * rng.standard_normal(len(time)), RATE)
        split = "test" if number % 3 == 0 else "train"
        lines.append(f"audio/{number}.wav,{GENRES[high]},{TAGS[high]},{split}")
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def overrides(songs: Path, release: Path, out: Path, column: str, *more: str) -> list[str]:
    """Of the shipped config, for a small run with the labels of a column of the table."""
    return [
        f"data.root={songs}", f"model.released={release}", f"model.labels={songs}/labels.csv:{column}",
        f"data.sources.0.labels={column}", f"data.test.0.labels={column}",
        "data.sources.0.min_seconds=0.2", "data.test.0.min_seconds=0.2", "data.context_length=128",
        "train.batch_tokens=512", "train.micro_batch=2", "train.optimizer.lr=1e-3", "train.params=[]",
        "train.device=cpu", "train.epochs=null", "train.max_steps=40", "model.hidden=32", "data.workers=0",
        f"data.cache={out.parent / 'cache'}", f"out={out}", *more,
    ]  # fmt: skip


def test_one_label(songs: Path, release: Path, tmp_path: Path) -> None:
    assert main(["train", str(CONFIG), *overrides(songs, release, tmp_path / "run", "genre")]) == 0
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert found["test_accuracy"] > 0.9 and found["test_tags"] < 0.4
    system, layout, config = load(tmp_path / "run", "cpu")
    assert config.model.labels == ("high", "low") and layout.tokenizer.id("low") == 2
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    written = load(tmp_path / "hf", "cpu")[0].encoder.state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in system.encoder.state_dict().items())


def scored(*settings: Any) -> dict[str, float]:
    result = Trainer(load_config(CONFIG, overrides(*settings)), Unwatched()).run()
    return {name: value for name, value in result.items() if name.startswith("test_")}


def test_several_labels(songs: Path, release: Path, ranks: Ranks, tmp_path: Path) -> None:
    """In one process, and on two that see half of the split each."""
    found = scored(songs, release, tmp_path / "one", "tags", "model.task=tags")
    assert found["test_roc_auc"] > 0.8 and found["test_average_precision"] > 0.7 and found["test_hits"] > 0.7
    few = "tags", "model.task=tags", "model.dropout=0", "train.max_steps=2"
    one, *two = [
        scored(songs, release, tmp_path / "few", *few),
        *ranks.run(scored, 2, songs, release, tmp_path / "two", *few, "train.engine={kind: fsdp}"),
    ]
    assert two[0] == two[1] == pytest.approx(one, rel=1e-4)
