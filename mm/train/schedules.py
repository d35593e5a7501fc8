"""The `train.schedule` section: what learning rates are multiplied by, as a pure function of phases. No torch here.

A phase leads from one factor to another over some steps, and a schedule is a list of phases, which a kind makes of its
settings and the number of steps. Nothing is kept between steps: a resumed run, a stage that goes on with the schedule
of the one before, and a drawing ask the same function.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mm.settings import Count, Kinds, KindSection, Number, Section, parse_number

Form = Callable[[float, float, float], float]
"""(begin, end, progress from 0 to 1) -> factor. At 0 it is `begin`, at 1 `end`, to the last bit."""


def constant(begin: float, end: float, progress: float) -> float:
    """No change."""
    return begin


def linear(begin: float, end: float, progress: float) -> float:
    """A straight line."""
    return begin * (1 - progress) + end * progress


def cosine(begin: float, end: float, progress: float) -> float:
    """Half a cosine (Loshchilov & Hutter, 1608.03983)."""
    return linear(begin, end, 0.5 * (1 - math.cos(math.pi * progress)))


def one_minus_sqrt(begin: float, end: float, progress: float) -> float:
    """Steep at first: 1 - sqrt(progress) is left (Hägele et al., 2405.18392)."""
    return linear(begin, end, math.sqrt(progress))


def inverse_sqrt(begin: float, end: float, progress: float, steepness: float) -> float:
    """1 / sqrt(1 + steepness * progress), shifted and scaled to meet both ends (Ibrahim et al., 2403.08763)."""
    return linear(begin, end, (1 - (1 + steepness * progress) ** -0.5) / (1 - (1 + steepness) ** -0.5))


def geometric(begin: float, end: float, progress: float) -> float:
    """By the same ratio at every step; both ends above 0."""
    return float(begin ** (1 - progress) * end**progress)


FORMS: dict[str, Form] = {"linear": linear, "cosine": cosine, "1-sqrt": one_minus_sqrt}


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a schedule."""

    name: str
    first: float
    """Its first step; not whole where it follows from a share of all steps."""
    steps: float
    begin: float
    end: float
    """The factor of step `first + steps`, where the phase is over."""
    form: Form = linear
    ahead: int = 0
    """1: every step has the factor of the next one. So the first step of a warm-up has a rate."""

    def factor(self, step: float) -> float:
        """Of any step; before and behind the phase that of its ends."""
        progress = max(0.0, step - self.first + self.ahead) / self.steps
        return self.form(self.begin, self.end, min(1.0, progress))


def factor(phases: Sequence[Phase], step: float) -> float:
    """That of the last phase that has begun."""
    return next((phase for phase in reversed(phases) if phase.first <= step), phases[0]).factor(step)


def spans(counts_on: Sequence[bool], steps: Sequence[int]) -> list[tuple[int, int]]:
    """For every stage the step of its schedule that it begins with, and all steps of that schedule: a stage that
    counts on shares the schedule of the one before."""
    together: list[list[int]] = []
    for number, on in enumerate(counts_on):
        if on:
            together[-1].append(number)
        else:
            together.append([number])
    return [
        (sum(steps[one] for one in some[:index]), sum(steps[one] for one in some))
        for some in together
        for index in range(len(some))
    ]


class ScheduleConfig(KindSection):
    """A linear warm-up, and what the kind has behind it. `factor` is what learning rates are multiplied by."""

    warmup: Number = Field(default=0.03, ge=0)
    """Steps, or a share of all steps when below 1 (`3%`)."""
    start: Number = Field(default=0.0, ge=0, le=1)
    """The factor that the warm-up rises from."""

    @field_validator("warmup", "decay", "cooldown", mode="before", check_fields=False)
    @classmethod
    def _shares_are_below_all(cls, value: Any) -> Any:
        """A number from 1 on is one of steps, so `100%` would be a single one."""
        if isinstance(value, str) and value.strip().endswith("%") and parse_number(value) >= 1:
            raise ValueError(f"{value} of all steps: give less, or a number of steps")
        return value

    def phases(self, steps: int) -> list[Phase]:
        """Of a run of so many steps; none of them is empty."""
        raise NotImplementedError

    def problems(self, steps: int) -> list[tuple[str, str]]:
        """What does not fit into so many steps: (setting, what is wrong)."""
        return [_too_long("warmup", self.warmup, steps)] if self.warmup > steps else []

    def factor(self, step: int, steps: int) -> float:
        """For step 0 … steps - 1. The end of a decay is the factor of the step behind the last."""
        return factor(self.phases(steps), step)

    def rise(self, first: float, steps: float, end: float = 1.0) -> list[Phase]:
        """The warm-up, from step `first` on."""
        return [Phase("warm-up", first, steps, self.start, end, ahead=1)] if steps else []


