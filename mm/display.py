"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a log file.

It must cost nothing beside a step and stay readable at 1 step and at 100,000: drawing is limited by the clock, not by
steps, and every number has a width of its own, so that nothing moves but the digits. Only rank 0 has a display.
"""

import math
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from mm.page import THIN, short

DRAW_SECONDS = 0.25
LINE_SECONDS = (10.0, 60.0)
"""Between lines of a log file: at first, and in a long run."""
RATE_SECONDS = 300.0
"""The time remaining goes by the speed of so long a time."""


class Display:
    """A `Watcher` that writes to stderr, so that stdout is left to results. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bar_width = min(24, self.console.width // 8)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._packing: TaskID | None = None
        self._what = ""
        self._stage = "training"
        self._start = self._drawn = -math.inf
        self._marks: deque[tuple[float, int]] = deque()
        self._held_out: float | None = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=self._bar_width),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self.console,
                refresh_per_second=1 / DRAW_SECONDS,
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def event(self, text: str) -> None:
        """A line that stays: what was built, saved, skipped."""
        self._end_packing()
        self.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        """The steps to come are of another stage of the run."""
        self._stage = name
        self._drawn = -math.inf
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name)
        self.event(f"stage: {name}")

    def packing(self, what: str, count: int) -> None:
        """`count` items of some long work are done."""
        if self._progress is not None:
            if self._packing is None or what != self._what:
                self._end_packing()
                self._packing = self._progress.add_task(what, total=None, numbers="")
            self._progress.update(self._packing, completed=count, numbers=f"{count:,}")
        elif what != self._what:
            self.console.print(f"{what} …", markup=False)
        self._what = what

    def step(self, row: dict[str, Any], steps: int) -> None:
        """A logged step, with its row of metrics.jsonl. What was drawn a moment ago is not drawn again."""
        now = time.monotonic()
        step, new = row["step"], "validation_loss" in row
        self._held_out = row.get("validation_loss", self._held_out)
        if self._marks and step < self._marks[-1][1]:  # the guard went back
            self._marks.clear()
        if self._start < 0:
            self._start = now
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, step))
            # Two at least: steps may be slower than that.
            while len(self._marks) > 2 and now - self._marks[0][0] > RATE_SECONDS:
                self._marks.popleft()
        first, longest = LINE_SECONDS
        pause = DRAW_SECONDS if self._progress else min(longest, max(first, (now - self._start) / 20))
        if not (new or step >= steps or now - self._drawn >= pause):
            return
        self._end_packing()
        self._drawn = now
        total = f"{steps:,}"
        parts = [f"{step:>{len(total)},}/{total}", f"{self._left(now, step, steps):>7} left", *self._numbers(row)]
        if self._progress is not None:
            if self._task is None:
                self._task = self._progress.add_task(self._stage, total=steps, numbers="")
            self._progress.update(self._task, completed=step, numbers=self._fitted(parts))
        if self._progress is None or new:
            self.console.print(f"step {'  '.join(parts)}", markup=False, soft_wrap=True)

    def _left(self, now: float, step: int, steps: int) -> str:
        then, before = self._marks[0]
        if step == before < steps:
            return "?"
        return clock(0) if step >= steps else clock((now - then) / (step - before) * (steps - step))

    def _numbers(self, row: dict[str, Any]) -> list[str]:
        """The most wanted first."""
        parts = [f"loss {figure(row['loss'])}", f"{short(row['tokens_per_second']).replace(THIN, ''):>5} tok/s"]
        parts += [f"held-out {figure(self._held_out)}"] if self._held_out is not None else []
        parts += [f"MFU {row['mfu']:5.1%}"] if "mfu" in row else []
        return [*parts, f"data wait {row['data_wait']:6.1%}", f"fill {row['pack_fill']:6.1%}"]

    def _fitted(self, parts: list[str]) -> str:
        """As many of them as there is room for on the bar's line."""
        room = self.console.width - self._bar_width - max(len("training"), len(self._stage)) - len("⠋   ")
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)

    def _end_packing(self) -> None:
        if self._progress is not None and self._packing is not None:
            self._progress.remove_task(self._packing)
            self._packing = None


def figure(value: float) -> str:
    """A loss in seven characters, whatever its size."""
    return f"{value:7.4f}" if abs(value) < 10 else f"{value:7.3f}" if abs(value) < 1000 else f"{value:7.1e}"


def clock(seconds: float) -> str:
    """75 -> 1:15, 5025 -> 1:23:45, 40000 -> 11h 06m, 200000 -> 2d 07h: at most seven characters below 1000 days"""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}h"
    if hours >= 10:
        return f"{hours}h {minute:02}m"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
