"""Bin packing: every item in one bin, no budget exceeded, hardly more bins than there must be; ranks evenly busy."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.pack import CLASSES, balance, best_fit_decreasing, pack, pack_stream


@st.composite
def problems(draw: st.DrawFn, most: int = 60) -> tuple[np.ndarray, list[int]]:
    limits = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    item = st.tuples(*(st.integers(0, limit) for limit in limits))
    items = draw(st.lists(item, max_size=most))
    return np.array(items, dtype=np.int64).reshape(len(items), len(limits)), limits


def naive(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing item by item."""
    left: list[int] = []
    assigned = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [b for b, have in enumerate(left) if have >= sizes[item]]
        chosen = min(fitting, key=lambda b: left[b], default=len(left))
        if chosen == len(left):
            left.append(capacity)
        left[chosen] -= sizes[item]
        assigned[item] = chosen
    return assigned


def loads(sizes: list[int], bins: list[int]) -> list[int]:
    """What the bins hold, sorted: which of two bins alike takes an item is nobody's business."""
    return sorted(np.bincount(bins, weights=sizes, minlength=0).tolist())


def mixture(count: int, placeholders: int = 144, sounds: int = 0) -> np.ndarray:
    """[N, 3] tokens, pictures and seconds: captions, documents of 1 to 9 pictures and text; sounds and films."""
    rng = np.random.default_rng(0)
    captions, documents, films = count * 6 // 10, count * 2 // 10, sounds // 3
    text = count - captions - documents
    pictures = np.concatenate([np.ones(captions), np.clip(rng.geometric(0.35, documents), 1, 9), np.zeros(text)])
    words = np.concatenate([rng.lognormal(3.3, 0.7, captions), rng.lognormal(6.4, 0.8, documents + text)])
    seconds = np.clip(rng.lognormal(1.9, 0.6, sounds), 1, 20).astype(np.int64)
    seconds[:films] = np.minimum(seconds[:films], 14)
    frames = np.where(np.arange(sounds) < films, (seconds + 1) // 2, 0)
    pictures = np.concatenate([pictures, frames])
    seconds = np.concatenate([np.zeros(count, dtype=np.int64), seconds])
    tokens = np.concatenate([words, rng.lognormal(3.3, 0.7, sounds)]) + placeholders * pictures + 12.5 * seconds
    costs = np.stack([tokens, pictures, seconds], axis=1).astype(np.int64)
    return costs[costs[:, 0] <= 4096]


def fill(costs: np.ndarray, limits: list[int]) -> float:
    """Part of the scarcest budget that is used."""
    return float((costs.sum(axis=0) / limits).max() / (pack(costs, limits).max() + 1))


def optimum(costs: list[tuple[int, ...]], limits: list[int]) -> int:
    """The fewest bins, by trying everything."""

    def place(rest: list[tuple[int, ...]], bins: list[list[int]], best: int) -> int:
        if len(bins) >= best:
            return best
        if not rest:
            return len(bins)
        for b in range(len(bins) + 1):
            left = bins[b] if b < len(bins) else limits
            if all(have >= need for have, need in zip(left, rest[0], strict=True)):
                filled = [have - need for have, need in zip(left, rest[0], strict=True)]
                best = min(best, place(rest[1:], [*bins[:b], filled, *bins[b + 1 :]], best))
        return best

    return place(costs, [], len(costs) + 1)


@given(problems())
def test_every_item_is_in_one_bin_and_no_budget_exceeded(problem: tuple[np.ndarray, list[int]]) -> None:
    costs, limits = problem
    bins = pack(costs, limits)
    assert bins.shape == (len(costs),)
    assert sorted(set(bins.tolist())) == list(range(len(set(bins.tolist()))))
    for b in set(bins.tolist()):
        assert (costs[bins == b].sum(axis=0) <= limits).all()
    assert np.array_equal(bins, pack(costs, limits))


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c), max_size=60))))
def test_one_budget_is_the_search_item_by_item_made_fast(problem: tuple[int, list[int]]) -> None:
    capacity, sizes = problem
    bins = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity).tolist()
    assert loads(sizes, bins) == loads(sizes, naive(sizes, capacity))


