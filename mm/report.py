"""A run folder as one HTML page: what was learned, how training went, and what it was trained on.

The page says what the files say and nothing more: a file that is missing (the run stopped early, or goes on)
is named at the top, and its part of the page is left out.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from mm.curves import Line, Points, Rows, end_labels, keys_under, line_chart, mean_before, series, smooth, thin, three
from mm.errors import DataError
from mm.page import (
    ACCENT,
    BAD,
    LINE,
    SECOND,
    SOFT,
    duration,
    ledger_rows,
    percent,
    render,
    seconds_of_frames,
    short,
    thumbnail,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

OPTIONAL = {
    "eval.json": "held-out results; written at the end of a run",
    "data.json": "what was packed",
    "run.json": "versions, model parts, device",
    "samples.json": "generated captions; written at the end of a run",
}
SMOOTHING = 1 / 40
"""Width that curves are smoothed over, as a share of the x axis."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds, read; absent files are empty."""

    path: Path
    config_text: str
    config: Any
    rows: Rows
    guard: Rows
    found: dict[str, Any]
    """The files of `OPTIONAL` that are there, by name."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last(self) -> dict[str, Any]:
        return self.rows[-1] if self.rows else {}


def read_run(path: Path) -> RunFiles:
    """Raises `DataError` when `path` is no run folder, or a file of it is damaged."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise DataError(f"{path}: not a run folder ({name} is missing); give one that `mm train` wrote")
    config_text = (path / "config.yaml").read_text()
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise DataError(f"{path / 'config.yaml'}: damaged ({str(error).splitlines()[0]})") from None
    guard = path / "guard.jsonl"
    rows = _rows(path / "metrics.jsonl")
    found = {name: _json(path / name) for name in OPTIONAL if (path / name).is_file()}
    if rows and found.get("eval.json", {}).get("step", math.inf) < rows[-1]["step"]:
        del found["eval.json"]  # of before the run went on; samples are of the same evaluation
        found.pop("samples.json", None)
    return RunFiles(
        path,
        config_text,
        config if isinstance(config, dict) else {},
        rows,
        _rows(guard) if guard.is_file() else [],
        found,
    )


def report_page(path: Path) -> str:
    """The page of the run folder. Raises `DataError` when it is none, or a file of it is damaged."""
    run = read_run(path)
    results: dict[str, Any] = run.found.get("eval.json", {})
    about: dict[str, Any] = run.found.get("run.json", {})
    splits = _splits(run.found.get("data.json", {}))
    rows = _with_sound(run.rows, splits)
    means = _means(results)
    expected = {name: why for name, why in OPTIONAL.items() if not (means and name == "samples.json")}
    stages = _stages(run)
    return render(
        "report.html.j2",
        title=f"{run.name} – run",
        name=run.name,
        facts=_facts(run.config, run.rows, about),
        missing={name: why for name, why in expected.items() if name not in run.found},
        planned=about.get("steps"),
        last=run.last,
        headlines=_headlines(results, rows),
        bars=_bars(results),
        means=means,
        interval=_interval(results),
        results=results,
        loss=_loss_chart(run, stages, results.get("unigram_loss")),
        objectives=[key.partition("/")[2] for key in keys_under(rows, "loss")],
        curves=_curves(rows),
        stages=stages,
        guard=[_event(row) for row in run.guard[-MOST_EVENTS:]],
        skipped=sum(bool(row.get("action")) for row in run.guard),
        checkpoints=_checkpoints(path / "checkpoints"),
        masks=_masks(run.config, splits),
        splits=splits,
        ledger=[{**row, "split": split} for split, one in splits.items() for row in ledger_rows(one)],
        samples=[_sample(path, one) for one in run.found.get("samples.json", [])],
        parts=_parts(about),
        about={key: value for key, value in about.items() if key not in ("versions", "parameters")},
        versions=about.get("versions", {}),
        config=run.config_text,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error})") from None


def _rows(path: Path) -> Rows:
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


def _splits(data: dict[str, Any]) -> dict[str, Any]:
    """What was packed, by split; of a run in stages, by stage and split."""
    if all("packs" in one for one in data.values()):
        return data
    return {f"{stage}, {split}": one for stage, splits in data.items() for split, one in splits.items()}


def _of_sound(splits: dict[str, Any]) -> dict[str, Any]:
    """The first split that holds any."""
    return next((one for one in splits.values() if seconds_of_frames(one, 1)), {})


