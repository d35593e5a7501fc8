"""One sample a row: nothing is packed, micro-batches are of like length, and the set of a step stays the same."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from mm.data.batch import IGNORE, PackedBatch
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import PackedDataset
from mm.errors import DataError

ROWS = 12


@pytest.fixture(scope="module")
def single(
    raw: Path, tmp_path_factory: pytest.TempPathFactory, layout: Layout, pack: Callable[..., PackedDataset]
) -> PackedDataset:
    out = tmp_path_factory.mktemp("single") / "train"
    source = {"prompt": "{language}: "}
    return pack("{root}/*.tar", out, layout, source, root=str(raw), visits=2, packing="single")


def steps(dataset: PackedDataset, layout: Layout, count: int, **options: int) -> list[list[PackedBatch]]:
    return list(PackedLoader(dataset, layout, ROWS, seed=5, **options).steps(count))


def ids(batches: list[PackedBatch]) -> list[str]:
    return [id for batch in batches for (id,) in filter(None, batch.ids)]


def test_every_sample_is_a_row(single: PackedDataset, packed: PackedDataset, layout: Layout) -> None:
    assert len(single) == 2 * 60
    ledger, full = single.about["ledger"]["pictures"], packed.about["ledger"]["pictures"]
    assert (ledger["segments"], ledger["segment_tokens"] * 3) == (
        120,
        pytest.approx(full["segment_tokens"] * 2, rel=0.2),
    )
    assert [len(pack.segments) for pack in map(single.read, range(len(single)))] == [1] * 120


def test_rows_are_as_long_as_the_longest_of_their_micro_batch(single: PackedDataset, layout: Layout) -> None:
    for batches in steps(single, layout, 4, micro_batch=3):
        lengths = [(batch.segment_ids > 0).sum(1) for batch in batches]
        for batch, filled in zip(batches, lengths, strict=True):
            assert batch.input_ids.shape == (3, int(filled.max()))
            assert (batch.labels[batch.segment_ids == 0] == IGNORE).all()
        spans = [(int(filled.min()), int(filled.max())) for filled in lengths]
        assert all(before[1] <= after[0] for before, after in pairwise(spans)), "not by length"
    for batch in one_pass(single, layout, 7):
        assert batch.input_ids.shape[1] == int((batch.segment_ids > 0).sum(1).max())


def test_rows_come_in_a_drawn_order(single: PackedDataset, layout: Layout) -> None:
    places = {f"pictures/{shard:03d}/{n:06d}": n for shard in range(2) for n in range(30 * shard, 30 * shard + 30)}
    first = [places[id] for batches in steps(single, layout, 1) for id in ids(batches)]
    assert max(first) - min(first) > 30, "a step is no run of neighbours"
    on_disk = [places[single.read(number).segments[0].id] for number in range(60)]
    assert sorted(on_disk) == list(range(60)) and on_disk != sorted(on_disk)


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (12, 1), (3, 2), (2, 3), (2, 5)])
def test_a_step_holds_the_same_samples_however_it_is_split(
    single: PackedDataset, layout: Layout, micro_batch: int, ranks: int
) -> None:
    expected = [sorted(ids(batches)) for batches in steps(single, layout, 3)]
    shares = [steps(single, layout, 3, micro_batch=micro_batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    found = [sorted(id for share in shares for id in ids(share[step])) for step in range(3)]
    assert found == expected
    assert len({len(share[0]) for share in shares}) == 1, "all ranks have as many micro-batches"


def test_a_set_of_the_other_kind_is_refused(single: PackedDataset, packed: PackedDataset, layout: Layout) -> None:
    single.require(layout, 64, packing="single")
    with pytest.raises(DataError, match=r"packing single \(data.packing is full\)"):
        single.require(layout, 64)
    with pytest.raises(DataError, match=r"packing full \(data.packing is single\)"):
        packed.require(layout, 64, packing="single")
