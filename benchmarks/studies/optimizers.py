"""AdamW, Muon, SOAP and Sophia on text: loss by steps, by compute and by seconds.

A Llama of a million parameters on English documents of Debian, all domains in their natural shares. For every arm three
to five learning rates are tried in runs of `TUNED` steps (seed 0, validation loss at the end; the row of each is kept).
Short runs prefer high rates, so the best one is tried against its half, its quarter and, of Sophia, its eighth in runs
of `STEPS` steps as well; what is best there is the arm's rate, and has a run of each of `SEEDS`. All else is alike:
cosine to a tenth after 5 % of warmup, decay 0.1, norms clipped to 1, the same packs in the same order of a seed.

    mm data build debian-text --out corpora/debian-text

Sophia is there with its published constants and with ones for short runs (a Hessian that is forgotten sooner, a larger
rho), since its estimate has a time constant of a thousand steps.

"at AdamW's FLOPs" and "at AdamW's seconds" are runs of their own, of seed 0 and as many steps as come to what AdamW's
runs took, each with its whole schedule, and stand beside AdamW's run of that seed; seconds are those of the median
step. Muon's AdamW part has Muon's rate.

Compute counts the FLOPs of forward and backward passes (`mm estimate`), of Sophia's extra passes, and of the matrix
products of Muon and SOAP, a QR decomposition with its Q as 8/3 n^3; what is done element by element is not counted.
"""

import statistics
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks import texts
from benchmarks.studies.moma import spread
from benchmarks.study import Config, Row, Run, Study
from mm.config import RunConfig
from mm.train.estimate import estimate
from mm.train.params import parameter_groups

WIDTH, LAYERS = 128, 4
STEPS, TUNED, EVERY = 600, 200, 100
SEEDS = (0, 1)
ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "AdamW": ({"kind": "adamw"}, (4e-3, 8e-3, 1.6e-2)),
    "Muon": ({"kind": "muon", "betas": [0.9, 0.95]}, (8e-3, 1.6e-2, 3.2e-2)),
    "SOAP": ({"kind": "soap", "betas": [0.95, 0.95]}, (4e-3, 8e-3, 1.6e-2)),
    "Sophia": ({"kind": "sophia", "betas": [0.965, 0.99], "rho": 0.04}, (4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)),
    "Sophia, short": ({"kind": "sophia", "betas": [0.965, 0.95], "rho": 0.5}, (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)),
}
"""Settings of `train.optimizer`, and learning rates."""
LOWER = {"half": 2, "quarter": 4, "eighth": 8}


def config(arm: str, lr: float, steps: int) -> Config:
    optimizer, _ = ARMS[arm]
    return {
        "data": texts.data(shares()),
        "model": texts.model(WIDTH, LAYERS),
        "train": texts.training(steps, lr, optimizer=optimizer),
        "evaluation": {"every": EVERY},
    }


@cache
def shares() -> dict[str, float]:
    """Of each domain, by the size of its text."""
    sizes = {domain: (texts.DATA / f"{domain}-train.jsonl").stat().st_size for domain in texts.DOMAINS}
    return {domain: round(size / sum(sizes.values()), 4) for domain, size in sizes.items()}


def tuned(arm: str, lr: float, rows: Sequence[Row]) -> Config:
    return config(arm, lr, TUNED)


def tried(arm: str, part: int, rows: Sequence[Row]) -> Config:
    return config(arm, best_rate(arm, rows)[0] / part, STEPS)


def final(arm: str, rows: Sequence[Row]) -> Config:
    return config(arm, rate(arm, rows), STEPS)


def best_rate(arm: str, rows: Sequence[Row]) -> tuple[float, dict[float, float]]:
    """Of short runs the rate with the lowest validation loss, and that of each."""
    losses = {lr: row["curve"][-1][2] for row in rows for lr in ARMS[arm][1] if row["run"] == f"{arm}, {lr:g}"}
    return min(losses, key=losses.__getitem__), losses


def whole(arm: str, rows: Sequence[Row]) -> dict[float, Row]:
    """By rate, the runs of all steps that choose between rates."""
    best = best_rate(arm, rows)[0]
    names = {arm: best, **{f"{arm}, {name}": best / part for name, part in LOWER.items()}}
    return {names[row["run"]]: row for row in rows if row["run"] in names and row["seed"] == SEEDS[0]}


def rate(arm: str, rows: Sequence[Row]) -> float:
    """The one with the lowest validation loss after all steps."""
    found = whole(arm, rows)
    return min(found, key=lambda lr: found[lr]["curve"][-1][2])


def finals(arm: str, rows: Sequence[Row]) -> list[Row]:
    """The runs of all steps at the arm's rate, one a seed."""
    found = best_rate_or_none(arm, rows) and whole(arm, rows)
    if not found:
        return []
    return [found[rate(arm, rows)], *(row for row in rows if row["run"] == arm and row["seed"] != SEEDS[0])]


def at_flops(arm: str, rows: Sequence[Row]) -> Config:
    return config(arm, rate(arm, rows), round(STEPS * flops("AdamW") / flops(arm)))


