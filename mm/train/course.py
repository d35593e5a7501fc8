"""The course of a run as a picture: rate, batch and mixture over all of its stages, from the config alone. No torch.

What is drawn are the functions that the trainer asks, at the same steps.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.curves import three
from mm.data.mixture import MixtureConfig
from mm.errors import ConfigError
from mm.page import short
from mm.train.config import Run, StageSettings
from mm.train.schedules import ScheduleConfig, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# As in pages/base.html.j2.
PAPER, INK, SOFT, LINE = "#fefefd", "#1c1e21", "#62676e", "#e3e3df"
SERIES = ("#2f62a8", "#d06a12", "#1d6b43", "#b65fb0", "#8f8206", "#3f9db0", "#b3261e", "#1c1e21")
POINTS = 1500
"""Of a curve, of one stage."""

Points = list[tuple[float, float]]
Span = tuple[float, float, str]
"""First step, last step, name."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stage, placed in the run."""

    name: str
    first: int
    steps: int
    tokens_before: int
    step_tokens: int
    """Positions of the rows of a step, padding included."""
    context_length: int
    rates: Points
    """(step of the run, learning rate)"""
    phases: list[Span]
    """Of the schedule that begins with it; none where it counts on."""
    weights: list[tuple[int, dict[str, float]]]
    """(step of the run from which they hold, shares of the sources); no shares where they follow from the data."""

    @property
    def end(self) -> int:
        return self.first + self.steps


def parts(config: Run) -> list[Part]:
    """Raises `ConfigError` where the config does not say how long a stage is."""
    runs = config.stage_runs()
    stages: list[StageSettings | None] = [*config.stages] or [None]
    lengths: list[int] = []
    for run in runs:
        if run.train.max_steps is None:
            raise ConfigError(
                f"train.epochs {run.train.epochs or 1:g}: how many steps that is depends on the packed data; give "
                "train.max_steps to draw it"
            )
        lengths.append(run.train.max_steps)
    over = spans([stage is not None and stage.counts_on for stage in stages], lengths)
    found: list[Part] = []
    data_first = 0  # of the steps that `mixture.schedule` counts
    for run, stage, steps, (schedule_first, schedule_steps) in zip(runs, stages, lengths, over, strict=True):
        first, tokens = (found[-1].end, _end_tokens(found[-1])) if found else (0, 0)
        data_first = data_first + found[-1].steps if stage is not None and stage.carry_on else 0
        schedule, lr = run.train.schedule, run.train.optimizer.lr
        rates: Points = [(first + at, lr * schedule.factor(schedule_first + at, schedule_steps)) for at in _some(steps)]
        found.append(
            Part(
                stage.name if stage is not None else "",
                first,
                steps,
                tokens,
                run.train.batch_tokens // run.data.context_length * run.data.context_length,
                run.data.context_length,
                rates,
                [] if schedule_first else _phases(schedule, schedule_steps, first),
                _weights(run.data.mixture, data_first, steps, first),
            )
        )
    return found


def _phases(schedule: ScheduleConfig, steps: int, first: int) -> list[Span]:
    phases = schedule.phases(steps)
    ends = [*(phase.first for phase in phases[1:]), steps]
    return [
        (first + one.first, first + min(end, steps), one.name)
        for one, end in zip(phases, ends, strict=True)
        if one.first < steps
    ]


def _end_tokens(part: Part) -> int:
    return part.tokens_before + part.steps * part.step_tokens


def _some(steps: int) -> list[int]:
    """All steps, or so many that a curve of them is smooth; the first and the last among them."""
    return sorted({round(n * (steps - 1) / (POINTS - 1)) for n in range(POINTS)}) if steps > POINTS else [*range(steps)]


def _weights(mixture: MixtureConfig, data_first: int, steps: int, first: int) -> list[tuple[int, dict[str, float]]]:
    """Weights as the mixture takes them at the start of steps."""
    changes = [entry.step for entry in mixture.schedule if data_first < entry.step < data_first + steps]
    found = []
    for at in (data_first, *changes):
        number = bisect_right(mixture.schedule, at, key=lambda entry: entry.step)
        given = mixture.schedule[number - 1].weights if number else mixture.weights
        total = sum(given.values())
        found.append((first + at - data_first, {name: weight / total for name, weight in given.items()}))
    return found


def draw(config: Run, path: Path) -> dict[str, Any]:
    """Write the picture, in the format of the file's ending; returns the steps and tokens of the run."""
    from matplotlib.figure import Figure

    found = parts(config)
    batches, contexts = ({getattr(part, key) for part in found} for key in ("step_tokens", "context_length"))
    mixed = any(shares for part in found for _, shares in part.weights)
    panels = ["rate"] + ["batch"] * (len(batches) > 1) + ["context"] * (len(contexts) > 1) + ["mixture"] * mixed
    heights = [{"rate": 3.0, "mixture": 1.5}.get(panel, 0.9) for panel in panels]
    by_tokens = len(batches) > 1
    if by_tokens:
        panels, heights = [*panels, "tokens"], [*heights, 2.2]
    figure = Figure(figsize=(9.6, sum(heights) + 0.55 * len(panels) + 0.5), dpi=150, layout="constrained")
    figure.set_facecolor(PAPER)
    axes = dict(zip(panels, figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], strict=True))
    steps, tokens = found[-1].end, _end_tokens(found[-1])
    said = [f"{steps:,} steps", f"{short(tokens)} tokens"]
    said += [f"{batch:,} a step" for batch in batches if len(batches) == 1]
    said += [f"rows of {length:,}" for length in contexts if len(contexts) == 1]
    figure.suptitle(f"{config.out.name}: {', '.join(said)}", x=0.01, ha="left", fontsize=12, color=INK)
    for name, one in axes.items():
        _style(one)
        if name != "tokens":
            one.set_xlim(0, steps)
            one.tick_params(labelbottom=name == [panel for panel in panels if panel != "tokens"][-1])
    _draw_rate(axes["rate"], found)
    if "batch" in axes:
        _draw_levels(axes["batch"], found, "tokens of a step", [part.step_tokens for part in found])
    if "context" in axes:
        _draw_levels(axes["context"], found, "tokens of a row", [part.context_length for part in found])
    if mixed:
        _draw_mixture(axes["mixture"], found)
    [*axes.values()][-1 - by_tokens].set_xlabel("step", color=SOFT, fontsize=9)
    if by_tokens:
        _draw_by_tokens(axes["tokens"], found)
    figure.savefig(path)
    return {"picture": str(path), "steps": steps, "tokens": tokens}


