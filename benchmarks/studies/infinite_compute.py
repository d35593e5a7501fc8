"""Few data and all the compute one likes: weight decay, size, ensembles and a student of them.

The questions of *Pre-training under infinite compute* (2509.14786) on 0.15 million tokens of the kernel's
documentation: models of 0.2 to 2.2 million parameters read them some eleven times, with decay from the customary 0.1 to
30 times that.

- Is the largest model the best one, at decay 0.1 and at the best decay of each size? The law E + A / N^a of the latter.
- Ensembles of seeds of the second size: the law E + A / K^a of 1 to 5 members.
- A student of that size that learns from the five.

Every size has the best of three or four learning rates at decay 0.1, and then the best of three decays at that rate
(seed 0, by the validation loss at the end), which is one pass and no search of both together. The lowest validation
loss along the way shows what early stopping would save; laws are of test losses at the end, that of sizes over two
seeds of each.

    mm data build debian-text --out corpora/debian-text
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import texts
from benchmarks.studies.moma import spread
from benchmarks.study import Config, Row, Run, Study
from benchmarks.training import CACHE
from mm.evals.ensemble import ensemble
from mm.files import atomic
from mm.fit import fit_power
from mm.hub import export

DATA = CACHE / "study-infinite_compute"
DOMAIN = "kernel-docs"
CHARACTERS = 400_000
SIZES = {"64 x 2": (64, 2), "96 x 3": (96, 3), "128 x 4": (128, 4), "192 x 4": (192, 4)}
DECAYS = (0.1, 0.8, 3.2)
RATES = {size: (2e-3, 4e-3, 8e-3) for size in SIZES}
RATES |= {size: (2e-3, 4e-3, 8e-3, 1.6e-2) for size in ("64 x 2", "192 x 4")}  # of the three the last was the best
MEMBERS, MEMBER = 5, "96 x 3"
SEEDS = (0, 1)
STEPS, EVERY, ROWS = 900, 100, 4


def prepare() -> None:
    """Documents of the domain as `texts.beginnings` draws them, of so many characters in all."""
    texts.prepare()
    out = DATA / "train.jsonl"
    if out.exists():
        return
    DATA.mkdir(parents=True, exist_ok=True)
    lines = (texts.DATA / f"{DOMAIN}-train.jsonl").read_text(encoding="utf-8").splitlines()
    some = texts.beginnings([json.loads(line) for line in lines], CHARACTERS)
    kept = [json.dumps({"text": about["text"]}, ensure_ascii=False) + "\n" for about in some]
    with atomic(out) as file:
        file.write("".join(kept).encode())


def config(size: str, decay: float, rate: float, teachers: Sequence[str] = ()) -> Config:
    data = texts.data({DOMAIN: 1.0}, mixture={})
    data["sources"] = [{"kind": "text", "name": DOMAIN, "path": str(DATA / "train.jsonl")}]
    distill = {"distill": {"teachers": [*teachers], "weight": 0.5}} if teachers else {}
    return {
        "data": data,
        "model": texts.model(*SIZES[size], **distill),
        "train": texts.training(STEPS, rate, ROWS, optimizer={"weight_decay": decay}),
        "evaluation": {"every": EVERY},
    }


def rates_of(size: str, rows: Sequence[Row]) -> dict[float, float]:
    """Validation losses at the end, decay 0.1."""
    return {rate: row["curve"][-1][2] for rate in RATES[size] for row in rows if row["run"] == f"{size}, rate {rate:g}"}


def rate_of(size: str, rows: Sequence[Row]) -> float:
    losses = rates_of(size, rows)
    return min(losses, key=losses.__getitem__)


def decay_of(size: str, rows: Sequence[Row]) -> float:
    """The decay with the lowest validation loss at the end."""
    losses = {decay: one["curve"][-1][2] for decay in DECAYS for one in rows if one["run"] == of(size, decay, rows)}
    return min(losses, key=losses.__getitem__)


def of(size: str, decay: float, rows: Sequence[Row]) -> str:
    """The name of the run: at the customary decay that of the best rate."""
    return f"{size}, rate {rate_of(size, rows):g}" if decay == DECAYS[0] else name_of(size, decay)


def name_of(size: str, decay: float) -> str:
    return f"{size}, decay {decay:g}"


def tuned(size: str, rate: float, rows: Sequence[Row]) -> Config:
    return config(size, DECAYS[0], rate)


def decayed(size: str, decay: float, rows: Sequence[Row]) -> Config:
    return config(size, decay, rate_of(size, rows))


def regularised(size: str, rows: Sequence[Row]) -> Config:
    return config(size, decay_of(size, rows), rate_of(size, rows))


def student(rows: Sequence[Row]) -> Config:
    teachers = [row["result"]["exported"] for row in rows if row["run"] == f"{MEMBER}, regularised"]
    return config(MEMBER, decay_of(MEMBER, rows), rate_of(MEMBER, rows), teachers)


def exported(folder: Path) -> dict[str, Any]:
    """A member is exported, for the student."""
    out = folder.resolve() / "exported"
    if not out.exists():
        export(folder / "run", out)
    return {"exported": str(out)}


def together(folder: Path) -> dict[str, Any]:
    runs = [folder.parent / f"{MEMBER}, regularised-{seed}" / "run" for seed in range(MEMBERS)]
    return ensemble(runs, "test", "cpu")


MINUTES = {"64 x 2": 2, "96 x 3": 3.5, "128 x 4": 5, "192 x 4": 8}
RUNS = [
    *(
        Run(f"{size}, rate {rate:g}", 0, MINUTES[size], partial(tuned, size, rate))
        for size in SIZES
        for rate in RATES[size]
    ),
    *(
        Run(name_of(size, decay), 0, MINUTES[size], partial(decayed, size, decay))
        for size in SIZES
        for decay in DECAYS[1:]
    ),
    *(
        Run(f"{MEMBER}, regularised", seed, MINUTES[MEMBER], partial(regularised, MEMBER), exported)
        for seed in range(MEMBERS)
    ),
    *(Run(f"{size}, regularised", 1, MINUTES[size], partial(regularised, size)) for size in SIZES if size != MEMBER),
    Run("ensemble", 0, 1, None, together),
    Run("student", MEMBERS, 6, student),  # a seed that no teacher has
]


def show(rows: list[Row]) -> str:
    """Rates, decay by size, the law of sizes, ensembles and their law, the student."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row["run"], []).append(row)
    lines = ["| validation loss at the end, decay 0.1 | by rate |", "|---|---|"]
    lines += [f"| {size} | {texts.of_rates(found)} |" for size in SIZES if (found := rates_of(size, rows))]
    titles = [f"decay {decay:g}" for decay in DECAYS]
    about = "test loss at the end (validation loss; its lowest; rate x decay x steps), **chosen**"
    lines += ["", f"| {about} | {' | '.join(titles)} |"]
    lines.append("|---" * (len(DECAYS) + 1) + "|")
    for size in SIZES:
        cells = []
        for decay in DECAYS if rates_of(size, rows) else ():
            cell = ""
            for row in by.get(of(size, decay, rows), [])[:1]:
                cell = f"{row['result']['test_loss']:.3f} ({row['curve'][-1][2]:.3f}; {lowest(row):.3f}; "
                cell += f"{rate_of(size, rows) * decay * STEPS:.2g})"
            cells.append(f"**{cell}**" if cell and decay == decay_of(size, rows) else cell)
        if cells:
            lines.append(f"| {size} | {' | '.join(cells)} |")
    points = [
        (parameters(size), row["result"]["test_loss"]) for size in SIZES for row in members(size, by)[: len(SEEDS)]
    ]
    if len({x for x, _ in points}) == len(SIZES):
        fit = fit_power([x for x, _ in points], [loss for _, loss in points])
        lines += ["", f"At the best decay of each size: {law(fit, 'N')}"]
    if some := by.get("ensemble"):
        sizes = some[0]["result"]["sizes"]
        lines += ["", "| members | test loss | averaged probabilities | subsets |", "|---|---|---|---|"]
        lines += [f"| {s['K']} | {s['loss']:.3f} | {s['probabilities']:.3f} | {s['subsets']} |" for s in sizes]
        fit = fit_power([s["K"] for s in sizes], [s["loss"] for s in sizes])
        lines += ["", f"Of ensembles of these five, not of other ones: {law(fit, 'K')}"]
    if some := by.get("student"):
        alone = [row["result"]["test_loss"] for row in members(MEMBER, by)]
        learned = some[0]["result"]["test_loss"]
        lines += ["", f"A student of the ensemble: {learned:.3f}; one alone {spread(alone, '.3f')}."]
    return "\n".join(lines)


def members(size: str, by: dict[str, list[Row]]) -> list[Row]:
    """The runs of a size at its best decay: those for ensembles, or the one of the grid and a second seed."""
    again = by.get(f"{size}, regularised", [])
    if size == MEMBER or not again:
        return again
    rows = [row for found in by.values() for row in found]
    return [*by[of(size, decay_of(size, rows), rows)], *again]


def lowest(row: Row) -> float:
    return float(min(loss for _, _, loss in row["curve"]))


def parameters(size: str) -> int:
    """Of layers and embeddings."""
    width, layers = SIZES[size]
    inner = 8 * round(width / 3)
    return texts.VOCABULARY * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width


def law(fit: Any, of: str) -> str:
    if not fit.settled:
        return f"no law E + A / {of}^a: losses do not fall, or best with an exponent at the end of what was tried."
    seeds = "seeds" if fit.by_seeds else "what the law misses"
    return f"E = {fit.E}, A = {fit.A}, a = {fit.a} of E + A / {of}^a (95 % over {seeds})"


STUDY = Study("infinite_compute", "weight decay, size, ensembles and a student, on few data", prepare, RUNS, show)
