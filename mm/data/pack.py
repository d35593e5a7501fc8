"""Bin packing under several budgets at once. Pure: costs in, bin numbers out.

Best-fit decreasing: items by falling size, each into the fullest bin that still takes it; for one budget at most
11/9 OPT + 6/9 bins (Johnson 1973; Dosa 2007 for first fit, best fit alike in practice). Items of equal cost are
placed together: the fullest fitting bin stays the fullest after one of them, so it takes as many as it can, and the
next bin of the same kind as many. Bins are therefore kept as ranges of numbers by what they have left, and the work
grows with the kinds of items and of bins rather than with the items.

With several budgets there is no such bound. Where one of them binds the result is within some 3% of it; where two bind
alike, up to 15% (tests/data/test_pack.py), because long items meet in bins whose other budget they leave unused.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CHUNK = 1 << 20  # items whose bins are worked out at once
Left = tuple[int, ...]
"""What a bin has left of each budget."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign items of `lengths` [N] to bins of one budget: `pack` with K = 1."""
    return pack(np.asarray(lengths)[:, None], [capacity])


def pack(costs: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """Assign every item to a bin.

    Args:
        costs: [N, K] non-negative integers; the first budget (tokens) decides fit, the others only forbid.
        capacities: K positive integers.

    Returns:
        [N] int64 bin numbers, dense from 0, the same for the same input.

    Raises:
        ValueError: an item exceeds a capacity on its own.
    """
    costs = np.asarray(costs)
    if costs.ndim != 2 or costs.shape[1] != len(capacities):
        raise ValueError(f"costs must be [N, {len(capacities)}], got {costs.shape}")
    if costs.size and not np.issubdtype(costs.dtype, np.integer):
        raise ValueError(f"costs must be integers, got {costs.dtype}")
    if costs.size and costs.min() < 0:
        raise ValueError("costs must not be negative")
    for k, capacity in enumerate(capacities):
        if len(costs) and costs[:, k].max() > capacity:
            over = int(costs[:, k].argmax())
            raise ValueError(f"item {over} costs {costs[over].tolist()}, the capacities are {list(capacities)}")
    assigned = np.empty(len(costs), dtype=np.int64)
    if not len(costs):
        return assigned
    order = _falling(costs)
    bins = _OpenBins(tuple(int(capacity) for capacity in capacities))
    placed: list[tuple[int, int, int]] = []  # (items, first bin, items in each bin), not yet written down
    written = 0
    for start, stop, need, least in _runs(costs, order):
        while start < stop:
            first, last, each = bins.place(need, stop - start, least)
            items = min(stop - start, each * (last - first))
            placed.append((items, first, each))
            start += items
        if stop - written > CHUNK or stop == len(order):
            assigned[order[written:stop]] = _bins_of(placed)
            written = stop
            placed.clear()
    return assigned


def _bins_of(placed: list[tuple[int, int, int]]) -> np.ndarray:
    """The bin of every item of consecutive placements: `each` items to the first bin, as many to the next, …"""
    items, first, each = np.array(placed, dtype=np.int64).T
    starts = np.cumsum(items) - items
    within = np.arange(items.sum()) - np.repeat(starts, items)
    return np.repeat(first, items) + within // np.repeat(each, items)


def _falling(costs: np.ndarray) -> np.ndarray:
    """Order of items by falling cost, the first budget deciding, ties by position."""
    if costs.shape[1] > 1:
        return np.lexsort(tuple(-costs[:, k].astype(np.int64) for k in reversed(range(costs.shape[1]))))
    most = int(costs.max(initial=0))
    # numpy sorts 16-bit numbers by radix, in linear time.
    falling = (most - costs[:, 0]).astype(np.uint16 if most < 1 << 16 else np.uint32)
    return np.argsort(falling, kind="stable")


def _runs(costs: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int, Left, Left]]:
    """Runs of equal items in `order`: start, stop, cost, and the least of each budget that it or a later one needs.

    The sorted costs are never there as a whole.
    """
    changes = [np.zeros(1, dtype=np.int64)]
    for begin in range(0, len(order) - 1, CHUNK):
        part = costs[order[begin : begin + CHUNK + 1]]
        changes.append(begin + 1 + np.flatnonzero((part[1:] != part[:-1]).any(axis=1)))
    starts = np.concatenate(changes)
    needs = costs[order[starts]].astype(np.int64)
    least = np.minimum.accumulate(needs[::-1], axis=0)[::-1]
    stops = np.append(starts[1:], len(order))
    for start, stop, need, lowest in zip(starts.tolist(), stops.tolist(), needs.tolist(), least.tolist(), strict=True):
        yield start, stop, tuple(need), tuple(lowest)