class DecayConfig(ScheduleConfig):
    """A warm-up to 1 and a decay to `final`, once or several times."""

    final: Number = Field(default=0.0, ge=0, le=1)
    """The factor that the decay ends at."""
    cycles: Count = Field(default=1, ge=1)
    """Warm-ups and decays, one after the other over equal parts of all steps (re-warming). A share of steps in
    `warmup` is one of a cycle's."""

    def shape(self, progress: float) -> float:
        """The decay, from 1 at progress 0 to 0 at progress 1."""
        raise NotImplementedError

    def phases(self, steps: int) -> list[Phase]:
        length = steps / self.cycles
        warmup = _steps(self.warmup, length)
        found = []
        for first in (number * length for number in range(self.cycles)):
            # Of a single cycle the warm-up may be all; its decay is then behind the last step.
            decay = Phase("decay", first + warmup, max(1.0, length - warmup), 1.0, self.final, self._form)
            found += [*self.rise(first, warmup), decay]
        return found

    def _form(self, begin: float, end: float, progress: float) -> float:
        return linear(end, begin, self.shape(progress))

    def problems(self, steps: int) -> list[tuple[str, str]]:
        length = steps / self.cycles
        warmup = _steps(self.warmup, length)
        if self.cycles > 1 and length - warmup < 1:
            text = f"{self.cycles} of {length:g} steps have no step of decay behind a warm-up of {warmup:g}"
            return [("cycles", f"{text}; set fewer, a shorter warm-up, or a larger train.max_steps")]
        return super().problems(steps)


