"""Bin packing under several budgets at once, and the sharing of bins between ranks. Pure: costs in, numbers out.

Items of equal cost are one *kind*, and whole kinds are placed at a time, so the work grows with the kinds and the ways
in which bins are filled rather than with the items.

**One budget**: best-fit decreasing, items by falling size, each into the fullest bin that still takes it; at most
11/9 OPT + 6/9 bins (Johnson 1973; Dosa 2007 for first fit, best fit alike in practice). The fullest fitting bin stays
the fullest after one item of a kind, so it takes as many as it can, and the next bin of the same kind as many: bins are
kept as ranges of numbers by what they have left.

**Several budgets**: long items that meet each other would leave the other budgets unused, so one bin is filled at a
time and keeps to the mix of what is in stock (the dot product rule of Panigrahy et al. 2011, "Heuristics for vector bin
packing", with a reserve):

1. The longest item left opens the bin.
2. The bin's share of every other budget is what is in stock over the bins which that needs at least. Filling it up
   takes tokens, at the stock's mean rate; only what is beyond this reserve is free for an item. Each class of items
   (alike in the other budgets) offers its longest item within that; the one most along what the bin still wants is
   taken. If no class has one, then where another budget is scarce the item that gives most of it per token, else the
   longest that fits.
3. When nothing fits any more, one item is exchanged for a longer one of its class, if that fills the bin better.
4. The bin is made as many times as there is stock for it.

A bin refuses all that comes after it, so any two together take more than one bin's worth, summed over the K budgets:
at most 2K OPT bins (while the classes are exact, see `CLASSES`). What comes of it in practice: docs/benchmarks.md.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import le, mul

import numpy as np

CHUNK = 1 << 20  # items that are looked at together, to save memory
CLASSES = 32  # classes at most; with more combinations of other budgets than this, near ones share a class
SCARCE = 0.98  # a budget is scarce if it needs at least this part of the bins that the scarcest needs

Placement = tuple[int, int, int]
"""Items of one kind, the first bin, and how many of them go into each bin from there on."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign items of `lengths` [N] to bins of one budget: `pack` with K = 1."""
    return pack(np.asarray(lengths)[:, None], [capacity])


