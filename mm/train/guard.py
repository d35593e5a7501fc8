"""The guard: whether a step may change the weights.

A step is skipped when its loss or gradient norm is not finite, or lies far above what it was of late: above mean +
sigmas x standard deviation of the last accepted steps. Only accepted steps enter the windows, so that a spike cannot
make the next one look normal. Low values are never a reason.

The decision depends on nothing but the numbers it is given. Give every rank the same ones (reduced over all ranks) and
every rank decides the same, without asking the others.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm.train.config import GuardConfig

FLOOR = {"loss": 0.01, "gradient norm": 0.1}
"""The standard deviation is taken to be at least this share of the mean. A flat stretch (large batches, repeated data)
would otherwise make ordinary noise an outlier: rounding to bfloat16 alone is 0.4%. At 6 sigmas a loss within 6% and a
norm within 60% of the mean always pass. (At half of that floor a harmless step of the quickstart was skipped.)"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step, and why."""

    accept: bool
    reason: str
    threshold: float | None = None
    """What the value was above; None when it was not finite."""


class Guard:
    """Judges steps one after the other.

    verdict = guard.judge(loss, grad_norm)    # the same numbers on all ranks, before the update
    if not verdict.accept:                    # no update; append guard.event(...) to guard.jsonl
        if guard.exhausted: ...               # end the run
        elif guard.should_rewind: ...         # load the newest checkpoint, then guard.rewind(its guard state)
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.skipped = 0
        """Skipped steps since the last accepted one."""
        self.rewinds = 0
        """Of the run so far."""

    def judge(self, loss: float, grad_norm: float | None) -> Verdict:
        """Decide about a step and remember it.

        Args:
            loss: the step's total, over all ranks; grad_norm: the global one before clipping, None where the engine
                does not know it before the update.
        """
        verdict = self._check("loss", loss, self.losses)
        if verdict.accept and grad_norm is not None:
            verdict = self._check("gradient norm", grad_norm, self.norms)
        if verdict.accept:
            self.skipped = 0
            # An exact zero (a step without loss-bearing tokens) says nothing of what is normal.
            if loss:
                self.losses.append(loss)
            if grad_norm:
                self.norms.append(grad_norm)
        else:
            self.skipped += 1
        return verdict

    def _check(self, name: str, value: float, window: Sequence[float]) -> Verdict:
        if not math.isfinite(value):
            return Verdict(False, f"the {name} is {value}")
        if not self.config.sigmas or len(window) < self.config.window // 2:
            return Verdict(True, "")
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((x - mean) * (x - mean) for x in window) / len(window))
        threshold = mean + self.config.sigmas * max(deviation, FLOOR[name] * abs(mean))
        if value <= threshold:
            return Verdict(True, "")
        return Verdict(
            False,
            f"the {name} {value:.4g} is above {threshold:.4g}, {self.config.sigmas:g} standard deviations over the "
            f"mean {mean:.4g} of the last {len(window)} accepted steps",
            threshold,
        )

    @property
    def should_rewind(self) -> bool:
        """So many steps were skipped in a row that the weights, not the data, are suspect."""
        return self.skipped >= self.config.rewind_after

    @property
    def exhausted(self) -> bool:
        """It should rewind, and has done so as often as it may: the run should end."""
        return self.should_rewind and self.rewinds >= self.config.max_rewinds

    def rewind(self, state: dict[str, Any] | None) -> None:
        """After going back to a checkpoint: windows as they were then (None: empty), one rewind more counted."""
        rewinds = self.rewinds + 1
        self.reset()
        if state is not None:
            self.load_state_dict(state)
        self.skipped, self.rewinds = 0, rewinds

    def reset(self) -> None:
        """Forget the windows: what comes is not to be compared with what was (another stage, other data or weights)."""
        self.losses.clear()
        self.norms.clear()
        self.skipped = 0

    def event(
        self, step: int, verdict: Verdict, loss: float, grad_norm: float | None, ids: Sequence[Any]
    ) -> dict[str, Any]:
        """A skipped step as a line of guard.jsonl. Values that are not finite are strings: JSON has none."""
        return {
            "step": step,
            "reason": verdict.reason,
            "loss": _plain(loss),
            "grad_norm": _plain(grad_norm),
            "threshold": verdict.threshold,
            "skipped": self.skipped,
            "rewinds": self.rewinds,
            "ids": list(ids),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, for checkpoints."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From another window length too: the newest values are taken."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.skipped, self.rewinds = state["skipped"], state["rewinds"]


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
