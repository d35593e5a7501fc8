"""Stages: a run of parts equals its parts run one after the other, resumes anywhere, and weights are carried over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mm.config import RunConfig, load_config
from mm.errors import CheckpointError, ConfigError
from mm.train.checkpoint import find, model_tensors
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.stages import by_part, initial_tensors, model_tensors_of, take_over, trained_system
from mm.train.trainer import Trainer, Unwatched

ALIGN = {
    "name": "align",
    "model": {"connector": {"tokens": 1}},
    "train": {"max_steps": 3, "params": [{"match": "(vision|language).*", "freeze": True}]},
}
WHOLE = {"name": "whole", "train": {"max_steps": 4, "optimizer": {"lr": 5e-4}}}
LORA = "train.lora=[{match: 'language.*(q|v)_proj', rank: 2}]"
NO_TEST = {"test": [], "validation": []}


def run(config: RunConfig, resume: bool = False) -> Trainer:
    trainer = Trainer(config, Unwatched())
    trainer.run(resume)
    return trainer


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture
def staged(tiny: Callable[..., Path]) -> Callable[..., RunConfig]:
    def config(*overrides: str, stages: Any = (ALIGN, WHOLE)) -> RunConfig:
        return load_config(tiny(stages=list(stages)), (*overrides, "data.test=[]", "data.validation=[]"))

    return config


def test_two_stages_are_two_runs(staged: Callable[..., RunConfig], tiny: Callable[..., Path], tmp_path: Path) -> None:
    both = run(staged(f"out={tmp_path / 'both'}"))
    rows = read_metrics(tmp_path / "both/metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [
        *((n, 0) for n in (1, 2, 3)),
        *((n, 1) for n in range(4, 8)),
    ]
    first, second = both.config.stage_runs()
    assert first.model.connector.tokens == 1 and second.model.connector.tokens == 4
    one = load_config(
        tiny("one"),
        (
            f"out={tmp_path / 'one'}", "data.test=[]", "data.validation=[]", "model.connector.tokens=1",
            "train.max_steps=3", 'train.params=[{match: "(vision|language).*", freeze: true}]',
        ),
    )  # fmt: skip
    run(one)
    two = (f"train.init_from={tmp_path / 'one'}", "train.max_steps=4", "train.optimizer.lr=5e-4")
    alone = load_config(tiny("two"), (f"out={tmp_path / 'two'}", "data.test=[]", "data.validation=[]", *two))
    run(alone)
    assert losses(tmp_path / "both")[:3] == losses(tmp_path / "one")
    # Dropout aside (there is none here), the second stage is a run that starts from the first one's weights.
    assert losses(tmp_path / "both")[3:] == losses(tmp_path / "two")


def test_a_run_begins_with_the_merged_weights_of_one_with_adapters(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(
        tiny("one"), (f"out={tmp_path / 'one'}", "data.test=[]", "data.validation=[]", "train.max_steps=2", LORA)
    )
    run(config)
    tensors, _ = initial_tensors(tmp_path / "one")
    expected = model_tensors(trained_system(config, find(tmp_path / "one"), ema=False))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert take_over(config.model.build(weights=False), tensors, None, "one") == []


def test_what_is_not_taken_over_is_said_part_by_part(tiny_config: Callable[..., RunConfig]) -> None:
    system = tiny_config().model.build(weights=False)
    tensors = {name: tensor for name, tensor in model_tensors(system).items() if not name.startswith("vision")}
    count = len(model_tensors(system)) - len(tensors)
    missing, other = by_part(take_over(system, {**tensors, "head.x": torch.ones(2)}, None, "here"))
    assert missing.startswith("vision.")
    assert missing.endswith(f" begins as random values: not in here, and so for {count - 1} more of vision")
    assert other == "head.x of here has no place in this model"
    with pytest.raises(CheckpointError, match=r"none of its tensors has the name of one of this model's: head.x there"):
        take_over(system, {"head.x": torch.ones(2)}, None, "here")


def test_frozen_parts_of_a_stage_do_not_move(staged: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = staged(f"out={tmp_path / 'run'}", stages=[ALIGN])
    trainer = run(config)
    torch.manual_seed(config.seed)
    fresh = config.stage_runs()[0].model.build()
    for name, parameter in trainer.system.named_parameters():
        same = torch.equal(parameter, dict(fresh.named_parameters())[name])
        assert same != name.startswith("connector"), name


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_stopped_in_either_stage_and_resumed(staged: Callable[..., RunConfig], tmp_path: Path, stop: int) -> None:
    run(staged(f"out={tmp_path / 'whole'}"))

    class Stop(Unwatched):
        def step(self, row: dict[str, Any], steps: int) -> None:
            trainer.signals.seen = 2 if row["step"] == stop else 0

    trainer = Trainer(staged(f"out={tmp_path / 'parts'}"), Stop())
    with pytest.raises(Interrupted):
        trainer.run()
    run(staged(f"out={tmp_path / 'parts'}"), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_another_resolution_resamples_positions(staged: Callable[..., RunConfig], tmp_path: Path) -> None:
    larger = {"name": "larger", "model": {"vision": {"image_size": 64}}, "train": {"max_steps": 2}}
    trainer = run(staged(f"out={tmp_path / 'run'}", stages=[{**WHOLE, "train": {"max_steps": 2}}, larger]))
    assert dict(trainer.system.named_parameters())["vision.featurizer.pos_embed"].shape[1] == 64
    before = model_tensors_of(tmp_path / "run/checkpoints/step-00000002")
    after = trainer.stages[1].config.model.build(weights=False)

    take_over(after, before, None, "here")
    expected = resample_abs_pos_embed(before["vision.featurizer.pos_embed"], [8, 8], [4, 4], num_prefix_tokens=0)
    assert torch.equal(dict(after.named_parameters())["vision.featurizer.pos_embed"], expected)


def doubled(tensors: dict[str, Tensor], system: torch.nn.Module) -> dict[str, Tensor]:
    """Each layer twice: depth grown by stacking."""
    grown = dict(tensors)
    for name, tensor in tensors.items():
        for layer in (0, 1):
            start = f"language.model.layers.{layer}."
            if name.startswith(start):
                grown[f"language.model.layers.{layer + 2}.{name.removeprefix(start)}"] = tensor
    return grown


def test_a_stage_may_convert_the_model(staged: Callable[..., RunConfig], tmp_path: Path) -> None:
    grow = {
        "name": "grow",
        "model": {"language": {"config": {"num_hidden_layers": 4}}},
        "train": {"max_steps": 2, "optimizer": {"lr": 1e-12, "weight_decay": 0}},
        "convert": "test_stages:doubled",
    }
    trainer = run(staged(f"out={tmp_path / 'run'}", stages=[{**WHOLE, "train": {"max_steps": 2}}, grow]))
    layers = trainer.system.language.model.layers
    for a, b in ((0, 2), (1, 3)):
        for one, other in zip(layers[a].parameters(), layers[b].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match=r"stages\.convert 'nowhere:f' cannot be imported"):
        run(
            staged(
                f"out={tmp_path / 'no'}",
                stages=[{**WHOLE, "train": {"max_steps": 1}}, {**grow, "convert": "nowhere:f"}],
            )
        )


def test_another_shape_is_refused_by_name(staged: Callable[..., RunConfig], tmp_path: Path) -> None:
    wide = {"name": "wide", "model": {"language": {"config": {"intermediate_size": 96}}}, "train": {"max_steps": 1}}
    with pytest.raises(CheckpointError, match=r"mlp.*is \[64, 32\], this model's \[96, 32\]; a stage's `convert`"):
        run(staged(f"out={tmp_path / 'run'}", stages=[{**WHOLE, "train": {"max_steps": 1}}, wide]))


def test_wrong_stages_are_one_line(staged: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.0\.train\.max_stps|max_stps: unknown key; did you mean 'max_steps'"
    ):
        staged(stages=[{"name": "a", "train": {"max_stps": 3}}])
    with pytest.raises(ConfigError, match=r"train\.engine: is the whole run's: set it above the stages"):
        staged(stages=[{"name": "a", "train": {"engine": {"kind": "fsdp"}}}])
    with pytest.raises(ConfigError, match=r"train\.deterministic: is the whole run's"):
        staged(stages=[{"name": "a", "train": {"deterministic": True}}])
    with pytest.raises(ConfigError, match=r"train\.ema: not for train\.engine\.stage 3"):
        averaged = {"name": "b", "train": {"max_steps": 1, "ema": 0.9}}
        staged("train.engine={kind: deepspeed, stage: 3}", stages=[{"name": "a", "train": {"max_steps": 1}}, averaged])


def test_adapters_of_a_stage_are_merged_for_the_next(staged: Callable[..., RunConfig], tmp_path: Path) -> None:
    adapt = {"name": "adapt", "train": {"max_steps": 3, "lora": [{"match": "language.*q_proj", "rank": 2}], "ema": 0.9}}
    plain = {"name": "plain", "train": {"max_steps": 1, "optimizer": {"lr": 1e-12, "weight_decay": 0}}}
    trainer = run(staged(f"out={tmp_path / 'run'}", stages=[adapt, plain]))
    before = trained_system(trainer.config.stage_runs()[0], tmp_path / "run/checkpoints/step-00000003", ema=False)
    for (name, a), (_, b) in zip(trainer.system.named_parameters(), before.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
