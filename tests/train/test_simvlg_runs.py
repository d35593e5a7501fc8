"""SimVLG in real runs: pictures and clips in one, tower and language model frozen; resumed, sharded, on features."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from tiny_simvlg import FEATURES, FRAMES, MODEL, POSITIONS, clip, picture
from whole_runs import train, weights

from mm import hub
from mm.config import load_config
from mm.errors import ConfigError
from mm.models.generate import generate
from mm.models.prompts import Decoding, raw_prompt
from mm.train import checkpoint
from mm.train.estimate import estimate
from mm.train.features import encode
from mm.train.metrics import read_metrics
from mm.train.trainer import Unwatched

FREEZE = [
    {"match": "(vision|language).*", "freeze": True},
    {"match": r"vision\.temporal\..*", "freeze": False},
]
CLIPS: dict[str, Any] = {"video": {"frames": FRAMES}}
WORDS = ("a car goes by", "snow falls", "two people talk", "a cat sleeps", "water", "nobody is there")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips with a caption each."""
    path = tmp_path_factory.mktemp("clips") / "000.tar"
    with tarfile.open(path, "w") as tar:
        for number, words in enumerate(WORDS):
            for ext, data in (("mp4", clip(number).data), ("txt", words.encode())):
                entry = tarfile.TarInfo(f"{number:03d}.{ext}")
                entry.size = len(data or b"")
                tar.addfile(entry, io.BytesIO(data or b""))
    return path


