"""The order of packs: a pure function of the seed, whatever reads it, and resumed to the pack."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mm.data.batch import PackedBatch
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass, source_infos
from mm.data.packed import PackedDataset
from mm.errors import DataError

Loader = Callable[..., PackedLoader]


@pytest.fixture
def make(packed: PackedDataset, layout: Layout) -> Loader:
    return lambda rows=4, **options: PackedLoader(packed, layout, rows, **{"seed": 3, **options})


def rows(batches: list[PackedBatch]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Every row by what is in it: sample ids and tokens."""
    return [
        (tuple(ids), tokens)
        for batch in batches
        for ids, tokens in zip(batch.ids, batch.input_ids.tolist(), strict=True)
    ]


def test_two_rounds_bring_every_pack_twice(packed: PackedDataset, make: Loader, layout: Layout) -> None:
    found = rows(list(make(rows=1).batches(2 * len(packed))))
    once = rows(list(one_pass(packed, layout, 5)))
    assert sorted(found) == sorted(once * 2)
    first_visit = int((packed.index["visit"].to_numpy() == 0).sum())
    assert len({id for ids, _ in found[:first_visit] for id in ids}) == 60, "the first epoch has every picture"


def test_any_number_of_workers_gives_the_same(make: Loader) -> None:
    expected = list(make().batches(12))
    for workers in (1, 2):
        found = list(make(workers=workers).batches(12))
        for a, b in zip(expected, found, strict=True):
            for field in dataclasses.fields(a):
                one, other = getattr(a, field.name), getattr(b, field.name)
                if isinstance(one, torch.Tensor):
                    assert torch.equal(one, other), field.name
            assert a.ids == b.ids
            assert torch.equal(a.media["image"].values, b.media["image"].values)


@pytest.mark.parametrize(("workers", "resumed_rows", "resumed_workers"), [(0, 2, 1), (2, 3, 0), (1, 12, 2)])
def test_resumed_with_other_workers_and_micro_batches(
    make: Loader, packed: PackedDataset, workers: int, resumed_rows: int, resumed_workers: int
) -> None:
    """Stop in the middle of an epoch: the rows go on where they were, none lost, none twice."""
    total = 12 * (len(packed) // 12 + 2)  # past the end of the first round
    expected = rows(list(make(rows=1).batches(total)))
    first = make(rows=4, workers=workers)
    stopped = first.batches(100)
    before = rows([next(stopped) for _ in range(3)])
    state = first.state_dict()
    assert state["mixture"]["position"] == 12, "what was read ahead is not consumed"
    state = json.loads(json.dumps(state))
    second = make(rows=resumed_rows, workers=resumed_workers)
    second.load_state_dict(state)
    after = rows(list(second.batches((total - 12) // resumed_rows)))
    assert before + after == expected
    assert second.state_dict()["mixture"]["position"] == total


def test_a_visit_without_packs_is_left_out(packed: PackedDataset) -> None:
    """As where its only caption is longer than a row."""
    whole = source_infos(packed)
    dataset = PackedDataset(packed.folder)
    visits = dataset.index["visit"].to_numpy() != 1
    dataset.index = dataset.index.filter(pa.array(visits))
    for info, before in zip(source_infos(dataset), whole, strict=True):
        assert len(info.visits) == len(before.visits) - 1 and all(map(len, info.visits))


def test_reading_leaves_the_global_generators_alone(make: Loader) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    list(make(workers=1).batches(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_one_pass_has_every_pack_once_in_order(packed: PackedDataset, layout: Layout) -> None:
    batches = list(one_pass(packed, layout, 7))
    assert {len(batch.ids) for batch in batches[:-1]} == {7} and len(batches) == -(-len(packed) // 7)
    ids = [ids for batch in batches for ids in batch.ids]
    assert ids == [[segment.id for segment in packed.read(number).segments] for number in range(len(packed))]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_line_from_a_worker_too(
    packed: PackedDataset, layout: Layout, tmp_path: Path, workers: int
) -> None:
    folder = Path(shutil.copytree(packed.folder, tmp_path / "train"))
    dataset = PackedDataset(folder)
    loader = PackedLoader(dataset, layout, 2, seed=3, workers=workers)
    fifth = [loader.mixture.next().pack for _ in range(9)][-1]
    row = pq.read_table(folder / "index.parquet").slice(fifth, 1).to_pylist()[0]
    data = bytearray((folder / row["shard"]).read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 1
    (folder / row["shard"]).write_bytes(data)
    batches = loader.batches(10)
    for _ in range(4):
        next(batches)
    with pytest.raises(DataError, match=f"pack {fifth} is damaged") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert loader.state_dict()["step"] == 4
    with pytest.raises(DataError, match=f"pack {fifth} is damaged"):
        list(one_pass(dataset, layout, 4))
