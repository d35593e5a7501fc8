"""Power laws of runs: `E + A / N^a`, with intervals.

For one exponent E and A are a linear problem, so the fit is a search along one axis, repeated for every draw of a
bootstrap. Three numbers from a few runs are never certain, so they always come with an interval, and fewer than four
different N are refused (the main criticism of published fits: see docs/text_lm.md).
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import DataError
from mm.report import read_run

LEAST = 4
DRAWS = 1000
EXPONENTS = np.geomspace(0.01, 10, 120)
OF = {
    "N": "trained parameters",
    "D": "tokens",
    "S": "steps",
    "K": "members of an ensemble",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Fit:
    """`E + A / x^a` of points (x, loss); `draws` [draws, 3] are (E, A, a) of the bootstrap."""

    E: Estimate
    A: Estimate
    a: Estimate
    residual: float
    """Root mean square of what the law misses, in nats."""
    draws: np.ndarray
    by_seeds: bool
    """Intervals are over the seeds at every x; else over what the law misses."""

    @property
    def settled(self) -> bool:
        """The best exponent is inside what was tried, and losses fall; else the points show no such law."""
        return self.A.value > 0 and bool(EXPONENTS[0] < self.a.value < EXPONENTS[-1])

    def at(self, x: float) -> Estimate:
        """What the law says at x."""
        return _estimate(self.E.value + self.A.value * x**-self.a.value, _law(self.draws, x))


def fit_power(x: Sequence[float], losses: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Fit:
    """Least squares under A >= 0, a from 0.01 to 10.

    E may lie above the lowest loss: losses have noise, and where they hardly fall any more the lowest of them lies
    below the law.

    Intervals are 2.5 and 97.5 % of fits to so many draws of the losses: normal ones, around the means at each x with
    the variance between seeds, where every x has several; else around the law with the variance of what it misses. The
    variance is itself drawn, as few points say little of it.

    Raises `DataError` for fewer than four different x.
    """
    xs, ys = np.asarray(x, float), np.asarray(losses, float)
    different, place, number = np.unique(xs, return_inverse=True, return_counts=True)
    if len(different) < LEAST:
        raise DataError(
            f"a law of three numbers needs points at {LEAST} different places at least, found {len(different)}: "
            f"{', '.join(f'{one:g}' for one in different)}"
        )
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all()):
        raise DataError("a law needs finite losses at positive places")
    rng = np.random.default_rng(seed)
    (best,) = _solve(xs, ys[None])
    law = _law(best[None], xs[:, None])[:, 0]
    by_seeds = bool((number > 1).all())
    middle = (np.bincount(place, weights=ys) / number)[place] if by_seeds else law
    free = len(ys) - (len(different) if by_seeds else 3)
    variances = ((ys - middle) ** 2).sum() / rng.chisquare(free, (draws, 1))
    drawn = _solve(xs, middle + np.sqrt(variances) * rng.normal(size=(draws, len(ys))))
    E, A, a = (_estimate(value, drawn[:, n]) for n, value in enumerate(best))
    return Fit(E, A, a, float(np.sqrt(((ys - law) ** 2).mean())), drawn, by_seeds)


def _law(numbers: np.ndarray, x: Any) -> np.ndarray:
    """numbers [n, 3] at x, a number or [m, 1]."""
    E, A, a = np.moveaxis(numbers, -1, 0)
    out: np.ndarray = E + A * x**-a
    return out


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def _solve(x: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """(E, A, a) [n, 3] for each row of losses [n, points]: the best of a grid of exponents, then of finer ones."""
    scale = np.exp(np.log(x).mean())  # x near 1, for the sake of numbers
    grid = np.broadcast_to(EXPONENTS, (len(ys), len(EXPONENTS)))
    for _ in range(4):
        E, A, squares = _linear(x / scale, ys, grid)
        best = squares.argmin(1)
        low = grid[np.arange(len(ys)), np.maximum(best - 1, 0)]
        high = grid[np.arange(len(ys)), np.minimum(best + 1, grid.shape[1] - 1)]
        chosen = np.arange(len(ys)), best
        found = np.stack([E[chosen], A[chosen], grid[chosen]], axis=1)
        grid = np.geomspace(low, high, 41, axis=1)
    found[:, 1] *= scale ** found[:, 2]
    return found


def _linear(x: np.ndarray, ys: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A and the sum of squares, [n, exponents], of losses [n, points] for exponents [n, exponents]."""
    u = x[None, None] ** -exponents[:, :, None]
    y = ys[:, None]
    mean_u, mean_y = u.mean(2), y.mean(2)
    spread = ((u - mean_u[:, :, None]) ** 2).sum(2)
    A = np.maximum(((u - mean_u[:, :, None]) * (y - mean_y[:, :, None])).sum(2) / spread, 0)
    E = mean_y - A * mean_u
    return E, A, ((y - E[:, :, None] - A[:, :, None] * u) ** 2).sum(2)


