"""A run folder as one HTML page: what was learned, how training went, and what it was trained on.

The page says what the files say and nothing more: a file that is missing (the run stopped early, or goes on)
is named at the top, and its part of the page is left out.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mm.errors import DataError
from mm.page import (
    ACCENT,
    SECOND,
    SOFT,
    chart,
    duration,
    ledger_rows,
    percent,
    render,
    short,
    svg,
    thumbnail,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

Metrics = list[dict[str, Any]]

OPTIONAL = {
    "eval.json": "held-out results; written at the end of a run",
    "data.json": "what was packed",
    "run.json": "versions, model parts, device",
    "samples.json": "generated captions; written at the end of a run",
}


def report_page(run: Path) -> str:
    """The page of the run folder `run`. Raises `DataError` when it is none, or a file of it is damaged."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise DataError(f"{run}: not a run folder ({name} is missing); give one that `mm train` wrote")
    config_text = (run / "config.yaml").read_text()
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise DataError(f"{run / 'config.yaml'}: damaged ({str(error).splitlines()[0]})") from None
    metrics = _metrics(run / "metrics.jsonl")
    found = {name: _json(run / name) for name in OPTIONAL if (run / name).is_file()}
    results: dict[str, Any] = found.get("eval.json", {})
    splits: dict[str, Any] = found.get("data.json", {})
    about: dict[str, Any] = found.get("run.json", {})
    return render(
        "report.html.j2",
        title=f"{run.resolve().name} – run",
        name=run.resolve().name,
        facts=_facts(config, metrics, about),
        missing={name: why for name, why in OPTIONAL.items() if name not in found},
        planned=about.get("steps"),
        last=metrics[-1] if metrics else {},
        headlines=_headlines(results, metrics),
        bars=_bars(results),
        interval=_interval(results),
        results=results,
        curves=_curves(metrics, results.get("unigram_loss")),
        splits=splits,
        ledger=[{**row, "split": split} for split, one in splits.items() for row in ledger_rows(one)],
        samples=[_sample(run, one) for one in found.get("samples.json", [])],
        parts=_parts(about),
        about={key: value for key, value in about.items() if key not in ("versions", "parameters")},
        versions=about.get("versions", {}),
        config=config_text,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error})") from None


