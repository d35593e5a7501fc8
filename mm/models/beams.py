"""Beam search behind one prompt: which texts to go on with, and when no better one can come.

Scores alone: where they come from is the business of `mm.models.decode`. The rules are those of transformers' search as
it is set up by default (`early_stopping=False`, its `_check_early_stop_heuristic`), so that a model writes the same
whichever of the two decodes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.models.prompts import Decoding, Reader

Scored = tuple[float, list[int]]
"""A text as token ids, and log p or what it is ranked by."""


@dataclass(slots=True)
class Beams:
    """The search behind a prompt, for texts of `most` tokens at most.

    running: what is gone on with, the likeliest first, with log p. finished: at most `decoding.beams` texts, the best
    first, with log p / length^`decoding.length_penalty`; the length counts the token that ended the text.
    """

    decoding: Decoding
    most: int
    ends: frozenset[int]
    stopped: Callable[[list[int]], bool]
    running: list[Scored] = field(default_factory=lambda: [(0.0, [])])
    finished: list[Scored] = field(default_factory=list)

    @classmethod
    def of(cls, decoding: Decoding, most: int, reader: Reader) -> "Beams":
        return cls(decoding, min(most, decoding.max_new_tokens), reader.ends, reader.stopped)

    @property
    def done(self) -> bool:
        """Whether no text that runs on is held to become better than those that are finished."""
        if not self.running:
            return True
        best, ids = self.running[0]
        return len(self.finished) == self.decoding.beams and self._rank(best, ids) <= self.finished[-1][0]

    def take(self, log_probs: Tensor) -> list[int]:
        """Go on by a token.

        Args:
            log_probs: of the next token, float32 [running, V].

        Returns:
            Of each text that runs on now, the place among those that ran before of the one that it goes on from.
        """
        beams, vocabulary = self.decoding.beams, log_probs.shape[1]
        written = len(self.running[0][1])
        if self.ends and written < self.decoding.min_new_tokens:
            log_probs = log_probs.index_fill(1, torch.tensor(sorted(self.ends), device=log_probs.device), -torch.inf)
        before = torch.tensor([score for score, _ in self.running], device=log_probs.device)
        # So many that, whichever of them end, enough are left to go on with.
        count = min(max(2, 1 + len(self.ends)) * beams, log_probs.numel())
        best = (log_probs + before[:, None]).flatten().topk(count)
        running: list[Scored] = []
        parents: list[int] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, vocabulary)
            ids = [*self.running[parent][1], token]
            if len(ids) >= self.most or token in self.ends or self.stopped(ids):
                if rank < beams:
                    self.finished.append((self._rank(score, ids), ids))
            elif len(running) < beams:
                running.append((score, ids))
                parents.append(parent)
        self.finished = sorted(self.finished, key=lambda one: -one[0])[:beams]
        self.running = running
        return parents

    def _rank(self, score: float, ids: list[int]) -> float:
        return score / len(ids) ** self.decoding.length_penalty
