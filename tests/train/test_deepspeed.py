"""DeepSpeed, ZeRO 0 to 3 on 2 ranks: torch's numbers in one process are the oracle, for every stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from tiny_run import TINY
from torch import Tensor

from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.loader import EMPTY, PackedLoader
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.backbone import ordinary_attention
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.distributed import World
from mm.train.engines.single import SingleEngine
from mm.train.params import freeze, parameter_groups

SPLIT_ALL = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""Else stage 3 keeps what is below 100,000 numbers whole: the whole of a tiny model."""
CASES = {
    "0": "stage: 0",
    "1": "stage: 1",
    "2": "stage: 2",
    "3": f"stage: 3, raw: {SPLIT_ALL}",
    "1-offload": "stage: 1, offload_optimizer: true",
    "2-offload": "stage: 2, offload_optimizer: true",
    "3-offload": f"stage: 3, offload_optimizer: true, raw: {SPLIT_ALL}",
}
SETTINGS = (
    "train.optimizer={kind: adamw, lr: 1e-3, eps: 1e-6}",
    "train.params=[{match: 'vision.featurizer.patch_embed.*', freeze: true}, {match: 'language.*norm.*', lr_scale: 2},"
    "{match: 'connector.*', weight_decay: 0.2}]",
)
STEPS, MORE, LIMIT = 5, 2, 0.5
Step = list[list[PackedBatch]]
"""Micro-batches, for each of two ranks two."""


def make_steps(config: RunConfig, count: int) -> list[Step]:
    """With pictures on all ranks, on one, on none; with rows of padding."""
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    batches = iter(PackedLoader(dataset, layout, rows=2).batches(4 * count))
    padding = collate([EMPTY, EMPTY], layout, config.data.context_length)

    def of(kind: str) -> PackedBatch:
        batch = next(batches)
        batch = {"picture": batch, "text": replace(batch, media={}), "padding": padding}[kind]
        return with_dummies(batch, layout)

    kinds = [
        [("picture", "picture"), ("picture", "picture")],
        [("picture", "text"), ("text", "text")],
        [("text", "text"), ("text", "padding")],
        [("padding", "padding"), ("picture", "picture")],
    ]
    return [[[of(kind) for kind in rank] for rank in kinds[i % len(kinds)]] for i in range(count)]


def start(config: RunConfig, world: World) -> Any:
    torch.manual_seed(0)
    system = config.model.build()
    rules = config.train.params
    freeze(system, rules)
    checkpoint_activations(system, config.train.activation_checkpointing, find_blocks(system, config.train.blocks))
    engine = config.train.engine.build(world, config.train)
    engine.prepare(system, lambda system: parameter_groups(system, rules, 0.01), 2)
    return engine


def gradients(engine: SingleEngine, step: Step, scale: float = 1.0) -> None:
    """Those of the sum over ranks and micro-batches of all losses, by the count of the whole step."""
    counts = [int(engine.system.counts(batch)["next_token"]) for rank in step for batch in rank]
    batches = [batch for rank in step for batch in rank]
    each = len(batches) // engine.world.ranks
    mine = batches[engine.world.rank * each :][:each]
    for number, batch in enumerate(mine):
        loss = engine.forward(batch).losses["next_token"]
        engine.backward(scale * loss / sum(counts), number == len(mine) - 1)


def run(engine: SingleEngine, steps: list[Step], first: int = 0) -> list[dict[str, float]]:
    norms = []
    for number, step in enumerate(steps, first):
        gradients(engine, step)
        norms.append({name: float(norm) for name, norm in engine.clip(LIMIT).items()})
        engine.set_lr(1e-3 / (number + 1))
        engine.update()
    return norms


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load(engine: SingleEngine, saved: dict[str, Tensor]) -> None:
    tensors = engine.tensors_to_load(set(saved))
    for name, tensor in tensors.items():
        assert tensor.shape == saved[name].shape, name
        tensor.copy_(saved[name])
    engine.loaded(tensors)


def whole_gradients(engine: SingleEngine) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    named = engine.system.named_parameters()
    return {name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}


