"""Numbers of a probe, and how far they may be trusted.

Recordings of one piece resemble each other, so that an interval over recordings would be too narrow: what is drawn
anew for an interval are whole groups (pieces, artists), with all that belongs to them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mm.data.sample import keyed_rng
from mm.models.scores import average_precision as average_precision
from mm.models.scores import roc_auc as roc_auc

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(truth, prediction) of n recordings to a number, larger is better; nan where it is undefined."""

TONICS = ("C", "C#", "D", "E♭", "E", "F", "F#", "G", "A♭", "A", "B♭", "B")
KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
"""24 keys by their number: semitones above C, and 12 more for minor."""
_KEY = re.compile(r"([A-G])([#♯b♭-]?)[\s:]+(major|maj|minor|min)", re.IGNORECASE)
_NATURAL = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
TOLERANCE = 0.04
"""Of tempi: share of the true one, as in MIREX."""


def parse_key(text: object) -> int | None:
    """`E♭ major`, `c# minor`, `Bb:min`, `B- major` (music21's flat) to a number of `KEYS`; None for anything else."""
    found = _KEY.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        return None
    tonic, accidental, mode = found.groups()
    shift = 0 if not accidental else 1 if accidental in "#♯" else -1
    return (_NATURAL[tonic.upper()] + shift) % 12 + 12 * mode.lower().startswith("min")


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of classes [n] that are right."""
    return float(np.mean(truth == predicted))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over the classes that occur in either [n]."""
    right = truth == predicted
    of = [(truth == one, predicted == one) for one in np.union1d(truth, predicted)]
    return float(np.mean([2 * np.sum(right & true) / (np.sum(true) + np.sum(given)) for true, given in of]))


def key_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """MIREX's weighted score of keys [n] by their numbers: 1 for the key; 0.5 a fifth above it; 0.3 its relative and
    0.2 its parallel. That the fifth below counts nothing is as in mir_eval, by which published numbers are made."""
    above = (predicted - truth) % 12
    same_mode = truth // 12 == predicted // 12
    relative = np.where(truth < 12, 9, 3)
    scores = np.select(
        [same_mode & (above == 0), same_mode & (above == 7), ~same_mode & (above == relative), above == 0],
        [1.0, 0.5, 0.3, 0.2],
    )
    return float(np.mean(scores))


def tempo_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of tempi [n] within 4 % of the true one."""
    return float(np.mean(np.abs(predicted - truth) <= TOLERANCE * truth))


def r2(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the variance of numbers [n] that is explained; nan where they have none."""
    rest, all = np.sum((truth - predicted) ** 2), np.sum((truth - truth.mean()) ** 2)
    return float(1 - rest / all) if all > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with the 95 % interval around it; None for ends that one group alone does not give."""

    value: float
    low: float | None
    high: float | None


def bootstrap(
    metric: Metric,
    truth: np.ndarray,
    predictions: Sequence[np.ndarray],
    groups: Sequence[str],
    against: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """A metric's mean over predictions (of several seeds), with a percentile bootstrap over groups (Efron 1979).

    Args:
        truth: [n, …]; predictions: the same n recordings each time; groups: [n], what belongs together.
        against: predictions of another probe for the same recordings: the difference from it, drawn in pairs.
    """

    def value(rows: np.ndarray | slice) -> float:
        mean = float(np.mean([metric(truth[rows], one[rows]) for one in predictions]))
        if against is not None:
            mean -= float(np.mean([metric(truth[rows], one[rows]) for one in against]))
        return mean

    values = np.array([value(rows) for rows in _drawn(groups, seed, resamples)])
    values = values[~np.isnan(values)]
    low, high = (float(end) for end in np.percentile(values, [2.5, 97.5])) if len(values) else (None, None)
    return Interval(value(slice(None)), low, high)


def _drawn(groups: Sequence[str], seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Rows of as many groups as there are, drawn with replacement."""
    names, of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return
    members = [np.flatnonzero(of == number) for number in range(len(names))]
    rng = keyed_rng("bootstrap", seed)
    for _ in range(resamples):
        yield np.concatenate([members[number] for number in rng.integers(len(names), size=len(names))])
