"""What every benchmark prints: a table for people and, with `--json`, one object on the last line."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
"""case, unit, better ("higher" | "lower"), ours, peers {"NAME VERSION": figure, or why there is none}, limit."""


def arguments(what: str, **more: str) -> argparse.Namespace:
    """`more`: further options that take a value, by name, with their help."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition: does it run at all?")
    for name, about in more.items():
        parser.add_argument(f"--{name}", help=about)
    return parser.parse_args()


def interleaved(repetitions: int, **candidates: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each candidate, all run in turn in every repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def release(package: str) -> str:
    """Name and version, or the bare name where it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def show(name: str, rows: list[Row], as_json: bool) -> None:
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    table = Table("case", "unit", "ours", "peers", "limit", title=f"{name} ({machine})")
    for row in rows:
        peers = "\n".join(f"{peer}: {_figure(value)}" for peer, value in row["peers"].items())
        table.add_row(row["case"], row["unit"], _figure(row["ours"]), escape(peers), _figure(row.get("limit", "")))
    Console(width=150).print(table)
    if as_json:
        print(json.dumps({"name": name, "machine": machine, "rows": rows}))


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
