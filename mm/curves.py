"""Curves of logged numbers: out of rows of metrics.jsonl, smoothed, thinned and drawn as SVG.

Rows may be a hundred thousand and logged at any interval. So smoothing is over a width of the x axis, not over a number
of rows, and what is drawn are the extremes of each pixel column, not every row.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mm.page import SERIES, SOFT, chart, count, svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]
Dashes = tuple[float, ...]

DASHES: tuple[Dashes, ...] = ((), (6, 2.5), (1.5, 1.8), (8, 2.5, 1.5, 2.5), (3, 1.5))


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with a colour and a dash of its own: number `style` of 40 that differ."""

    name: str
    points: Points
    style: int

    @property
    def colour(self) -> str:
        return SERIES[self.style % len(SERIES)]

    @property
    def variable(self) -> str:
        """The colour as a name of the page's style sheet."""
        return f"--series-{self.style % len(SERIES)}"

    @property
    def dashes(self) -> Dashes:
        return DASHES[self.style % len(DASHES)]


def series(rows: Rows, key: str, x: str = "step") -> Points:
    """(x, value) of the rows that hold both as finite numbers."""
    return [(float(row[x]), float(row[key])) for row in rows if _is_number(row.get(key)) and _is_number(row.get(x))]


def keys_under(rows: Rows, prefix: str) -> list[str]:
    """The keys `prefix/…` that some row has, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(key for key in row if key.startswith(f"{prefix}/")))
    return list(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def smooth(points: Points, width: float) -> Points:
    """At each x the value there of the straight line that fits the points within `width` / 2 best (least squares).

    In the middle of evenly logged points that is their mean; at the ends, where neighbours are missing on one side, it
    neither lags behind a falling curve nor falls back on single noisy values.
    """
    if not points or points[-1][0] == points[0][0]:
        return points
    start, span = points[0][0], points[-1][0] - points[0][0]
    xs = [(x - start) / span for x, _ in points]  # in [0, 1], so that differences of sums stay exact enough
    sums = [
        [0.0, *accumulate(terms)]
        for terms in (
            xs, (y for _, y in points), (x * x for x in xs), (x * y for x, (_, y) in zip(xs, points, strict=True))
        )
    ]  # fmt: skip
    reach = width / span / 2
    found = []
    for x, (place, _) in zip(xs, points, strict=True):
        first, stop = bisect_left(xs, x - reach), bisect_right(xs, x + reach)
        n = stop - first
        mean_x, mean_y, mean_xx, mean_xy = ((one[stop] - one[first]) / n for one in sums)
        variance = mean_xx - mean_x * mean_x
        slope = (mean_xy - mean_x * mean_y) / variance if variance > 1e-12 else 0.0
        found.append((place, mean_y + slope * (x - mean_x)))
    return found


def thin(points: Points, columns: int) -> Points:
    """Few enough points to draw: the lowest and the highest of each of so many columns, and both ends."""
    if len(points) <= 3 * columns:
        return points
    low, high = points[0][0], points[-1][0]
    kept = {0, len(points) - 1}
    column: list[int] = []
    place = -1
    for index, (x, _) in enumerate([*points, (math.inf, 0.0)]):
        here = int((x - low) / (high - low) * columns) if math.isfinite(x) else columns + 1
        if here != place and column:
            kept |= {min(column, key=lambda i: points[i][1]), max(column, key=lambda i: points[i][1])}
            column = []
        place = here
        column.append(index)
    return [points[index] for index in sorted(kept)]


def mean_before(points: Points, x: float, width: float) -> float:
    """The mean of the values in (`x` - `width`, `x`], or of the first one when all come later."""
    values = [value for place, value in points if x - width < place <= x] or [points[0][1]]
    return sum(values) / len(values)


def three(value: float) -> str:
    """Three figures: 0.0123, 1.2e-4"""
    written = f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
    if "e" not in written:
        return written
    digits, _, exponent = written.partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    write: Callable[[float], str],
    size: tuple[int, int] = (350, 165),
    x_write: Callable[[float], str] = count,
    x_label: str = "",
    width: float = 0.0,
    draw: Callable[["Axes"], None] | None = None,
    limits: tuple[float, float] | None = None,
) -> "Markup":
    """The lines in one chart. `width`: smooth over so much of x; a line that is alone shows its values faintly, too.

    `draw` adds to the axes before they are scaled; `limits` of y are else chosen here.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = chart(*size)
    shown: list[float] = []
    for line in lines:
        if width and len(lines) == 1:
            axes.plot(*_columns(thin(line.points, size[0])), color=line.colour, alpha=0.3, linewidth=1)
            shown += [y for _, y in line.points]
        drawn = smooth(line.points, width) if width else line.points
        shown += [y for _, y in drawn]
        few = len(drawn) < 3
        axes.plot(
            *_columns(thin(drawn, size[0])), color=line.colour, linewidth=1.8, marker="o" if few else "", markersize=4,
            dashes=line.dashes or (None, None),
        )  # fmt: skip
    if draw is not None:
        draw(axes)
    middles = [abs(sorted(y for _, y in line.points)[len(line.points) // 2]) for line in lines if line.points]
    if limits is not None:
        axes.set_ylim(*limits)
    elif len(middles) > 1 and min(shown) > 0 and max(middles) > 12 * min(middles):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.set_ylim(*_range(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: x_write(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: write(y)))
    axes.set_xlabel(x_label, color=SOFT, fontsize=11)
    return svg(figure, title)


def end_labels(axes: "Axes", labels: Sequence[tuple[float, str, str]], gap: float) -> None:
    """(y, text, colour) of each line's end, to the right of the axes; none closer than `gap` to another."""
    placed = apart([y for y, _, _ in labels], gap)
    for height, (_, text, colour) in zip(placed, labels, strict=True):
        axes.text(1.008, height, text, color=colour, fontsize=12.5, va="center", transform=axes.get_yaxis_transform())


def apart(heights: list[float], gap: float) -> list[float]:
    """The heights, moved up as little as it takes to keep `gap` between any two."""
    placed = [0.0] * len(heights)
    floor = -math.inf
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        placed[index] = max(heights[index], floor)
        floor = placed[index] + gap
    return placed


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _range(values: list[float]) -> tuple[float, float]:
    """From zero where the curve stays readable, else close around it, but not so that noise looks large."""
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        return 0, high * 1.06
    room = max(0.1 * (high - low), 0.01 * abs(high), 1e-9)
    return low - room, high + room