def parse_law(text: str) -> str:
    """`E+A/N^a` -> `N`: which number of a run the loss is a law of. Raises `DataError`."""
    found = re.fullmatch(r"E\+A/([A-Z])\^a", text.replace(" ", ""))
    if found is None or found[1] not in OF:
        raise DataError(f"--law {text!r}: expected E+A/X^a with X of {', '.join(f'{k} ({v})' for k, v in OF.items())}")
    return found[1]


def points_of(paths: Sequence[Path], of: str, metric: str) -> list[tuple[str, float, float]]:
    """(name, x, loss) of every run folder, and of every line of a table (CSV with columns of these names).

    Raises `DataError` for one that lacks either.
    """
    found: list[tuple[str, float, float]] = []
    for path in paths:
        if path.is_file():
            with open(path, newline="") as file:
                for number, row in enumerate(csv.DictReader(file), start=2):
                    try:
                        found.append((f"{path.name}:{number}", float(row[of]), float(row[metric])))
                    except (KeyError, TypeError, ValueError):
                        raise DataError(
                            f"{path}:{number}: expected numbers in columns {of} and {metric}, found {row}"
                        ) from None
            continue
        run = read_run(path)
        evaluated = run.found.get("eval.json") or {}
        loss = evaluated.get(metric, run.last.get(metric))
        if loss is None:
            raise DataError(f"{path}: no {metric} in eval.json or at the end of metrics.jsonl; see --metric")
        found.append((run.name, _number_of(run, of), float(loss)))
    return found


def _number_of(run: Any, of: str) -> float:
    if of == "N":
        parts = run.found.get("run.json", {}).get("parameters", {})
        return float(sum(part["trained"] for part in parts.values()))
    if of == "K":
        raise DataError(f"{run.path}: a run has no members; give the table that `mm ensemble` wrote")
    return float(run.last["tokens" if of == "D" else "step"])


def draw(path: Path, points: Sequence[tuple[str, float, float]], fit: Fit, of: str, metric: str) -> None:
    """A chart of the points, the law with its interval, and its asymptote."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = np.array([one for _, one, _ in points])
    line = np.geomspace(x.min(), x.max() * 4, 200)
    curve = fit.E.value + fit.A.value * line**-fit.a.value
    low, high = np.quantile(_law(fit.draws, line[:, None]), (0.025, 0.975), axis=1)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.fill_between(line, low, high, alpha=0.15, color="C0", linewidth=0)
    axes.plot(line, curve, color="C0", label=f"{fit.E.value:.3f} + {fit.A.value:.3g} / {of}^{fit.a.value:.3f}")
    axes.axhline(fit.E.value, color="0.5", linewidth=1, linestyle="--", label=f"E = {fit.E}")
    axes.plot(x, [loss for _, _, loss in points], "o", color="C1", markersize=5, label="runs")
    axes.set_xscale("log")
    axes.set_xlabel(f"{of}: {OF[of]}")
    axes.set_ylabel(f"{metric}, nats")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
