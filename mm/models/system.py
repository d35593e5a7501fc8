"""System: what the trainer knows of a model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mm.data.batch import IGNORE, PackedBatch

if TYPE_CHECKING:
    from mm.data.batch import MediaBatch


@dataclass(frozen=True, slots=True)
class Output:
    """Sums of losses with the counts that they are to be divided by, both by objective, and metrics to log."""

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class System(nn.Module):
    """A composition of parts with its objectives.

    `weights` are the factors of the objectives in the total loss: sum over k of weights[k] * S_k / N_k, where N_k
    counts all rows, micro-batches and ranks of a step.
    """

    weights: dict[str, float]

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        """N_k of a batch: a pure function of it, asked for before the first forward of a step."""
        raise NotImplementedError

    def forward(self, batch: PackedBatch) -> Output:
        raise NotImplementedError


class GenerativeSystem(System):
    """A system that writes text: its objective is `next_token` on the batch's labels."""

    language: Any
    """The causal language model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"next_token": 1.0}

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {"next_token": (batch.labels != IGNORE).sum()}

    def forward(self, batch: PackedBatch) -> Output:
        return Output({"next_token": self.token_losses(batch).sum()}, self.counts(batch))

    def token_losses(self, batch: PackedBatch) -> Tensor:
        """-log p in nats, float32, of every target (label that is not -100), row by row."""
        raise NotImplementedError

    def embed(self, batch: PackedBatch) -> Tensor:
        """[B, L, D]: what the language model reads, media features in their places."""
        raise NotImplementedError

    def encode(self, medium: str, media: "MediaBatch") -> Tensor:
        """[sum length, D]: the features of all items of a medium, in item order."""
        raise NotImplementedError
