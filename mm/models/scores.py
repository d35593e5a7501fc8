"""Numbers of many predictions at once, which are no means over batches."""

import numpy as np


def roc_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean area under the ROC curve over tags, bool and float [n, tags]; without tags that all have or none."""
    areas = []
    for true, given in zip(truth.T, scores.T, strict=True):
        positive = int(true.sum())
        if 0 < positive < len(true):
            _, place, counts = np.unique(given, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of equal scores the mean of theirs
            above = ranks[true].sum() - positive * (positive + 1) / 2
            areas.append(above / (positive * (len(true) - positive)))
    return float(np.mean(areas)) if areas else float("nan")


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean over tags, bool and float [n, tags], of the sum of precisions weighted by the recall that each adds; equal
    scores are one threshold. Without tags that none has."""
    found = []
    for true, given in zip(truth.T, scores.T, strict=True):
        if true.any():
            order = np.argsort(-given, kind="stable")
            last = np.flatnonzero(np.append(np.diff(given[order]) != 0, True))  # of each threshold
            hits = np.cumsum(true[order])[last]
            found.append(np.sum(np.diff(hits, prepend=0) * hits / (last + 1)) / hits[-1])
    return float(np.mean(found)) if found else float("nan")