def continued(engine: SingleEngine, batch: PackedBatch) -> Tensor:
    """Token ids: a text and what the language model makes of it."""
    language = engine.system.language
    with torch.no_grad(), ordinary_attention(language):
        return engine.call(
            language.generate, batch.input_ids[:, :4], max_new_tokens=3, min_new_tokens=3, pad_token_id=0
        )


def case(path: Path, settings: tuple[str, ...], folder: Path) -> None:
    config = load_config(path, settings)
    steps = torch.load(folder / "steps.pt", weights_only=False)
    world = World.from_environment()
    world.start(torch.device("cpu"), 60, True)
    found: dict[str, Any] = {}

    engine = start(config, world)
    names = [name for name, _ in engine.system.named_parameters()]
    gradients(engine, steps[0])
    found["gradients"] = whole_gradients(engine)
    engine.discard()
    found["norms"] = run(engine, steps[:2])
    two = copied(engine.tensors())
    # What evaluation and generation do between training steps, the same on all ranks or not.
    with torch.no_grad():
        found["loss"] = engine.forward(steps[0][0][0]).losses["next_token"]
        found["embedded"] = engine.call(engine.system.embed, steps[0][world.rank][0])
    found["continued"] = continued(engine, steps[0][0][0])
    found["norms"] += run(engine, steps[2:STEPS], 2)
    found["tensors"] = copied(engine.tensors())
    run(engine, steps[STEPS:], STEPS)
    found["more"] = copied(engine.tensors())
    assert names == [name for name, _ in engine.system.named_parameters()]
    engine.close()

    # Steps that are left out leave nothing behind, not a bit.
    engine = start(config, world)
    for number in range(2):
        gradients(engine, steps[3], scale=100.0)
        engine.clip(LIMIT)
        engine.discard()
        run(engine, [steps[number]], number)
    after = engine.tensors()
    assert after.keys() == two.keys()
    assert [name for name in two if not torch.equal(after[name], two[name])] == []
    # What one process saved is gone on with, in the place of what is there.
    load(engine, torch.load(folder / "single.pt", weights_only=True)["tensors"])
    run(engine, steps[STEPS:], STEPS)
    found["from_single"] = copied(engine.tensors())
    engine.close()
    world.stop()
    torch.save(found, folder / f"rank{world.rank}.pt")


def short_case(path: Path, settings: tuple[str, ...], folder: Path) -> dict[str, Any]:
    world = World.from_environment()
    world.start(torch.device("cpu"), 60, True)
    engine = start(load_config(path, settings), world)
    run(engine, torch.load(folder / "steps.pt", weights_only=False)[:2])
    if engine.stage == 3:
        assert not any(parameter.numel() for parameter in engine.system.parameters()), "weights are in parts"
    tensors = {name: tensor.numpy() for name, tensor in engine.tensors().items()}
    engine.close()
    world.stop()
    return tensors


