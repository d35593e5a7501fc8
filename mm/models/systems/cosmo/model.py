"""COSMO as a composition: a language model split in two, a vision tower with a resampler, and two objectives.

The lower half of the language model reads text alone; before layers of the upper half gated blocks look at the pictures
(`mm.models.gated`). At the border a learned query takes a text's vector and one latent of the resampler is a picture's:
these are compared with all others of the step. A picture is one position of the row, where the language model reads the
token that says so. Sources: Wang et al., 2401.00849; github showlab/cosmo, `src/multimodal_model`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.batch import IGNORE, MediaBatch, PackedBatch, collate
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Special, Text
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.contrastive import contrastive_sum, recalls
from mm.models.gated import MediaSeen, PerceiverResampler, TextQuery, ends, insert_gated, scopes, see
from mm.models.new_tokens import NewTokens
from mm.models.system import ALL, GenerativeSystem, Output, PooledSystem, Tower
from mm.models.systems.cosmo.config import CosmoConfig
from mm.models.vision import VisionTower


@dataclass(frozen=True, slots=True)
class Pairs:
    """Segments with one medium and learned text: int64 [n] each, the number of the medium among all of the batch, the
    segment's first flat position, and how many it has."""

    media: Tensor
    start: Tensor
    length: Tensor


class Cosmo(GenerativeSystem, PooledSystem):
    """See the module. Submodules `vision`, `resampler`, `language` (with `gated` in its upper layers), `text_query`,
    `image_projection`, `text_projection`, where they are trained by themselves `new_tokens`, and the parameters
    `temperature` and, of SigLIP's loss, `bias` are what name patterns in configs match.

    Objectives: `next_token`; `contrastive`, over the pairs of a step. `features` of pairs: image and text [n, width],
    of length 1; scale and bias [n], all equal.
    """

    def __init__(self, config: CosmoConfig, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        contrastive, resampler = config.contrastive, config.resampler
        self.weights = {"next_token": config.generative, "contrastive": contrastive.weight}
        self.decodes_itself = True
        self._layout = config.layout()
        tokenizer = self._layout.tokenizer
        self.visual = tokenizer.id(config.visual_token)
        self.vision = VisionTower(config.vision, weights)
        self.language = backbone.load(config.language, len(tokenizer), weights)
        self.new_tokens = None
        if config.train_new_tokens:
            first = len(Tokenizer.load(config.language.tokenizer_name))
            if first == len(tokenizer):
                raise ConfigError("model.train_new_tokens: the tokenizer has all tokens already; leave it out")
            self.new_tokens = NewTokens(self.language, first, len(tokenizer) - first)
        width = self.language.config.hidden_size
        insert_gated(self.language, config, self.vision.width)
        self.resampler = PerceiverResampler(self.vision.width, resampler.latents, resampler.depth, resampler.heads)
        self.text_query = TextQuery(width)
        self.image_projection = nn.Linear(self.vision.width, contrastive.width, bias=False)
        self.text_projection = nn.Linear(width, contrastive.width, bias=False)
        self.temperature = nn.Parameter(torch.tensor([config.initial_temperature]))
        self.bias = nn.Parameter(torch.tensor([-10.0])) if contrastive.loss == "siglip" else None
        tower = config.vision.model_dump(mode="json", exclude={"pretrained", "crop", "flip"})
        rows = self.vision.features
        self.media_towers = {"image": Tower("vision", self.vision.width, {"vision": tower}, rows)}
        if config.frames is not None:
            settings = {"vision": tower, "frames": config.frames}
            self.media_towers["video"] = Tower("vision", self.vision.width, settings, config.frames * rows)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {**super().counts(batch), "contrastive": torch.tensor(len(self._pairs(batch).media))}

    def forward(self, batch: PackedBatch) -> Output:
        latents = self._latents(batch)
        seen = replace(self._seen(batch, latents), left=[])
        losses = backbone.token_losses(self.language, self.embed(batch), batch, media=seen)
        assert seen.left is not None
        pairs, (hidden,) = self._pairs(batch), seen.left
        features = {
            "image": self._image_features(latents[pairs.media]),
            "text": self._text_features(hidden, pairs.start, pairs.length),
            "scale": self.temperature.float().exp().expand(len(pairs.media)),
        }
        if self.bias is not None:
            features["bias"] = self.bias.float().expand(len(pairs.media))
        metrics = {"scale": self.temperature.detach().float().exp().mean()}
        return replace(self.output(batch, losses, None), features=features, metrics=metrics)

    def pooled_losses(self, features: dict[str, Tensor], own: slice = ALL) -> dict[str, Tensor]:
        loss = self.config.contrastive.loss
        image, text = features["image"], features["text"]
        return {"contrastive": contrastive_sum(image, text, features["scale"], features.get("bias"), loss, own)}

    def pooled_scores(self, features: dict[str, Tensor]) -> dict[str, float]:
        return recalls(features["image"], features["text"])

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S], as the layout has them made, to [n, width], of length 1."""
        return self._image_features(self.connect("image", self.vision.of_squares(pixels).flatten(0, 1)))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """[n, width], of length 1: each as the text of a pair, behind the token of a picture that is not there."""
        layout = self._layout
        parts = [(Special(self.config.visual_token), Text(layout.template.after_media + text)) for text in texts]
        segments = [make_segment(one, layout, f"text {n}", Limits()) for n, one in enumerate(parts)]
        pack = join_segments([(f"text {n}", "", segment) for n, segment in enumerate(segments)])
        batch = collate([pack], layout, len(pack.tokens)).to(self.temperature.device)
        seen = replace(self.media_seen(batch), left=[])
        where = (batch.segment_ids, batch.position_ids, batch.segment_ids.new_zeros(0).long())
        backbone.run(self.language, self.embed(batch), *where, batch.isolate_segments, media=seen)
        assert seen.left is not None
        (hidden,) = seen.left
        length = torch.tensor([len(segment) for segment in segments], device=hidden.device)
        return self._text_features(hidden, length.cumsum(0) - length, length)

    def media_seen(self, batch: PackedBatch) -> MediaSeen:
        return self._seen(batch, self._latents(batch))

    def embed(self, batch: PackedBatch) -> Tensor:
        """[B, L, D]: what the language model reads, in the places of media the token that says so."""
        ids = batch.input_ids.flatten()
        for media in batch.media.values():
            if not media.dummy:
                ids = ids.index_fill(0, media.slots(batch.input_ids.shape[1]), self.visual)
        embeddings: Tensor = self.language.get_input_embeddings()(ids.view_as(batch.input_ids))
        return embeddings

    def features(self, medium: str, media: MediaBatch) -> Tensor:
        features: Tensor = self.vision(media)
        return features

    def connect(self, medium: str, features: Tensor) -> Tensor:
        """[n * rows, D] to [n, 1 + latents, D]: the first of each item for the contrastive objective, the others for
        the language model."""
        rows = self.media_towers[medium].rows
        assert rows is not None
        latents: Tensor = self.resampler(features.unflatten(0, (-1, rows)))
        return latents

    def _image_features(self, latents: Tensor) -> Tensor:
        """[n, 1 + latents, D] to [n, width], of length 1."""
        return F.normalize(self.image_projection(latents[:, 0]).float(), dim=-1)

    def _text_features(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """Of n texts among hidden states [N, D], by their first positions and lengths: [n, width], of length 1."""
        return F.normalize(self.text_projection(self.text_query(hidden, start, length)).float(), dim=-1)

    def _latents(self, batch: PackedBatch) -> Tensor:
        """[M, 1 + latents, D], of all media of the batch, medium by medium."""
        like = self.resampler.latents
        known = {name: self.known_features(name, media, like.dtype) for name, media in _media(batch).items()}
        found = [self.connect(name, features) for name, features in known.items()]
        # A plain tensor, whatever the weight is, and of its whole shape, which DeepSpeed keeps by another name.
        shape = (0, *getattr(like, "ds_shape", like.shape))
        return torch.cat(found) if found else torch.zeros(shape, dtype=like.dtype, device=batch.labels.device)

    def _seen(self, batch: PackedBatch, latents: Tensor) -> MediaSeen:
        config = self.config
        return see(latents[:, 1:], _places(batch), batch.segment_ids, config.immediate, config.faithful)

    def _pairs(self, batch: PackedBatch) -> Pairs:
        """Those of rows whose source has any."""
        scope, places, sources = scopes(batch.segment_ids), _places(batch), self.config.contrastive.sources
        start, end = ends(scope)
        own = scope[places].masked_fill(places < 0, 0)
        size = batch.segment_ids.shape[0] * (batch.segment_ids.shape[1] + 1) + 1
        media = torch.bincount(own, minlength=size)
        learned = torch.bincount(scope[batch.labels.flatten() != IGNORE], minlength=size)
        paired = (own > 0) & (media[own] == 1) & (learned[own] > 0)
        if sources:
            meant = torch.tensor([source in sources for source in batch.sources], device=own.device)
            paired &= meant[places // batch.segment_ids.shape[1]]
        numbers = paired.nonzero()[:, 0]
        first, last = start[places[numbers]], end[places[numbers]]
        return Pairs(numbers, first, last - first + 1)


def _media(batch: PackedBatch) -> dict[str, MediaBatch]:
    """In one order, whatever that of the batch is."""
    return {name: batch.media[name] for name in sorted(batch.media)}


def _places(batch: PackedBatch) -> Tensor:
    """int64 [M]: the flat position of each of the media's tokens, -1 of a dummy."""
    none = torch.zeros(0, dtype=torch.int64, device=batch.segment_ids.device)
    length = batch.segment_ids.shape[1]
    places = [torch.full_like(m.row, -1) if m.dummy else m.row * length + m.position for m in _media(batch).values()]
    return torch.cat([none, *places])
