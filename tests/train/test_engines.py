"""Engines: however the work of a step is split, the gradients, parameters and reported loss are the same.

Each split runs the trainer's own step (`mm.train.step`) on the same eight rows; the reference is one process, one
micro-batch. A rank without pictures runs its towers on a dummy, so nothing hangs, whatever rank has what.
"""

import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Ranks
from tiny_run import TINY

from mm.data.batch import PackedBatch, collate
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.errors import ConfigError
from mm.models.config import SYSTEMS
from mm.settings import KindSection
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.params import freeze, parameter_groups
from mm.train.step import Stepper, count, counted

LENGTH, STEPS = 64, 5
MODEL = SYSTEMS.resolve("open_qwen2vl").model_validate(TINY["model"])
LAYOUT = MODEL.layout()
LANGUAGE = TINY["model"]["language"]
UNTIED = MODEL.model_validate(
    {**TINY["model"], "language": {**LANGUAGE, "config": {**LANGUAGE["config"], "tie_word_embeddings": False}}}
)


def picture(seed: int) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Media("image", data.getvalue(), "png")


def pack(row: int, pictures: bool) -> Pack:
    """Two or three segments of uneven length, each with a picture or none."""
    items = []
    for number in range(2 + row % 2):
        text = Text(" ".join(f"word{(row * 7 + number * 3 + k) % 11}" for k in range(2 + (row + number) % 4)))
        parts = (picture(row * 10 + number), text) if pictures else (text,)
        items.append((f"{row}#{number}", "s", make_segment(parts, LAYOUT, "test", Limits())))
    return join_segments(items)


def rows(kind: str) -> list[Pack]:
    """Eight packs: `text`, `image`, or `mixed` (the first half without pictures, so that ranks differ)."""
    return [pack(row, kind == "image" or (kind == "mixed" and row >= 4)) for row in range(8)]


def batches(kind: str, world: World, micro_batches: int) -> list[PackedBatch]:
    """This rank's share of the eight rows."""
    share = np.array_split(np.arange(8), world.ranks)[world.rank]
    packs = rows(kind)
    parts = [[packs[row] for row in part] for part in np.array_split(share, micro_batches)]
    return [collate(part or [EMPTY], LAYOUT, LENGTH) for part in parts]


@dataclass
class Split:
    """A way to split a step."""

    ranks: int
    micro_batches: int
    engine: dict[str, Any]


SPLITS = {
    "accumulation 2": Split(1, 2, {}),
    "fsdp, 1 rank": Split(1, 1, {"kind": "fsdp"}),
    "fsdp, full, 2 ranks": Split(2, 1, {"kind": "fsdp"}),
    "fsdp, full, 2 ranks x 2": Split(2, 2, {"kind": "fsdp"}),
    "fsdp, copies, 2 ranks": Split(2, 2, {"kind": "fsdp", "shard_size": 1}),
    "fsdp, hybrid, 4 ranks": Split(4, 1, {"kind": "fsdp", "shard_size": 2}),
    "fsdp, hybrid, 4 ranks x 2": Split(4, 2, {"kind": "fsdp", "shard_size": 2}),
    **{f"zero {stage}, 2 ranks": Split(2, 1, {"kind": "deepspeed", "stage": stage}) for stage in (0, 1, 2, 3)},
    **{f"zero {stage}, 2 ranks x 2": Split(2, 2, {"kind": "deepspeed", "stage": stage}) for stage in (1, 3)},
}


