"""MoMa: one stream of tokens, of text and of pictures, through one causal language model (early fusion).

A picture comes as a picture, and a run of placeholders with begin and end around it. Its codes, as many, are tokens of
the vocabulary: `fused` puts them in the place of placeholders, where these are read and where they are predicted, and
after that a batch is one of text. Attention is shared; which experts a token has goes by its modality. Sources: Lin et
al., 2407.21770; Chameleon, 2405.09818 section 2.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mm.data.batch import IGNORE, MODALITIES, MediaBatch, PackedBatch
from mm.data.tokenizer import Tokenizer
from mm.models import backbone
from mm.models.routing import Routing
from mm.models.system import GenerativeSystem, Output
from mm.models.systems.moma.config import MomaConfig
from mm.models.teachers import PictureTeacher


class Moma(GenerativeSystem):
    """See the module. Submodules `language` and, with experts or mixture of depths, `sparsity` are what name patterns
    in configs match. `vocabulary`: int64 [codes], the token id of each code.

    Objectives: `next_token`, with the z-loss in training; and of no weight, to be logged, the same without it by the
    modality of what is predicted: `text`, and `image`, begin and end of pictures among it.
    """

    vocabulary: Tensor

    def __init__(self, config: MomaConfig, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        self.weights = {"next_token": 1.0, "text": 0.0, "image": 0.0}
        self._layout = config.layout()
        tokenizer = self._layout.tokenizer
        # On the host even where weights are on the meta device: what they say decides shapes.
        ids = torch.tensor([tokenizer.id(name) for name in config.codes()], device="cpu")
        self.register_buffer("vocabulary", ids, persistent=False)
        self.language = _language(config, tokenizer, weights)
        self.sparsify(config, ("image",))
        self.decodes_itself = True  # pictures are tokens, also where it is dense

    @cached_property
    def teacher(self) -> PictureTeacher:
        """Made when it is first asked. It is no submodule: it belongs to the data."""
        teacher: PictureTeacher = self.config.teacher.build()
        teacher.check(self._layout)
        return teacher

    def fused(self, batch: PackedBatch) -> PackedBatch:
        """The batch with token ids for placeholders, in what is read and in what is predicted, and without media."""
        media = batch.media.get("image")
        if media is None or media.dummy:
            return replace(batch, media={})
        tokens = self.vocabulary[self._codes(media)]
        slots = media.slots(batch.input_ids.shape[1])
        ids = batch.input_ids.flatten().index_put((slots,), tokens)
        labels = batch.labels.flatten()
        asked = labels[slots - 1]  # of the position before, which is of the same picture, or the begin of it
        labels = labels.index_put((slots - 1,), torch.where(asked == IGNORE, asked, tokens))
        return replace(batch, input_ids=ids.view_as(batch.input_ids), labels=labels.view_as(batch.labels), media={})

    def _codes(self, media: MediaBatch) -> Tensor:
        """int64 [sum length]: read with the data, or as the teacher says now."""
        if media.codes is not None:
            return media.codes[:, 0].long()
        lengths = [media.positions // len(media)] * len(media)  # all are squares of one size
        with torch.no_grad():
            return self.teacher.codes(media.items(), lengths, self._layout)[:, 0]

    def embed(self, batch: PackedBatch) -> Tensor:
        embeddings: Tensor = self.language.get_input_embeddings()(self.fused(batch).input_ids)
        return embeddings

    def token_losses(self, batch: PackedBatch, routing: Routing | None = None) -> Tensor:
        return super().token_losses(self.fused(batch), routing)

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        return super().drawn_losses(self.fused(batch), generators)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        found = super().counts(batch)
        image = ((batch.labels != IGNORE) & _before_pictures(batch)).sum()
        return {**found, "text": found["next_token"] - image, "image": image}

    def forward(self, batch: PackedBatch) -> Output:
        batch = self.fused(batch)
        routing = self.routing(batch)
        z = self.config.z_loss if self.training else 0.0
        losses, plain = backbone.token_terms(self.language, self.embed(batch), batch, routing, z)
        output = self.output(batch, losses, routing)
        image = _before_pictures(batch).flatten()[batch.learned()]
        output.losses["text"], output.losses["image"] = (plain * ~image).sum(), (plain * image).sum()
        return output


def _before_pictures(batch: PackedBatch) -> Tensor:
    """bool [B, L]: whether what follows a position belongs to a picture."""
    image = batch.modality == MODALITIES["image"]
    return torch.cat([image[:, 1:], torch.zeros_like(image[:, :1])], dim=1)


def _language(config: MomaConfig, tokenizer: Tokenizer, weights: bool) -> Any:
    """The language model, with an embedding and a row of the head for every token of the vocabulary."""
    language = config.language
    if language.name is None:
        return backbone.load(language, len(tokenizer), weights)
    own = Tokenizer.load(language.tokenizer_name, language.added_tokens)
    model = backbone.load(language, len(own), weights)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model
