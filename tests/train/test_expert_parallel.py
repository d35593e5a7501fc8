"""Experts in parts, and divided over ranks: the numbers are those of one process, whoever holds which expert.

Half of the rows have pictures and half have none, so some ranks send no tokens to the experts of pictures, and ranks
send unlike numbers. A row is one segment: where several began alike, their first tokens would have scores that are
equal but for rounding, and which of them an expert takes would depend on how matrices are split.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from test_engines import LAYOUT, LENGTH, MODEL, picture, train_config, whole_parameters
from tiny_run import TINY
from torch import Tensor

from mm.config import RunConfig
from mm.data.batch import PackedBatch, collate
from mm.data.limits import Limits
from mm.data.packed import Pack, join_segments
from mm.data.sample import Text
from mm.data.tokens import make_segment
from mm.errors import ConfigError
from mm.models.generate import generate
from mm.models.prompts import Decoding, raw_prompt
from mm.train import checkpoint, evaluate
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.checkpoint import Checkpoints
from mm.train.config import CheckpointingConfig
from mm.train.distributed import World
from mm.train.ema import EMA
from mm.train.engines.expert_parallel import _transposed
from mm.train.engines.single import part_of
from mm.train.guard import Guard
from mm.train.params import freeze, parameter_groups
from mm.train.step import Stepper, count, counted

STEPS = 3


def section(**experts: Any) -> Any:
    return MODEL.model_validate({**TINY["model"], "experts": {"routing_rows": 1, **experts}})


MODELS = {
    "two groups": section(text=4, image=2, auxiliary="along", noise={"steps": 2}),
    "one without a router": section(text=4, image=1, auxiliary="along", normalize=True),
    "auxiliary routers alone": section(all=4, auxiliary="alone"),
    "depths": MODEL.model_validate({**TINY["model"], "experts": {"all": 4, "routing_rows": 1}, "depths": {"first": 1}}),
}


@dataclass
class Split:
    """A way to split a step."""

    ranks: int
    engine: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    recompute: bool = False
    precision: str = "fp32"


FSDP = {"kind": "fsdp"}
DIVIDED = {"kind": "fsdp", "expert_parallel": 2}
SPLITS = {
    "one process": Split(1),
    "fsdp, 2 ranks": Split(2, FSDP),
    "fsdp, 4 ranks, more than experts": Split(4, FSDP),
    "divided, 2 ranks": Split(2, DIVIDED),
    "divided, 2 ranks x 2": Split(2, DIVIDED, micro_batches=2),
    "divided, 2 ranks, recomputed": Split(2, DIVIDED, recompute=True),
    "divided and in parts, 4 ranks": Split(4, DIVIDED),
    "divided, copies, 4 ranks": Split(4, {**DIVIDED, "shard_size": 2}, micro_batches=2),
    "divided, 4 ranks, one expert each": Split(4, {**DIVIDED, "expert_parallel": 4}),
    "divided, offloaded, kept gathered": Split(2, {**DIVIDED, "cpu_offload": True, "reshard_after_forward": False}),
    **{f"zero {stage}": Split(2, {"kind": "deepspeed", "stage": stage}) for stage in (2, 3)},
}


def row_of(number: int) -> Pack:
    """One segment; of the last four of eight rows with one to four pictures before the text."""
    text = Text(" ".join(f"word{(number * 7 + k * k) % 13}" for k in range(6 + 2 * number % 5)))
    pictures = [picture(10 * number + k) for k in range(number - 3)]
    return join_segments([(f"{number}", "s", make_segment((*pictures, text), LAYOUT, "test", Limits()))])


def batches(world: World, micro_batches: int) -> list[PackedBatch]:
    """This rank's share of eight rows, of which the first four have no pictures."""
    share = np.array_split(np.arange(8), world.ranks)[world.rank]
    return [
        collate([row_of(row) for row in part], LAYOUT, LENGTH, draws=[(0, int(row)) for row in part])
        for part in np.array_split(share, micro_batches)
    ]