def _metrics(path: Path) -> Metrics:
    """The whole lines. The last one may be cut short, where a run was killed or is still writing."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: damaged, not JSON ({error})") from None
    return rows


def _facts(config: Any, metrics: Metrics, about: dict[str, Any]) -> list[str]:
    """The run in a few words, for under its name."""
    last = metrics[-1] if metrics else {}
    model = config.get("model") if isinstance(config, dict) else None
    facts = [model["kind"] if isinstance(model, dict) and "kind" in model else None]
    facts += [f"{last['step']:,} steps" if "step" in last else "no step logged yet"]
    facts += [f"{short(last['tokens'])} tokens" if "tokens" in last else None]
    seconds = about.get("seconds", last.get("elapsed"))
    facts += [duration(seconds) if seconds else None, about.get("device")]
    facts += [f"attention: {about['attention']}" if "attention" in about else None, about.get("date")]
    return [str(fact) for fact in facts if fact]


def _headlines(results: dict[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    """(number, what it is in plain words)"""
    found = []
    if "match_accuracy" in results:
        chance = results["match_chance"]
        words = f"picks the true caption of a test picture among {round(1 / chance)} (chance {percent(chance)})"
        found.append((percent(results["match_accuracy"]), words))
    if "caption_loss" in results:
        found.append((f"{results['caption_loss']:.3f}", "nats per caption token on held-out pictures"))
    if {"caption_loss", "shuffled_loss"} <= results.keys():
        gain = results["shuffled_loss"] - results["caption_loss"]
        words = "nats per token when pictures are swapped: what the model reads from them"
        found.append((f"{gain:+.3f}".replace("-", "−"), words))
    validation = _series(metrics, "validation_loss")
    if validation and "caption_loss" not in results:
        found.append((f"{validation[-1][1]:.3f}", f"validation loss at step {validation[-1][0]:,}"))
    last = metrics[-1] if metrics else {}
    if last.get("tokens"):
        learned = f", {short(last['loss_tokens'])} of them learned" if "loss_tokens" in last else ""
        found.append((short(last["tokens"]), f"tokens read{learned}"))
    speeds = sorted(value for _, value in _series(metrics, "tokens_per_second"))
    if speeds:
        found.append((short(speeds[len(speeds) // 2]), "tokens a second, median"))
    fills = [value for _, value in _series(metrics, "pack_fill")]
    if fills:
        found.append((percent(sum(fills) / len(fills)), "of row positions hold tokens, not padding"))
    return found


def _interval(results: dict[str, Any]) -> tuple[float, float] | None:
    """95 % interval of the matching accuracy (Wilson, JASA 1927), for as many pictures as were tested."""
    share, n = results.get("match_accuracy"), results.get("test_items")
    if share is None or not n:
        return None
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - reach, middle + reach


@dataclass(frozen=True, slots=True)
class _Bar:
    name: str
    note: str
    value: float
    share: float
    """Of the longest bar."""


def _bars(results: dict[str, Any]) -> list[_Bar]:
    """Caption loss beside its two baselines, for bars that start at zero."""
    names = {
        "caption_loss": ("This model", "given the right picture"),
        "shuffled_loss": ("Pictures swapped", "the same model, given another test picture"),
        "unigram_loss": ("Unigram", "token frequencies of the training captions, no context"),
    }
    values = {key: float(results[key]) for key in names if results.get(key) is not None}
    longest = max(values.values(), default=1.0)
    return [_Bar(*names[key], value, value / longest) for key, value in values.items()]


def _series(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    """(step, value) where the value was logged and finite."""
    return [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float)]


def _smooth(values: list[float], parts: int) -> list[float]:
    """A moving average over 1/`parts` of the values, centred so that a falling curve is not shifted."""
    reach = len(values) // (2 * parts)
    sums = [0.0, *accumulate(values)]
    found = []
    for index in range(len(values)):
        here = min(reach, index)
        first, stop = index - here, min(index + here + 1, len(values))
        found.append((sums[stop] - sums[first]) / (stop - first))
    return found


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    note: str
    chart: "Markup"


def _curves(metrics: Metrics, unigram: float | None) -> dict[str, Any]:
    """`loss`: the large chart (None without a logged loss); `others`: the small ones."""
    small: dict[str, tuple[str, Callable[[float], str], bool]] = {
        "lr": ("Learning rate", lambda x: f"{x:.3g}", False),
        "grad_norm": ("Gradient norm, before clipping", lambda x: f"{x:.3g}", True),
        "tokens_per_second": ("Tokens a second", short, True),
        "pack_fill": ("Pack fill", percent, True),
        "data_wait": ("Time spent waiting for data", lambda x: percent(x, 2), True),
    }
    others = []
    for key, (name, write, smooth) in small.items():
        series = _series(metrics, key)
        if series:
            values = sorted(value for _, value in series)
            note = f"median {write(values[len(values) // 2])}" if smooth else f"peak {write(values[-1])}"
            others.append(_Curve(name, note, _small_chart(name, series, write, smooth)))
    loss = _series(metrics, "loss")
    validation = _series(metrics, "validation_loss")
    return {"loss": _loss_chart(loss, validation, unigram) if loss else None, "others": others}


def _loss_chart(loss: list[tuple[int, float]], validation: list[tuple[int, float]], unigram: float | None) -> "Markup":
    figure, axes = chart(1110, 350)
    steps, values = [step for step, _ in loss], [value for _, value in loss]
    axes.plot(steps, values, color=ACCENT, alpha=0.28, linewidth=1)
    smooth = _smooth(values, 40)
    axes.plot(steps, smooth, color=ACCENT, linewidth=2)
    labels = [(smooth[-1], f"training {smooth[-1]:.2f}", ACCENT)]
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=SECOND, linewidth=1.4, markersize=4.5, mew=0)
        labels.append((validation[-1][1], f"validation {validation[-1][1]:.2f}", SECOND))
    if unigram is not None:
        axes.axhline(unigram, color=SOFT, linewidth=1.2, linestyle=(0, (5, 4)))
        labels.append((unigram, f"unigram {unigram:.2f}", SOFT))
    shown = [*values, *(value for value, _, _ in labels)]
    room = 0.05 * (max(shown) - min(shown) or 1.0)
    axes.set_ylim(min(shown) - room, max(shown) + room)
    for height, (_, text, colour) in zip(_apart([y for y, _, _ in labels], 1.25 * room), labels, strict=True):
        place = axes.get_yaxis_transform()
        axes.text(1.008, height, text, color=colour, fontsize=12.5, va="center", transform=place)
    axes.set_xlabel("step", color=SOFT, fontsize=11)
    axes.set_ylabel("nats per learned token", color=SOFT, fontsize=11)
    return svg(figure, f"Loss by step: {', '.join(text for _, text, _ in labels)}")


def _apart(heights: list[float], gap: float) -> list[float]:
    """The heights, moved up as little as it takes to keep `gap` between any two."""
    placed = [0.0] * len(heights)
    floor = -math.inf
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        placed[index] = max(heights[index], floor)
        floor = placed[index] + gap
    return placed


def _small_chart(name: str, series: list[tuple[int, float]], write: Callable[[float], str], smooth: bool) -> "Markup":
    from matplotlib.ticker import FuncFormatter

    figure, axes = chart(350, 165)
    steps, values = [step for step, _ in series], [value for _, value in series]
    if smooth:
        axes.plot(steps, values, color=ACCENT, alpha=0.3, linewidth=1)
        values = _smooth(values, 25)
    axes.plot(steps, values, color=ACCENT, linewidth=1.7)
    _show_range(axes, [value for _, value in series])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: write(y)))
    return svg(figure, f"{name} by step")


def _show_range(axes: "Axes", values: list[float]) -> None:
    """From zero where the curve stays readable, else close around it, but not so that noise looks large."""
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        axes.set_ylim(0, high * 1.06)
    else:
        room = max(0.1 * (high - low), 0.01 * abs(high), 1e-9)
        axes.set_ylim(low - room, high + room)


def _parts(about: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's parts with parameter counts, and their sum."""
    parts = [{"name": name, **counts} for name, counts in about.get("parameters", {}).items()]
    if not parts:
        return []
    total = {key: sum(part[key] for part in parts) for key in ("total", "trained")}
    rows = [*parts, {"name": "all", **total}]
    return [{**row, "share": row["total"] / max(1, total["total"])} for row in rows]


def _sample(run: Path, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with its picture as data; None where the picture is gone, or lies outside the run."""
    path = (run / str(sample.get("image", ""))).resolve()
    inside = path.is_relative_to(run.resolve()) and path.is_file()
    uri = thumbnail(path.read_bytes(), path.suffix[1:]) if inside else None
    words = {key: str(sample.get(key, "")) for key in ("id", "prompt", "true", "generated")}
    return {**words, "picture": uri}
