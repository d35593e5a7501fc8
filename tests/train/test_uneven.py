"""No hang, ever, from uneven media: ranks differ in what they have, and every tower runs on every rank.

A system of three towers, in training, evaluation and generation, with every combination of present and absent on two
ranks, for trained and for frozen towers. A hang is a failure: each run has a time limit.
"""

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_engines import LAYOUT, LENGTH, MODEL, pack, picture, train_config
from torch import Tensor, nn

from mm.data.batch import MediaBatch, PackedBatch, collate, with_dummies
from mm.data.layout import AudioLayout, Layout, VideoLayout
from mm.models.generate import generate
from mm.models.prompts import Decoding, raw_prompt
from mm.models.system import GenerativeSystem, place
from mm.train import evaluate
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.params import freeze, parameter_groups
from mm.train.step import Stepper, count, counted

WIDTH = 32
KINDS = ("image", "audio", "video")


class Tower(nn.Module):
    """[n, values] of an item to `length` features."""

    def __init__(self, values: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.stem, self.head = nn.Linear(values, WIDTH), nn.Linear(WIDTH, length * WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.stem(values)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden).view(-1, WIDTH)


@cache
def layout() -> Layout:
    image = LAYOUT.image
    assert image is not None
    return replace(
        LAYOUT, audio=AudioLayout(16000, 80), video=VideoLayout(2, image.tokens, image.cost, image.transform)
    )


class ThreeTowers(GenerativeSystem):
    """A language model that reads pictures, recordings and clips."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {kind: layout().smallest(kind) for kind in KINDS}
        self.towers = nn.ModuleDict(
            {kind: Tower(int(torch.tensor(shape).prod()), length) for kind, (shape, length, _) in shapes.items()}
        )
        self.inner = MODEL.build()
        self.language = self.inner.language

    def embed(self, batch: PackedBatch) -> Tensor:
        embeddings = self.language.get_input_embeddings()(batch.input_ids)
        for kind, media in batch.media.items():
            embeddings = place(embeddings, self.towers[kind](media.values.view(len(media), -1)), media)
        return embeddings


def batch_with(kinds: tuple[str, ...], row: int) -> PackedBatch:
    """Two rows of text, with an item of each of some kinds in the place of the first tokens."""
    batch = collate([pack(row, False), pack(row + 1, False)], layout(), LENGTH)
    media: dict[str, MediaBatch] = {}
    for kind in kinds:
        # A dummy that is none: the same shapes with values, in row 1 from position 0.
        made = with_dummies(batch, layout()).media[kind]
        values = torch.randn(len(made.values), generator=torch.Generator().manual_seed(row))
        media[kind] = replace(made, values=values, row=torch.ones(1, dtype=torch.int64), dummy=False)
    return replace(batch, media=media)


def generated(engine: dict[str, Any], have: list[bool]) -> list[str]:
    """What each rank writes: one has a picture, the other a prompt alone."""
    world = World.from_environment()
    train = train_config(engine, "adamw", [])
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        one.prepare(MODEL.build(), lambda prepared: parameter_groups(prepared, [], 0.1), 1)
        written = []
        for rank, has in enumerate(have):
            if world.ranks == 1 or rank == world.rank:
                prompt = raw_prompt("word3 ", [picture(rank)] if has else [])
                call = dict(decoding=Decoding(max_new_tokens=6), synced=world.ranks > 1)
                written += one.call(generate, one.system, LAYOUT, [prompt], **call)
        return written
    finally:
        one.close()
        world.stop()


COMBINATIONS = [tuple(kinds) for n in range(4) for kinds in itertools.combinations(KINDS, n)]


def every_combination(engine: dict[str, Any], frozen: bool) -> list[float]:
    """A step and an evaluation for each pair of combinations; the losses."""
    rules = [{"match": r"towers\..*", "freeze": True}] if frozen else []
    engine = {**engine, **({"units": [r"towers\.\w+"]} if engine["kind"] == "fsdp" else {})}
    train = train_config(engine, "adamw", rules)
    world = World.from_environment()
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        system = ThreeTowers()
        freeze(system, train.params)
        one.prepare(system, lambda prepared: parameter_groups(prepared, train.params, 0.1), 1)
        stepper = Stepper(one, layout(), Guard(train.guard), 0, 1.0, ["s"])
        losses = []
        for step, pair in enumerate(itertools.product(COMBINATIONS, COMBINATIONS)):
            mine = batch_with(pair[world.rank] if world.ranks > 1 else pair[0], 2 * world.rank)
            both = [mine] if world.ranks > 1 else [mine, batch_with(pair[1], 2)]
            totals = counted(one.system, world.sum(count(one.system, both, ["s"])), ["s"])
            losses.append(stepper(both, totals, step, 1e-3).loss)
            if step % 8 == 0:
                one.system.eval()
                losses.append(evaluate.caption_loss(one, layout(), both))
                one.system.train()
        return losses
    finally:
        one.close()
        world.stop()


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"kind": "fsdp"},
    "copies": {"kind": "fsdp", "shard_size": 1},
    **{f"zero {stage}": {"kind": "deepspeed", "stage": stage} for stage in (0, 1, 2, 3)},
}


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> dict[bool, list[float]]:
    """The losses of one process that has both ranks' rows."""
    return {frozen: ranks.run(every_combination, 1, {"kind": "single"}, frozen)[0] for frozen in (False, True)}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_combination_of_present_and_absent(engine: str, ranks: Ranks, expected: dict[bool, list[float]]) -> None:
    """64 pairs of what two ranks have."""
    for found in ranks.run(every_combination, 2, ENGINES[engine], False):
        assert found == pytest.approx(expected[False], rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp", "zero 3"])
def test_frozen_towers_in_parts(engine: str, ranks: Ranks, expected: dict[bool, list[float]]) -> None:
    """The same where weights are gathered that have no gradients."""
    for found in ranks.run(every_combination, 2, ENGINES[engine], True):
        assert found == pytest.approx(expected[True], rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp", "zero 2", "zero 3"])
@pytest.mark.parametrize("have", [[True, False], [False, True], [False, False], [True, True]], ids=repr)
def test_generation_where_ranks_differ(engine: str, have: list[bool], ranks: Ranks) -> None:
    expected = ranks.run(generated, 1, {"kind": "single"}, have)[0]
    assert [text for (text,) in ranks.run(generated, 2, ENGINES[engine], have)] == expected
