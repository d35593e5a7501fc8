"""Metadata in front of documents, with and without a cool-down, tested with right, wrong and no metadata.

MeCo (2501.01956) for a Llama of a million parameters on six domains of Debian's English documents, whose made-up
addresses (`https://scripture.example/…`) say the domain: six sites, where the paper has millions. All arms take
`STEPS` + `COOL` steps under one schedule; the last tenth is on another pool of documents, which no earlier step has
seen.

- "plain": documents alone, in both pools.
- "metadata": `URL: scripture.example` in front of every document, in both pools.
- "cool-down": with it in the first pool, without in the second.

Metadata take room and bear no loss, so arms with them learn from fewer tokens in as many steps, as in the paper. Each
arm has the best of three rates by its validation loss without metadata at the end (seed 0). Test losses are of the same
documents under every condition; wrong metadata are those of another document. Intervals are 95 %, by a bootstrap over
whole documents.

    mm data build debian-text --out corpora/debian-text
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import texts
from benchmarks.studies.moma import spread
from benchmarks.study import Config, Row, Run, Study
from mm.config import RunConfig
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.evals.conditioned import CONDITIONS, conditioned_losses
from mm.hub import load

STEPS, COOL = 720, 80
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1)
METADATA = {"field": "url"}
POOLS = ([0, 0.36], [0.36, 0.4])
"""Of the training documents; both are more than is read."""
ARMS = {"plain": (False, False), "metadata": (True, True), "cool-down": (True, False)}
"""Whether documents have metadata, in the first pool and in the second."""
DRAWS = 1000


def sources(pool: int, conditioned: bool) -> list[dict[str, Any]]:
    about = {"metadata": METADATA} if conditioned else {}
    return [texts.source(domain, "train", part=POOLS[pool], **about) for domain in texts.DOMAINS]


def config(arm: str, rate: float) -> Config:
    base = texts.data(dict.fromkeys(texts.DOMAINS, 1.0), mixture={})
    stages = [
        {"name": name, "data": {"sources": sources(pool, ARMS[arm][pool])}, "train": {"max_steps": steps}}
        for pool, (name, steps) in enumerate((("first", STEPS), ("second", COOL)))
    ]
    stages[1]["keep_optimizer"] = True
    return {
        "data": {**base, "sources": sources(0, ARMS[arm][0])},
        "model": texts.model(128, 4),
        "train": texts.training(STEPS + COOL, rate),
        "evaluation": {"every": 100},
        "stages": stages,
    }


def tuned(arm: str, rate: float, rows: Sequence[Row]) -> Config:
    return config(arm, rate)


def final(arm: str, rows: Sequence[Row]) -> Config:
    return config(arm, best_rate(arm, rows)[0])


def best_rate(arm: str, rows: Sequence[Row]) -> tuple[float, dict[float, float]]:
    losses = {rate: row["curve"][-1][2] for row in rows for rate in RATES if row["run"] == f"{arm}, {rate:g}"}
    return min(losses, key=losses.__getitem__), losses


def measured(folder: Path) -> dict[str, Any]:
    """`tokens` of each test document, and `nats` under each condition, its pieces together."""
    system, layout, run = load(folder / "run", "cpu")
    held_out = [texts.source(domain, "test", metadata=METADATA) for domain in texts.DOMAINS]
    data = {**run.data.model_dump(mode="json"), "test": held_out}
    raw = RunConfig.model_validate({**run.resolved(), "data": data})
    packed = pack_split(raw.data, "test", layout, 0)
    assert packed is not None
    found: Any = conditioned_losses(system, layout, PackedDataset(packed))
    documents, place = np.unique([id.partition("#")[0] for id in found.ids], return_inverse=True)

    def by_document(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values, minlength=len(documents))

    return {
        "tokens": by_document(found.tokens).astype(int).tolist(),
        "nats": {name: np.round(by_document(values), 2).tolist() for name, values in found.nats.items()},
    }


RUNS = [
    *(Run(f"{arm}, {rate:g}", 0, 8, partial(tuned, arm, rate), measured) for arm in ARMS for rate in RATES),
    *(Run(arm, seed, 8, partial(final, arm), measured) for seed in SEEDS[1:] for arm in ARMS),
]


def chosen(arm: str, rows: Sequence[Row]) -> list[Row]:
    """The runs of an arm at its best rate, one a seed."""
    try:
        name = f"{arm}, {best_rate(arm, rows)[0]:g}"
    except ValueError:
        return []
    return [row for row in rows if row["run"] in (name, arm)]


def losses(row: Row, condition: str, weights: np.ndarray | None = None) -> np.ndarray:
    """[n] nats a token, of all test documents, each counted as often as a row of weights [n, documents] says."""
    tokens, nats = (np.array(one) for one in (row["result"]["tokens"], row["result"]["nats"][condition]))
    weights = np.ones((1, len(tokens))) if weights is None else weights
    found: np.ndarray = weights @ nats / (weights @ tokens)
    return found


def show(rows: list[Row]) -> str:
    """Rates, then losses under each condition and their differences from plain without metadata."""
    lines = ["| validation loss without metadata | of three rates |", "|---|---|"]
    for arm in ARMS:
        if chosen(arm, rows):
            lines.append(f"| {arm} | {texts.of_rates(best_rate(arm, rows)[1])} |")
    lines += ["", f"| test loss | seeds | loss tokens | {' | '.join(CONDITIONS)} |", "|---" * 6 + "|"]
    for arm in ARMS:
        if some := chosen(arm, rows):
            cells = [arm, str(len(some)), f"{some[0]['loss_tokens'] / 1e6:.2f} M"]
            cells += [spread([float(losses(row, one)[0]) for row in some], ".3f") for one in CONDITIONS]
            lines.append(f"| {' | '.join(cells)} |")
    plain = {row["seed"]: row for row in chosen("plain", rows)}
    if not plain:
        return "\n".join(lines)
    documents = len(next(iter(plain.values()))["result"]["tokens"])
    weights = np.random.default_rng(0).multinomial(documents, [1 / documents] * documents, DRAWS).astype(float)
    lines += ["", f"| less plain without metadata | {' | '.join(CONDITIONS)} |", "|---|---|---|---|"]
    for arm in ARMS:
        some = [row for row in chosen(arm, rows) if row["seed"] in plain]
        if not some:
            continue
        cells = [arm]
        for condition in CONDITIONS:
            drawn = [losses(row, condition, weights) - losses(plain[row["seed"]], "none", weights) for row in some]
            each = [float((losses(row, condition) - losses(plain[row["seed"]], "none"))[0]) for row in some]
            low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
            seeds = ", ".join(f"{one:+.3f}" for one in each)
            cells.append(f"{np.mean(each):+.3f} ({low:+.3f} to {high:+.3f}; {seeds})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


STUDY = Study("meco", "metadata with and without cool-down; right, wrong and none", texts.prepare, RUNS, show)
