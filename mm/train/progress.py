"""What a run has behind it."""

import math
from dataclasses import dataclass, field

from mm.train.step import Counted


@dataclass(slots=True)
class Progress:
    """Saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    """Steps of the stage."""
    ended: bool = False
    """The stage ended before its last step: early, or for want of data."""
    unevaluated: bool = False
    """The evaluation that is due after this step is still to come: a signal was first, or its data were damaged."""
    tokens: int = 0
    loss_tokens: int = 0
    modalities: dict[str, int] = field(default_factory=dict)
    """Tokens by modality."""
    skipped: int = 0
    """Steps without an update, by the guard; their tokens are not counted above."""
    skipped_tokens: int = 0
    offending: list[int] = field(default_factory=list)
    """The steps that were skipped since the last accepted one, by their number in the sequence of packs."""
    best: float | None = None
    """Of `train.best.metric`."""
    stale: int = 0
    """Evaluations since then."""
    seconds: float = 0.0
    bad: list[list[str]] = field(default_factory=list)
    """(id, reason) of what was quarantined while loading."""

    def advance(self, totals: Counted, learned: int, updated: bool) -> None:
        """One step further; `learned`: its tokens with a loss."""
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        if not updated:
            self.skipped, self.skipped_tokens = self.skipped + 1, self.skipped_tokens + totals.tokens
            return
        self.offending = []
        self.tokens += totals.tokens
        self.loss_tokens += learned
        for kind, number in totals.modalities.items():
            self.modalities[kind] = self.modalities.get(kind, 0) + number

    def judge(self, value: float, lower: bool) -> bool:
        """Whether an evaluation is the best so far, written down; what is not finite never is."""
        better = math.isfinite(value) and (self.best is None or (value < self.best if lower else value > self.best))
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better
