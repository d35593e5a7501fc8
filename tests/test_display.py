"""The display stays readable and cheap however many steps there are."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from mm.display import Display, clock, figure


def row(step: int, **more: float) -> dict[str, Any]:
    speed = 900.0 * (1 + step / 100) ** 2  # from hundreds to hundreds of millions
    return {"step": step, "loss": 400 / step, "tokens_per_second": speed, "data_wait": 0.01, "pack_fill": 1.0, **more}


class Watched:
    """A display whose clock stands in the test's hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, width: int | None = None) -> None:
        self.now = 1000.0
        monkeypatch.setattr("mm.display.time.monotonic", lambda: self.now)
        self.out = io.StringIO()
        # rich leaves escape codes out when it writes to a file, and draws bars when told that it is a terminal.
        self.display = Display(Console(file=self.out, force_terminal=width is not None, width=width or 80))

    @property
    def lines(self) -> list[str]:
        return [line for line in self.out.getvalue().splitlines() if line]


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, 100_000), (0.5, 20_000), (1000.0, 1000)])
def test_a_log_of_a_long_run_is_short_and_its_columns_stand_still(
    monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    watched = Watched(monkeypatch)
    with watched.display as display:
        for step in range(1, steps + 1):
            watched.now += seconds
            display.step(row(step), steps)
    lines = watched.lines
    # At most a line a step, and from one in 10 seconds to one a minute.
    assert min(steps, steps * seconds / 70) <= len(lines) <= min(steps, steps * seconds / 10 + 2)
    total = f"{steps:,}"
    assert lines[0].startswith(f"step {1:>{len(total)}}/{total}") and lines[-1].startswith(f"step {total}/{total}")
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(m.start() for m in re.finditer(r"left|loss|tok/s|data wait|fill", line)) for line in lines}) == 1


def test_one_step_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with watched.display as display:
        display.step(row(1, validation_loss=3.5), 1)
    assert len(watched.lines) == 1 and "1/1" in watched.lines[0] and "held-out  3.5000" in watched.lines[0]


def test_what_must_not_be_missed_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with watched.display as display:
        for step in range(1, 101):  # all within one second
            watched.now += 0.01
            if step == 40:
                display.stage("align")
            if step == 60:
                display.event("step 60: skipped [loss 34.2]")
            display.step(row(step, **({"validation_loss": 2.0} if step == 50 else {})), 100)
    text = "\n".join(watched.lines)
    found = [re.search(rf"step +{step}/100", text) is not None for step in (1, 40, 50, 100, 2, 99)]
    assert found == [True, True, True, True, False, False]
    assert "stage: align" in text and "step 60: skipped [loss 34.2]" in text


def test_time_remaining_goes_by_the_speed_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with watched.display as display:
        for step in range(101, 1001):  # resumed after step 100; slow at first, then 2 s a step
            watched.now += 60 if step < 300 else 2
            display.step(row(step), 10_000)
    step = int(re.findall(r"(\d+)/", watched.lines[-1])[0])
    assert step > 900 and f" {clock(2 * (10_000 - step))} left" in watched.lines[-1]
    assert "? left" in watched.lines[0]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_bar_fits_the_terminal_and_is_not_drawn_every_step(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    watched = Watched(monkeypatch, width)
    updates = []
    with watched.display as display:
        assert display._progress is not None
        update = display._progress.update
        monkeypatch.setattr(display._progress, "update", lambda *a, **k: (updates.append(k), update(*a, **k)))
        for step in range(1, 3001):
            watched.now += 0.01
            display.step(row(step, mfu=0.41), 3000)
    assert len(updates) <= 3000 * 0.01 / 0.25 + 2
    assert len({len(one["numbers"]) for one in updates}) == 1
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watched.out.getvalue()).replace("\r", "\n").split("\n")
    drawn = [line for line in last if "training" in line]
    assert drawn and all(len(line.rstrip()) <= width and "…" not in line for line in drawn)
    assert "3,000/3,000" in drawn[-1] and ("fill" in drawn[-1]) == (width == 200)


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0:00"), (75, "1:15"), (5025, "1:23:45"), (40_000, "11h 06m"), (200_000, "2d 07h")]
)
def test_clock(seconds: float, written: str) -> None:
    assert clock(seconds) == written


@pytest.mark.parametrize("value", [0.0, 1e-9, 9.9999, 10.0, 999.94, 1234.5, 1e30, -3.2, float("nan"), float("inf")])
def test_a_loss_takes_seven_characters(value: float) -> None:
    assert len(figure(value)) == 7
