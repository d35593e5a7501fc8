"""Several runs on one HTML page: their curves over tokens, where they ended, and what was different about them.

Runs may differ in length, batch and logging interval. So curves are aligned by tokens (or, at a click, by steps or by
hours), all are smoothed over the same width of that axis, and the table says each loss at the same number of tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.curves import Line, Points, Rows, keys_under, line_chart, mean_before, series, smooth, three
from mm.errors import DataError
from mm.page import THIN, count, duration, percent, render, short
from mm.report import QUANTITIES, SMOOTHING, Quantity, RunFiles, read_run

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

APART = {"loss": "Loss: {}", "loss_from": "Loss on {}"}
"""What a chart is called of one of the keys under a prefix; by default by its `Quantity`."""
START = 0.1
"""The steep fall of the first steps may lie above the chart: so much of the axis does not count for its height."""


@dataclass(frozen=True, slots=True)
class _Axis:
    key: str
    name: str
    label: str
    write: Callable[[float], str]


AXES = (
    _Axis("tokens", "tokens", "tokens read", short),
    _Axis("step", "steps", "optimizer steps", count),
    _Axis("hours", "hours", "hours of training", three),
)


@dataclass(frozen=True, slots=True)
class _Run:
    tag: str
    """A letter, on the charts."""
    name: str
    files: RunFiles
    rows: Rows
    style: int


def compare_page(paths: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """The page, and the runs that are left out of it: name -> why (damaged, or without a logged loss).

    Raises `DataError` when that leaves none.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    runs: list[_Run] = []
    skipped: dict[str, str] = {}
    for path, name in zip(paths, distinct_names(paths), strict=True):
        try:
            files = read_run(path)
            rows = [{**row, "hours": row["elapsed"] / 3600} if "elapsed" in row else row for row in files.rows]
            if not series(rows, "loss", "tokens"):
                raise DataError(f"{path}: no step with a loss was logged yet")
        except (DataError, OSError) as error:
            skipped[name] = str(error)
            continue
        runs.append(_Run(_tag(len(runs)), name, files, rows, len(runs)))
    if not runs:
        raise DataError(f"no run to compare: {'; '.join(skipped.values())}")
    differences = config_differences([_described(run.files) for run in runs])
    page = render(
        "compare.html.j2",
        title=f"{len(runs)} runs – {', '.join(run.name for run in runs)}",
        runs=runs,
        lines=[Line(run.name, [], run.style) for run in runs],
        tags=[run.tag for run in runs],
        skipped=skipped,
        axes=[{"axis": axis, **_charts(runs, axis)} for axis in AXES],
        results=_results(runs),
        differences=differences,
    )
    return page, skipped


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from one another: `run`, or `a/run` beside `b/run`."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def config_differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys that are not the same in all of them, with each one's value as it is written; – where it has none."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [one.get(key, "–") for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [pair for key, one in inner for pair in _flat(one, f"{path}.{key}".lstrip("."))]
    if found:
        return found
    return [(path, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))]


def _described(files: RunFiles) -> dict[str, Any]:
    """What a run was made from: its config, without the folder that it went to, and the versions."""
    config = {key: value for key, value in files.config.items() if key != "out"}
    return config | {"versions": files.found.get("run.json", {}).get("versions", {})}


