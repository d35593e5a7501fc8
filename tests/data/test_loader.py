"""The order of packs: a pure function of the seed, whatever reads it, and resumed to the pack."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.data.batch import PackedBatch
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, PackOrder, one_pass
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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 2**31), st.integers(1, 3))
def test_an_epoch_is_a_permutation_of_one_visit(visits: list[int], seed: int, rounds: int) -> None:
    order = PackOrder(np.array(visits), seed)
    start = 0
    present = sorted(set(visits))
    for _ in range(rounds):
        for visit in present:
            packs = [number for number, of in enumerate(visits) if of == visit]
            drawn = [order[start + index] for index in range(len(packs))]
            assert sorted(drawn) == packs
            start += len(packs)


def test_locate_counts_epochs(packed: PackedDataset) -> None:
    visits = packed.index["visit"].to_numpy()
    sizes = np.bincount(visits).tolist()
    order = PackOrder(visits, 0)
    places = [order.locate(position) for position in range(2 * len(visits))]
    assert places == [(epoch, index) for epoch in range(6) for index in range(sizes[epoch % 3])]


def test_order_is_a_function_of_the_seed_alone(packed: PackedDataset) -> None:
    visits, n = packed.index["visit"].to_numpy(), 2 * len(packed)
    forwards = [PackOrder(visits, 5)[position] for position in range(n)]
    order = PackOrder(visits, 5)
    assert [order[position] for position in np.arange(n)[::-1]][::-1] == forwards, "asked in any way"
    assert [PackOrder(visits, 6)[position] for position in range(n)] != forwards
    assert forwards[: n // 2] != forwards[n // 2 :], "every epoch has an order of its own"


def test_two_rounds_bring_every_pack_twice(packed: PackedDataset, make: Loader) -> None:
    found = rows(list(make(rows=1).batches(2 * len(packed))))
    once = rows(list(one_pass(packed, make()._source.layout, 5)))
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
    assert state == {"consumed": 12}, "what was read ahead is not consumed"
    second = make(rows=resumed_rows, workers=resumed_workers)
    second.load_state_dict(state)
    after = rows(list(second.batches((total - 12) // resumed_rows)))
    assert before + after == expected
    assert second.state_dict() == {"consumed": total}


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
    fifth = loader.order[8]
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
    assert loader.state_dict() == {"consumed": 8}
    with pytest.raises(DataError, match=f"pack {fifth} is damaged"):
        list(one_pass(dataset, layout, 4))