def at_seconds(arm: str, rows: Sequence[Row]) -> Config:
    ratio = seconds_a_step(arm, rows) / seconds_a_step("AdamW", rows)
    return config(arm, rate(arm, rows), round(STEPS / ratio))


def seconds_a_step(arm: str, rows: Sequence[Row]) -> float:
    return statistics.mean(row["step_seconds"] for row in finals(arm, rows))


EQUAL = {"FLOPs": at_flops, "seconds": at_seconds}
EQUALLED = ("Muon", "SOAP")
RUNS = [
    *(Run(f"{arm}, {lr:g}", 0, 3, partial(tuned, arm, lr)) for arm, (_, rates) in ARMS.items() for lr in rates),
    *(Run(arm, SEEDS[0], 8, partial(tried, arm, 1)) for arm in ARMS),
    *(
        Run(f"{arm}, {name}", SEEDS[0], 8, partial(tried, arm, part))
        for name, part in LOWER.items()
        for arm in ARMS
        if name != "eighth" or "Sophia" in arm
    ),
    *(Run(arm, seed, 8, partial(final, arm)) for seed in SEEDS[1:] for arm in ARMS),
    *(Run(f"{arm}, at AdamW's {what}", 0, 8, partial(made, arm)) for arm in EQUALLED for what, made in EQUAL.items()),
]


@cache
def flops(arm: str) -> float:
    """Of a step, in the mean."""
    run = RunConfig.model_validate({**config("AdamW", 1e-3, STEPS), "out": "unused"})
    passes = float(estimate(run)["flops_per_step"]["total"])
    with torch.device("meta"):
        groups = parameter_groups(run.model.build(weights=False), [], 0.1)
    matrices = [one.shape for group in groups if group["role"] == "matrix" for one in group["params"]]
    kind = ARMS[arm][0]["kind"]
    if kind == "sophia":
        return passes * 1.1
    own = 0.0
    for m, n in (sorted(shape) for shape in matrices):
        if kind == "muon":
            own += 5 * (4 * m * m * n + 2 * m**3)
        if kind == "soap":  # Grams, in and back; a tenth of the refreshes: a product, a QR, and the moment's turn
            own += 6 * (m * m * n + m * n * n)
            own += (sum(2 * d**3 + 8 / 3 * d**3 for d in (m, n)) + 4 * (m * m * n + m * n * n)) / 10
    return passes + own


def show(rows: list[Row]) -> str:
    """Rates, then losses by steps, by compute and by seconds."""
    lines = [f"| validation loss after {TUNED} steps | of learning rates |", "|---|---|"]
    for arm in ARMS:
        if losses := best_rate_or_none(arm, rows):
            lines.append(f"| {arm} | {texts.of_rates(losses)} |")
    base = finals("AdamW", rows)
    if not base:
        return "\n".join(lines)
    lines += ["", f"| validation loss after {STEPS} steps, seed {SEEDS[0]} | of learning rates |", "|---|---|"]
    for arm in ARMS:
        if found := best_rate_or_none(arm, rows) and whole(arm, rows):
            losses = {lr: found[lr]["curve"][-1][2] for lr in sorted(found)}
            lines.append(f"| {arm} | {texts.of_rates(losses, higher=False)} |")
    quarters = (STEPS // 4, STEPS // 2, STEPS)
    titles = ["arm", "lr", "seeds", *(f"validation loss, step {step}" for step in quarters), "test loss", "s a step"]
    titles += ["FLOPs over AdamW's", *(f"at AdamW's {what}, less AdamW, seed 0" for what in EQUAL)]
    titles += ["steps to AdamW's validation loss"]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    reached = statistics.mean(row["curve"][-1][2] for row in base)
    for arm in ARMS:
        found = finals(arm, rows)
        if not found:
            continue
        cells = [arm, f"{rate(arm, rows):g}", str(len(found))]
        cells += [spread([at(row, step) for row in found], ".3f") for step in quarters]
        cells.append(spread([row["result"]["test_loss"] for row in found], ".3f"))
        cells += [f"{seconds_a_step(arm, rows):.3f}", f"{flops(arm) / flops('AdamW'):.2f}"]
        for what in EQUAL:
            equal = [row for row in rows if row["run"] == f"{arm}, at AdamW's {what}"]
            over = [row["result"]["test_loss"] - base[0]["result"]["test_loss"] for row in equal]
            cells.append("".join(f"{one:+.3f} ({row['steps']} steps)" for one, row in zip(over, equal, strict=True)))
        cells.append(", ".join(first_at(row, reached) for row in found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_rate_or_none(arm: str, rows: Sequence[Row]) -> dict[float, float]:
    try:
        return best_rate(arm, rows)[1]
    except ValueError:
        return {}


def at(row: Row, step: float) -> float:
    """The validation loss after so many steps, straight from point to point."""
    points = np.array(row["curve"])
    return float(np.interp(step, points[:, 0], points[:, 2]))


def first_at(row: Row, loss: float) -> str:
    """The first evaluation at which a curve is down to a loss."""
    return next((str(step) for step, _, value in row["curve"] if value <= loss), f"more than {row['steps']}")


STUDY = Study("optimizers", "AdamW, Muon, SOAP, Sophia by steps, compute and seconds", texts.prepare, RUNS, show)
