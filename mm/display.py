"""What a person sees while a run goes on: a rich progress bar on a terminal, plain lines in a log file."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 15.0


class Display:
    """A `Watcher` that writes to stderr, so that stdout is left to results. Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._packing: TaskID | None = None
        self._what = ""
        self._last = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def event(self, text: str) -> None:
        self._end_packing()
        self.console.print(text, markup=False, soft_wrap=True)

    def packing(self, what: str, count: int) -> None:
        if self._progress is not None:
            if self._packing is None or what != self._what:
                self._end_packing()
                self._packing = self._progress.add_task(what, total=None, numbers="")
            self._progress.update(self._packing, completed=count)
        elif what != self._what:
            self.console.print(f"{what} …", markup=False)
        self._what = what

    def step(self, row: dict[str, Any], steps: int) -> None:
        self._end_packing()
        numbers = (
            f"loss {row['loss']:.3f}"
            + (f"  held-out {row['validation_loss']:.3f}" if "validation_loss" in row else "")
            + f"  {row['tokens_per_second']:,.0f} tok/s  fill {row['pack_fill']:.1%}  data wait {row['data_wait']:.1%}"
        )
        if self._progress is not None:
            if self._task is None:
                self._task = self._progress.add_task("training", total=steps, completed=row["step"], numbers="")
            self._progress.update(self._task, completed=row["step"], numbers=numbers)
            if "validation_loss" in row:
                self._progress.console.print(f"step {row['step']:>6}  {numbers}", markup=False)
        elif "validation_loss" in row or row["step"] == steps or time.monotonic() - self._last > LINE_SECONDS:
            self.console.print(f"step {row['step']}/{steps}  {numbers}", markup=False, soft_wrap=True)
            self._last = time.monotonic()
        sys.stderr.flush()

    def _end_packing(self) -> None:
        if self._progress is not None and self._packing is not None:
            self._progress.remove_task(self._packing)
            self._packing = None