@pytest.fixture
def simvlg(tmp_path: Path, cache: Path, shard: Path) -> Callable[..., Path]:
    """Writes the config of a run of four steps, four rows each, with as many packs of clips as of pictures."""

    def write(**model: Any) -> Path:
        emoji = {
            "kind": "captions", "name": "emoji", "path": "builtin:emoji/validation-*.tar.gz", "prompt": "{language}: ",
            "only": {"language": "en"},
        }  # fmt: skip
        clips = {"kind": "video", "name": "clips", "path": str(shard)}
        temporal = model.get("video", {}).get("temporal", "attention") if model.get("video") else None
        names = [name for name, there in (("emoji", model.get("image", True)), ("clips", temporal)) if there]
        values = {
            "out": str(tmp_path / "run"),
            "data": {
                "sources": [one for one in (emoji, clips) if one["name"] in names],
                "validation": [clips if temporal else emoji],
                **({"mixture": {"weights": dict.fromkeys(names, 1)}} if len(names) > 1 else {}),
                "context_length": 96, "workers": 0, "cache": str(cache),
            },
            "model": {**MODEL, **model},
            "train": {
                "max_steps": 4, "batch_tokens": 384, "micro_batch": 2, "device": "cpu", "save_every": 2,
                "params": FREEZE if temporal == "attention" else FREEZE[:1],
                "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.05, "eps": 1e-6},
                "schedule": {"kind": "constant", "warmup": 0},
            },
        }  # fmt: skip
        path = tmp_path / "simvlg.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def test_it_learns_from_pictures_and_clips_and_frozen_parts_stay(simvlg: Callable[..., Path], tmp_path: Path) -> None:
    path = simvlg(**CLIPS)
    train(path, ("train.max_steps=16", "train.save_every=16", "evaluation.every=8", "train.optimizer.lr=1e-2"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert sum(losses(tmp_path / "run")[-5:]) < 0.97 * sum(losses(tmp_path / "run")[:5])
    assert sum(row["tokens/image"] for row in rows) > 0 and sum(row["tokens/video"] for row in rows) > 0
    assert all(row["tokens/image"] % POSITIONS == 0 and row["tokens/video"] % POSITIONS == 0 for row in rows)
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) == 2
    system, layout, run = hub.load(tmp_path / "run")
    torch.manual_seed(run.seed)
    before, after = checkpoint.model_tensors(run.model.build()), checkpoint.model_tensors(system)
    assert before.keys() == after.keys()
    moved = {name for name, one in before.items() if not torch.equal(one, after[name])}
    frozen = {name for name in before if name.startswith(("vision.featurizer.", "language.")) or ".pooler." in name}
    assert moved == before.keys() - frozen and any(".temporal." in name for name in moved)
    prompts = [raw_prompt("", [one], "") for one in (picture(1), clip(1))]
    written = generate(system, layout, prompts, Decoding(max_new_tokens=4))
    assert len(written) == 2


def test_resumed_equals_never_stopped(simvlg: Callable[..., Path], tmp_path: Path) -> None:
    path, whole, parts = simvlg(**CLIPS), tmp_path / "whole", tmp_path / "parts"
    train(path, (f"out={whole}",))
    for steps in (2, 4):
        train(path, (f"out={parts}", f"train.max_steps={steps}"), resume=True)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    found, expected = weights(parts), weights(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "model.connector.bert.pooler.dense.weight" in expected
    assert not any("pooler" in name for name in expected if name.startswith("optimizer."))


@pytest.mark.parametrize("engine", ["{kind: fsdp}", "{kind: deepspeed, stage: 3}"])
def test_two_ranks_are_one(simvlg: Callable[..., Path], ranks: Ranks, tmp_path: Path, engine: str) -> None:
    """Weights in parts, blocks recomputed; ranks have other media, some none of a kind."""
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    path, recompute = simvlg(**CLIPS), "train.activation_checkpointing={mode: full}"
    one, two = tmp_path / "one", tmp_path / "two"
    train(path, ("train.max_steps=2", f"out={one}"))
    ranks.run(train, 2, path, ("train.max_steps=2", f"train.engine={engine}", recompute, f"out={two}"))
    for name in ("loss", "grad_norm"):
        found, expected = ([row[name] for row in read_metrics(out / "metrics.jsonl")] for out in (two, one))
        assert found == pytest.approx(expected, rel=1e-4), name
    found, expected = weights(two), weights(one)
    frozen = [name for name in expected if ".pooler." in name or name.startswith("model.language.")]
    assert frozen and all(torch.equal(found[name], expected[name]) for name in frozen)


def test_features_of_the_frozen_tower_are_read_instead(simvlg: Callable[..., Path], tmp_path: Path) -> None:
    """All 257 of a picture, here 17, so that what is trained reads them as before."""
    path, on = simvlg(), "data.features=true"
    (made,) = encode(load_config(path, (on,)), ["train"], None, (0, 1), Unwatched()).values()
    assert made["bytes"] == made["items"] * FEATURES * 32 * 2
    encode(load_config(path, (on,)), [], None, (0, 1), Unwatched())
    train(path, (f"out={tmp_path / 'pictures'}",))
    train(path, (on, f"out={tmp_path / 'features'}"))
    found, expected = losses(tmp_path / "features"), losses(tmp_path / "pictures")
    assert found == pytest.approx(expected, rel=1e-2) and found != expected


def test_features_of_clips_are_refused_where_the_tower_learns_to_look_across_frames(
    simvlg: Callable[..., Path],
) -> None:
    one = "data.mixture.weights={clips: 1}"
    clips = "data.sources=[{kind: video, name: clips, path: 'nowhere/*.tar'}]"
    path = simvlg(image=False, video={"frames": FRAMES})
    with pytest.raises(ConfigError, match=r"vision is trained \(vision\.temporal\.0\.alpha\)"):
        encode(load_config(path, ("data.features=true", one, clips)), [], None, (0, 1), Unwatched())
    both = simvlg(video={"frames": FRAMES})
    with pytest.raises(ConfigError, match=r"for models of text and one other medium; this one takes image, video"):
        encode(load_config(both, ("data.features=true",)), [], None, (0, 1), Unwatched())


def test_a_run_is_estimated(simvlg: Callable[..., Path]) -> None:
    small = ("data.context_length=32", "train.batch_tokens=32", "train.micro_batch=1")
    found = estimate(load_config(simvlg(video={"frames": FRAMES, "temporal": "merge"}), small))
    assert found["flops_per_step"]["forward"] > 0 and found["tokens_per_step"]["image"] > 0
    parts = found["parameters"]
    assert parts.keys() == {"vision", "language", "connector", "temporal"}
    assert parts["temporal"] == {"total": FRAMES * 32, "trained": FRAMES * 32} and parts["vision"]["trained"] == 0


def test_clips_alone_are_evaluated_without_pictures(simvlg: Callable[..., Path], shard: Path, tmp_path: Path) -> None:
    clips = json.dumps([{"kind": "video", "name": "clips", "path": str(shard)}])
    train(simvlg(**CLIPS, image=False), ("data.validation=[]", f"data.test={clips}", "train.max_steps=1"))
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert found["caption_loss"] > 0 and found["shuffled_loss"] > 0 and "match_accuracy" not in found
