"""Masked language models in real runs: masks drawn by row, a curriculum in stages, in one process and two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from whole_runs import train, weights

import mm
from mm.cli import main
from mm.config import load_config
from mm.data.loader import one_pass
from mm.data.prepare import open_splits
from mm.train.estimate import estimate
from mm.train.metrics import read_metrics

MODEL: dict[str, Any] = {
    "kind": "masked_lm",
    "language": {
        "tokenizer": "builtin:emoji",
        "config": {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 64, "hidden_dropout_prob": 0,
            "attention_probs_dropout_prob": 0,
        },
    },
    "template": {"bos": "<s>", "eos": "<|im_end|>", "pad": "<|endoftext|>"},
    "mask_token": "<mask>",
    "masking": {"rate": 0.3, "unit": "word"},
}  # fmt: skip
CURRICULUM = [
    {"name": "tokens", "model": {"masking": {"unit": "token", "rate": 0.15}}, "train": {"max_steps": 2}},
    {"name": "masks", "model": {"masking": {"unit": "word", "rate": 0.5, "corruption": [1, 0, 0]}},
     "train": {"max_steps": 2}, "keep_optimizer": True, "carry_on": True},
]  # fmt: skip


def written(folder: Path, cache: Path, **sections: Any) -> Path:
    """The config of a run of four steps, six rows each, on 60 short texts."""
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(60):
        text = f"Text {number}.\n\n" + " ".join(f"word {number * k}" for k in range(number % 9 + 1))
        (texts / f"{'test' if number % 6 == 0 else 'train'}-{number:02d}.md").write_text(text)

    def source(split: str) -> list[dict[str, Any]]:
        return [{"kind": "text", "name": split, "path": str(texts / f"{split}-*.md")}]

    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": source("train"), "validation": source("test"), "test": source("test"), "context_length": 64,
            "workers": 0, "cache": str(cache),
        },
        "model": MODEL,
        "train": {
            "max_steps": 4, "batch_tokens": 384, "micro_batch": 1, "device": "cpu", "save_every": 2,
            "optimizer": {"kind": "adamw", "lr": 3e-3, "eps": 1e-6}, "schedule": {"kind": "constant", "warmup": 0},
        },
        "evaluation": {"every": 2},
        **sections,
    }  # fmt: skip
    path = folder / "text.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def text(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    return lambda **sections: written(tmp_path, cache, **sections)


@pytest.fixture(scope="module")
def expected(cache: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, a row at once."""
    folder = tmp_path_factory.mktemp("expected")
    ranks.run(train, 1, written(folder, cache), ("data.test=[]",))
    return folder / "run"


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ("train.micro_batch=6",)),
        (1, ("train.activation_checkpointing.mode=full",)),
        (2, ("train.engine={kind: fsdp}",)),
    ],
    ids=["at once", "recomputed", "fsdp"],
)
def test_however_a_step_is_split_the_run_is_the_same(
    processes: int, overrides: tuple[str, ...], text: Callable[..., Path], ranks: Ranks, expected: Path, tmp_path: Path
) -> None:
    ranks.run(train, processes, text(), ("data.test=[]", *overrides))
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", expected))
    assert len(rows) == len(others) == 4
    for row, other in zip(rows, others, strict=True):
        for name in ("loss", "masked_share"):
            assert row[name] == pytest.approx(other[name], rel=1e-5), (row["step"], name)
        assert row.get("validation_loss", 0) == pytest.approx(other.get("validation_loss", 0), rel=1e-5)
    ours, theirs = weights(tmp_path / "run"), weights(expected)
    for name, tensor in theirs.items():
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_curriculum_changes_the_masks_and_keeps_all_else(text: Callable[..., Path], tmp_path: Path) -> None:
    """A stage masks another share; stopped between steps it goes on bit for bit."""
    path = text(stages=CURRICULUM, evaluation={"every": 0})
    train(path, ("data.test=[]",))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shares = [row["masked_share"] for row in rows]
    assert max(shares[:2]) < 0.25 < 0.35 < min(shares[2:]), "of all tokens, begin and end of text among them"
    whole = weights(tmp_path / "run")
    steps = {float(value) for name, value in whole.items() if name.endswith(".step")}
    assert steps == {4}, "one optimizer through both"
    halves = ("data.test=[]", f"out={tmp_path / 'halves'}")
    train(path, (*halves, "stages.1.train.max_steps=1"))
    train(path, halves, resume=True)
    again = weights(tmp_path / "halves")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_losses_are_told_by_source(text: Callable[..., Path], tmp_path: Path) -> None:
    """Their mean, by what each source has of the masked tokens, is the loss."""
    data = yaml.safe_load(text().read_text())["data"]
    both = [*data["sources"], *data["validation"]]
    path = text(data={**data, "sources": both, "validation": both}, evaluation={"every": 2})
    train(path, ("data.test=[]", "train.max_steps=2"))
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    for name in ("loss", "validation_loss"):
        parts = [row[f"{'loss_from' if name == 'loss' else name}/{source}"] for source in ("train", "test")]
        assert min(parts) < row[name] < max(parts)


def test_what_is_evaluated_is_what_the_saved_model_says(
    text: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(text()), "train.max_steps=2"]) == 0
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    system, layout, config = mm.load(tmp_path / "run", device="cpu")
    dataset = open_splits(config.data, layout, config.seed)["test"]
    with torch.no_grad():
        outputs = [system(batch) for batch in one_pass(dataset, layout, 3)]
    total = sum(float(output.losses["masked"]) for output in outputs)
    count = sum(int(output.counts["masked"]) for output in outputs)
    assert results["test_loss"] == pytest.approx(total / count, rel=1e-5)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0

    again = text(model={**MODEL, "language": {"name": str(tmp_path / "out")}}, out=str(tmp_path / "named"))
    assert main(["train", str(again), "train.max_steps=1", "data.test=[]"]) == 0
    first = read_metrics(tmp_path / "named" / "metrics.jsonl")[0]["loss"]
    assert first < read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"], "it begins from the trained weights"
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "Text"]) == 2
    assert "does not write text" in capsys.readouterr().err


def test_what_a_step_takes_is_told_before_it_runs(text: Callable[..., Path]) -> None:
    found = estimate(load_config(text()))
    assert found["flops_per_step"]["total"] > 1e6