def _style(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor(PAPER)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=SOFT, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, color=INK, pad=6)


def _borders(axes: "Axes", found: Sequence[Part]) -> None:
    for part in found[1:]:
        axes.axvline(part.first, color=SOFT, linewidth=0.8, dashes=(3, 3))


def _draw_rate(axes: "Axes", found: list[Part]) -> None:
    _title(axes, "learning rate")
    most, steps = max(rate for part in found for _, rate in part.rates), found[-1].end
    axes.set_ylim(0, most * 1.25)
    for first, last, name in (phase for part in found for phase in part.phases):
        axes.vlines(first, 0, most * 1.05, color=LINE, linewidth=0.9)
        if (last - first) / steps > 0.011 * len(name):
            axes.text((first + last) / 2, most * 1.06, name, ha="center", va="bottom", fontsize=8, color=SOFT)
    for curve in _curves(found, lambda part, step: step):
        xs, rates = zip(*curve, strict=True)
        axes.plot(xs, rates, color=SERIES[0], linewidth=1.9, solid_capstyle="butt")
        axes.fill_between(xs, rates, color=SERIES[0], alpha=0.08, linewidth=0)
    for part in found:
        if part.name and part.steps / steps > 0.011 * len(part.name):
            axes.text(part.first, most * 1.24, f" {part.name}", va="top", fontsize=9, color=INK)
    _rates_written(axes, most)
    _borders(axes, found)


def _curves(found: list[Part], x: Callable[[Part, float], float]) -> list[Points]:
    """Rates by `x`, in one curve for each schedule."""
    curves: list[Points] = []
    for part in found:
        if part.phases:
            curves.append([])
        curves[-1] += [(x(part, step), rate) for step, rate in part.rates]
    return curves


def _rates_written(axes: "Axes", most: float) -> None:
    axes.set_yticks([most * quarter / 4 for quarter in range(5)])
    axes.yaxis.set_major_formatter(lambda y, _: three(y))


def _draw_levels(axes: "Axes", found: list[Part], title: str, values: list[int]) -> None:
    """A value of each stage."""
    _title(axes, title)
    xs = [x for part in found for x in (part.first, part.end)]
    axes.plot(xs, [value for value in values for _ in range(2)], color=SERIES[1], linewidth=1.9, solid_capstyle="butt")
    axes.set_ylim(0, max(values) * 1.15)
    axes.set_yticks(_apart(sorted({*values}), 0.18 * max(values)), minor=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    _borders(axes, found)


def _apart(values: list[int], gap: float) -> list[int]:
    """The largest, and of the others those with room for a label."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if kept[-1] - value >= gap:
            kept.append(value)
    return kept


def _draw_mixture(axes: "Axes", found: list[Part]) -> None:
    """Shares of the sources, one on the other; a gap where they follow from the data."""
    _title(axes, "weights of the sources")
    names = [*dict.fromkeys(name for part in found for _, shares in part.weights for name in shares)]
    xs: list[float] = []
    columns: list[list[float]] = [[] for _ in names]
    for part in found:
        ends = [first for first, _ in part.weights[1:]] + [part.end]
        for (first, shares), end in zip(part.weights, ends, strict=True):
            xs += [first, end]
            for name, column in zip(names, columns, strict=True):
                column += [shares.get(name, 0.0)] * 2
            if not shares:
                axes.text((first + end) / 2, 0.5, "by the data", ha="center", va="center", fontsize=8, color=SOFT)
    colours = [SERIES[number % len(SERIES)] for number in range(len(names))]
    axes.stackplot(xs, *columns, labels=names, colors=colours, alpha=0.8, edgecolor=PAPER, linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(6, len(names)), frameon=False, fontsize=8.5,
        labelcolor=SOFT, handlelength=1.0, borderaxespad=0.2, columnspacing=1.2,
    )  # fmt: skip
    _borders(axes, found)


def _draw_by_tokens(axes: "Axes", found: list[Part]) -> None:
    _title(axes, "learning rate by tokens")
    for curve in _curves(found, lambda part, step: part.tokens_before + (step - part.first) * part.step_tokens):
        axes.plot(*zip(*curve, strict=True), color=SERIES[0], linewidth=1.9, solid_capstyle="butt")
    for part in found[1:]:
        axes.axvline(part.tokens_before, color=SOFT, linewidth=0.8, dashes=(3, 3))
    axes.set_xlim(0, _end_tokens(found[-1]))
    most = max(rate for part in found for _, rate in part.rates)
    axes.set_ylim(0, most * 1.08)
    _rates_written(axes, most)
    axes.set_xlabel("tokens, padding included", color=SOFT, fontsize=9)
