"""When metadata harm: a known grammar, documents with none or all of their latents told, short prompts and long.

The setting of 2504.17562 in small: `mm data build pcfg` (three levels of two tables each, so eight latents), a Llama of
0.8 million parameters, half of the documents behind the first K latents, tested without any. Whether a model has found
the latents is read off by a linear probe, and by the grammar of what it writes behind the first terminals; beside each
is what exact inference makes of the same beginnings (docs/pcfg.md).

    mm data build pcfg --count 400000 --out corpora/pcfg

No document is read twice. Every number of told latents has the best of three learning rates, by the loss at the end of
validation documents of which nothing is told (seed 0); the next seed has the same. Probes are of the last layer.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import texts
from benchmarks.studies.moma import CORPORA, spread
from benchmarks.study import Config, Row, Run, Study
from mm.config import load_config
from mm.evals import pcfg

DATA = CORPORA / "pcfg"
TOLD = (0, 3)
SEEDS = (0, 1)
CONFIG = Path(__file__).parents[2] / "configs/text_lm/pcfg.yaml"
STEPS = 1000
DOCUMENTS = 400_000
RATES = (2e-3, 4e-3, 8e-3)


def prepare() -> None:
    about = DATA / "corpus.json"
    if not about.exists() or json.loads(about.read_text())["options"]["count"] < DOCUMENTS:
        raise SystemExit(f"{DATA}: no corpus of so many; mm data build pcfg --count {DOCUMENTS} --out {DATA}")


def config(told: int, rate: float) -> Config:
    settings = (f"train.max_steps={STEPS}", f"train.optimizer.lr={rate}", "train.guard.sigmas=0")
    sections = load_config(CONFIG, settings).resolved()
    sections["data"]["workers"] = 0
    for split, name, known in (("sources", "train", told), ("validation", "validation", 0)):
        path = str(DATA / f"{name}-*.jsonl.gz")
        sections["data"][split] = [{"kind": "text", "name": name, "path": path, "prompt": f"{{metadata_{known}}}"}]
    return {key: value for key, value in sections.items() if key not in ("out", "seed")}


def tuned(told: int, rate: float, rows: Sequence[Row]) -> Config:
    return config(told, rate)


def final(told: int, rows: Sequence[Row]) -> Config:
    return config(told, min(losses := of_rates(told, rows), key=losses.__getitem__))


def of_rates(told: int, rows: Sequence[Row]) -> dict[float, float]:
    return {rate: row["curve"][-1][2] for rate in RATES for row in rows if row["run"] == f"told {told}, {rate:g}"}


def runs_of(told: int, rows: Sequence[Row]) -> list[Row]:
    """At the better rate, one a seed."""
    losses = of_rates(told, rows)
    if not losses:
        return []
    name = f"told {told}, {min(losses, key=losses.__getitem__):g}"
    return [row for row in rows if row["run"] in (name, f"told {told}")]


def measured(folder: Path, told: int) -> dict[str, Any]:
    """What `mm pcfg` found, without what says where it was found."""
    found = pcfg.run(str(folder / "run"), DATA, folder / "pcfg", told, documents=2000, samples=500, device="cpu")
    return {key: found[key] for key in ("loss", "probes", "grammatical", "reached")}


RUNS = [
    *(
        Run(f"told {told}, {rate:g}", 0, 18, partial(tuned, told, rate), partial(measured, told=told))
        for told in TOLD
        for rate in RATES
    ),
    *(
        Run(f"told {told}", seed, 18, partial(final, told), partial(measured, told=told))
        for seed in SEEDS[1:]
        for told in TOLD
    ),
]


def show(rows: list[Row]) -> str:
    """Nothing told in the prompt: losses, what is written, what probes find, each over what is exact."""
    some = {told: [row["result"] for row in runs_of(told, rows)] for told in TOLD}
    some = {told: found for told, found in some.items() if found}
    if not some:
        return ""
    (first, *_), *_ = some.values()
    lines = ["| validation loss, nothing told, seed 0 | of three rates |", "|---|---|"]
    for told in some:
        lines.append(f"| {told} told in training | {texts.of_rates(of_rates(told, rows))} |")
    lines += ["", "| latents told in training | seeds | loss, nothing told | exact | all told as in training | exact |"]
    lines.append("|---" * 6 + "|")
    for told, found in some.items():
        cells = [f"{told}", str(len(found))]
        for place in (0, -1):
            cells += [spread([one["loss"][place]["model"] for one in found], ".4f")]
            cells += [f"{found[0]['loss'][place]['bayes']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    prompts = first["grammatical"][0]["prompts"]
    lines += by_length("grammatical under the document's latents, %", prompts, some, written)
    exact = [100 * one for one in first["grammatical"][0]["bayes"]]
    lines.append(f"| *exact* | {' | '.join(f'*{one:.1f}*' for one in exact)} |")
    lines += by_length("grammatical under any latents, %", prompts, some, written_any)
    positions = [position for position in prompts if position < len(first["probes"]["bayes"])]
    lines += by_length("latents told by a probe, %", positions, some, probed)
    sure = [100 * statistics.mean(first["probes"]["bayes"][position]) for position in positions]
    lines.append(f"| *exact* | {' | '.join(f'*{one:.1f}*' for one in sure)} |")
    return "\n".join(lines)


def by_length(
    title: str, lengths: Sequence[int], some: dict[int, list[Any]], values: Callable[[Any], list[float]]
) -> list[str]:
    """A table over terminals that have been read: means of the seeds, (lowest to highest)."""
    lines = ["", f"| {title}; terminals read: | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for told, found in some.items():
        columns = zip(*(values(one)[: len(lengths)] for one in found), strict=True)
        lines.append(f"| {told} told in training | {' | '.join(spread([*one], '.1f') for one in columns)} |")
    return lines


def written(result: Any) -> list[float]:
    return [100 * share for share in result["grammatical"][0]["own"]]


def written_any(result: Any) -> list[float]:
    return [100 * share for share in result["grammatical"][0]["any"]]


def probed(result: Any) -> list[float]:
    """Of the last layer, in the mean over latents, where prompts end."""
    accuracy = np.array(result["probes"]["accuracy"][-1]).mean(1)
    return [100 * float(accuracy[n]) for n in result["grammatical"][0]["prompts"] if n < len(accuracy)]


STUDY = Study("pcfg", "metadata of a known grammar: help and harm by the length of prompts", prepare, RUNS, show)
