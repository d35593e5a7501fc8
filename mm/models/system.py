"""System: what the trainer knows of a model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mm.data.batch import IGNORE, MediaBatch, PackedBatch
from mm.data.layout import FeatureShape
from mm.models import backbone
from mm.models.attention import Packing
from mm.models.config import BackboneSection
from mm.models.routing import Routing
from mm.models.sparse import Sparsity, adopt

if TYPE_CHECKING:
    from mm.models.gated import MediaSeen

T = TypeVar("T")
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Output:
    """Sums of losses with the counts that they are to be divided by, both by objective, and metrics to log.

    All have the same names for every batch, whatever is in it: ranks add them up by their place.

    `metric_counts`: of a metric that is a mean over something of its own, how many of those there were in the batch;
    the others are means over `System.counted_by`.
    `rows`: of objectives that can tell, the loss of each row of the batch [B], for logging by source. `features`: of a
    `PooledSystem`, what its pooled objectives are computed from. `predictions`: in evaluation, what `System.scores` is
    to be given of each item, [n, …].
    """

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    metric_counts: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)


class System(nn.Module):
    """A composition of parts with its objectives.

    `weights` are the factors of the objectives in the total loss: sum over k of weights[k] * S_k / N_k, where N_k
    counts all rows, micro-batches and ranks of a step.
    """

    weights: dict[str, float]

    @property
    def teachers(self) -> Sequence[nn.Module]:
        """Frozen models that it learns from, whole on every rank: no parts of it, neither trained nor saved."""
        return ()

    @property
    def learned(self) -> tuple[str, ...]:
        """Objectives whose counts say how many positions are learned; the others look at the same ones again."""
        return (next(iter(self.weights)),)

    def counted_by(self, metric: str) -> str:
        """The objective whose count is a batch's weight in the mean of a metric."""
        return next(iter(self.weights))

    def scores(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Numbers that are no means over batches, from the predictions of a whole split, in host memory."""
        return {}

    def begin_step(self, step: int, steps: int) -> None:
        """Told before every step, from 0 on, of the `steps` of a stage, or of all that share a schedule: for what
        changes with the time."""

    def adopt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of another model, by name, as those of this one: for models that are grown from others."""
        return tensors

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        """N_k of a batch: a pure function of it, asked for before the first forward of a step."""
        raise NotImplementedError

    def row_counts(self, batch: PackedBatch) -> Tensor:
        """int64 [B]: N_k by row, of the first objective, where `Output.rows` has its loss."""
        return (batch.labels != IGNORE).sum(1)

    def forward(self, batch: PackedBatch) -> Output:
        raise NotImplementedError

    @property
    def drawn(self) -> tuple[str, ...]:
        """Objectives that `drawn_losses` has: those that are -log p of something that the model can draw itself."""
        return ()

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Sums of the losses of the objectives `drawn`, with labels (or targets) drawn from what the model itself says
        in place of those of the batch; `counts` says of how many terms.

        In the mean over draws their squared gradients are the diagonal of the Gauss-Newton matrix (Sophia, 2305.14342,
        2.3). No gradient goes through the drawing. There is a generator for each row: what a row draws does not depend
        on the others.
        """
        raise NotImplementedError

    def within(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function that uses this system's parts from outside its `forward`.

        Where weights are sharded, those that belong to no block are gathered for the time of the call, as around
        `forward`. Evaluation and generation go through here; every rank has to come.
        """
        return function(*args, **kwargs)


class PooledSystem(System):
    """A system with objectives over all items of a step, whatever row, micro-batch or rank they are in.

    Its `forward` gives `features`, tensors with one entry an item along the first axis, in one order: [n, …] (a learned
    temperature too, expanded to [n]). The trainer gathers them and hands gradients back. In evaluation the items are
    those of the whole split.
    """

    def pooled_losses(self, features: dict[str, Tensor], own: slice = ALL) -> dict[str, Tensor]:
        """Sums of losses by objective, from the features of all items, in float32: a pure function, no parameters.

        `own`: only what these items contribute. Over items that are split in any way it adds up to the whole: each rank
        works out its own, and evaluation some at a time.
        """
        raise NotImplementedError

    def pooled_scores(self, features: dict[str, Tensor]) -> dict[str, float]:
        """Numbers that are no means over items, such as recalls, from the features of a whole split in host memory."""
        return {}


@dataclass(frozen=True, slots=True)
class Tower:
    """The submodule `name`, whose `features` of a medium are `width` wide, in `rows` rows for every item, or one for
    each of its positions; `settings`, in plain values, is what decides them besides its weights."""

    name: str
    width: int
    settings: dict[str, Any]
    rows: int | None = None

    @property
    def shape(self) -> FeatureShape:
        return FeatureShape(self.width, self.rows)


class GenerativeSystem(System):
    """A system that writes text: its objective is `next_token` on the batch's labels."""

    media_towers: dict[str, Tower]
    """By medium; none in a system of text alone."""
    language: Any
    """The causal language model of transformers."""
    decodes_itself: bool
    """transformers' `generate` cannot run it with its cache: `mm.models.decode` writes its text."""

    sparsity: Sparsity | None
    """Of a language model with experts or mixture of depths."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"next_token": 1.0}
        self.media_towers = {}
        self.sparsity = None
        self.decodes_itself = False

    def sparsify(self, config: BackboneSection, media: tuple[str, ...]) -> None:
        """Give the language model experts and mixture of depths, as the section says. Called once all parts are there.

        Raises `ConfigError` where the model or the media do not fit.
        """
        if config.routing is None:
            return
        published = config.language.name is not None  # type: ignore[attr-defined]
        self.sparsity = Sparsity(self.language, config, published, media)
        self.decodes_itself = True
        if self.sparsity.learns:
            self.weights = {**self.weights, "routers": 1.0}
        if self.sparsity.auxiliary == "alone":
            self.requires_grad_(False)
            self.sparsity.requires_grad_()

    def begin_step(self, step: int, steps: int) -> None:
        if self.sparsity is not None:
            self.sparsity.step = step

    def adopt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.sparsity is None else adopt(tensors, self.state_dict())

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        counts = {"next_token": (batch.labels != IGNORE).sum()}
        if "routers" in self.weights:  # in evaluation nothing is chosen that they could be held against
            counts["routers"] = (batch.segment_ids > 0).sum() * self.training
        return counts

    def forward(self, batch: PackedBatch) -> Output:
        routing = self.routing(batch)
        return self.output(batch, self.token_losses(batch, routing), routing)

    def output(self, batch: PackedBatch, losses: Tensor, routing: Routing | None) -> Output:
        """Of the losses of a batch's targets, float32 [K], and of what the routers left behind, if there are any."""
        row = batch.learned() // batch.labels.shape[1]
        rows = losses.detach().new_zeros(len(batch.labels)).index_add_(0, row, losses.detach())
        output = Output({"next_token": losses.sum()}, self.counts(batch), rows={"next_token": rows})
        if routing is None or self.sparsity is None:
            return output
        if "routers" in self.weights:
            output.losses["routers"] = self.sparsity.loss(routing) if self.training else losses.new_zeros(())
        metrics, counts = self.sparsity.metrics(routing)
        return replace(output, metrics=metrics, metric_counts=counts)

    def routing(self, batch: PackedBatch) -> Routing | None:
        """Of a model with experts or mixture of depths: in training experts choose, else auxiliary routers say.

        Raises `ConfigError` in evaluation without auxiliary routers.
        """
        return None if self.sparsity is None else self.sparsity.routing(batch, choose=self.training)

    def token_losses(self, batch: PackedBatch, routing: Routing | None = None) -> Tensor:
        """-log p in nats, float32, of every target (label that is not -100), row by row."""
        routing, media, meta = routing or self.routing(batch), self.media_seen(batch), self.meta_tokens(batch)
        return backbone.token_losses(self.language, self.embed(batch), batch, routing, media=media, meta=meta)

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("next_token",)

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        routing, media, meta = self.routing(batch), self.media_seen(batch), self.meta_tokens(batch)
        losses = backbone.drawn_losses(self.language, self.embed(batch), batch, generators, routing, media, meta)
        return {"next_token": losses.sum()}

    def logits(
        self, batch: PackedBatch, keep: Tensor, packing: Packing | None = None, media: "MediaSeen | None" = None
    ) -> Tensor:
        """[K, V] at flat positions, int64 [K] (row * L + position). `packing`: see `backbone.run`; `media`: other than
        those of the batch, where there is a memory of positions before these."""
        return backbone.run(
            self.language, self.embed(batch), batch.segment_ids, batch.position_ids, keep, batch.isolate_segments,
            routing=self.routing(batch), packing=packing, media=media or self.media_seen(batch),
            meta=self.meta_tokens(batch),
        )  # fmt: skip

    def embed(self, batch: PackedBatch) -> Tensor:
        """[B, L, D]: what the language model reads, media features in their places."""
        embeddings: Tensor = self.language.get_input_embeddings()(batch.input_ids)
        for medium, media in batch.media.items():
            features = self.known_features(medium, media, embeddings.dtype)
            embeddings = place(embeddings, self.connect(medium, features), media)
        return embeddings

    def media_seen(self, batch: PackedBatch) -> "MediaSeen | None":
        """What the positions of a batch look at through cross-attention, in a model whose decoder layers have that."""
        return None

    def meta_tokens(self, batch: PackedBatch) -> Tensor | None:
        """bool [B, L], which tokens are meta-tokens, in a model with meta-attention."""
        return None

    def known_features(self, medium: str, media: MediaBatch, dtype: torch.dtype) -> Tensor:
        """`features`; where these are there already, they are not computed but brought to a type of number."""
        return self.features(medium, media) if media.features is None else media.features.to(dtype)

    def features(self, medium: str, media: MediaBatch) -> Tensor:
        """[sum rows, D]: what a medium's tower gives for all items, in their order, after pooling without weights: a
        row for each position, or as many for every item as its `Tower` says.

        It depends on the tower and the media alone, so for a frozen tower it can be computed once (`mm.data.features`).
        A system without media has none.
        """
        raise NotImplementedError

    def connect(self, medium: str, features: Tensor) -> Tensor:
        """[sum rows, D] to [sum length, width of the language model]: what is trained on `features`, if anything."""
        return features


def place(embeddings: Tensor, features: Tensor, media: MediaBatch) -> Tensor:
    """Media features in the positions of their placeholders.

    Args:
        embeddings: [B, L, D]; features: [sum length, D] in item order.

    A dummy's features (of a rank without this medium, which runs the tower because the others do) change nothing and
    stay in the graph, so that its sharded weights take part in the backward pass.
    """
    if media.dummy:
        return embeddings + 0.0 * features.sum().to(embeddings.dtype)
    flat = embeddings.flatten(0, 1)
    slots = media.slots(embeddings.shape[1])
    return flat.index_put((slots,), features.to(flat.dtype)).view_as(embeddings)


@torch.no_grad()
def weights_digest(system: System) -> str:
    """Tells one set of weights from another by up to 256 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in system.state_dict().items():
        flat = tensor.flatten()
        some = flat[:: max(1, len(flat) // 256)][:256].float().cpu().numpy()
        digest.update(name.encode() + str(tuple(tensor.shape)).encode() + some.tobytes())
    return digest.hexdigest()[:16]