def run(model: Any, split: Split, load: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    """A few steps, from a checkpoint or from the start: what they gave, and an evaluation after them."""
    train = train_config(split.engine, "adamw", [], split.precision)
    world = World.from_environment()
    engine = train.engine.build(world, train)
    world.start(engine.device, 60, engine.group)
    try:
        torch.manual_seed(0)
        system = model.build().train()
        freeze(system, train.params)
        if split.recompute:
            checkpoint_activations(system, CheckpointingConfig(mode="full"), find_blocks(system, train.blocks))
        engine.prepare(system, lambda prepared: parameter_groups(prepared, [], 0.1), split.micro_batches)
        stepper = Stepper(engine, LAYOUT, Guard(train.guard), 0, train.clip_norm, ["s"])
        ema = EMA(engine.system, 0.5) if engine.kind != "deepspeed" else None
        first = 0
        if load is not None:
            assert ema is not None
            tensors = {**engine.tensors_to_load(set(checkpoint.described(load))), **ema.tensors()}
            state = checkpoint.load(load, tensors)
            engine.loaded(tensors)
            first = ema.updates = state["step"]
        found: dict[str, Any] = {"loss": [], "norms": []}
        for step in range(first, first + STEPS):
            mine = batches(world, split.micro_batches)
            engine.system.begin_step(step, 2 * STEPS)
            totals = counted(engine.system, world.sum(count(engine.system, mine, ["s"])), ["s"])
            done = stepper(mine, totals, step, train.optimizer.lr)
            found["loss"].append(done.loss)
            found["norms"].append(done.norms)
            if ema is not None:
                ema.update()
        if system.sparsity.learns:
            engine.system.eval()
            with torch.no_grad():
                found["evaluated"] = evaluate.caption_loss(engine, LAYOUT, batches(world, 1))
            found["written"] = written(engine)
        found["parameters"] = whole_parameters(engine)
        if ema is not None:
            found["averages"] = {name: whole(tensor) for name, tensor in ema.tensors().items()}
            if save is not None:
                checkpoints = Checkpoints(save, keep=1, ranks=world.ranks, rank=world.rank)
                checkpoints.save(first + STEPS, {**engine.tensors(), **ema.tensors()}, {})
                checkpoints.close()
        return found
    finally:
        engine.close()
        world.stop()


def written(engine: Any) -> dict[int, str]:
    """What the model makes of a prompt a rank, some longer than others; one process writes for all."""
    texts = {}
    for rank in range(4) if engine.world.ranks == 1 else [engine.world.rank]:
        prompt = raw_prompt(f"word{rank} ", [picture(rank)] if rank % 2 else [])
        how = dict(decoding=Decoding(max_new_tokens=3 + rank), synced=engine.world.ranks > 1)
        (texts[rank],) = engine.call(generate, engine.system, LAYOUT, [prompt], **how)
    return texts


def whole(tensor: Tensor) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).numpy()


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-6)
    assert found["norms"] == [pytest.approx(norms, rel=1e-5) for norms in expected["norms"]]
    if "evaluated" in expected:
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        assert found["written"].items() <= expected["written"].items()
    for kind in ("parameters", "averages"):
        for name, value in expected[kind].items() if kind in found else ():
            np.testing.assert_allclose(found[kind][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def references(ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {name: ranks.run(run, 1, model, SPLITS["one process"])[0] for name, model in MODELS.items()}


@pytest.mark.parametrize(("model", "split"), [
    *(("two groups", name) for name in SPLITS if name not in ("one process", "divided, 4 ranks, one expert each")),
    ("one without a router", "divided, 2 ranks"),
    ("one without a router", "fsdp, 4 ranks, more than experts"),
    ("auxiliary routers alone", "fsdp, 2 ranks"),
    ("auxiliary routers alone", "divided, 4 ranks, one expert each"),
    ("auxiliary routers alone", "zero 3"),
    ("depths", "divided, 2 ranks, recomputed"),
    ("depths", "zero 3"),
])  # fmt: skip
def test_however_split_the_numbers_are_the_same(
    model: str, split: str, ranks: Ranks, references: dict[str, dict[str, Any]]
) -> None:
    how = SPLITS[split]
    for found in ranks.run(run, how.ranks, MODELS[model], how):
        check(found, references[model])


def test_bf16_is_that_of_one_process(ranks: Ranks, references: dict[str, dict[str, Any]]) -> None:
    """Tokens travel in bfloat16; routers can be gathered in float32, by units of their own."""
    routers = {"units": ["vision", "connector", ".*router"], "precision": [{"match": ".*router", "weights": "fp32"}]}
    model = MODELS["two groups"]
    single = ranks.run(run, 1, model, Split(1, precision="bf16"))[0]
    assert not np.allclose(single["loss"], references["two groups"]["loss"], rtol=1e-6)
    for found in ranks.run(run, 2, model, Split(2, {**DIVIDED, **routers}, precision="bf16")):
        np.testing.assert_allclose(found["loss"], single["loss"], rtol=5e-3)
        assert found["evaluated"] == pytest.approx(single["evaluated"], rel=5e-3)


def test_routers_are_a_part_of_their_own(references: dict[str, dict[str, Any]]) -> None:
    for norms in references["two groups"]["norms"]:
        assert {"language", "routers"} < norms.keys() and norms["routers"] > 0
        parts = [norm for name, norm in norms.items() if name not in ("total", "auxiliary_routers")]
        assert sum(norm**2 for norm in parts) == pytest.approx(norms["total"] ** 2, rel=1e-5)
    for norms in references["auxiliary routers alone"]["norms"]:
        assert norms.keys() == {"auxiliary_routers", "total"} and norms["auxiliary_routers"] == norms["total"]
    assert part_of("language.model.layers.0.mlp.groups.text.router.weight") == "routers"
    assert part_of("language.model.layers.0.depth_router.weight") == "routers"
    assert part_of("sparsity.routers.0.text.inner.weight") == "auxiliary_routers"
    assert part_of("language.model.layers.0.mlp.groups.text.down") == "language"


@pytest.mark.parametrize(("saved", "loaded"), [
    ("one process", "divided and in parts, 4 ranks"),
    ("divided, 2 ranks", "one process"),
    ("divided, 2 ranks", "fsdp, 2 ranks"),
    ("divided and in parts, 4 ranks", "divided, 2 ranks"),
    ("fsdp, 4 ranks, more than experts", "divided, copies, 4 ranks"),
])  # fmt: skip
def test_a_checkpoint_loads_however_experts_are_divided(
    saved: str, loaded: str, ranks: Ranks, references: dict[str, dict[str, Any]], tmp_path: Path,
    straight: dict[str, Any],
) -> None:  # fmt: skip
    model = MODELS["two groups"]
    ranks.run(run, SPLITS[saved].ranks, model, SPLITS[saved], None, tmp_path)
    (folder,) = checkpoint.complete(tmp_path)
    for found in ranks.run(run, SPLITS[loaded].ranks, model, SPLITS[loaded], folder):
        check(found, straight)


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gives that goes on from its own checkpoint."""
    path, one = tmp_path_factory.mktemp("straight"), SPLITS["one process"]
    ranks.run(run, 1, MODELS["two groups"], one, None, path)
    (folder,) = checkpoint.complete(path)
    return ranks.run(run, 1, MODELS["two groups"], one, folder)[0]


def test_each_rank_has_its_experts_only(ranks: Ranks) -> None:
    shapes = ranks.run(local_shapes, 4, MODELS["two groups"], {**DIVIDED})
    for found in shapes:
        assert found["text.gate_up"] == ([4, 128, 32], [2, 64, 32])
        assert found["image.down"] == ([2, 32, 64], [1, 16, 64])
    # Fewer experts than ranks: along an axis that divides, and not one expert a rank, with padding for the others.
    for found in ranks.run(local_shapes, 4, MODELS["two groups"], FSDP):
        assert found["text.gate_up"] == ([4, 128, 32], [1, 128, 32])
        assert found["image.gate_up"] == ([2, 128, 32], [2, 32, 32])


def local_shapes(model: Any, settings: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Whole and local shapes of the weights of the first layer's groups."""
    train = train_config(settings, "adamw", [])
    world = World.from_environment()
    engine = train.engine.build(world, train)
    world.start(engine.device, 60, engine.group)
    try:
        engine.prepare(model.build(), lambda prepared: parameter_groups(prepared, [], 0.1), 1)
        groups = engine.system.language.model.layers[0].mlp.groups
        return {
            f"{name}.{key}": (list(weight.shape), list(weight.to_local().shape))
            for name, group in groups.items()
            for key, weight in group.named_parameters(recurse=False)
        }
    finally:
        world.stop()


@pytest.mark.parametrize(("model", "count", "settings", "message"), [
    (MODEL, 2, DIVIDED, "the model has no group of several experts"),
    (section(text=4, image=3), 2, DIVIDED, "does not divide the 3 experts of language.model.layers.0.mlp.groups.image"),
    (section(all=2), 2, {**DIVIDED, "expert_parallel": 3}, "expert_parallel 3 does not divide the 2 processes"),
    (section(all=2), 3, {**DIVIDED, "shard_size": 1}, "does not divide the 1 processes that hold a copy"),
])  # fmt: skip
def test_what_cannot_be_divided_is_refused_in_one_line(
    model: Any, count: int, settings: dict[str, Any], message: str, ranks: Ranks
) -> None:
    for error in ranks.run(refused, count, model, settings):
        assert message in error and "\n" not in error


def test_what_a_config_tells_is_refused_before_anything_is_built(tiny_config: Callable[..., RunConfig]) -> None:
    engine = "train.engine={kind: fsdp, expert_parallel: 2}"
    with pytest.raises(ConfigError, match=r"train.engine.expert_parallel: 2 does not divide .* \(text: 4, image: 3\)"):
        tiny_config("model.experts={text: 4, image: 3}", engine)
    assert tiny_config("model.experts={text: 4, image: 1}", "data.test=[]", engine).train.engine.expert_parallel == 2


def refused(model: Any, settings: dict[str, Any]) -> str:
    try:
        local_shapes(model, settings)
    except ConfigError as error:
        return str(error)
    return ""


def test_pieces_row_by_row_come_out_column_by_column() -> None:
    sizes = [[2, 0, 1], [1, 3, 0]]
    x = torch.tensor([[0, 0], [0, 0], [0, 2], [1, 0], [1, 1], [1, 1], [1, 1]])  # row and column of its piece
    assert _transposed(x, sizes).tolist() == [[0, 0], [0, 0], [1, 0], [1, 1], [1, 1], [1, 1], [0, 2]]
    back = [list(column) for column in zip(*sizes, strict=True)]
    assert torch.equal(_transposed(_transposed(x, sizes), back), x)
