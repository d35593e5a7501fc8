"""torch's profiler for a range of steps: `train.profile: [first, last]`.

Each rank writes into `RUN/profile/` a trace for https://ui.perfetto.dev or chrome://tracing and a table of the
operators that took longest. A step outside the range costs one comparison.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import ConfigError

if TYPE_CHECKING:
    import torch.profiler

TOP = 40
"""Operators in the table."""


class Profiler:
    """Tell it of every step, counted from 1, before the step begins; it traces those in `steps`.

        with Profiler(config.train.profile, out / "profile", rank) as profiler:
            for step in ...:
                with timer.excluded():  # writing the files takes seconds
                    profiler.step(step)

    `steps`: first and last; None traces nothing. The call after the last one writes the files, and so does the end of
    the `with` for a run that ends inside the range. Raises `ConfigError` for a range that no run has.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int = 0) -> None:
        if steps and not 1 <= steps[0] <= steps[1]:
            raise ConfigError(f"train.profile: [{steps[0]}, {steps[1]}] is no range; give first and last step, from 1")
        first_last: tuple[float, float] = steps or (math.inf, -math.inf)
        self._first, self._last = first_last
        self._folder, self._rank = folder, rank
        self._profile: torch.profiler.profile | None = None
        self._mark: torch.profiler.record_function | None = None
        self._traced: list[int] = []

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self, step: int) -> None:
        """Step number `step` is about to begin."""
        if self._profile is None and not self._first - 1 <= step <= self._last:
            return
        # Kineto writes its own progress to stderr, and an error on every machine without a GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import profile, record_function

        if self._profile is None:
            # One step ahead of the range, so that the time this takes is not in the trace.
            self._profile = profile(record_shapes=True, profile_memory=True)
            self._profile.prepare_trace()
        self._end_mark()
        if self._first <= step <= self._last:
            if not self._traced:
                self._profile.start_trace()
            self._traced.append(step)
            self._mark = record_function(f"step {step}")
            self._mark.__enter__()
        elif self._traced:
            self._stop()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _stop(self) -> None:
        self._end_mark()
        if self._profile is not None and self._traced:
            self._profile.stop_trace()
            self._write(self._profile)
        self._profile = None
        self._traced = []

    def _write(self, profile: "torch.profiler.profile") -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._traced[0], self._traced[-1]
        name = f"steps-{first}-{last}.rank{self._rank}"
        profile.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        averages = profile.key_averages()
        on_gpu = any(one.self_device_time_total for one in averages)
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = averages.table(sort_by=by, row_limit=TOP, max_name_column_width=60)
        (self._folder / f"{name}.ops.txt").write_text(f"steps {first} to {last}, by {by}\n{table}")