@given(problems())
def test_a_budget_that_another_one_implies_changes_nothing(problem: tuple[np.ndarray, list[int]]) -> None:
    costs, limits = problem
    implied = np.concatenate([costs, costs[:, :1] // 2], axis=1)
    assert np.array_equal(pack(implied, [*limits, limits[0]]), pack(costs, limits))


@given(problems(), st.randoms(use_true_random=False))
def test_bin_count_does_not_depend_on_the_order_of_items(problem: tuple[np.ndarray, list[int]], random: object) -> None:
    costs, limits = problem
    shuffled = costs.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = pack(np.array(shuffled, dtype=np.int64).reshape(costs.shape), limits)
    assert again.max(initial=-1) == pack(costs, limits).max(initial=-1)


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=8))))
def test_hardly_more_bins_than_the_optimum(problem: tuple[int, list[int]]) -> None:
    capacity, sizes = problem
    used = best_fit_decreasing(np.array(sizes), capacity).max() + 1
    assert used <= 11 / 9 * optimum([(size,) for size in sorted(sizes, reverse=True)], [capacity]) + 1


@settings(deadline=None, max_examples=150)
@given(problems(most=8))
def test_several_budgets_need_hardly_more_bins_than_the_optimum(problem: tuple[np.ndarray, list[int]]) -> None:
    """At most 2 K OPT bins is proved (see the next test); of up to 8 items the worst found is 1.5 OPT."""
    costs, limits = problem
    used, best = pack(costs, limits).max(initial=-1) + 1, optimum([tuple(cost) for cost in costs.tolist()], limits)
    assert best <= used <= 1.5 * best + 0.5


@given(problems())
def test_any_two_bins_together_take_more_than_one_could(problem: tuple[np.ndarray, list[int]]) -> None:
    """What the bound of 2 K OPT rests on; classes are exact here."""
    costs, limits = problem
    costs = costs[: CLASSES - 1]
    bins = pack(costs, limits)
    held = np.stack([np.bincount(bins, weights=costs[:, k], minlength=1) for k in range(len(limits))], axis=1)
    filled = np.sort((held / limits).sum(axis=1))
    assert len(filled) < 2 or filled[0] + filled[1] > 1


def test_caption_lengths_fill_their_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.0, 0.7, 20_000).astype(np.int64), 4, 2000)
    assert fill(lengths[:, None], [4096]) > 0.99


@pytest.mark.parametrize(
    ("placeholders", "pictures"),
    [(144, pictures) for pictures in (11, 12, 16, 28, 40)] + [(64, pictures) for pictures in (9, 12, 16, 28, 40)],
)
def test_two_budgets_are_filled_together(placeholders: int, pictures: int) -> None:
    assert fill(mixture(10_000, placeholders)[:, :2], [4096, pictures]) > 0.98


@pytest.mark.parametrize(("pictures", "seconds"), [(13, 35), (9, 30), (20, 70)])
def test_three_budgets_are_filled_together(pictures: int, seconds: int) -> None:
    assert fill(mixture(6000, sounds=6000), [4096, pictures, seconds]) > 0.98


def test_many_combinations_of_other_budgets_are_filled_together() -> None:
    """Three independent costs of each item, thousands of combinations: near ones share a class."""
    assert fill(np.random.default_rng(0).integers(1, 100, (3000, 3)), [1000, 1000, 1000]) > 0.95


@pytest.mark.parametrize(
    ("costs", "limits", "words"),
    [
        ([[3, 1], [5, 3]], [8, 2], r"item 1 costs \[5, 3\], the capacities are \[8, 2\]"),
        ([[-1]], [8], "negative"),
        ([[1, 2]], [8], r"\[N, 1\]"),
        ([[1.5]], [8], "integers"),
    ],
)
def test_what_cannot_be_packed_is_refused(costs: list[list[float]], limits: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(np.array(costs), limits)


@given(st.integers(1, 50), st.lists(st.integers(0, 50), max_size=300), st.integers(2, 40))
def test_a_stream_is_packed_within_its_window(capacity: int, sizes: list[int], window: int) -> None:
    sizes = [size % (capacity + 1) for size in sizes]
    read = 0

    def stream() -> Iterator[tuple[int]]:
        nonlocal read
        for size in sizes:
            read += 1
            yield (size,)

    seen: list[int] = []
    for items in pack_stream(stream(), [capacity], window):
        assert items and sum(sizes[item] for item in items) <= capacity
        seen += items
        assert read - len(seen) <= window
    assert sorted(seen) == list(range(len(sizes)))


def test_a_stream_fills_its_packs_nearly_as_well_as_a_global_plan() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.9, 30_000).astype(np.int64), 4, 4096)
    packs = sum(1 for _ in pack_stream(lengths[:, None].tolist(), [4096], window=3000))
    assert packs <= 1.01 * math.ceil(lengths.sum() / 4096)


