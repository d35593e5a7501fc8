"""COSMO in real runs: both objectives fall, frozen parts stay, a run resumes, and two ranks are one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from tiny_cosmo import FROZEN, MODEL
from whole_runs import StopAt, train, weights

from mm.config import load_config
from mm.errors import ConfigError
from mm.train.estimate import estimate
from mm.train.features import encode
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.trainer import Trainer

SOURCE = {"kind": "captions", "path": "builtin:emoji/validation-*.tar.gz", "prompt": "{language}: "}
TEXT = {"kind": "text", "name": "text"}


@pytest.fixture
def cosmo(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """Writes the config of a run of six steps, four rows each, a quarter of them text alone."""
    (tmp_path / "text.txt").write_text("A text without pictures, of which there is but little. " * 60)

    def write(**sections: Any) -> Path:
        values = {
            "out": str(tmp_path / "run"),
            "data": {
                "sources": [SOURCE, {**TEXT, "path": str(tmp_path / "text.txt")}], "validation": [SOURCE],
                "context_length": 64, "visits": 2, "workers": 0, "cache": str(cache), "too_long": "split",
                "mixture": {"weights": {"emoji": 3, "text": 1}},
            },
            "model": MODEL,
            "train": {
                "max_steps": 6, "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "save_every": 3,
                "params": FROZEN, "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-6},
                "schedule": {"kind": "constant", "warmup": 0},
            },
            **sections,
        }  # fmt: skip
        path = tmp_path / "cosmo.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_both_objectives_are_learned_and_what_is_frozen_stays(cosmo: Callable[..., Path], tmp_path: Path) -> None:
    path = cosmo(evaluation={"every": 12})
    train(path, ("train.max_steps=24", "train.save_every=12"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    for name in ("loss/next_token", "loss/contrastive"):
        first, last = (sum(row[name] for row in some) / 8 for some in (rows[:8], rows[-8:]))
        assert last < first, name
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/next_token"] + row["loss/contrastive"], rel=1e-5)
    held_out = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in held_out] == [12, 24]
    assert held_out[1]["validation/contrastive"] > 0
    folder = tmp_path / "run/checkpoints"
    early, late = (weights(folder / f"step-{step:08}") for step in (12, 24))
    for name, tensor in early.items():
        frozen = name.startswith(("model.vision.", "model.language.")) and ".gated." not in name
        assert torch.equal(tensor, late[name]) == frozen, name


def test_a_run_resumes_bit_for_bit(cosmo: Callable[..., Path], tmp_path: Path) -> None:
    path, whole, parts = cosmo(evaluation={"every": 2}), tmp_path / "whole", tmp_path / "parts"
    train(path, (f"out={whole}",))

    with pytest.raises(Interrupted):
        Trainer(load_config(path, (f"out={parts}",)), StopAt(3)).run()
    train(path, (f"out={parts}",), resume=True)
    names = ("loss", "loss/contrastive", "grad_norm", "step_tokens", "validation_loss")
    found, expected = (
        [[row.get(name) for name in names] for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (parts, whole)
    )
    assert found == expected and len(found) == 6
    ours, theirs = (weights(folder) for folder in (parts, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Teller:
    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...


def test_numbers_of_half_the_length_are_near(cosmo: Callable[..., Path], tmp_path: Path) -> None:
    """A run under bfloat16; and one that reads what the frozen tower gives, computed once and kept in bfloat16: four
    rows for every picture, which takes one position."""
    path = cosmo()
    train(path, ("train.max_steps=3", f"out={tmp_path / 'whole'}"))
    train(path, ("train.max_steps=3", "train.precision=bf16", f"out={tmp_path / 'bf16'}"))
    encode(load_config(path, ("data.features=true",)), [], None, (0, 1), Teller())
    train(path, ("train.max_steps=3", "data.features=true", f"out={tmp_path / 'read'}"))
    whole, *others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "bf16", "read"))
    for other in others:
        assert other[0]["loss"] != whole[0]["loss"]
        for name in ("loss", "loss/contrastive"):
            assert [row[name] for row in other] == pytest.approx([row[name] for row in whole], rel=2e-2), name


def test_a_run_is_estimated(cosmo: Callable[..., Path]) -> None:
    found = estimate(load_config(cosmo(model={**MODEL, "frames": 2})))
    assert found["flops_per_step"]["forward"] > 0 and found["tokens_per_step"]["image"] > 0
    assert set(found["parameters"]) >= {"vision", "language", "resampler", "text_query"}


def test_two_ranks_are_one(cosmo: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    """Pairs are of all ranks; some rows have no pictures, and clips, which there are none of, run on dummies. Sharded
    weights are gathered equally often on both, whatever texts and pictures they have."""
    path = cosmo(model={**MODEL, "frames": 2, "train_new_tokens": True}, evaluation={"every": 2})
    runs = {
        "single": (1, ()),
        "fsdp": (2, ("train.engine={kind: fsdp}", "train.activation_checkpointing={mode: full}")),
        "zero": (2, ("train.engine={kind: deepspeed, stage: 3}",)),
    }
    found = {}
    for name, (processes, settings) in runs.items():
        out = tmp_path / name
        ranks.run(train, processes, path, (*settings, "train.max_steps=4", f"out={out}"))
        found[name] = read_metrics(out / "metrics.jsonl")
    for name in ("fsdp", "zero"):
        for key in ("loss", "loss/next_token", "loss/contrastive", "grad_norm"):
            values = [row[key] for row in found[name]]
            assert values == pytest.approx([row[key] for row in found["single"]], rel=1e-4), (name, key)
        held_out = found[name][-1]["validation_loss"]
        assert held_out == pytest.approx(found["single"][-1]["validation_loss"], rel=1e-4), name


def test_a_split_without_pairs_is_evaluated(cosmo: Callable[..., Path], tmp_path: Path) -> None:
    text = json.dumps([{**TEXT, "path": str(tmp_path / "text.txt")}])
    train(cosmo(evaluation={"every": 2}), ("train.max_steps=2", f"data.validation={text}"))
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert last["validation_loss"] > 0 and not [name for name in last if "recall" in name]


def test_sources_of_pairs_that_are_not_there_are_said(cosmo: Callable[..., Path]) -> None:
    path = cosmo()
    with pytest.raises(ConfigError, match="emojis is not among the sources of the training set, which are emoji, text"):
        train(path, ("model.contrastive.sources=[emoji, emojis]",))
