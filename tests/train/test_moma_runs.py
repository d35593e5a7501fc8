"""MoMa in real runs: seed, one expert a modality, several, routers that do not look ahead; codes read or made."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from ranks import Ranks
from tiny_moma import MODEL, POSITIONS
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from whole_runs import train, weights

from mm.config import load_config
from mm.errors import ConfigError, MMError
from mm.report import report_page
from mm.train.estimate import estimate
from mm.train.features import encode
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.trainer import Trainer, Unwatched

SOURCE = {"kind": "captions", "prompt": "{language}: ", "path": "builtin:emoji/validation-*.tar.gz"}
SEVERAL: dict[str, Any] = {"text": 4, "image": 4}


def written(folder: Path, cache: Path, **sections: Any) -> Path:
    """The config of a run of four steps, four rows each."""
    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": [{**SOURCE, "text_first": 0.5}], "validation": [SOURCE], "context_length": 64, "visits": 2,
            "workers": 0, "cache": str(cache),
        },
        "model": MODEL,
        "train": {
            "max_steps": 4, "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "save_every": 2,
            "optimizer": {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1},
            "schedule": {"kind": "constant", "warmup": 0},
        },
        **sections,
    }  # fmt: skip
    path = folder / "moma.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def moma(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    return lambda **sections: written(tmp_path, cache, **sections)


def test_it_learns_both_modalities(moma: Callable[..., Path], tmp_path: Path) -> None:
    experts = {**SEVERAL, "auxiliary": "along", "noise": {"steps": 20, "decay": True}}
    path = moma(model={**MODEL, "experts": experts}, evaluation={"every": 20})
    train(path, ("train.max_steps=40", "train.save_every=40", "train.optimizer.lr=1e-2"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/next_token"] + row["loss/routers"], rel=1e-5)
        least, most = sorted((row["loss/text"], row["loss/image"]))
        assert least - 1e-4 < row["loss/next_token"] < most + 0.01, "a mean of both, and a little for the z-loss"
        for name in ("text", "image"):
            shares = [row[f"{what}/{name}"] for what in ("unrouted", "once", "more")]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert rows[-1]["tokens/image"] % (POSITIONS + 2) == 0 and rows[-1]["tokens/text"] > 0
    for name in ("loss/text", "loss/image", "loss/routers"):
        first, last = (sum(row[name] for row in some) / 10 for some in (rows[:10], rows[-10:]))
        assert last < first, name
    held_out = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in held_out] == [20, 40]
    assert held_out[1]["validation_loss"] == pytest.approx(held_out[1]["validation/next_token"])
    assert held_out[1]["validation/image"] < held_out[0]["validation/image"]


STAGES: list[dict[str, Any]] = [
    {"name": "seed", "train": {"max_steps": 2}},
    {"name": "1t1i", "carry_on": True, "model": {"experts": {"text": 1, "image": 1}}, "train": {"max_steps": 2}},
    {
        "name": "4t4i", "carry_on": True, "train": {"max_steps": 3}, "evaluation": {"every": 0},
        "model": {"experts": {**SEVERAL, "noise": {"steps": 2}}},
    },
    {
        "name": "routers", "carry_on": True, "train": {"max_steps": 2},
        "model": {"experts": {**SEVERAL, "auxiliary": "alone"}},
    },
]  # fmt: skip


def test_a_run_in_stages_resumes_bit_for_bit(moma: Callable[..., Path], tmp_path: Path) -> None:
    """From the middle of the third; the data go on through all of them, and the last trains its routers alone."""
    path, whole, parts = moma(stages=STAGES, evaluation={"every": 1}), tmp_path / "whole", tmp_path / "parts"
    train(path, (f"out={whole}",))
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert ["validation_loss" in row for row in rows] == [True] * 4 + [False] * 3 + [True] * 2

    class StopAfterSix(Unwatched):
        def step(self, row: dict[str, Any], steps: int) -> None:
            if row["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        Trainer(load_config(path, (f"out={parts}",)), StopAfterSix()).run()
    between = weights(parts)
    train(path, (f"out={parts}",), resume=True)
    names = ("loss", "loss/text", "loss/image", "grad_norm", "step_tokens", "validation_loss", "unrouted/text")
    found, expected = (
        [[row.get(name) for name in names] for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (parts, whole)
    )
    assert found == expected
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(name.startswith("model.sparsity.routers") for name in theirs) and between.keys() != theirs.keys()
    # The packs are those of one long stage.
    train(path, (f"out={tmp_path / 'plain'}", "stages=[]", "train.max_steps=9", "evaluation.every=0"))
    plain = read_metrics(tmp_path / "plain/metrics.jsonl")
    assert [row["step_tokens"] for row in plain] == [row["step_tokens"] for row in rows]


def test_each_stage_begins_where_the_one_before_ended(moma: Callable[..., Path], tmp_path: Path) -> None:
    """The first loss of every stage is what one more step of the stage before would have had."""
    kinds: dict[str, dict[str, Any]] = {
        "seed": {},
        "1t1i": {"experts": {"text": 1, "image": 1}},
        "4t4i": {"experts": {**SEVERAL, "capacity": 1, "normalize": True}},
    }
    names = list(kinds)
    stages = [
        {"name": name, "carry_on": number > 0, "model": kinds[name], "train": {"max_steps": 2}}
        for number, name in enumerate(names)
    ]
    train(moma(stages=stages), (f"out={tmp_path / 'grown'}",))
    grown = read_metrics(tmp_path / "grown/metrics.jsonl")
    for number, step in ((0, 2), (1, 4)):
        again = [*stages[: number + 1], {**stages[number], "name": "again", "carry_on": True}]
        train(moma(stages=again), (f"out={tmp_path / f'again{number}'}",))
        row = read_metrics(tmp_path / f"again{number}/metrics.jsonl")[step]
        for name in ("loss/text", "loss/image"):
            assert grown[step][name] == pytest.approx(row[name], rel=1e-5), (names[number], name)


def janus(folder: Path) -> Path:
    """A VQ model of random weights: 16 codes, 4 x 4 of them for a picture of 8 pixels."""
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        embed_dim=4, num_embeddings=16, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, num_patches=4,
    )  # fmt: skip
    JanusVQVAE(config).save_pretrained(folder)
    return folder


class Teller:
    def event(self, text: str) -> None: ...

    def packing(self, what: str, count: int) -> None: ...


def test_codes_are_read_as_the_teacher_would_say_them(tmp_path: Path) -> None:
    teacher = {"kind": "vq", "path": str(janus(tmp_path / "vq"))}
    path = written(tmp_path, tmp_path / "cache", model={**MODEL, "teacher": teacher}, evaluation={"every": 2})
    with pytest.raises(MMError, match="has no codes of a teacher"):
        train(path, ("data.codes=true", f"out={tmp_path / 'none'}"))
    train(path, (f"out={tmp_path / 'made'}",))
    made = encode(load_config(path, ("data.codes=true",)), [], None, (0, 1), Teller())
    assert {one["split"]: one["finished"] for one in made.values()} == {"train": True, "validation": True}
    train(path, ("data.codes=true", f"out={tmp_path / 'read'}"))
    test = f"data.test=[{{kind: captions, path: '{SOURCE['path']}', prompt: '{{language}}: ', captions: all}}]"
    encode(load_config(path, ("data.codes=true", test)), ["test"], None, (0, 1), Teller())
    few = ("evaluation.candidates=4", "evaluation.samples=2", "evaluation.every=0")
    train(path, ("data.codes=true", test, *few, f"out={tmp_path / 'drawn'}"))
    result = json.loads((tmp_path / "drawn/eval.json").read_text())
    assert 0 <= result["match_accuracy"] <= 1 and result["caption_loss"] > 0
    samples = json.loads((tmp_path / "drawn/samples.json").read_text())
    assert len(samples) == 2
    for sample in samples:
        with Image.open(tmp_path / "drawn" / sample["drawn"]) as drawn:
            assert drawn.size == (8, 8)
    assert report_page(tmp_path / "drawn").count('class="drawn"') == 2
    names = ("loss", "loss/image", "validation/image")
    found, expected = (
        [[row.get(name) for name in names] for row in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("read", "made")
    )
    assert found == expected and found[1][2] is not None


def test_two_ranks_are_one(moma: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    """Experts choose from a row; ranks have other numbers of pictures, some none."""
    experts = {**SEVERAL, "routing_rows": 1, "noise": {"steps": 3}, "auxiliary": "along"}
    model = {**MODEL, "experts": experts, "depths": {"capacity": 0.5}}
    for folder, processes, engine in (("one", 1, "single"), ("two", 2, "fsdp")):
        path = moma(model=model, evaluation={"every": 4})
        ranks.run(train, processes, path, (f"train.engine={{kind: {engine}}}", f"out={tmp_path / folder}"))
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two"))
    for name in ("loss", "loss/text", "loss/image", "loss/routers", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), name
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("experts", [None, SEVERAL], ids=["dense", "4t4i"])
@pytest.mark.parametrize("depths", [None, {}], ids=["", "depths"])
def test_a_run_is_estimated(
    experts: dict[str, Any] | None, depths: dict[str, Any] | None, moma: Callable[..., Path]
) -> None:
    found = estimate(load_config(moma(model={**MODEL, "experts": experts, "depths": depths})))
    assert found["flops_per_step"]["forward"] > 0 and found["tokens_per_step"]["image"] > 0
    assert found["not_counted"], "the teacher"
    assert set(found["parameters"]) == {"language", *(["sparsity"] if experts or depths is not None else [])}


THERE = {"around_image": ["<s>", "<|im_end|>"]}
WRONG: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"experts": {"text": 2}}, (), "the model takes image, and there are no experts for it; add image: 1"),
    ({"experts": SEVERAL}, ("evaluation.every=2",), "evaluation.every: this model has no auxiliary routers"),
    ({"depths": {}}, ("data.test=[{kind: text, path: x}]",), "data.test: this model has no auxiliary routers"),
    ({"code_token": "chameleon", "template": THERE}, (), "there is no token 'IMGIMGAZ'"),
]


@pytest.mark.parametrize(("changes", "overrides", "line"), WRONG, ids=[line for *_, line in WRONG])
def test_what_cannot_be_is_said_in_a_line(
    changes: dict[str, Any], overrides: tuple[str, ...], line: str, moma: Callable[..., Path]
) -> None:
    with pytest.raises(MMError) as error:
        train(moma(model={**MODEL, **changes}), overrides)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_stages_start_somewhere(moma: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="carry_on: there is no stage before"):
        load_config(moma(stages=STAGES[1:]))