class _OpenBins:
    """Bins that may still take something, by what they have left.

    The first budget's remainders in use are the bits of one integer, so the fullest fitting bin is a shift and a lowest
    set bit away rather than a search.
    """

    def __init__(self, capacities: Left) -> None:
        self.capacities = capacities
        self.count = 0
        self._in_use = 0
        self._by_first: dict[int, dict[Left, list[tuple[int, int]]]] = {}

    def place(self, need: Left, items: int, least: Left) -> tuple[int, int, int]:
        """Put up to `items` of one cost into like bins: (first bin, one past the last, items placed).

        Every bin but the last takes the same number. `least`: bins with less left than this of any budget are closed.
        """
        left = self._fullest(need)
        each = min(
            (have // take for have, take in zip(left or self.capacities, need, strict=True) if take), default=items
        )
        each = min(each, items)
        wanted = -(-items // each)
        if left is None:
            left, first, last = self.capacities, self.count, self.count + wanted
            self.count = last
        else:
            first, last = self._take(left, wanted)
        placed = min(items, each * (last - first))
        in_last = placed - each * (last - first - 1)
        if in_last < each:
            self._put(first, last - 1, left, need, each, least)
            self._put(last - 1, last, left, need, in_last, least)
        else:
            self._put(first, last, left, need, each, least)
        return first, last, each

    def _fullest(self, need: Left) -> Left | None:
        """What the fullest bins that take `need` have left; of bins alike in the first budget, the tightest."""
        candidates = self._in_use >> need[0]
        while candidates:
            first = need[0] + (candidates & -candidates).bit_length() - 1
            fitting = [left for left in self._by_first[first] if all(map(int.__ge__, left, need))]
            if fitting:
                return min(fitting)
            candidates &= candidates - 1
        return None

    def _take(self, left: Left, wanted: int) -> tuple[int, int]:
        ranges = self._by_first[left[0]][left]
        first, last = ranges.pop()
        if last - first > wanted:
            ranges.append((first + wanted, last))
            last = first + wanted
        if not ranges:
            del self._by_first[left[0]][left]
            if not self._by_first[left[0]]:
                self._in_use ^= 1 << left[0]
                del self._by_first[left[0]]
        return first, last

    def _put(self, first: int, last: int, left: Left, need: Left, items: int, least: Left) -> None:
        left = tuple(have - items * take for have, take in zip(left, need, strict=True))
        if first < last and all(map(int.__ge__, left, least)):
            self._by_first.setdefault(left[0], {}).setdefault(left, []).append((first, last))
            self._in_use |= 1 << left[0]


def pack_stream(costs: Iterable[Sequence[int]], capacities: Sequence[int], window: int = 10_000) -> Iterator[list[int]]:
    """Packs of an endless stream, holding at most `window` items: yields the positions of the items of one bin.

    A full window is packed as a whole; the fuller half of its bins, and the one with the oldest item, leave. The rest
    waits for better company, but every item becomes the oldest and so leaves in the end.

    Raises:
        ValueError: an item exceeds a capacity on its own.
    """
    waiting: list[tuple[int, Sequence[int]]] = []

    def packed() -> list[list[int]]:
        bins = pack(np.array([cost for _, cost in waiting], dtype=np.int64).reshape(-1, len(capacities)), capacities)
        places: list[list[int]] = [[] for _ in range(int(bins.max(initial=-1)) + 1)]
        for place, bin in enumerate(bins.tolist()):
            places[bin].append(place)
        return places

    for item in enumerate(costs):
        if any(cost > capacity for cost, capacity in zip(item[1], capacities, strict=True)):
            raise ValueError(f"item {item[0]} costs {list(item[1])}, the capacities are {list(capacities)}")
        waiting.append(item)
        if len(waiting) < window:
            continue
        places = sorted(packed(), key=lambda bin: (0 not in bin, -sum(waiting[place][1][0] for place in bin), bin))
        leaving = places[: (len(places) + 1) // 2]
        yield from ([waiting[place][0] for place in bin] for bin in leaving)
        gone = {place for bin in leaving for place in bin}
        waiting = [one for place, one in enumerate(waiting) if place not in gone]
    yield from ([waiting[place][0] for place in bin] for bin in packed())
