"""A causal language model alone: what every generative system is on a batch without media."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm.data.batch import PackedBatch
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError, DataError
from mm.models import backbone
from mm.models.attention import Packing
from mm.models.config import LanguageConfig
from mm.models.distill import head_distillation_losses
from mm.models.meta_attention import insert_meta_attention
from mm.models.routing import Routing
from mm.models.system import GenerativeSystem, Output
from mm.models.systems.text_lm.config import TextLMConfig

if TYPE_CHECKING:
    from mm.models.gated import MediaSeen


class TextLM(GenerativeSystem):
    """See the module. Its one submodule is `language`.

    With `distill` there is an objective of that name beside `next_token`: the distance from what the teachers say, over
    the same positions. With `meta_tokens`, `meta_attention` says whether these have attention of their own.
    """

    def __init__(self, config: TextLMConfig, weights: bool = True) -> None:
        super().__init__()
        tokenizer, meta = config.tokenizer(), config.meta_tokens
        self.language = backbone.load(config.language, len(tokenizer), weights)
        self.meta_attention, self.zero_positions = bool(meta and meta.attention), bool(meta and meta.zero_positions)
        self.meta_id = tokenizer.id(meta.token) if meta else -1
        if self.meta_attention:
            tiny = backbone.miniature(self.language, layers=1)
            insert_meta_attention(self.language, tiny, scaled=config.language.init == "scaled")
        if self.zero_positions and not hasattr(self.language.base_model, "rotary_emb"):
            raise ConfigError(
                f"model.meta_tokens.zero_positions: {self.language.config.model_type} does not rotate its queries and "
                "keys; set it to false"
            )
        self.sparsify(config, ())
        self.decodes_itself = self.decodes_itself or self.meta_attention or self.zero_positions
        self.distill, self._tokenizer = config.distill, tokenizer
        if config.distill is not None:
            _check_head(self.language, "model.distill: the model that learns")
            self.weights = {**self.weights, "next_token": 1 - config.distill.weight, "distill": config.distill.weight}

    @cached_property
    def teachers(self) -> Sequence[nn.Module]:
        """Read when they are first asked, for who only writes with the model needs none."""
        if self.distill is None:
            return ()
        device = next(self.parameters()).device
        found = []
        for name in self.distill.teachers:
            _check_tokens(name, self._tokenizer)
            with torch.device(device):
                teacher = backbone.load(LanguageConfig(name=name), len(self._tokenizer), device.type != "meta")
            _check_head(teacher, f"model.distill.teachers {name}")
            found.append(teacher.to(device).eval().requires_grad_(False))
        return found

    def meta_tokens(self, batch: PackedBatch) -> Tensor | None:
        return batch.input_ids == self.meta_id if self.meta_attention else None

    def token_losses(self, batch: PackedBatch, routing: Routing | None = None) -> Tensor:
        return super().token_losses(self._placed(batch), routing)

    def logits(
        self, batch: PackedBatch, keep: Tensor, packing: Packing | None = None, media: "MediaSeen | None" = None
    ) -> Tensor:
        return super().logits(self._placed(batch), keep, packing, media)

    def _placed(self, batch: PackedBatch) -> PackedBatch:
        """The batch with meta-tokens at the position whose rotation is none, where that is asked for."""
        if self.training or not self.zero_positions:
            return batch
        return replace(batch, position_ids=batch.position_ids.masked_fill(batch.input_ids == self.meta_id, 0))

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        counts = super().counts(batch)
        return counts if self.distill is None else {**counts, "distill": counts["next_token"]}

    def forward(self, batch: PackedBatch) -> Output:
        if self.distill is None:
            return super().forward(batch)
        if not backbone.chunks_logits(self.language):
            raise ConfigError("train.lora: adapters on the output head are not for model.distill; leave the head out")
        routing, keep = self.routing(batch), batch.learned()
        batch = self._placed(batch)
        hidden = backbone.hidden_at(
            self.language, self.embed(batch), batch, keep, routing, meta=self.meta_tokens(batch)
        )
        losses, _ = backbone.head_terms(self.language, hidden, batch.labels.flatten()[keep])
        output = self.output(batch, losses, routing)
        distance = self.distances(hidden, batch, keep).sum()
        return replace(output, losses={**output.losses, "distill": distance})

    def distances(self, hidden: Tensor, batch: PackedBatch, keep: Tensor) -> Tensor:
        """From the teachers, in nats, float32 [K], at flat positions int64 [K], where the head reads hidden [K, D]."""
        assert self.distill is not None
        temperature = self.distill.temperature
        theirs: list[tuple[Tensor, nn.Linear, float]] = []
        with torch.no_grad():
            for name, teacher in zip(self.distill.teachers, self.teachers, strict=True):
                language: Any = teacher
                most = getattr(language.config, "max_position_embeddings", None) or math.inf
                if (length := batch.input_ids.shape[1]) > most:
                    raise ConfigError(
                        f"model.distill.teachers {name}: has {most:,} positions, rows have {length:,} tokens; set "
                        f"data.context_length to {most} at most, or choose another teacher"
                    )
                seen = backbone.hidden_at(language, language.get_input_embeddings()(batch.input_ids), batch, keep)
                theirs.append((seen, language.get_output_embeddings(), language.logit_factor))
        head, factor = self.language.get_output_embeddings(), self.language.logit_factor
        return backbone.at_head(
            head, hidden, lambda hidden: head_distillation_losses(hidden, head, factor, theirs, temperature)
        )


def _check_tokens(name: str, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` where a teacher speaks of other tokens than the student, at the same ids."""
    what = f"model.distill.teachers {name}"
    try:
        theirs = Tokenizer.load(name).ids()
    except DataError as error:
        raise ConfigError(
            f"{what}: nothing says what its tokens are ({error}); put the tokenizer.json that it was trained with there"
        ) from None
    ours = tokenizer.ids()
    if other := [token for token, id in theirs.items() if ours.get(token) != id]:
        raise ConfigError(
            f"{what}: its tokenizer is another one: {len(other):,} of its {len(theirs):,} tokens have no such id in "
            f"{tokenizer.name}, {other[0]!r} for one; choose a teacher with the student's tokenizer, or set "
            f"model.language.tokenizer={name}"
        )


def _check_head(language: Any, what: str) -> None:
    if not backbone.chunks_logits(language):
        raise ConfigError(f"{what}: does more with its head's output than scale it (a soft cap); choose another model")
