"""A run on features of its frozen tower is the run that rounds those features to bfloat16, and its model is whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from mm import hub
from mm.cli import main
from mm.config import load_config
from mm.data.batch import MediaBatch, collate
from mm.data.prepare import open_splits
from mm.errors import ConfigError, DataError
from mm.models.systems.open_qwen2vl.model import OpenQwen2VL
from mm.train import checkpoint
from mm.train.estimate import estimate
from mm.train.features import digest, encode
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

ON = "data.features=true"
PARAMS = "train.params=[{match: 'vision.*', freeze: true}"
FROZEN = (
    "model.vision.crop=1",
    f"{PARAMS}]",
    "train.schedule={kind: constant, warmup: 0}",
    "train.max_steps=6",
)


def train(path: Path, overrides: tuple[str, ...], resume: bool = False) -> Trainer:
    trainer = Trainer(load_config(path, overrides), Unwatched())
    trainer.run(resume)
    return trainer


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def same(out: Path, other: Path, tolerance: float) -> None:
    """The logged numbers of two runs."""
    found, expected = (read_metrics(one / "metrics.jsonl") for one in (out, other))
    assert len(found) == len(expected)
    for key in ("loss", "grad_norm/connector", "grad_norm/language"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=tolerance), key
    assert found[-1].get("validation_loss") == pytest.approx(expected[-1].get("validation_loss"), rel=tolerance)


def tensors(out: Path) -> dict[str, Tensor]:
    reader = checkpoint.open_reader(checkpoint.find(out))
    return dict(zip(reader.tensors, reader.whole(reader.tensors), strict=True))


@pytest.fixture
def config(tiny: Callable[..., Path]) -> Path:
    """The tiny run with its features computed, on all splits."""
    path = tiny()
    assert main(["data", "encode", str(path), *FROZEN, ON]) == 0
    return path


def rounded(self: OpenQwen2VL, medium: str, media: MediaBatch) -> Tensor:
    return FEATURES(self, medium, media).to(torch.bfloat16).float()


FEATURES = OpenQwen2VL.features


def test_it_is_the_run_whose_features_are_rounded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In losses, norms of gradients and every number of the evaluation; the plain run is near.

    On one thread to the last bit. But a tower's numbers may depend on what is computed beside a picture, and then a few
    round to the other neighbour.
    """
    every = (*FROZEN, "evaluation.every=3", "evaluation.samples=0")
    plain, expected, found = (tmp_path / name for name in ("plain", "rounded", "features"))
    train(config, (*every, "data.test=[]", f"out={plain}"))
    with monkeypatch.context() as patch:
        patch.setattr(OpenQwen2VL, "features", rounded)
        train(config, (*every, f"out={expected}"))
    monkeypatch.setattr(OpenQwen2VL, "features", None)  # nothing calls the tower
    train(config, (*every, ON, f"out={found}"))
    same(found, expected, 1e-5)
    assert losses(found) == pytest.approx(losses(plain), rel=1e-2) and losses(found) != losses(plain)
    assert tensors(found).keys() == tensors(expected).keys()
    ours, theirs = (json.loads((out / "eval.json").read_text()) for out in (found, expected))
    assert ours.pop("evaluation") == theirs.pop("evaluation")
    assert ours == pytest.approx(theirs, rel=1e-4)


NATIVE = ("model.vision.resize=native", "model.connector={pool: 2}")