def _tag(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


@dataclass(frozen=True, slots=True)
class _Chart:
    name: str
    note: str
    chart: "Markup"


def _charts(runs: list[_Run], axis: _Axis) -> dict[str, Any]:
    """`loss` and `validation`: large charts (None where nothing was logged); `others`; `width`: of the smoothing."""
    end = max((series(run.rows, "loss", axis.key) or [(0.0, 0.0)])[-1][0] for run in runs)
    width = SMOOTHING * end
    objectives = _objectives(runs)
    split = [
        Quantity(key, APART.get(one.prefix, f"{one.name}: {{}}").format(key.partition("/")[2]), one.write, one.told)
        for one in QUANTITIES
        if one.prefix and not one.key
        for key in _logged(runs, one.prefix)
    ]
    split += [Quantity(f"validation/{one}", f"Validation loss: {one}", three, "end") for one in objectives]
    whole = [quantity for quantity in QUANTITIES if quantity.key]
    others = []
    for quantity in [*split, *whole]:
        lines = _lines(runs, quantity.key, axis.key)
        if lines:
            raw = quantity.told == "peak"
            chart = _tagged(quantity, lines, axis, runs, 0.0 if raw else width)
            others.append(_Chart(quantity.name, "as logged" if raw else "", chart))
    loss = _lines(runs, "loss", axis.key)
    validation = _lines(runs, "validation_loss", axis.key)
    return {
        "loss": _large("Training loss", loss, axis, runs, width) if loss else None,
        "validation": _large("Validation loss", validation, axis, runs, 0.0) if validation else None,
        "others": others,
        "width": axis.write(width).replace(THIN, " "),
    }


def _logged(runs: list[_Run], prefix: str) -> list[str]:
    """The keys `prefix/…` that some run has."""
    return list(dict.fromkeys(key for run in runs for key in keys_under(run.rows, prefix)))


def _objectives(runs: list[_Run]) -> list[str]:
    return [key.partition("/")[2] for key in _logged(runs, "loss")]


def _lines(runs: list[_Run], key: str, x: str) -> list[Line]:
    return [Line(run.name, points, run.style) for run in runs if (points := series(run.rows, key, x))]


def _large(name: str, lines: list[Line], axis: _Axis, runs: list[_Run], width: float) -> "Markup":
    return _tagged(Quantity("", name, three, "end"), lines, axis, runs, width, (1110, 380))


def _tagged(
    quantity: Quantity,
    lines: list[Line],
    axis: _Axis,
    runs: list[_Run],
    width: float,
    size: tuple[int, int] = (350, 165),
) -> "Markup":
    """A chart of smoothed lines, with each run's letter where its line ends."""
    drawn = [Line(line.name, smooth(line.points, width) if width else line.points, line.style) for line in lines]
    tags = {run.style: run.tag for run in runs}
    last = max(line.points[-1][0] for line in drawn)
    late = [y for line in drawn for x, y in line.points if x >= START * last] or [
        y for line in drawn for _, y in line.points
    ]
    low, high = min(late), max(late)
    # Losses are compared by small differences; of the rest, how large they are matters more.
    room = max(0.06 * (high - low), (0.001 if quantity.told == "end" else 0.03) * abs(high), 1e-9)
    bottom = 0.0 if quantity.told != "end" and 0 <= low < 0.6 * high else low - room
    limits = (bottom, high + room)
    height = high + room - bottom

    def draw(axes: "Axes") -> None:
        font = 12.5 if size[0] > 500 else 10.5
        gap = height * 1.25 * font / (0.8 * size[1])
        placed: list[tuple[float, float]] = []
        for line in sorted(drawn, key=lambda line: line.points[-1]):
            x, y = line.points[-1]
            y = min(max(y, limits[0]), limits[1])
            while clash := [other for near, other in placed if abs(near - x) < 0.02 * last and abs(other - y) < gap]:
                y = max(clash) + gap * 1.001
            placed.append((x, y))
            axes.annotate(
                tags[line.style], (x, y), xytext=(5, 0), textcoords="offset points", color=line.colour, fontsize=font,
                fontweight="bold", va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(right=last * (1.025 if size[0] > 500 else 1.06))

    return line_chart(
        f"{quantity.name} by {axis.name}", drawn, quantity.write, size, axis.write, axis.label if size[0] > 500 else "",
        draw=draw, limits=limits,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Result:
    name: str
    note: str
    values: list[str]
    best: set[int]
    """Numbers of the runs that have the best value; empty where none is better."""


def _results(runs: list[_Run]) -> list[_Result]:
    """The table of final numbers: a row a quantity, a column a run."""
    losses = [series(run.rows, "loss", "tokens") for run in runs]
    shortest = min(points[-1][0] for points in losses)
    window = SMOOTHING * max(points[-1][0] for points in losses)
    over = f"mean over {short(window)} tokens"
    evals = [run.files.found.get("eval.json", {}) for run in runs]
    about = [run.files.found.get("run.json", {}) for run in runs]
    last = [run.files.last for run in runs]
    chosen_from = {one["match_candidates"] for one in evals if "match_candidates" in one}

    def of(key: str, pick: Callable[[Points], float]) -> list[float | None]:
        found = [series(run.rows, key) for run in runs]
        return [pick(points) if points else None for points in found]

    def middle(points: Points) -> float:
        values = sorted(y for _, y in points)
        return values[len(values) // 2]

    def last_value(points: Points) -> float:
        return points[-1][1]

    def lowest(points: Points) -> float:
        return min(y for _, y in points)

    def parameters(which: str) -> list[float | None]:
        parts = [one.get("parameters", {}).values() for one in about]
        return [sum(part[which] for part in some) if some else None for some in parts]

    def loss(value: float) -> str:
        return f"{value:.4f}"

    rows = [
        _result("Steps", "", [row.get("step") for row in last], count),
        _result("Tokens", "", [row.get("tokens") for row in last], count),
        _result("Learned tokens", "the loss is on these", [row.get("loss_tokens") for row in last], count),
        _result("Training time", "without evaluation and saving", [row.get("elapsed") for row in last], duration),
        _result("Training loss", f"at its end, {over}", [mean_before(p, p[-1][0], window) for p in losses], loss, min),
        _result(
            "Training loss", f"at {short(shortest)} tokens, where the shortest run ends, {over}",
            [mean_before(p, shortest, window) for p in losses], loss, min,
        ),
        _result("Validation loss", "last", of("validation_loss", last_value), loss, min),
        _result("Validation loss", "lowest", of("validation_loss", lowest), loss, min),
        *(
            _result(f"Validation loss: {one}", "last", of(f"validation/{one}", last_value), loss, min)
            for one in _objectives(runs)
        ),
        *(
            _result(name, "test split", [one.get(key) for one in evals], write, better)
            for key, name, write, better in (
                ("caption_loss", "Caption loss", loss, min),
                ("shuffled_loss", "Caption loss, pictures swapped", loss, None),
                ("match_accuracy", "Matching accuracy", percent, max if len(chosen_from) < 2 else None),
                ("match_candidates", "of so many candidates", count, None),
            )
        ),
        _result("Tokens a second", "median", of("tokens_per_second", middle), short, max),
        _result("Learned tokens a second", "median", of("loss_tokens_per_second", middle), short, max),
        _result("MFU", "median", of("mfu", middle), percent, max),
        _result("Pack fill", "median", of("pack_fill", middle), percent, max),
        _result("Waiting for data", "median", of("data_wait", middle), lambda x: percent(x, 2), min),
        _result("Peak memory, GB", "", of("memory_gb", lambda points: max(y for _, y in points)), three, min),
        _result("Steps left out", "by the guard", [len(run.files.guard) or None for run in runs], count),
        _result("Parameters", "", parameters("total"), count),
        _result("of them trained", "", parameters("trained"), count),
    ]  # fmt: skip
    devices = [f"{one.get('ranks', 1)} × {one['device']}" if "device" in one else "–" for one in about]
    return [*(row for row in rows if any(value != "–" for value in row.values)), _Result("Device", "", devices, set())]


def _result(
    name: str,
    note: str,
    values: Sequence[float | None],
    write: Callable[[float], str],
    better: Callable[[list[float]], float] | None = None,
) -> _Result:
    written = ["–" if value is None else write(value) for value in values]
    present = [value for value in values if value is not None and math.isfinite(value)]
    if better is None or len(set(map(write, present))) < 2:
        return _Result(name, note, written, set())
    # What is written alike is alike.
    best = write(better(present))
    return _Result(name, note, written, {n for n, text in enumerate(written) if text == best})