@pytest.fixture(scope="module")
def single(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process does, in `single.pt`, with the config that it did it by."""
    folder = tmp_path_factory.mktemp("single")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "run"), **TINY, "data": {**TINY["data"], "cache": str(cache)}}))
    config = load_config(path, SETTINGS)
    steps = make_steps(config, STEPS + MORE)
    torch.save(steps, folder / "steps.pt")
    engine = start(config, World())
    gradients(engine, steps[0])
    found: dict[str, Any] = {
        "gradients": copied({name: p.grad for name, p in engine.system.named_parameters() if p.grad is not None})
    }
    engine.discard()
    found["norms"] = run(engine, steps[:2])
    found["two"] = copied(engine.tensors())
    with torch.no_grad():
        found["loss"] = engine.forward(steps[0][0][0]).losses["next_token"]
        found["embedded"] = [engine.call(engine.system.embed, rank[0]) for rank in steps[0]]
    found["continued"] = continued(engine, steps[0][0][0])
    found["norms"] += run(engine, steps[2:STEPS], 2)
    found["tensors"] = copied(engine.tensors())
    run(engine, steps[STEPS:], STEPS)
    found["more"] = copied(engine.tensors())
    torch.save(found, folder / "single.pt")
    return folder, path


def close_to(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of the expected tensors; a parameter that never had a gradient has moments, of zeros, under DeepSpeed only."""
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    for name in found.keys() - expected.keys():
        assert name.startswith("optimizer.") and (name.endswith(".step") or not found[name].any()), name


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_process(name: str, ranks: Ranks, single: tuple[Path, Path]) -> None:
    folder, path = single
    settings = (*SETTINGS, f"train.engine={{kind: deepspeed, {CASES[name]}}}")
    ranks.run(case, 2, path, settings, folder, seconds=100)
    expected = torch.load(folder / "single.pt", weights_only=True)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    flat = torch.cat([grad.flatten() for grad in expected["gradients"].values()]).double()
    for rank in range(2):
        mine = torch.cat([found[rank]["gradients"][name].flatten() for name in expected["gradients"]]).double()
        assert float((mine - flat).norm() / flat.norm()) < 1e-6
        for a, b in zip(found[rank]["norms"], expected["norms"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)
        torch.testing.assert_close(found[rank]["loss"], expected["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[rank]["embedded"], expected["embedded"][rank], rtol=1e-4, atol=1e-5)
        assert torch.equal(found[rank]["continued"], expected["continued"])
    for key, like in (("tensors", "tensors"), ("more", "more"), ("from_single", "more")):
        assert not found[0][key].keys() & found[1][key].keys(), "each tensor is on one rank"
        close_to({**found[0][key], **found[1][key]}, expected[like])

    # And back: one process goes on with what DeepSpeed saved.
    engine = start(load_config(path, SETTINGS), World())
    load(engine, {**found[0]["tensors"], **found[1]["tensors"]})
    run(engine, torch.load(folder / "steps.pt", weights_only=False)[STEPS:], STEPS)
    close_to(engine.tensors(), expected["more"])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_engines_follow_one_another_at_any_number_of_ranks(stage: str, ranks: Ranks, single: tuple[Path, Path]) -> None:
    """Process groups come and go in the same processes; DeepSpeed keeps none of them."""
    folder, path = single
    settings = (*SETTINGS, f"train.engine={{kind: deepspeed, {CASES[stage]}}}")
    expected = torch.load(folder / "single.pt", weights_only=True)["two"]
    for count in (1, 4, 2):
        found = ranks.run(short_case, count, path, settings, folder, seconds=100)
        close_to({name: torch.from_numpy(array) for one in found for name, array in one.items()}, expected)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(mode: str, ranks: Ranks, single: tuple[Path, Path]) -> None:
    folder, path = single
    engine = f"train.engine={{kind: deepspeed, {CASES['3']}}}"
    settings = (*SETTINGS, engine, f"train.activation_checkpointing.mode={mode}")
    found = ranks.run(short_case, 2, path, settings, folder, seconds=100)
    tensors = {name: torch.from_numpy(array) for one in found for name, array in one.items()}
    close_to(tensors, torch.load(folder / "single.pt", weights_only=True)["two"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.engine={kind: deepspeed, stage: 0, offload_optimizer: true}"], "needs stage 1, 2 or 3"),
        (["train.engine={kind: deepspeed, raw: {fp16: {enabled: true}}}"], "fp16 is set by train.precision"),
        (["train.engine={kind: deepspeed, raw: {train_batch_size: 8}}"], "set by train.batch_tokens"),
        (["train.engine={kind: deepspeed, raw: {optimizer: {type: Adam}}}"], "set by train.optimizer"),
        (["train.engine={kind: deepspeed, raw: {scheduler: {type: WarmupLR}}}"], "set by train.schedule"),
        (["train.engine={kind: deepspeed, raw: {zero_optimization: {stage: 1}}}"], "set by train.engine.stage"),
        (["train.engine={kind: deepspeed, raw: {tensor_parallel: {autotp_size: 2}}}"], "data parallelism only"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: list[str], message: str, single: tuple[Path, Path]) -> None:
    config = load_config(single[1], settings)
    with pytest.raises(ConfigError, match=message) as error:
        config.train.engine.build(World(), config.train)
    assert "\n" not in str(error.value)