@pytest.mark.parametrize("settings", [NATIVE, ("train.precision=bf16",)], ids=["native", "bf16"])
def test_so_it_is_with_pictures_of_all_shapes_and_in_bf16(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    path, every = tiny(), (*FROZEN, *settings, "train.max_steps=3", "data.test=[]", "evaluation.every=3")
    encode(load_config(path, (*every, ON)), [], None, (0, 1), Unwatched())
    train(path, (*every, ON, f"out={tmp_path / 'features'}"))
    monkeypatch.setattr(OpenQwen2VL, "features", rounded)
    train(path, (*every, f"out={tmp_path / 'rounded'}"))
    tolerance = 1e-5 if settings is NATIVE else 1e-2  # a tower in bfloat16 is as exact as that
    same(tmp_path / "features", tmp_path / "rounded", tolerance)


def test_a_stage_reads_the_features_of_the_tower_that_it_will_have(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Two stages on features, the second with another pooling; a third trains all of it, on pictures."""
    frozen = [{"match": "vision.*", "freeze": True}]
    first = {"name": "align", "train": {"params": [{"match": "(vision|language).*", "freeze": True}]}}
    second = {"name": "wider", "model": {"connector": {"tokens": 1}}, "train": {"params": frozen}}
    third = {"name": "whole", "data": {"features": False}}
    shared = ("model.vision.crop=1", ON, "train.max_steps=2", "data.test=[]", "data.validation=[]")
    path = tiny(stages=[first, second, third])
    assert main(["data", "encode", str(path), *shared]) == 0
    trainer = train(path, (*shared, f"out={tmp_path / 'run'}"))
    assert len(losses(tmp_path / "run")) == 6 and trainer.aside is None
    wrong = tiny("wrong", stages=[third, second])
    with pytest.raises(ConfigError, match="vision is trained"):
        encode(load_config(wrong, shared), [], None, (0, 1), Unwatched())


def test_gradients_of_connector_and_language_are_those_of_rounded_features(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_config(config, (*FROZEN, ON))
    torch.manual_seed(run.seed)
    system, layout = run.model.build(), run.model.layout()
    dataset = open_splits(run.data, layout, run.seed)["train"]
    batch = collate([dataset.read(n) for n in range(4)], layout, 128)
    monkeypatch.setattr(OpenQwen2VL, "features", rounded)
    gradients = []
    image = batch.media["image"]
    given = replace(image, values=torch.empty(0), features=FEATURES(system, "image", image).detach().to(torch.bfloat16))
    for media in (image, given):
        system.zero_grad()
        system(replace(batch, media={"image": media})).losses["next_token"].backward()
        gradients.append({n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None})
    parts = ("connector.", "language.")
    assert any(gradients[0][name].any() for name in gradients[0] if name.startswith(parts[0]))
    for name in (name for name in gradients[0] if name.startswith(parts)):
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_resumed_with_features_equals_never_stopped(config: Path, tmp_path: Path) -> None:
    settings = (*FROZEN, ON, "data.test=[]", "train.save_every=2", "data.workers=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, (*settings, f"out={whole}"))
    for steps in (2, 4, 6):
        train(config, (*settings, f"out={parts}", f"train.max_steps={steps}"), resume=True)
    assert losses(parts) == losses(whole)
    expected, found = tensors(whole), tensors(parts)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_model_of_such_a_run_is_whole(config: Path, tmp_path: Path) -> None:
    """Loaded back it takes pictures, with the tower that it began with, and its loss on them is that on features."""
    trainer = train(config, (*FROZEN, ON, f"out={tmp_path / 'run'}"))
    assert trainer.aside is not None and not list(trainer.system.vision.parameters())
    system, layout, run = hub.load(tmp_path / "run")
    torch.manual_seed(run.seed)
    assert digest(system.vision) == digest(run.model.build().vision)
    stage = trainer.stages[0]
    splits = open_splits(run.data, layout, run.seed)
    packs = range(3)
    pictures = collate([splits["validation"].read(n) for n in packs], layout, 128)
    features = collate([stage.splits["validation"].read(n) for n in packs], layout, 128)
    assert features.media["image"].features is not None and not features.media["image"].values.numel()
    with torch.no_grad():
        torch.testing.assert_close(system.token_losses(features), system.token_losses(pictures), rtol=1e-2, atol=1e-3)
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())) == 2
    described = json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]["vision"]
    assert described == {"total": sum(p.numel() for p in system.vision.parameters()), "trained": 0}


def test_what_makes_features_wrong_is_refused(config: Path, tmp_path: Path, cache: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    for overrides, error, text in [
        (("train.params=[]",), ConfigError, r"vision is trained .*freeze it with train\.params"),
        ((PARAMS + ", {match: '.*norm.*', freeze: false}]",), ConfigError, "trained"),
        (("model.vision.crop=0.6",), ConfigError, "cut or mirrored anew"),
        (("seed=1",), DataError, "other weights|has no features"),
        (("model.vision.block=-2",), DataError, r"vision\.block -1 .the run has -2"),
        (("data.context_length=64",), DataError, "has no features"),
    ]:
        with pytest.raises(error, match=text):
            train(config, (*FROZEN, ON, *overrides, out))
        if error is ConfigError:
            with pytest.raises(ConfigError, match=text):
                encode(load_config(config, (*FROZEN, ON, *overrides)), [], None, (0, 1), Unwatched())


def test_the_command_says_what_it_writes_and_what_is_wrong(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = str(tiny()), f"data.cache={tmp_path / 'cache'}"
    command = ["data", "encode", path, *FROZEN, data]
    assert main(command) == 2 and "set data.features=true" in capsys.readouterr().err
    assert main([*command, ON, "--split", "test", "--json"]) == 0
    said = capsys.readouterr()
    (found,) = json.loads(said.out.splitlines()[-1])["encoded"].values()
    assert found["split"] == "test" and found["finished"] and found["bytes"] == found["items"] * 4 * 32 * 2
    assert f"{found['items']:,} images, 256 bytes of features each, {found['bytes']:,} in all" in said.err
    assert main(["train", path, *FROZEN, data, ON, f"out={tmp_path / 'run'}"]) == 2
    assert "has no features" in capsys.readouterr().err
    assert main([*command, ON]) == 0 and "all there" in capsys.readouterr().err
    tokenizer = "{tokenizer: 'builtin:emoji', config: {model_type: qwen2, hidden_size: 32, num_hidden_layers: 1}}"
    text = ["model={kind: text_lm, language: " + tokenizer + "}", "train.params=[]"]
    assert main(["data", "encode", path, *text, data, ON]) == 2
    assert "this one takes none" in capsys.readouterr().err


def test_the_estimate_leaves_the_tower_out(config: Path) -> None:
    plain, given = (estimate(load_config(config, (*FROZEN, *more))) for more in ((), (ON,)))
    assert plain["parameters"] == given["parameters"]
    assert plain["flops_per_step"]["backward"] == given["flops_per_step"]["backward"]
    assert given["flops_per_step"]["forward"] < plain["flops_per_step"]["forward"]
    tower = 4 * plain["parameters"]["vision"]["total"]
    assert plain["memory"]["weights"] - given["memory"]["weights"] == tower


def on_ranks(path: Path, overrides: tuple[str, ...]) -> None:
    train(path, overrides)


@pytest.mark.parametrize("engine", ["{kind: fsdp}", "{kind: deepspeed, stage: 3}"])
def test_on_two_ranks_of_which_one_has_no_pictures(config: Path, tmp_path: Path, ranks: Ranks, engine: str) -> None:
    """Three rows a step: rank 1 gets a row of padding. Validation, matching and samples included."""
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    settings: tuple[Any, ...] = (*FROZEN, ON, "train.batch_tokens=384", "train.micro_batch=1", "evaluation.every=3")
    train(config, (*settings, f"out={tmp_path / 'one'}"))
    ranks.run(on_ranks, 2, config, (*settings, f"train.engine={engine}", f"out={tmp_path / 'two'}"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    vision = [name for name in one if name.startswith("model.vision.")]
    assert vision and all(torch.equal(one[name], two[name]) for name in vision)
