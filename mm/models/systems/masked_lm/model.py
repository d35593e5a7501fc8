"""A masked language model: an encoder reads documents in which some tokens are masked, and predicts these.

Which tokens, and what stands in their place, is drawn on the host from a key of the row (`PackedBatch.draws`): so it is
the same however the rows of a step are split, it is another at every visit, and how many count is known before the
first forward pass. In evaluation keys are those of the samples, so masks stay what they are.

`MaskedLM.masked` says where and what, apart from the model that predicts. An objective over what is in these places
instead, such as whether a token was replaced (ELECTRA, 2003.10555), starts from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm.data.batch import IGNORE, PackedBatch
from mm.data.sample import keyed_rng
from mm.errors import ConfigError
from mm.models.masking import Vocabulary, choose_text, corrupt, words_of
from mm.models.objectives import draw_labels
from mm.models.system import Output, System
from mm.models.systems.masked_lm import encoder
from mm.models.systems.masked_lm.config import MaskedLMConfig
from mm.models.systems.masked_lm.encoder import Targets


@dataclass(frozen=True, slots=True)
class Masked:
    """What is drawn of a batch, in host memory.

    places: int64 [K], flat positions (row * L + position) that are predicted, in rising order. targets: int64 [K], the
    tokens there. ids: int64 [B, L], what the encoder reads.
    """

    places: np.ndarray
    targets: np.ndarray
    ids: np.ndarray

    def by_row(self) -> np.ndarray:
        """int64 [B]: how many places each row has."""
        return np.bincount(self.places // self.ids.shape[1], minlength=len(self.ids))


class MaskedLM(System):
    """See the module. Its one submodule is `language`; its objective, `masked`, is over the tokens that are masked."""

    def __init__(self, config: MaskedLMConfig, weights: bool = True) -> None:
        super().__init__()
        self.weights = {"masked": 1.0}
        self.masking = config.masking
        layout = config.layout()
        tokenizer, template = layout.tokenizer, layout.template
        self._mask_id = tokenizer.id(config.mask_token)
        special = [tokenizer.id(token) for token in (template.bos, template.eos) if token is not None]
        self.vocabulary = Vocabulary.of(tokenizer, (self._mask_id, layout.pad, *special))
        self.language = encoder.load(config.language, len(tokenizer), layout.pad, weights)

    def masked(self, batch: PackedBatch) -> Masked:
        """What is drawn: a pure function of the batch.

        Of text that is learned, but for special tokens and what opens a segment: no label says of that whether it is
        learned, and without a begin of text it may be metadata or a prompt.

        Raises `ConfigError` where a document is longer than the model's positions.
        """
        ids, segments, labels, positions = (
            tensor.cpu().numpy() for tensor in (batch.input_ids, batch.segment_ids, batch.labels, batch.position_ids)
        )
        if (most := encoder.positions(self.language)) <= positions.max():
            raise ConfigError(
                f"model.language: a document has {positions.max() + 1:,} tokens, the model {most:,} positions; set "
                f"data.context_length to {most} at most, with data.too_long=split"
            )
        eligible = (segments > 0) & ~self.vocabulary.special[ids]
        eligible[:, 0] = False
        eligible[:, 1:] &= (labels[:, :-1] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
        found, chosen = ids.copy(), np.zeros_like(eligible)
        masking = self.masking
        for row, key in enumerate(batch.draws.tolist()):
            # Not what is behind the last token: how much that is depends on the rows beside it.
            own = np.s_[row, : np.flatnonzero(segments[row]).max(initial=-1) + 1]
            rng = keyed_rng("mask", key)
            words = words_of(ids[own], segments[own], self.vocabulary)
            piece = choose_text(eligible[own], words, segments[own], masking.rate, masking.unit, rng)
            found[own] = corrupt(ids[own], piece, masking.corruption, self._mask_id, self.vocabulary, rng)
            chosen[own] = piece >= 0
        places = np.flatnonzero(chosen)
        return Masked(places, ids.ravel()[places], found)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {"masked": torch.tensor(len(self.masked(batch).places))}

    def row_counts(self, batch: PackedBatch) -> Tensor:
        return torch.from_numpy(self.masked(batch).by_row())

    def forward(self, batch: PackedBatch) -> Output:
        masked = self.masked(batch)
        losses = self.token_losses(batch, masked)
        tokens = (batch.segment_ids > 0).sum()
        rows = torch.stack([part.sum() for part in losses.detach().split(masked.by_row().tolist())])
        return Output(
            {"masked": losses.sum()},
            {"masked": torch.tensor(len(masked.places))},
            metrics={"masked_share": len(masked.places) / tokens.clamp(min=1)},
            metric_counts={"masked_share": tokens},
            rows={"masked": rows},
        )

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("masked",)

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        masked = self.masked(batch)
        rows = masked.by_row().tolist()
        losses = self.token_losses(batch, masked, lambda logits: draw_labels(logits, rows, generators))
        return {"masked": losses.sum()}

    def token_losses(self, batch: PackedBatch, masked: Masked, draw: Targets | None = None) -> Tensor:
        """-log p in nats, float32 [K], of the tokens that are masked, or of others that are drawn in their place."""
        ids, places, targets = (
            torch.from_numpy(array).to(batch.input_ids.device, non_blocking=True)
            for array in (masked.ids, masked.places, masked.targets)
        )
        return encoder.token_losses(
            self.language, ids, batch.segment_ids, batch.position_ids, places, draw or targets, batch.isolate_segments
        )
