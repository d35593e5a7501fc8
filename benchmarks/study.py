"""Small honest experiments, run after run: `python -m benchmarks.study NAME`.

A study is a list of `mm train` runs, at most three hours of two cores in all. Each runs in a process of its own, and
may be measured further when it has ended; what it gave is appended to `benchmarks/studies/NAME.jsonl`, and one that was
stopped goes on from its checkpoint. So a study may be stopped and started at any time, and a row that is there is never
run again. Seconds are those of training, without evaluation and saving.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mm.train.metrics import read_metrics

HERE = Path(__file__).parent / "studies"
Config = dict[str, Any]
Row = dict[str, Any]
"""study, run, seed, date, machine, seconds of training, `step_seconds` of the median step, which does not know of
pauses, loss_tokens, tokens, steps, and as `result` eval.json and what `Run.after` gave."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: `config(rows)` may use the rows of runs before it; `minutes` are what it is expected to take.

    `after(run)`, of a folder that has the training run in `run/`, gives more results. Without a config nothing is
    trained, and it is all there is.
    """

    name: str
    seed: int
    minutes: float
    config: Callable[[list[Row]], Config] | None
    after: Callable[[Path], dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """`prepare` makes the data, once; `show` gives what was found as Markdown, from the rows that are there."""

    name: str
    about: str
    prepare: Callable[[], None]
    runs: list[Run]
    show: Callable[[list[Row]], str]


def main() -> None:
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__init__")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names)
    parser.add_argument("--show", action="store_true", help="only what has been found so far, as Markdown")
    parser.add_argument("--minutes", type=float, help="start no run that is expected to end later than this")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="where the runs go")
    options = parser.parse_args()
    study: Study = importlib.import_module(f"benchmarks.studies.{options.name}").STUDY
    if options.show:
        print(study.show(read_rows(study.name)))
        return
    run_study(study, options.work / study.name, options.minutes)
    print(study.show(read_rows(study.name)))


def read_rows(name: str) -> list[Row]:
    path = HERE / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_study(study: Study, work: Path, minutes: float | None) -> None:
    """All runs that have no row yet, in order."""
    start = time.monotonic()
    done = {(row["run"], row["seed"]) for row in read_rows(study.name)}
    left = [run for run in study.runs if (run.name, run.seed) not in done]
    print(
        f"{study.name}: {len(study.runs)} runs, {len(done)} of them done; the others take about "
        f"{sum(run.minutes for run in left):.0f} minutes",
        flush=True,
    )
    study.prepare()
    for run in left:
        if minutes is not None and (time.monotonic() - start) / 60 + run.minutes > minutes:
            print(f"{run.name}, seed {run.seed}: about {run.minutes:g} minutes; left for the next time")
            return
        print(f"{run.name}, seed {run.seed}: about {run.minutes:g} minutes", flush=True)
        row = run_one(study.name, run, read_rows(study.name), work / f"{run.name}-{run.seed}")
        with open(HERE / f"{study.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_one(study: str, run: Run, rows: list[Row], folder: Path) -> Row:
    """Train and measure. Raises `SystemExit` where training fails."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {} if run.config is None else train(run, run.config(rows), folder)
    more = {} if run.after is None else run.after(folder)
    return {
        "study": study,
        "run": run.name,
        "seed": run.seed,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **trained,
        "result": {**trained.get("result", {}), **more},
    }


def train(run: Run, config: Config, folder: Path) -> Row:
    """In a process of its own, going on where it was stopped."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**config, "seed": run.seed, "out": str(folder / "run")}))
    resume = ["--resume"] if (folder / "run").exists() else []
    status = subprocess.run([sys.executable, "-m", "mm", "train", str(path), *resume]).returncode
    if status:
        raise SystemExit(f"{run.name}, seed {run.seed}: ended with status {status}; the same command goes on")
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    logged = [row for row in rows if "elapsed" in row]
    about, tested = json.loads((folder / "run" / "run.json").read_text()), folder / "run" / "eval.json"
    return {
        "threads": about["threads"],
        "steps": logged[-1]["step"],
        "seconds": logged[-1]["elapsed"],
        "step_seconds": round(1 / statistics.median(row["steps_per_second"] for row in logged), 5),
        **{name: logged[-1][name] for name in ("tokens", "loss_tokens") if name in logged[-1]},
        "result": json.loads(tested.read_text()) if tested.exists() else {},  # of runs without a test split none
        "curve": [[row["step"], row["elapsed"], row["validation_loss"]] for row in rows if "validation_loss" in row],
    }


if __name__ == "__main__":
    main()
