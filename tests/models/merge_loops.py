"""Token merging in plain loops over one item's tokens, written from the paper: what the tests hold ours against."""

import math

import torch
from torch import Tensor

Groups = list[list[int]]
"""For each merged token, in order, the tokens that are in it."""


def matched(metric: Tensor, r: int, protected: int) -> Groups:
    """Of the tokens of one item, metric [N, C]."""
    rows = metric.double().tolist()
    even = [n for n in range(protected, len(rows)) if n % 2 == 0]
    odd = [n for n in range(protected, len(rows)) if n % 2 == 1]
    r = min(r, (len(rows) - protected) // 2)
    if r == 0:
        return [[n] for n in range(len(rows))]
    likest = {n: max((cosine(rows[n], rows[m]), m) for m in odd) for n in even}
    gone = sorted(even, key=lambda n: -likest[n][0])[:r]
    stay = [n for n in even if n not in gone]
    return [
        *([n] for n in range(protected)), *([n] for n in stay),
        *([m, *(n for n in gone if likest[n][1] == m)] for m in odd),
    ]  # fmt: skip


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def merged(x: Tensor, groups: Groups, sizes: list[int]) -> Tensor:
    """x [N, D] to the means of groups, each token weighing as much as its size."""
    means = []
    for group in groups:
        total = sum(sizes[n] for n in group)
        means.append(sum((x[n] * sizes[n] for n in group), torch.zeros_like(x[0])) / total)
    return torch.stack(means)


def joined(before: Groups, groups: Groups) -> Groups:
    """Groups of groups, as the tokens of the beginning that are in each."""
    return [[token for n in group for token in before[n]] for group in groups]