def _with_sound(rows: Rows, splits: dict[str, Any]) -> Rows:
    """The rows with the seconds of sound that training has heard, `sound`, and how many a second since the row before,
    `sound_per_second`; as they are where it has heard none."""
    about = _of_sound(splits)
    found, before, elapsed = [], 0.0, 0.0
    for row in rows:
        sound, now = seconds_of_frames(about, row.get("tokens/audio", 0)), row.get("elapsed", elapsed)
        if sound > before and now > elapsed:
            row = {**row, "sound": sound, "sound_per_second": (sound - before) / (now - elapsed)}
            before, elapsed = sound, now
        found.append(row)
    return found


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    first: int
    last: int
    """Of its logged steps."""
    tokens: float
    loss: float | None
    """Mean of its last part."""


def _stages(run: RunFiles) -> list[_Stage]:
    """The stages that have begun; none of a run without."""
    names = [stage.get("name") for stage in run.config.get("stages") or []]
    found = []
    before = 0.0
    for number in sorted({int(row["stage"]) for row in run.rows if "stage" in row}):
        rows = [row for row in run.rows if row.get("stage") == number]
        loss = series(rows, "loss")
        tokens = series(rows, "tokens")[-1:] or [(0.0, before)]
        found.append(
            _Stage(
                str(names[number]) if number < len(names) else f"stage {number}",
                rows[0]["step"],
                rows[-1]["step"],
                tokens[0][1] - before,
                _told(loss, "end") if loss else None,
            )
        )
        before = tokens[0][1]
    return found


MOST_EVENTS = 50
MOST_IDS = 6


def _event(row: dict[str, Any]) -> dict[str, Any]:
    """A line of guard.jsonl, for the table. `ids` are lists by row of the batch, or one list."""
    ids = [id for part in row.get("ids", []) for id in (part if isinstance(part, list) else [part])]
    more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
    return {
        "step": row["step"],
        "action": row.get("action", ""),
        "reason": row.get("reason", ""),
        "ids": ", ".join(map(str, ids[:MOST_IDS])) + more,
    }


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """The whole ones, newest first."""
    best = (folder / "best").read_text().strip() if (folder / "best").is_file() else ""
    whole = sorted((path for path in folder.glob("step-*") if (path / "state.json").is_file()), reverse=True)
    return [
        {
            "name": path.name,
            "step": int(path.name.removeprefix("step-")),
            "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "note": ", ".join(word for word, holds in (("newest", not n), ("best", path.name == best)) if holds),
        }
        for n, path in enumerate(whole)
        if path.name.removeprefix("step-").isdigit()
    ]


def _facts(config: dict[str, Any], rows: Rows, about: dict[str, Any]) -> list[str]:
    """The run in a few words, for under its name."""
    last = rows[-1] if rows else {}
    model = config.get("model")
    facts = [model["kind"] if isinstance(model, dict) and "kind" in model else None]
    facts += [f"{last['step']:,} steps" if "step" in last else "no step logged yet"]
    facts += [f"{short(last['tokens'])} tokens" if "tokens" in last else None]
    seconds = about.get("seconds", last.get("elapsed"))
    facts += [duration(seconds) if seconds else None, about.get("device")]
    facts += [f"attention: {about['attention']}" if "attention" in about else None, about.get("date")]
    return [str(fact) for fact in facts if fact]