class CosineConfig(DecayConfig):
    """Half a cosine (Loshchilov & Hutter, 1608.03983)."""

    kind: str = "cosine"

    def shape(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class LinearConfig(DecayConfig):
    """A straight line."""

    kind: str = "linear"

    def shape(self, progress: float) -> float:
        return 1 - progress


class ConstantConfig(ScheduleConfig):
    """No decay after the warm-up."""

    kind: str = "constant"

    def phases(self, steps: int) -> list[Phase]:
        warmup = _steps(self.warmup, steps)
        return [*self.rise(0, warmup), Phase("constant", warmup, max(1.0, steps - warmup), 1.0, 1.0, constant)]


class WSDConfig(ScheduleConfig):
    """Warm-up, a stable phase, and a decay over the last steps (Hu et al., 2404.06395; Hägele et al., 2405.18392)."""

    kind: str = "wsd"
    decay: Number = Field(default=0.2, gt=0)
    """Steps of the decay, or a share of all steps when below 1."""
    form: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """Of the decay."""
    final: Number = Field(default=0.0, ge=0, le=1)
    """The factor that the decay ends at."""

    def phases(self, steps: int) -> list[Phase]:
        warmup, decay = _steps(self.warmup, steps), _steps(self.decay, steps)
        stable = steps - warmup - decay
        return [
            *self.rise(0, warmup),
            *([Phase("stable", warmup, stable, 1.0, 1.0, constant)] if stable > 0 else []),
            Phase("decay", steps - decay, decay, 1.0, self.final, FORMS[self.form]),
        ]

    def problems(self, steps: int) -> list[tuple[str, str]]:
        together = round(_steps(self.warmup, steps) + _steps(self.decay, steps), 9)
        return [_too_long("decay", together, steps, "with the warm-up ")] if together > steps else []


class AnnealConfig(Section):
    """The end of an infinite schedule."""

    at: Count = Field(ge=0)
    """The first step of the annealing; the steps of stages that share the schedule are counted together."""
    steps: Count = Field(ge=1)
    """How long it takes. The rate then stays: at `final`, where `exponent` is `exact`."""
    exponent: Literal["exact", "from_start", "exponential"] = "exact"
    """How the exponent of the published formula is read. `exact`: constant * (final / constant)^((n - at) / steps),
    which is `final` at its end. `from_start`: the same with (n - at) / (steps + at), which would be `final` only
    `at` steps after that. `exponential`: final + (constant - final) * exp(-(n - at) / tau), which never is."""
    tau: Number | None = Field(default=None, gt=0)
    """Steps, of `exponential` alone."""

    @model_validator(mode="after")
    def _tau_is_of_exponential(self) -> "AnnealConfig":
        if (self.exponent == "exponential") != (self.tau is not None):
            raise ValueError("tau: `exponent: exponential` needs it, and no other reads it")
        return self

    def phase(self, begin: float, end: float) -> Phase:
        if self.exponent == "exact":
            return Phase("anneal", self.at, self.steps, begin, end, geometric)
        if self.exponent == "from_start":
            form = partial(_part_of, self.steps / (self.steps + self.at))
        else:
            assert self.tau is not None
            form = partial(_exponential, self.steps / self.tau)
        return Phase("anneal", self.at, self.steps, begin, end, form)


class InfiniteConfig(ScheduleConfig):
    """Warm-up, a cool-down to a constant rate that may go on for ever, and an end when one is wanted (Ibrahim et al.,
    2403.08763; Singh et al., 2503.02844). Nothing of it depends on how many steps a run has."""

    kind: str = "infinite"
    warmup: Number = Field(ge=0)
    """Steps."""
    cooldown: Number = Field(ge=0)
    """Steps from the peak to `constant`; 0: the warm-up rises to `constant` alone."""
    constant: Number = Field(default=0.375, gt=0, le=1)
    """The factor that stays. What is best has to be found."""
    form: Literal["cosine", "inverse-sqrt"] = "cosine"
    """Of the cool-down."""
    steepness: Number = Field(default=10.0, gt=0)
    """Of `inverse-sqrt`."""
    final: Number = Field(default=0.01, gt=0, le=1)
    """The factor that annealing ends at; above 0, since it gets there by ratios."""
    anneal: AnnealConfig | None = None
    """`{at: STEP, steps: N}`; may be set when a run is resumed or branched off from."""

    @field_validator("warmup", "cooldown")
    @classmethod
    def _is_in_steps(cls, value: float) -> float:
        if not float(value).is_integer():
            raise ValueError("expected whole steps: an infinite schedule has no length to take a share of")
        return value

    @model_validator(mode="after")
    def _anneals_from_the_constant_rate(self) -> "InfiniteConfig":
        if self.anneal and self.anneal.at < self.warmup + self.cooldown:
            raise ValueError(
                f"anneal.at {self.anneal.at} is before warm-up and cool-down have ended, at {self._settled:g}"
            )
        if self.final > self.constant:
            raise ValueError(f"final {self.final:g} is above constant, {self.constant:g}: annealing lowers the rate")
        return self

    @property
    def _settled(self) -> float:
        return self.warmup + self.cooldown

    def phases(self, steps: int) -> list[Phase]:
        found = self.rise(0, self.warmup, 1.0 if self.cooldown else self.constant)
        if self.cooldown:
            form: Form = cosine if self.form == "cosine" else partial(inverse_sqrt, steepness=self.steepness)
            found.append(Phase("cool-down", self.warmup, self.cooldown, 1.0, self.constant, form))
        end = self.anneal.at if self.anneal else max(float(steps), self._settled + 1)
        if end > self._settled:
            steady = (self.constant, self.constant, constant)
            found.append(Phase("constant", self._settled, end - self._settled, *steady))
        if self.anneal:
            found.append(self.anneal.phase(self.constant, self.final))
        return found

    def problems(self, steps: int) -> list[tuple[str, str]]:
        if self.anneal and self.anneal.at + self.anneal.steps > steps:
            end = self.anneal.at + self.anneal.steps
            return [("anneal", f"ends at step {end}, behind the schedule's {steps}: set train.max_steps to it")]
        return []


SCHEDULES = Kinds(
    "schedule",
    {
        name: f"mm.train.schedules:{kind}"
        for name, kind in (
            ("cosine", "CosineConfig"),
            ("linear", "LinearConfig"),
            ("constant", "ConstantConfig"),
            ("wsd", "WSDConfig"),
            ("infinite", "InfiniteConfig"),
        )
    },
    default="cosine",
)


def _steps(number: float, steps: float) -> float:
    """Steps, or a share of steps when below 1."""
    return number * steps if number < 1 else number


def _too_long(setting: str, wanted: float, steps: int, what: str = "") -> tuple[str, str]:
    return setting, f"{what}{wanted:g} steps are more than the schedule's {steps} (train.max_steps)"


def _part_of(share: float, begin: float, end: float, progress: float) -> float:
    """The first part of a geometric fall, which does not come to its end."""
    return geometric(begin, end, share * progress)


def _exponential(times: float, begin: float, end: float, progress: float) -> float:
    """`times` time constants of an exponential fall towards `end`."""
    return linear(end, begin, math.exp(-times * progress))