def pack(costs: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """Assign every item to a bin.

    Args:
        costs: [N, K] non-negative integers. The first budget (tokens) should be the one that items fill most finely.
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
    costs, limits = _without_implied(costs, [int(capacity) for capacity in capacities])
    order = _falling(costs)
    kinds, counts = _kinds(costs, order)
    if len(limits) == 1:
        placed = _best_fit(kinds[:, 0].tolist(), counts.tolist(), limits[0])
    else:
        placed = _fill_bins(kinds, counts, limits)
    _write(placed, order, assigned)
    return assigned


def _without_implied(costs: np.ndarray, limits: list[int]) -> tuple[np.ndarray, list[int]]:
    """Without the budgets that hold wherever another one does: no item takes a larger part of them than of that."""
    kept = list(range(len(limits)))
    for k in reversed(range(len(limits))):
        part = costs[:, k].astype(np.int64) if len(kept) > 1 else costs[:, k]
        if any((part * limits[j] <= costs[:, j].astype(np.int64) * limits[k]).all() for j in kept if j != k):
            kept.remove(k)
    return (costs, limits) if len(kept) == len(limits) else (costs[:, kept], [limits[k] for k in kept])


def _falling(costs: np.ndarray) -> np.ndarray:
    """Order of items by falling cost, the first budget deciding, ties by position."""
    tops = costs.max(axis=0).tolist()
    # numpy sorts 16-bit numbers by radix, in linear time.
    columns = [(top - costs[:, k]).astype(np.uint16 if top < 1 << 16 else np.uint64) for k, top in enumerate(tops)]
    return np.lexsort(columns[::-1])


def _kinds(costs: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different costs [D, K] in their order, and how many items have each; sorted costs are never there whole."""
    changes = [np.zeros(1, dtype=np.int64)]
    for begin in range(0, len(order) - 1, CHUNK):
        part = costs[order[begin : begin + CHUNK + 1]]
        changes.append(begin + 1 + np.flatnonzero((part[1:] != part[:-1]).any(axis=1)))
    starts = np.concatenate(changes)
    return costs[order[starts]].astype(np.int64), np.diff(starts, append=len(order))


def _write(placed: list[Placement], order: np.ndarray, assigned: np.ndarray) -> None:
    """Write down the bin of every item: `placed` takes the items of `order` from the front."""
    items, first, each = np.array(placed, dtype=np.int64).T
    stops = np.cumsum(items)
    starts = stops - items
    for begin in range(0, len(order), CHUNK):
        end = min(begin + CHUNK, len(order))
        part = slice(np.searchsorted(stops, begin, "right"), np.searchsorted(starts, end, "left"))
        repeats = np.minimum(stops[part], end) - np.maximum(starts[part], begin)
        bins = np.arange(begin, end) - np.repeat(starts[part], repeats)
        bins //= np.repeat(each[part], repeats)
        bins += np.repeat(first[part], repeats)
        assigned[order[begin:end]] = bins


def _best_fit(sizes: list[int], counts: list[int], capacity: int) -> list[Placement]:
    """Best-fit decreasing for one budget; `sizes` fall.

    The remainders in use are the bits of one integer, so the fullest fitting bin is a shift and a lowest set bit away
    rather than a search. Bins that have less left than the smallest size are closed.
    """
    placed: list[Placement] = []
    ranges: dict[int, list[tuple[int, int]]] = {}  # bins that have this much left: first, one past the last
    in_use = bins = 0
    for size, items in zip(sizes, counts, strict=True):
        while items:
            candidates = in_use >> size
            if candidates:
                left = size + (candidates & -candidates).bit_length() - 1
                first, last = ranges[left].pop()
            else:
                left, first, last = capacity, bins, bins + items
            each = min(left // size, items) if size else items
            full, rest = divmod(items, each)
            stop = first + full + (rest > 0)  # one past the last bin that is wanted
            if not candidates:
                last = bins = stop
            elif stop < last:
                ranges[left].append((stop, last))
                last = stop
            elif not ranges[left]:
                in_use ^= 1 << left
            filled = min(first + full, last)
            for begin, end, remainder in (first, filled, left - each * size), (filled, last, left - rest * size):
                if begin < end and remainder >= sizes[-1]:
                    ranges.setdefault(remainder, []).append((begin, end))
                    in_use |= 1 << remainder
            taken = min(items, each * (last - first))
            placed.append((taken, first, each))
            items -= taken
    return placed


def _fill_bins(kinds: np.ndarray, counts: np.ndarray, capacities: list[int]) -> list[Placement]:
    """Fill bin after bin under several budgets; the placements are in the order of `kinds`."""
    stock = _Stock(kinds, counts, capacities)
    placed: list[list[Placement]] = [[] for _ in counts]
    bins = 0
    while stock.items:
        content = stock.fill()
        times = min(stock.left[kind] // each for kind, each in content.items())
        for kind, each in content.items():
            placed[stock.numbers[kind]].append((each * times, bins, each))
            stock.remove(kind, each * times)
        bins += times
    return [placement for of_kind in placed for placement in of_kind]


def _classes(others: np.ndarray, counts: np.ndarray, capacities: np.ndarray) -> list[np.ndarray]:
    """Kinds grouped by what they cost of the other budgets [D, K - 1]: the group that is most spread is halved."""

    def spread(group: np.ndarray) -> tuple[float, int]:
        ranges = np.ptp(others[group], axis=0) / capacities
        return float(ranges.max() * counts[group].sum()), int(ranges.argmax())

    groups = [np.arange(len(others))]
    spreads = [spread(groups[0])]
    while len(groups) < CLASSES and max(spreads)[0] > 0:
        widest = spreads.index(max(spreads))
        group, (_, k) = groups[widest], spreads[widest]
        low = others[group, k] <= np.average(others[group, k], weights=counts[group])
        groups[widest : widest + 1] = group[low], group[~low]
        spreads[widest : widest + 1] = spread(group[low]), spread(group[~low])
    return groups


class _Stock:
    """The items that are left; kinds are numbered from 1 by class and rising tokens, so that a class is a range."""

    def __init__(self, kinds: np.ndarray, counts: np.ndarray, capacities: list[int]) -> None:
        self.capacities = capacities
        groups = _classes(kinds[:, 1:], counts, np.array(capacities[1:]))
        groups = [group[np.argsort(kinds[group, 0], kind="stable")] for group in groups]
        order = np.concatenate(groups)
        self.numbers = [-1, *order.tolist()]
        self.costs: list[tuple[int, ...]] = [(), *map(tuple, kinds[order].tolist())]
        self.tokens = [0, *kinds[order, 0].tolist()]
        self.left = [1, *counts[order].tolist(), 1]
        # The next kind up and down that is not used up, itself included: both ends never are.
        self.lower, self.higher = list(range(len(self.left))), list(range(len(self.left)))
        stops = 1 + np.cumsum([len(group) for group in groups])
        self.classes = [
            (int(stop) - len(group), int(stop), kinds[group, 1:].max(axis=0).tolist())
            for group, stop in zip(groups, stops, strict=True)
        ]
        self.class_of = [(0, 0)] + [(begin, end) for begin, end, _ in self.classes for _ in range(begin, end)]
        self.items = int(counts.sum())
        self.totals = (kinds * counts[:, None]).sum(axis=0).tolist()
        # Tokens of the items that cost anything of each budget.
        self.tokens_with = [int((kinds[:, 0] * counts)[kinds[:, k] > 0].sum()) for k in range(len(capacities))]

    def remove(self, kind: int, items: int) -> None:
        self.items -= items
        self.left[kind] -= items
        for k, cost in enumerate(self.costs[kind]):
            self.totals[k] -= items * cost
            self.tokens_with[k] -= items * self.tokens[kind] if cost else 0
        if not self.left[kind]:
            self.lower[kind], self.higher[kind] = kind - 1, kind + 1

    def longest(self, limit: float, begin: int, end: int, content: dict[int, int]) -> int:
        """Of a class the kind of most tokens up to `limit` that the bin has not used up; 0 if there is none."""
        lower, left = self.lower, self.left
        kind = bisect_right(self.tokens, limit, begin, end) - 1
        while kind >= begin:
            while lower[kind] != kind:
                lower[kind] = kind = lower[lower[kind]]
            if kind < begin:
                break
            if content.get(kind, 0) < left[kind]:
                return kind
            kind -= 1
        return 0

    def shortest(self, limit: int, begin: int, end: int, content: dict[int, int]) -> int:
        """Of a class the kind of fewest tokens, if no more than `limit`, that the bin has not used up; or 0."""
        higher, left = self.higher, self.left
        kind = begin
        while kind < end:
            while higher[kind] != kind:
                higher[kind] = kind = higher[higher[kind]]
            if kind >= end or self.tokens[kind] > limit:
                break
            if content.get(kind, 0) < left[kind]:
                return kind
            kind += 1
        return 0

    def fill(self) -> dict[int, int]:
        """Kinds and numbers of the items of one bin."""
        content: dict[int, int] = {}
        needed = [total / capacity for total, capacity in zip(self.totals, self.capacities, strict=True)]
        bins = max(1.0, *needed)
        share = [total / bins for total in self.totals]
        rates = [tokens / total if total else 0.0 for tokens, total in zip(self.tokens_with, self.totals, strict=True)]
        scarce = [k for k in range(1, len(needed)) if needed[k] >= SCARCE * max(needed)]
        room = list(self.capacities)
        classes = self.classes
        longest = [self.longest(self.capacities[0], begin, end, content) for begin, end, _ in classes]
        kind = max(longest, key=lambda kind: self.tokens[kind] if kind else -1)
        while kind:
            content[kind] = content.get(kind, 0) + 1
            for k, cost in enumerate(self.costs[kind]):
                room[k] -= cost
                share[k] -= cost
            classes = [one for one in classes if all(map(le, one[2], room[1:]))]
            kind = self._along(room, share, rates, classes, content) or self._densest(room, scarce, classes, content)
        self._exchange(room, content)
        return content

    def _along(
        self,
        room: list[int],
        share: list[float],
        rates: list[float],
        classes: list[tuple[int, int, list[int]]],
        content: dict[int, int],
    ) -> int:
        """The kind that leaves the reserve of tokens alone and is most along what the bin still wants; or 0."""
        tokens = room[0]
        wanted = [max(min(have, part), 0) for have, part in zip(room, share, strict=True)]
        wanted[0] = tokens
        others = [(k, want, min(rates[k], tokens / want)) for k, want in enumerate(wanted) if k and want > 0]
        weights = [want / capacity**2 for want, capacity in zip(wanted, self.capacities, strict=True)]
        best, most = 0, -1.0
        for begin, end, cost in classes:
            reserve = 0.0
            for k, want, rate in others:
                reserve = max(reserve, rate * (want - cost[k - 1]))
            kind = self.longest(tokens - reserve, begin, end, content)
            if kind and (value := sum(map(mul, weights, self.costs[kind]))) > most:
                best, most = kind, value
        return best

    def _densest(
        self, room: list[int], scarce: list[int], classes: list[tuple[int, int, list[int]]], content: dict[int, int]
    ) -> int:
        """The kind that gives most of the scarce budgets per token, or else the longest; 0 if nothing fits."""
        best, most = 0, (-1.0, 0)
        for begin, end, cost in classes:
            find = self.shortest if any(cost[k - 1] for k in scarce) else self.longest
            if kind := find(room[0], begin, end, content):
                given = sum(self.costs[kind][k] / self.capacities[k] for k in scarce)
                value = given / max(self.tokens[kind], 1), self.tokens[kind]
                if value > most:
                    best, most = kind, value
        return best

    def _exchange(self, room: list[int], content: dict[int, int]) -> None:
        """Exchange one item of a bin for the longer one of its class that leaves the least room."""
        if not room[0]:
            return
        best, gain = (0, 0), 0
        for old in content:
            new = self.longest(self.tokens[old] + room[0], *self.class_of[old], content)
            if not new or (more := self.tokens[new] - self.tokens[old]) <= gain:
                continue
            if all(a - b <= have for a, b, have in zip(self.costs[new], self.costs[old], room, strict=True)):
                best, gain = (old, new), more
        if gain:
            old, new = best
            content[old] -= 1
            content[new] = content.get(new, 0) + 1
            if not content[old]:
                del content[old]


def pack_stream(costs: Iterable[Sequence[int]], capacities: Sequence[int], window: int = 10_000) -> Iterator[list[int]]:
    """Packs of an endless stream, holding at most `window` items: yields the positions of the items of one bin.

    A full window is packed as a whole; the fuller half of its bins (by the budget that each fills most), and the one
    with the oldest item, leave. The rest waits for better company, but every item becomes the oldest and so leaves.

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

    def fullness(bin: list[int]) -> float:
        return max(sum(waiting[place][1][k] for place in bin) / limit for k, limit in enumerate(capacities))

    for item in enumerate(costs):
        if any(cost > capacity for cost, capacity in zip(item[1], capacities, strict=True)):
            raise ValueError(f"item {item[0]} costs {list(item[1])}, the capacities are {list(capacities)}")
        waiting.append(item)
        if len(waiting) < window:
            continue
        places = sorted(packed(), key=lambda bin: (0 not in bin, -fullness(bin), bin))
        leaving = places[: (len(places) + 1) // 2]
        yield from ([waiting[place][0] for place in bin] for bin in leaving)
        gone = {place for bin in leaving for place in bin}
        waiting = [one for place, one in enumerate(waiting) if place not in gone]
    yield from ([waiting[place][0] for place in bin] for bin in packed())


def balance(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Share the rows of one step between ranks so that cost is even: the largest row first, to the idlest rank.

    Every rank gets R // ranks rows, the first R % ranks one more. Of several costs each counts by its part of the
    step's total, and a rank is as busy as its worst. Row after row in turn is kept where that happens to be more even.

    Args:
        costs: [R] or [R, K] non-negative numbers.

    Returns:
        [R] int64 ranks, the same for the same input.
    """
    costs = np.asarray(costs)
    costs = costs.astype(np.int64 if np.issubdtype(costs.dtype, np.integer) else np.float64)
    if ranks < 1:
        raise ValueError(f"cannot share rows between {ranks} ranks")
    if costs.size and costs.min() < 0:
        raise ValueError("costs must not be negative")
    totals = costs.sum(axis=0)
    # One cost is counted in whole numbers, several in parts of their totals.
    parts = costs.reshape(len(costs), 1) if costs.size == len(costs) else costs / np.where(totals > 0, totals, 1)
    in_turn = np.arange(len(costs)) % ranks
    rows = np.bincount(in_turn, minlength=ranks)
    free, loads = rows.copy(), np.zeros((ranks, parts.shape[1]), dtype=parts.dtype)
    assigned = np.empty(len(costs), dtype=np.int64)
    for row in np.argsort(-parts.max(axis=1, initial=0), kind="stable").tolist():
        able = np.flatnonzero(free)
        busy = (loads[able] + parts[row]).max(axis=1)
        rank = able[np.lexsort((rows[able], busy))[0]]  # of ranks alike one that gets fewer rows
        assigned[row] = rank
        free[rank] -= 1
        loads[rank] += parts[row]
    taken_in_turn = np.zeros_like(loads)
    np.add.at(taken_in_turn, in_turn, parts)
    return assigned if loads.max(initial=0) <= taken_in_turn.max(initial=0) else in_turn
