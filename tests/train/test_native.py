"""Pictures in their own aspect ratio in training: sharded over ranks that have different ones, estimated, evaluated,
and in stages of several resolutions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_run import native, picture
from ranks import Ranks
from test_engines import train_config, whole_parameters
from test_estimate import passes, traced
from tiny_run import TINY
from torch.utils.flop_counter import FlopCounterMode

from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch, collate
from mm.data.limits import Limits
from mm.data.packed import Pack, PackedDataset, join_segments
from mm.data.prepare import find_packed, open_splits
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.models.config import SYSTEMS
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.metrics import read_metrics
from mm.train.packs import Packs, fullest_packs
from mm.train.params import freeze, parameter_groups
from mm.train.step import Stepper, count, counted
from mm.train.trainer import Trainer, Unwatched

VISION = {**TINY["model"]["vision"], "resize": "native", "crop": 1.0}
MODEL = SYSTEMS.resolve("open_qwen2vl").model_validate({**TINY["model"], "vision": VISION, "connector": {"pool": 2}})
LAYOUT = MODEL.layout()
PICTURES = [(3, 0), (0, 2), (1, 4), (2, 2)]
"""Of the two ranks, step by step."""


def pack(step: int, rank: int) -> Pack:
    items = [("text", "s", make_segment((Text(f"some words {step}"),), LAYOUT, "test", Limits()))]
    for number in range(PICTURES[step][rank]):
        parts = Media("image", picture(100 * step + 10 * rank + number), "png"), Text(f"picture {number}")
        items.append((f"{number}", "s", make_segment(parts, LAYOUT, "test", Limits())))
    return join_segments(items)


def batch(step: int, rank: int) -> PackedBatch:
    return collate([pack(step, rank)], LAYOUT, 128)


def steps(engine: dict[str, Any], frozen: bool) -> dict[str, Any]:
    """Losses of a few steps, and the parameters after them; one process takes both ranks' rows as micro-batches."""
    train = train_config(engine, "sgd", [{"match": "vision.*", "freeze": True}] if frozen else [])
    world = World.from_environment()
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        system = MODEL.build()
        freeze(system, train.params)
        ours = [world.rank] if world.ranks > 1 else [0, 1]
        one.prepare(system, lambda prepared: parameter_groups(prepared, train.params, 0.1), len(ours))
        stepper = Stepper(one, LAYOUT, Guard(train.guard), 0, 1.0, ["s"])
        losses = []
        for step in range(len(PICTURES)):
            mine = [batch(step, rank) for rank in ours]
            totals = counted(one.system, world.sum(count(one.system, mine, ["s"])), ["s"])
            losses.append(stepper(mine, totals, step, 0.1).loss)
        return {"losses": losses, "parameters": whole_parameters(one)}
    finally:
        one.close()
        world.stop()


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> dict[bool, dict[str, Any]]:
    return {frozen: ranks.run(steps, 1, {"kind": "single"}, frozen)[0] for frozen in (False, True)}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "fsdp"},
        {"kind": "fsdp", "units": ["vision", r"vision\.featurizer\.patch_embed", r".*\.attn", r".*\.mlp"]},
        {"kind": "deepspeed", "stage": 3},
    ],
    ids=["fsdp", "fsdp, every part", "zero 3"],
)
def test_ranks_with_different_pictures(
    engine: dict[str, Any], frozen: bool, ranks: Ranks, expected: dict[bool, dict[str, Any]]
) -> None:
    """No rank waits for another, and the numbers are those of one process."""
    assert len({shape for step in range(4) for rank in (0, 1) for shape in grids(step, rank)}) > 5
    for found in ranks.run(steps, 2, engine, frozen):
        np.testing.assert_allclose(found["losses"], expected[frozen]["losses"], rtol=2e-6)
        for name, value in expected[frozen]["parameters"].items():
            np.testing.assert_allclose(found["parameters"][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def grids(step: int, rank: int) -> list[tuple[int, ...]]:
    return [tuple(one.plan["grid"]) for one in pack(step, rank).media]


def test_an_estimate_runs_pictures_of_all_shapes(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """FLOPs of the worst micro-batch against torch's counter over the real pass."""
    config = tiny_config(*native(tmp_path))
    layout = config.model.layout()
    open_splits(config.data, layout, config.seed)
    model = traced(config)
    trace, packs = model._worst(config.train, 1)
    torch.manual_seed(0)
    system = config.model.build(weights=False).train()
    media = [one for pack in packs for one in pack.media]
    assert len({tuple(one.plan["grid"]) for one in media}) > 3
    with FlopCounterMode(display=False) as counter:
        passes(system, collate(packs, layout, config.data.context_length), config.train)
    assert sum(trace.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    # Before anything is packed: as many patches as a row may hold.
    (full,) = fullest_packs(layout, config.data)
    assert {tuple(one.plan["grid"]) for one in full.media} == {(4, 4)} and len(full.media) == 8
    assert Packs(layout, config.data).batch([full]).media["image"].shapes.tolist() == [[3, 32, 32]] * 8


def trained(config: RunConfig) -> Trainer:
    trainer = Trainer(config, Unwatched())
    trainer.run()
    return trainer


def test_a_run_is_trained_and_evaluated(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    overrides = native(tmp_path)
    source = next(one for one in overrides if one.startswith("data.sources")).partition("=")[2]
    config = tiny_config(
        *(one for one in overrides if not one.startswith(("data.validation", "data.test"))),
        f"data.validation={source}", f"data.test={source}", "evaluation.every=4",
    )  # fmt: skip
    trained(config)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert len(rows) == 8 and rows[-1]["loss"] < rows[0]["loss"]
    found = json.loads((Path(config.out) / "eval.json").read_text())
    assert found["test_items"] == 40 and found["caption_loss"] > 0 and found["shuffled_loss"] != found["caption_loss"]


def test_stages_of_several_resolutions(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Few positions, then all, then larger pictures, then their own aspect ratio, of a tower with a class token: four
    packed sets, one set of weights."""
    stages = [
        {"name": "low", "model": {"connector": {"tokens": 4}}},
        {"name": "high", "model": {"connector": {"tokens": 16}}},
        {"name": "large", "model": {"vision": {"image_size": 64}, "connector": {"tokens": 64}}},
        {"name": "native", "model": {"vision": {"resize": "native", "max_patches": 24}, "connector": {"pool": 2}}},
    ]
    token = {"class_token": True, "global_pool": "token"}
    options = {**TINY["model"]["vision"]["options"], **token}
    config = load_config(
        tiny(stages=[{**stage, "train": {"max_steps": 2}} for stage in stages]),
        (
            *(one for one in native(tmp_path) if one.startswith("data.")), f"out={tmp_path / 'run'}",
            f"model.vision.options={json.dumps(options)}",
        ),
    )  # fmt: skip
    trainer = trained(config)
    folders, positions = set(), []
    for run in config.stage_runs():
        layout = run.model.layout()
        folder = find_packed(run.data, "train", layout, run.seed)
        assert folder is not None
        folders.add(folder)
        index = PackedDataset(folder).index
        positions.append(int(np.sum(index["image_tokens"])) / int(np.sum(index["image"])))
    assert len(folders) == 4 and positions[:3] == [4, 16, 64] and 1 < positions[3] < 8
    shapes = {n: list(p.shape) for n, p in trainer.system.named_parameters() if n.endswith("pos_embed")}
    assert shapes == {"vision.featurizer.pos_embed": [1, 1 + 16, 32]}
    assert [row["stage"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_open_clip_tower_trains_and_changes_resolution(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its blocks are found, and its position embeddings resampled behind the class token."""
    tower = {"name": "open_clip/ViT-B-32", "options": {"patch_size": 8, "width": 32, "layers": 2, "head_width": 16}}
    larger = {"name": "larger", "model": {"vision": {"image_size": 64}}, "train": {"max_steps": 2}}
    vision = {**{k: v for k, v in TINY["model"]["vision"].items() if k != "options"}, **tower}
    config = load_config(
        tiny(stages=[{"name": "small", "train": {"max_steps": 2}}, larger], model={**TINY["model"], "vision": vision}),
        (
            f"out={tmp_path / 'run'}", "data.validation=[]", "data.test=[]",
            "train.activation_checkpointing.mode=full",
        ),
    )  # fmt: skip
    trainer = trained(config)
    shapes = {n: list(p.shape) for n, p in trainer.system.named_parameters() if n.endswith("positional_embedding")}
    assert shapes == {"vision.featurizer.positional_embedding": [65, 32]}
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 4
