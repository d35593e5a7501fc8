"""Three domains one after the other: an infinite schedule against a cosine that begins anew, with and without replay.

WordNet, then the kernel's documentation, then scripture: a strong shift each time, `STEPS` steps of 4,096 tokens a
domain for a Llama of a million parameters. The optimizer's moments go on in both arms (Ibrahim et al., 2403.08763;
Singh et al., 2503.02844). With replay a share of the tokens of a stage is of the domains before, equally, so that runs
have the same compute whatever they replay. "union" sees all three mixed from the beginning, for as many tokens.

- "cosine": warm-up over 2 % of each stage, then to a tenth.
- "infinite": one warm-up, a cool-down over the rest of the first stage to `CONSTANT` of the peak, constant from there
  on, annealed over the last `ANNEAL` steps of the last stage.

The peak rate of each schedule with each share of replay, and of the union, is the best of three or four by the
validation loss of the three domains together at the end (seed 0). Both schedules end at `FINAL` of the peak. Forgetting
of a domain is its test loss at the end less that after its own stage, so it holds what later stages teach it too; and a
stage of the infinite schedule ends at a rate that is not annealed, so that it begins from a higher loss and seems to
forget less.
What the arms have in the end is comparable.

    mm data build debian-text --out corpora/debian-text
"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import texts
from benchmarks.studies.moma import spread
from benchmarks.study import Config, Row, Run, Study
from mm.config import load_config
from mm.data.loader import one_pass
from mm.data.prepare import open_splits
from mm.hub import load

DOMAINS = ("dictionary", "kernel-docs", "scripture")
STEPS, WARMUP, ANNEAL = 128, 4, 40
CONSTANT, FINAL = 0.375, 0.1
REPLAY = (0.0, 0.05, 0.25)
SEEDS = (0, 1)
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"kind": "cosine", "warmup": WARMUP, "final": FINAL},
    "infinite": {
        "kind": "infinite", "warmup": WARMUP, "cooldown": STEPS - WARMUP, "constant": CONSTANT,
        "final": FINAL, "anneal": {"at": 3 * STEPS - ANNEAL, "steps": ANNEAL},
    },
}  # fmt: skip
RATES = (1e-3, 2e-3, 4e-3)
ARMS: dict[str, tuple[str, float, tuple[float, ...]]] = {
    **{
        f"{schedule}, replay {100 * replay:g} %" if replay else schedule: (
            schedule,
            replay,
            (*RATES, 8e-3) if schedule == "infinite" and replay else RATES,
        )
        for schedule in SCHEDULES
        for replay in REPLAY
    },
    "union": ("union", 0.0, (2e-3, 4e-3, 8e-3)),
}
"""Schedule, share of replay, learning rates."""


def shares(stage: int, replay: float) -> dict[str, float]:
    """Of each domain in a stage."""
    if stage == 0:
        return {DOMAINS[0]: 1.0}
    return {**dict.fromkeys(DOMAINS[:stage], replay / stage), DOMAINS[stage]: 1 - replay}


def data(weights: dict[str, float]) -> dict[str, Any]:
    """All domains are packed in every stage, so that one set does for all; only weights differ."""
    found = texts.data(dict.fromkeys(DOMAINS, 1.0))
    return {**found, "mixture": {"weights": {domain: weights.get(domain, 0.0) for domain in DOMAINS}}}


def config(arm: str, rate: float) -> Config:
    schedule, replay, _ = ARMS[arm]
    base = {
        "data": data(dict.fromkeys(DOMAINS, 1 / 3)),
        "model": texts.model(128, 4),
        "train": texts.training(
            3 * STEPS, rate, schedule=SCHEDULES.get(schedule, SCHEDULES["cosine"]), save_every=STEPS, keep_every=STEPS
        ),
        "evaluation": {"every": STEPS},
    }
    if arm == "union":
        return base
    stages = [
        {
            "name": domain,
            "data": data(shares(number, replay)),
            "train": {"max_steps": STEPS},
            **({"keep_optimizer": True, "rewarm": schedule == "cosine"} if number else {}),
        }
        for number, domain in enumerate(DOMAINS)
    ]
    return {**base, "stages": stages}


def tuned(arm: str, rate: float, rows: Sequence[Row]) -> Config:
    return config(arm, rate)


def final(arm: str, rows: Sequence[Row]) -> Config:
    return config(arm, best_rate(arm, rows)[0])


def best_rate(arm: str, rows: Sequence[Row]) -> tuple[float, dict[float, float]]:
    losses = {rate: row["curve"][-1][2] for rate in ARMS[arm][2] for row in rows if row["run"] == f"{arm}, {rate:g}"}
    return min(losses, key=losses.__getitem__), losses


@torch.no_grad()
def measured(folder: Path) -> dict[str, Any]:
    """Test losses by domain, in nats a token, of the checkpoints at the end of each stage."""
    stages = []
    for number in range(1, len(DOMAINS) + 1):
        system, layout, _ = load(folder / "run/checkpoints" / f"step-{number * STEPS:08d}", "cpu")
        config = load_config(folder / "run/config.yaml")
        sums: dict[str, list[float]] = {domain: [0.0, 0.0] for domain in DOMAINS}
        for batch in one_pass(open_splits(config.stage_runs()[0].data, layout, config.seed)["test"], layout, 8):
            losses = system(batch).rows["next_token"]
            for name, loss, row in zip(batch.sources, losses.tolist(), batch.labels, strict=True):
                sums[name][0] += loss
                sums[name][1] += int((row >= 0).sum())
        stages.append({domain: total / count for domain, (total, count) in sums.items()})
    return {"stages": stages}


RUNS = [
    *(Run(f"{arm}, {rate:g}", 0, 6, partial(tuned, arm, rate), measured) for arm in ARMS for rate in ARMS[arm][2]),
    *(Run(arm, seed, 6, partial(final, arm), measured) for seed in SEEDS[1:] for arm in ARMS),
]


def chosen(arm: str, rows: Sequence[Row]) -> list[Row]:
    """The runs of an arm at its best rate, one a seed."""
    try:
        name = f"{arm}, {best_rate(arm, rows)[0]:g}"
    except ValueError:
        return []
    return [row for row in rows if row["run"] in (name, arm)]


def show(rows: list[Row]) -> str:
    """Rates, losses of each domain at the end, means, and what was forgotten."""
    lines = ["| validation loss at the end, seed 0 | by rate |", "|---|---|"]
    for arm in ARMS:
        if chosen(arm, rows):
            lines.append(f"| {arm} | {texts.of_rates(best_rate(arm, rows)[1])} |")
    titles = ["test loss at the end", "seeds", *DOMAINS, "mean", *(f"forgotten: {domain}" for domain in DOMAINS[:2])]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm in ARMS:
        some = [row["result"]["stages"] for row in chosen(arm, rows)]
        if not some:
            continue
        cells = [arm, str(len(some))]
        cells += [spread([stages[-1][domain] for stages in some], ".3f") for domain in DOMAINS]
        cells.append(spread([statistics.mean(stages[-1].values()) for stages in some], ".3f"))
        for number, domain in enumerate(DOMAINS[:2]):
            lost = [stages[-1][domain] - stages[number][domain] for stages in some]
            cells.append("" if arm == "union" else spread(lost, "+.3f"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


STUDY = Study(
    "continual", "three domains in sequence: infinite against repeated cosine, replay", texts.prepare, RUNS, show
)
