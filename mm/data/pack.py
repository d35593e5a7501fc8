"""Bin packing under several budgets at once. Pure: costs in, bin numbers out.

Best-fit decreasing: items by falling size, each into the fullest bin that still takes it; at most 11/9 OPT + 6/9 bins
for one budget (Johnson 1973; Dosa 2007 for first fit, best fit alike in practice). Open bins are kept by what they
have left of the first budget, and the set of remainders in use is one integer's bits, so finding the fullest fitting
bin is a shift and a lowest set bit rather than a search. Bins whose other budgets are spent are closed, so that they
are not looked at again for every later item.

With several budgets there is no such bound. Where one of them binds the result is within some 3% of it; where two bind
alike, up to 15% (tests/data/test_pack.py), because long items meet in bins whose other budget they leave unused.
"""

from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(costs: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """Assign every item to a bin.

    Args:
        costs: [N, K] non-negative integers; the first budget (tokens) decides fit, the others only forbid.
        capacities: K positive integers.

    Returns:
        [N] int64 bin numbers, dense from 0, the same for the same input.

    Raises:
        ValueError: an item exceeds a capacity on its own.
    """
    costs = np.asarray(costs, dtype=np.int64)
    limits = np.asarray(capacities, dtype=np.int64)
    if costs.ndim != 2 or costs.shape[1] != len(limits):
        raise ValueError(f"costs must be [N, {len(limits)}], got {costs.shape}")
    if (costs < 0).any():
        raise ValueError("costs must not be negative")
    over = np.flatnonzero((costs > limits).any(axis=1))
    if len(over):
        raise ValueError(f"item {over[0]} costs {costs[over[0]].tolist()}, the capacities are {limits.tolist()}")

    # Ties of size are broken by the other budgets, then by position (lexsort is stable).
    order = np.lexsort(tuple(-costs[:, k] for k in reversed(range(costs.shape[1]))))
    assigned = np.empty(len(costs), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(int(limits[0]) + 1)]  # by what is left of the first budget
    in_use = 0  # bit r: some open bin has r left
    others_left: list[list[int]] = []
    # Per item, the least that it and those after it need of each other budget: a bin with less left takes nothing more.
    least = np.minimum.accumulate(costs[order[::-1], 1:], axis=0)[::-1].tolist()
    others_capacity = limits[1:].tolist()
    sizes, others = costs[:, 0].tolist(), costs[:, 1:].tolist()

    for place, item in enumerate(order.tolist()):
        size, need = sizes[item], others[item]
        candidates = in_use >> size
        remainder, slot = -1, -1
        while candidates:
            remainder = size + (candidates & -candidates).bit_length() - 1
            slot = _first_fitting(open_bins[remainder], need, others_left)
            if slot >= 0:
                break
            candidates &= candidates - 1
        if slot < 0:
            bin, left = len(others_left), int(limits[0])
            others_left.append(list(others_capacity))
        else:
            bin, left = open_bins[remainder].pop(slot), remainder
            if not open_bins[remainder]:
                in_use ^= 1 << remainder
        assigned[item] = bin
        left -= size
        others_left[bin] = [have - take for have, take in zip(others_left[bin], need, strict=True)]
        if _covers(others_left[bin], least[place]):
            open_bins[left].append(bin)
            in_use |= 1 << left
    return assigned


def _first_fitting(bins: list[int], need: list[int], others_left: list[list[int]]) -> int:
    """Index in `bins` of the newest bin with room for `need`, or -1."""
    if not need:
        return len(bins) - 1
    for slot in range(len(bins) - 1, -1, -1):
        if _covers(others_left[bins[slot]], need):
            return slot
    return -1


def _covers(left: list[int], need: list[int]) -> bool:
    return all(have >= take for have, take in zip(left, need, strict=True))