def train_config(engine: dict[str, Any], optimizer: str, rules: list[Any], precision: str = "fp32") -> TrainConfig:
    kinds = {
        "adamw": {"kind": "adamw", "lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1},
        "sgd": {"kind": "test_engines:SGDConfig", "lr": 0.5},
    }
    values = {"device": "cpu", "engine": engine, "optimizer": kinds[optimizer], "params": rules, "clip_norm": 0.5}
    return TrainConfig.model_validate({**values, "precision": precision})


def test_patterns_that_match_no_unit_are_refused() -> None:
    """Precision is a unit's; of a module inside one it would change nothing."""

    def shard(**engine: Any) -> None:
        train = train_config({"kind": "fsdp", **engine}, "adamw", [])
        one = train.engine.build(World(), train)
        units = one._units(["vision", "language", "language.lm_head", "language.layers.0"])
        one._check_precision(units | {"language.layers.0"})

    rule = {"weights": "bf16"}
    shard(precision=[{"match": "vision.*", **rule}, {"match": r".*layers\.\d+", **rule}, {"match": "", **rule}])
    with pytest.raises(ConfigError, match=r"precision: 'language\.lm_head' matches nothing that is gathered as one"):
        shard(precision=[{"match": "language.lm_head", **rule}])
    shard(units=["language.lm_head"], precision=[{"match": "language.lm_head", **rule}])
    with pytest.raises(ConfigError, match=r"units: 'langage' matches no module"):
        shard(units=["vision", "langage"])


def run_split(
    kind: str,
    micro_batches: int,
    engine: dict[str, Any],
    optimizer: str,
    rules: list[Any],
    precision: str = "fp32",
    model: Any = MODEL,
) -> dict[str, Any]:
    """Five steps; losses and norms of each, and the parameters at the end, whole."""
    train = train_config(engine, optimizer, rules, precision)
    world = World.from_environment()
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        system = model.build()
        freeze(system, train.params)
        groups = lambda prepared: parameter_groups(prepared, train.params, 0.1)  # noqa: E731
        one.prepare(system, groups, micro_batches)
        stepper = Stepper(one, LAYOUT, Guard(train.guard), 0, train.clip_norm, ["s"])
        seen: dict[str, Any] = {"loss": [], "norm": []}
        for step in range(STEPS):
            mine = batches(kind, world, micro_batches)
            totals = counted(one.system, world.sum(count(one.system, mine, ["s"])), ["s"])
            done = stepper(mine, totals, step, train.optimizer.lr)
            seen["loss"].append(done.loss)
            seen["norm"].append(done.norms["total"])
        seen["parameters"] = whole_parameters(one)
        return seen
    finally:
        one.close()
        world.stop()


def whole_parameters(engine: Any) -> dict[str, np.ndarray]:
    """All parameters, whole; those that a rank does not give come from another."""
    found = {
        name.removeprefix("model."): engine.whole(tensor).float().cpu().numpy()
        for name, tensor in engine.tensors().items()
        if name.startswith("model.")
    }
    everyone = engine.world.gather(found)
    return {name: value for one in everyone for name, value in one.items()}


FROZEN = [{"match": "vision.*", "freeze": True}, {"match": ".*bias", "lr_scale": 2.0}]


@pytest.fixture(scope="session")
def references(ranks: Ranks) -> dict[tuple[str, str, bool], dict[str, Any]]:
    cases = [*itertools.product(("text", "image", "mixed"), ("adamw",), (False,)), ("mixed", "sgd", True)]
    return {case: ranks.run(run_split, 1, case[0], 1, {}, case[1], FROZEN if case[2] else [])[0] for case in cases}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind,optimizer,frozen", [
    ("text", "adamw", False), ("image", "adamw", False), ("mixed", "adamw", False), ("mixed", "sgd", True),
])  # fmt: skip
def test_however_split_the_numbers_are_the_same(
    split: str, kind: str, optimizer: str, frozen: bool, ranks: Ranks, references: dict[Any, dict[str, Any]]
) -> None:
    how = SPLITS[split]
    rules = FROZEN if frozen else []
    found = ranks.run(run_split, how.ranks, kind, how.micro_batches, how.engine, optimizer, rules)
    expected = references[kind, optimizer, frozen]
    for one in found:
        np.testing.assert_allclose(one["loss"], expected["loss"], rtol=2e-6)
        np.testing.assert_allclose(one["norm"], expected["norm"], rtol=1e-5)
        assert one["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(one["parameters"][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


VARIANTS = {
    "offloaded": Split(2, 1, {"kind": "fsdp", "cpu_offload": True}),
    "kept gathered": Split(2, 2, {"kind": "fsdp", "reshard_after_forward": False}),
    "one unit": Split(2, 1, {"kind": "fsdp", "units": []}),
    "precision by tower": Split(2, 1, {"kind": "fsdp", "precision": [{"match": "vision.*", "weights": "fp32"}]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_of_sharding_change_no_numbers(variant: str, ranks: Ranks, references: dict[Any, Any]) -> None:
    how = VARIANTS[variant]
    found = ranks.run(run_split, how.ranks, "mixed", how.micro_batches, how.engine, "adamw", [])
    expected = references["mixed", "adamw", False]
    for one in found:
        np.testing.assert_allclose(one["loss"], expected["loss"], rtol=2e-6)
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(one["parameters"][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("split", ["fsdp, full, 2 ranks x 2", "fsdp, hybrid, 4 ranks", "zero 3, 2 ranks x 2"])
def test_a_head_of_its_own(split: str, ranks: Ranks) -> None:
    """Not tied to the embeddings."""
    how = SPLITS[split]
    expected = ranks.run(run_split, 1, "mixed", 1, {}, "adamw", [], "fp32", UNTIED)[0]
    for one in ranks.run(run_split, how.ranks, "mixed", how.micro_batches, how.engine, "adamw", [], "fp32", UNTIED):
        np.testing.assert_allclose(one["loss"], expected["loss"], rtol=2e-6)
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(one["parameters"][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_bf16_is_that_of_one_process(ranks: Ranks, references: dict[Any, Any]) -> None:
    """Autocast over float32 weights in one process; gathered in bf16, with float32 shards, in two."""
    single = ranks.run(run_split, 1, "mixed", 1, {}, "adamw", [], "bf16")[0]
    sharded = ranks.run(run_split, 2, "mixed", 1, {"kind": "fsdp"}, "adamw", [], "bf16")[0]
    np.testing.assert_allclose(sharded["loss"], single["loss"], rtol=5e-3)
    assert not np.allclose(single["loss"], references["mixed", "adamw", False]["loss"], rtol=1e-6)


class SGDConfig(KindSection):
    """Without momentum: the update shows the gradient itself."""

    kind: str = "sgd"
    lr: float

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr)