def test_large_inputs_of_any_integer_type_give_the_same_bins() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 50_000)
    bins = best_fit_decreasing(lengths, 4096)
    assert np.bincount(bins, weights=lengths).max() <= 4096
    for kind in (np.int16, np.uint16, np.int32, np.uint64):
        assert np.array_equal(bins, best_fit_decreasing(lengths.astype(kind), 4096))
    long = np.random.default_rng(0).integers(1, 1_000_000, 2000)
    assert np.bincount(best_fit_decreasing(long, 1_000_000), weights=long).max() <= 1_000_000


def test_a_stream_names_the_item_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"item 5 costs \[9\], the capacities are \[8\]"):
        list(pack_stream([[1], [2], [3], [4], [5], [9]], [8], window=2))


@st.composite
def steps(draw: st.DrawFn, most: int = 40, encoders: int = 3) -> tuple[np.ndarray, int]:
    many = draw(st.integers(1, encoders))
    of_row = st.lists(st.integers(0, 30), min_size=many, max_size=many)
    rows = draw(st.lists(of_row, max_size=most))
    return np.array(rows, dtype=np.int64).reshape(len(rows), many), draw(st.integers(1, 8))


def busiest(costs: np.ndarray, ranks: np.ndarray) -> float:
    """The largest part of any encoder's cost that falls to one rank."""
    parts = costs / np.maximum(costs.sum(axis=0), 1)
    return max(float(np.bincount(ranks, weights=part, minlength=1).max()) for part in parts.T)


@given(steps())
def test_ranks_get_as_many_rows_and_no_more_work_than_in_turn(step: tuple[np.ndarray, int]) -> None:
    costs, ranks = step
    shared = balance(costs, ranks)
    rows = np.bincount(shared, minlength=ranks)
    assert rows.tolist() == [len(costs) // ranks + (rank < len(costs) % ranks) for rank in range(ranks)]
    assert np.array_equal(shared, balance(costs, ranks))
    assert busiest(costs, shared) <= busiest(costs, np.arange(len(costs)) % ranks) + 1e-9
    if costs.shape[1] == 1:
        assert np.array_equal(shared, balance(costs[:, 0].astype(np.uint8), ranks))


def evenest(sizes: list[int], rows: list[int]) -> int:
    """The least that the busiest rank can have if rank r gets `rows[r]` rows, by trying everything."""

    def place(item: int, load: tuple[int, ...], free: tuple[int, ...], best: int) -> int:
        if max(load) >= best or item == len(sizes):
            return min(best, max(load))
        for r in {pair: r for r, pair in enumerate(zip(load, free, strict=True)) if free[r]}.values():
            more, fewer = load[r] + sizes[item], free[r] - 1
            best = place(item + 1, (*load[:r], more, *load[r + 1 :]), (*free[:r], fewer, *free[r + 1 :]), best)
        return best

    return place(0, (0,) * len(rows), tuple(rows), sum(sizes) + 1)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 4))
def test_the_busiest_rank_has_little_more_than_it_must(sizes: list[int], ranks: int) -> None:
    """Within 4/3, proved for up to three rows a rank (Kellerer & Woeginger 1993) and seen for all that were tried."""
    shared = balance(np.array(sizes), ranks)
    rows = np.bincount(shared, minlength=ranks).tolist()
    assert np.bincount(shared, weights=sizes).max() <= 4 / 3 * evenest(sorted(sizes, reverse=True), rows)


@pytest.mark.parametrize(("costs", "ranks", "words"), [([1, 2], 0, "0 ranks"), ([1, -2], 2, "negative")])
def test_what_cannot_be_shared_is_refused(costs: list[int], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        balance(np.array(costs), ranks)