def _headlines(results: dict[str, Any], rows: Rows) -> list[tuple[str, str]]:
    """(number, what it is in plain words)"""
    found = []
    if "match_accuracy" in results:
        chance = results["match_chance"]
        words = f"picks the true caption of a test picture among {round(1 / chance)} (chance {percent(chance)})"
        found.append((percent(results["match_accuracy"]), words))
    if "perplexity" in results:
        found.append((f"{results['perplexity']:.1f}", "perplexity on held-out text"))
    if "bits_per_byte" in results:
        found.append((f"{results['bits_per_byte']:.3f}", "bits per byte of held-out text"))
    if "caption_loss" in results:
        found.append((f"{results['caption_loss']:.3f}", "nats per caption token on held-out pictures"))
    if {"caption_loss", "shuffled_loss"} <= results.keys():
        gain = results["shuffled_loss"] - results["caption_loss"]
        words = "nats per token when pictures are swapped: what the model reads from them"
        found.append((f"{gain:+.3f}".replace("-", "−"), words))
    validation = series(rows, "validation_loss")
    if validation and "caption_loss" not in results:
        found.append((f"{validation[-1][1]:.3f}", f"validation loss at step {validation[-1][0]:,.0f}"))
    for kind in ("text", "image"):
        if held_out := series(rows, f"validation/{kind}"):
            found.append((f"{held_out[-1][1]:.3f}", f"nats per {kind} token in the last validation"))
    last = rows[-1] if rows else {}
    if last.get("tokens"):
        learned = f", {short(last['loss_tokens'])} of them learned" if "loss_tokens" in last else ""
        found.append((short(last["tokens"]), f"tokens read{learned}"))
    heard = series(rows, "sound", "elapsed")
    if heard:
        found.append((duration(heard[-1][1]), "of sound heard, repetitions included"))
        found.append((three(heard[-1][1] / heard[-1][0]), "seconds of sound heard a second"))
    speeds = sorted(value for _, value in series(rows, "tokens_per_second"))
    if speeds:
        found.append((short(speeds[len(speeds) // 2]), "tokens a second, median"))
    uses = sorted(value for _, value in series(rows, "mfu"))
    if uses:
        found.append((percent(uses[len(uses) // 2]), "of the accelerators' peak used (MFU), median"))
    fills = [value for _, value in series(rows, "pack_fill")]
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
    if _means(results):
        return []
    names = {
        "caption_loss": ("This model", "given the right picture"),
        "test_loss": ("This model", "on held-out text"),
        "shuffled_loss": ("Pictures swapped", "the same model, given another test picture"),
        "unigram_loss": ("Unigram", "token frequencies of the training set, no context"),
    }
    values = {key: float(results[key]) for key in names if results.get(key) is not None}
    longest = max(values.values(), default=1.0)
    return [_Bar(*names[key], value, value / longest) for key, value in values.items()]


def _means(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, mean over the test split) of a system that writes no text: its objectives and metrics."""
    if "perplexity" in results or "caption_loss" in results:
        return []
    names = {"test_loss": "all objectives, weighted"}
    return [
        (names.get(key, key.removeprefix("test_")), three(float(value)))
        for key, value in results.items()
        if key.startswith("test_") and isinstance(value, int | float)
    ]


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    note: str
    chart: "Markup"
    lines: list[Line]
    """For a legend; empty where there is one line only."""
    ends: list[str]
    """What is written behind each line's name."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that is logged: a chart of a report."""

    key: str
    name: str
    write: Callable[[float], str]
    told: Literal["end", "median", "peak"] = "median"
    """The number that stands for a curve. One that is told by its peak is not smoothed."""
    others: tuple[str, ...] = ()
    """More keys of the same chart."""
    prefix: str = ""
    """Keys `prefix/…`, and `validation/prefix/…`, belong to the same chart."""
    names: tuple[str, ...] = ()
    """What the keys are called in a legend; by default see `NAMES`."""


QUANTITIES = (
    Quantity("", "Loss by objective", three, "end", prefix="loss"),
    Quantity("", "Loss by source", three, "end", prefix="loss_from"),
    Quantity("", "Validation loss by source", three, "end", prefix="validation_loss"),
    Quantity("lr", "Learning rate", three, "peak", prefix="lr"),
    Quantity("grad_norm", "Gradient norm, before clipping", three, prefix="grad_norm"),
    Quantity(
        "output_norm", "Norm of the last layer's output", three, others=("validation/output_norm",),
        names=("training", "validation"),
    ),
    Quantity("", "Tokens without an expert", percent, prefix="unrouted"),
    Quantity("", "Tokens with one expert", percent, prefix="once"),
    Quantity("", "Tokens with several experts", percent, prefix="more"),
    Quantity("", "Tokens of the busiest expert, of the mean one's", percent, prefix="busiest"),
    Quantity("sound_per_second", "Seconds of sound a second", three),
    Quantity("tokens_per_second", "Tokens a second", short, others=("loss_tokens_per_second",)),
    Quantity("mfu", "Share of the accelerators' peak (MFU)", percent),
    Quantity("memory_gb", "Peak memory, GB", three, "peak", others=("host_memory_gb",)),
    Quantity("pack_fill", "Pack fill", percent),
    Quantity("data_wait", "Time spent waiting for data", lambda x: percent(x, 2)),
)  # fmt: skip
NAMES = {
    "grad_norm": "all", "lr": "base", "tokens_per_second": "all", "loss_tokens_per_second": "learned",
    "memory_gb": "accelerator", "host_memory_gb": "host",
}  # fmt: skip
"""What a key is called in a legend; others by what stands behind the slash."""
COUNTERS = (
    "step", "stage", "loss", "validation_loss", "epoch", "tokens", "loss_tokens", "step_tokens", "skipped", "elapsed",
    "steps_per_second", "sound",
)  # fmt: skip
COUNTED_BY = ("tokens", "tokens_from", "validation")
"""Logged with every step, or under these prefixes; every other key that is no `Quantity` is a metric of the system."""


def lines_of(rows: Rows, quantity: Quantity, x: str = "step") -> list[Line]:
    """The curves of its chart: those that were logged."""
    held_out = f"validation/{quantity.prefix}"
    training, validation = (keys_under(rows, one) if quantity.prefix else [] for one in (quantity.prefix, held_out))
    keys = [quantity.key, *quantity.others, *training, *validation]
    logged: list[tuple[str, Points]] = []
    for key in keys:
        points = series(rows, key, x)
        if points and all(points != other for _, other in logged):  # `lr` is that of one of the groups
            logged.append((key, points))
    names = {key: f"{key.removeprefix(held_out)[1:]}, validation" for key in validation}
    names |= NAMES | dict(zip(keys, quantity.names, strict=False))
    return [Line(names.get(key, key.partition("/")[2]), points, n) for n, (key, points) in enumerate(logged)]


def _of_system(rows: Rows) -> list[Quantity]:
    """What the system itself logs: its metrics, in training and in validation, and its objectives in validation."""
    known = {*COUNTERS, *(key for one in QUANTITIES for key in (one.key, *one.others))}
    prefixes = {*COUNTED_BY, *(one.prefix for one in QUANTITIES)} - {""}
    keys = dict.fromkeys(key for row in rows for key in row)
    metrics = [key for key in keys if key not in known and ("/" not in key or key.partition("/")[0] not in prefixes)]
    objectives = [key.partition("/")[2] for key in keys_under(rows, "loss")]
    found = [
        Quantity("", "Validation loss by objective", three, "end", tuple(f"validation/{one}" for one in objectives))
    ]
    for key in metrics:
        name = key.replace("_", " ").capitalize()
        pair = ("training", "validation")
        found.append(Quantity(key, name, three, "end", (f"validation/{key}",), names=pair))
    return found


def _curves(rows: Rows) -> list[_Curve]:
    """The small charts."""
    curves = []
    for quantity in (*QUANTITIES[:1], *_of_system(rows), *QUANTITIES[1:]):
        lines = lines_of(rows, quantity)
        if not lines:
            continue
        width = SMOOTHING * _span(lines[0].points) if quantity.told != "peak" else 0.0
        ends = [quantity.write(_told(line.points, quantity.told)) for line in lines]
        word = "at the end" if quantity.told == "end" else quantity.told
        chart = line_chart(f"{quantity.name} by step", lines, quantity.write, width=width)
        alone = len(lines) == 1
        curves.append(
            _Curve(quantity.name, f"{word} {ends[0]}" if alone else word, chart, [] if alone else lines, ends)
        )
    return curves


def _told(points: Points, how: str) -> float:
    if how == "end":
        return mean_before(points, points[-1][0], SMOOTHING * _span(points) + 1)
    values = sorted(y for _, y in points)
    return values[-1] if how == "peak" else values[len(values) // 2]


def _span(points: Points) -> float:
    return points[-1][0] - points[0][0]


def _loss_chart(run: RunFiles, stages: list[_Stage], unigram: float | None) -> "Markup | None":
    """The large chart; None without a logged loss."""
    loss, validation = series(run.rows, "loss"), series(run.rows, "validation_loss")
    if not loss:
        return None
    training = smooth(loss, SMOOTHING * _span(loss))
    labels = [(training[-1][1], f"training {training[-1][1]:.2f}", ACCENT)]
    if validation:
        labels.append((validation[-1][1], f"validation {validation[-1][1]:.2f}", SECOND))
    if unigram is not None:
        labels.append((unigram, f"unigram {unigram:.2f}", SOFT))
    shown = [*(y for _, y in loss), *(y for _, y in validation), *(value for value, _, _ in labels)]
    room = 0.05 * (max(shown) - min(shown) or 1.0)
    low, high = min(shown) - room, max(shown) + room * (2 if stages else 1)

    def draw(axes: "Axes") -> None:
        if validation:
            marker = "o" if len(validation) < 60 else ""
            steps, values = zip(*thin(validation, 400), strict=True)
            axes.plot(steps, values, color=SECOND, marker=marker, linewidth=1.4, markersize=4.5)
        if unigram is not None:
            axes.axhline(unigram, color=SOFT, linewidth=1.2, linestyle=(0, (5, 4)))
        for row in run.guard:
            axes.plot(row["step"], low, color=BAD, marker="x", markersize=8, mew=1.8, clip_on=False, zorder=5)
        for number, stage in enumerate(stages):
            end = stages[number + 1].first if number + 1 < len(stages) else loss[-1][0]
            axes.axvline(stage.first, color=LINE, linewidth=1.2)
            # A name that has no room is in the table of stages alone.
            if (end - stage.first) / (_span(loss) or 1) > 0.009 * len(stage.name):
                axes.text(stage.first, high, f" {stage.name}", color=SOFT, fontsize=11, va="top")
        end_labels(axes, labels, 1.25 * room)

    return line_chart(
        f"Loss by step: {', '.join(text for _, text, _ in labels)}",
        [Line("training", loss, 0)],
        three,
        size=(1110, 350),
        x_label="step",
        width=SMOOTHING * _span(loss),
        draw=draw,
        limits=(low, high),
    )


@dataclass(frozen=True, slots=True)
class _Masks:
    """What a run masks of a clip, drawn for the page. `spans`: (start, length) in frames, of each draw."""

    frames: int
    seconds: float
    spans: list[list[tuple[int, int]]]
    share: float
    longest: float
    """Seconds, of the median draw."""


MASKED_SECONDS, SHOWN_DRAWS, DRAWS = 5.0, 6, 200


def _masks(config: dict[str, Any], splits: dict[str, Any]) -> _Masks | None:
    """By the rule and the settings of the run's model; None where it masks nothing."""
    a_frame = seconds_of_frames(_of_sound(splits), 1)
    model = config["model"] if a_frame else {}
    settings = next((one["mask"] for one in (model, *model.get("parts", {}).values()) if "mask" in one), None)
    if settings is None:
        return None
    from mm.data.sample import keyed_rng
    from mm.models.masking import span_mask

    frames = round(MASKED_SECONDS / a_frame)
    rng = keyed_rng(config.get("seed", 0), "report")
    masks = [span_mask(frames, rng=rng, **settings) for _ in range(DRAWS)]
    spans = [_spans(mask.tolist()) for mask in masks]
    longest = sorted(max(length for _, length in one) for one in spans)[DRAWS // 2]
    share = float(sum(mask.mean() for mask in masks)) / DRAWS
    return _Masks(frames, frames * a_frame, spans[:SHOWN_DRAWS], share, longest * a_frame)


def _spans(mask: list[bool]) -> list[tuple[int, int]]:
    """(start, length) of every run of true values."""
    runs = [(hit, len(list(run))) for hit, run in groupby(mask)]
    starts = accumulate((length for _, length in runs), initial=0)
    return [(start, length) for start, (hit, length) in zip(starts, runs, strict=False) if hit]


def _parts(about: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's parts with parameter counts, and their sum."""
    parts = [{"name": name, **counts} for name, counts in about.get("parameters", {}).items()]
    if not parts:
        return []
    total = {key: sum(part[key] for part in parts) for key in ("total", "trained")}
    rows = [*parts, {"name": "all", **total}]
    return [{**row, "share": row["total"] / max(1, total["total"])} for row in rows]


def _sample(run: Path, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with its picture, and the one that the model drew, as data; None where it is gone, or lies outside the
    run."""

    def picture(key: str) -> str | None:
        path = (run / str(sample.get(key, ""))).resolve()
        inside = path.is_relative_to(run.resolve()) and path.is_file()
        return thumbnail(path.read_bytes(), path.suffix[1:]) if inside else None

    words = {key: str(sample.get(key, "")) for key in ("id", "prompt", "true", "generated")}
    return {**words, "picture": picture("image"), "drawn": picture("drawn")}
