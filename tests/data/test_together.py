"""Packs that stay together: units of the sequence go to ranks and batches whole, and are shared evenly by modality."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.batch import MODALITIES, PackedBatch
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.mixture import MixtureConfig
from mm.data.pack import balance
from mm.data.packed import PackedDataset
from mm.errors import ConfigError

Row = tuple[tuple[str, ...], tuple[int, ...]]
STEPS = 4
MOST = STEPS * 4 * 6
"""Packs in so many steps of at most 6 units of 4."""


def rows_of(batch: PackedBatch) -> list[Row | None]:
    """Every row by what is in it, None for padding."""
    pairs = zip(batch.ids, batch.input_ids.tolist(), strict=True)
    return [(tuple(ids), tuple(tokens)) if ids else None for ids, tokens in pairs]


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.fixture(scope="module")
def sequence(packed: PackedDataset, layout: Layout) -> list[Row]:
    """The packs of the global sequence, one after the other, and over the end of the first round."""
    assert len(packed) < MOST
    batches = PackedLoader(packed, layout, rows=1, seed=3).batches(MOST)
    return [row for batch in batches for row in rows_of(batch) if row is not None]


def units_seen(steps: list[list[list[PackedBatch]]], together: int) -> list[list[list[Row | None]]]:
    """`steps` by rank; of each step what rows n x together and on hold, over all batches of all ranks."""
    seen = []
    for of_ranks in zip(*steps, strict=True):
        assert len({tuple(batch.input_ids.shape) for batches in of_ranks for batch in batches}) == 1
        assert len({len(batches) for batches in of_ranks}) == 1, "all ranks have as many batches"
        found = [chunks(rows_of(batch), together) for batches in of_ranks for batch in batches]
        seen.append([unit for unit in chain(*found) if any(unit)])
    return seen


@settings(max_examples=60, deadline=None)
@given(
    together=st.integers(1, 4),
    units=st.integers(1, 6),
    micro=st.integers(1, 6),
    ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    by_modality=st.booleans(),
    stop=st.integers(1, STEPS - 1),
)
def test_units_are_whole_and_every_pack_comes_once(
    packed: PackedDataset,
    layout: Layout,
    sequence: list[Row],
    together: int,
    units: int,
    micro: int,
    ranks: tuple[int, int],
    by_modality: bool,
    stop: int,
) -> None:
    """With any ranks and batches, and stopped in the middle and gone on with by other ones."""
    rows = together * units
    expected = [chunks(step, together) for step in chunks(sequence[: STEPS * rows], rows)]
    state = None
    seen = []
    for count, steps in zip(ranks, (stop, STEPS - stop), strict=True):
        loaders = [
            PackedLoader(
                packed, layout, rows, together * micro, seed=3, rank=rank, ranks=count, together=together,
                by_modality=by_modality,
            )
            for rank in range(count)
        ]  # fmt: skip
        for loader in loaders if state else ():
            loader.load_state_dict(state)
        seen += units_seen([list(loader.steps(steps)) for loader in loaders], together)
        assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
        state = loaders[0].state_dict()
        micro = 1
    assert [sorted(step) for step in seen] == [sorted(step) for step in expected]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_lacks_of_the_last_unit_is_padding(packed: PackedDataset, layout: Layout, ranks: int) -> None:
    once = MixtureConfig(max_epochs={"pictures": 1})
    first = int((packed.index["visit"].to_numpy() == 0).sum())
    together = next(n for n in (2, 3, 4, 5) if first % n)
    made = [
        PackedLoader(packed, layout, 2 * together, together, 3, once, rank=rank, ranks=ranks, together=together)
        for rank in range(ranks)
    ]
    units = [unit for step in units_seen([list(loader.steps(10_000)) for loader in made], together) for unit in step]
    assert sum(row is not None for unit in units for row in unit) == first
    (short,) = [unit for unit in units if None in unit]
    packs = first % together
    assert None not in short[:packs] and short[packs:] == [None] * (together - packs)


@pytest.mark.parametrize(("together", "by_modality"), [(1, False), (1, True), (2, False), (2, True)])
def test_units_go_to_ranks_as_their_costs_are_balanced(
    packed: PackedDataset, layout: Layout, sequence: list[Row], together: int, by_modality: bool
) -> None:
    """In the order of the sequence; of a single row, as ever, encoder tokens are the cost."""
    units, ranks = 10, 3
    rows = units * together
    all_rows = [row for batch in one_pass(packed, layout, 1) for row in rows_of(batch)]
    costs = {row: cost for row, cost in zip(all_rows, packed.modality_costs(), strict=True)}
    plain = {row: cost for row, cost in zip(all_rows, packed.encoder_costs(), strict=True)}
    options: dict[str, Any] = {"ranks": ranks, "together": together, "by_modality": by_modality}
    made = [PackedLoader(packed, layout, rows, 2, seed=3, rank=rank, **options) for rank in range(ranks)]
    found = [list(loader.steps(STEPS)) for loader in made]
    differs = False
    for number in range(STEPS):
        drawn = chunks(sequence[number * rows : (number + 1) * rows], together)
        shared, other = (
            balance(np.array([sum(one[row] for row in unit) for unit in drawn]), ranks) for one in (costs, plain)
        )
        differs |= not np.array_equal(shared, other)
        for rank, steps in enumerate(found):
            whose = shared if by_modality else other
            mine = [row for unit, owner in zip(drawn, whose, strict=True) if owner == rank for row in unit]
            seen = [row for batch in steps[number] for row in rows_of(batch)]
            assert seen == mine + [None] * (len(seen) - len(mine))
    assert differs, "the two costs share the same in every step"


def test_costs_by_modality_are_the_positions_of_batches(packed: PackedDataset, layout: Layout) -> None:
    costs = packed.modality_costs()
    for number, batch in enumerate(one_pass(packed, layout, 1)):
        kinds = batch.modality[batch.segment_ids > 0]
        assert costs[number].tolist() == np.bincount(kinds, minlength=len(MODALITIES)).tolist()


def test_ranks_have_even_shares_of_text_and_of_pictures(packed: PackedDataset, layout: Layout) -> None:
    """The most that a rank has of a step, of either, is no more than with rows dealt in turn, and less in the mean."""
    rows, together, ranks = 16, 2, 2
    costs, mixture = packed.modality_costs()[:, :2], PackedLoader(packed, layout, rows, seed=3).mixture
    drawn = np.array([mixture.next().pack for _ in range(STEPS * rows)])  # type: ignore[union-attr]
    in_turn = costs[drawn].reshape(STEPS, rows // together // ranks, ranks, together, 2).sum((1, 3))  # s r 2
    shared = np.zeros_like(in_turn)
    for rank in range(ranks):
        loader = PackedLoader(packed, layout, rows, seed=3, rank=rank, ranks=ranks, together=together, by_modality=True)
        for step, batches in enumerate(loader.steps(STEPS)):
            kinds = np.concatenate([batch.modality[batch.segment_ids > 0].numpy() for batch in batches])
            shared[step, rank] = np.bincount(kinds, minlength=2)
    assert np.array_equal(shared.sum(1), in_turn.sum(1)), "the same packs"
    busiest = [(part / part.sum(1, keepdims=True)).max((1, 2)) for part in (shared, in_turn)]
    assert (busiest[0] <= busiest[1] + 1e-9).all() and busiest[0].mean() < busiest[1].mean()


@pytest.mark.parametrize(
    ("rows", "micro_batch", "words"),
    [(9, None, "the 9 rows of a step (train.batch_tokens)"), (8, 2, "the 2 rows of train.micro_batch")],
)
def test_rows_that_hold_no_whole_units_are_refused(
    packed: PackedDataset, layout: Layout, rows: int, micro_batch: int | None, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        PackedLoader(packed, layout, rows, micro_batch, together=4)
    assert str(caught.value).startswith(words + " are no multiple of the 4") and "\n" not in str(caught.value)


def test_rows_of_one_sample_go_by_the_longest_of_their_unit(
    raw: Path, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    """And the last unit of all, which padding fills up, goes where it belongs among them."""
    single = pack("{root}/*.tar", tmp_path / "single", layout, root=str(raw), packing="single")
    once, in_front = MixtureConfig(max_epochs={"pictures": 1}), 0
    for seed in range(4):
        for batches in PackedLoader(single, layout, 21, 7, seed, once, together=7).steps(3):
            longest = [int((batch.segment_ids > 0).sum(1).max()) for batch in batches]
            assert longest == sorted(longest) and len(longest) == 3
        last = [[row is None for row in rows_of(batch)] for batch in batches]
        assert sorted(last) == [[False] * 7, [False] * 7, [False] * 4 + [True] * 3], "60 = 42 + 7 + 7 + 4"
        in_front += last[2] == [False] * 7
    assert in_front
