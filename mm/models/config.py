"""The sections that models are configured by. No torch here: it is imported when something is built."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, cast

from pydantic import Field, field_validator, model_validator

from mm.data.sample import Chat
from mm.errors import ConfigError
from mm.settings import Count, Kinds, KindSection, Number, Section

if TYPE_CHECKING:
    from mm.data.layout import AudioLayout, Layout
    from mm.data.media import ImageTransform
    from mm.data.tokenizer import Tokenizer
    from mm.models.system import System


class SystemConfig(Protocol):
    """What a run asks of the config of a system, besides being a `KindSection`."""

    kind: str

    def layout(self) -> "Layout":
        """What data must know of this model. Imports no torch, unless how many positions a picture takes is a matter of
        what merges in a tower (`VisionConfig.features`)."""
        ...

    def build(self, weights: bool = True) -> "System":
        """The model in float32 on the default device; without `weights` nothing published is read, all is random."""
        ...


class MergeConfig(Section):
    """Token merging (ToMe, 2210.09461): in every block of a vision transformer, between attention and MLP, the `r`
    tokens that are most like another one are merged with it. Works in training and without any."""

    r: int = Field(default=8, ge=0)
    """Tokens that a block merges away, at most half of the patches that are left."""
    inflect: Number = Field(default=0.0, ge=-1, le=1)
    """How the number changes from the first block to the last, in a straight line: -1, from 2 r to none; 0, not at all;
    1, from none to 2 r."""
    proportional: bool = True
    """Attention counts a merged token as often as it has patches (the log of that is added to the logits)."""
    restore: bool = False
    """Each patch gets the feature of the token that it was merged into, so that there is a grid again, for connectors
    that pool it: the tower is cheaper, the language model reads as much as before."""


class VisionConfig(Section):
    """A vision tower of timm or open_clip: a vision transformer, or a convolutional one."""

    name: str
    """`timm/vit_so400m_patch14_siglip_384` or `open_clip/ViT-B-32.laion2b_s34b_b79k`; a tag after a dot picks the
    published weights."""
    pretrained: bool = True
    """Take the published weights; `false` starts from random ones."""
    image_size: int = Field(default=384, ge=1)
    """Pictures are resized to a square of so many pixels; with `resize: native`, what position embeddings are resampled
    from."""
    resize: Literal["square", "native"] = "square"
    """`square` ignores the aspect ratio. `native` keeps it: a picture becomes a grid of whole patches, never enlarged
    but by rounding to them. For vision transformers of timm, and a connector with `pool`."""
    max_patches: int | None = Field(default=None, ge=1)
    """With `resize: native`, the patches of a picture at most; larger ones are scaled down. By default those of the
    square."""
    block: int = -2
    """The block whose output is used; -1 is the last."""
    patch_size: int | None = Field(default=None, ge=1)
    """Pixels along the side of a feature; by default that in `options` or in the name. Convolutional towers need it."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, taken off pixels from 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, what pixels are divided by."""
    crop: Number = Field(default=1.0, gt=0, le=1)
    """In training, pictures are cut to a drawn box of at least this share of their area; 1: never."""
    flip: bool = False
    """In training, every second picture is mirrored, left to right."""
    norm: bool = False
    """Features go through the tower's final norm, as those of CLIP do that a resampler reads."""
    class_token: bool = False
    """The class token stays in front of the patches' features, as one more of them."""
    merge: MergeConfig | None = None
    """Let every block merge the tokens that are most alike: `{r: 8}`."""
    options: dict[str, Any] = {}
    """Arguments of the timm model: `{patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}` makes a small one. Of an
    open_clip model, keys of its `vision_cfg`: `{patch_size: 8, width: 128, layers: 4, head_width: 32}`."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if not name.startswith(("timm/", "open_clip/")):
            raise ValueError("expected a model of timm as timm/NAME, or of open_clip as open_clip/NAME.WEIGHTS")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> "VisionConfig":
        if self.name.startswith("open_clip/") and self.pretrained and "." not in self.name:
            raise ValueError(f"{self.name} names no weights: put their tag after a dot, or set `pretrained: false`")
        if self.resize == "native" and not self.name.startswith("timm/"):
            raise ValueError("`resize: native` is for vision transformers of timm, which has those of open_clip too")
        if self.max_patches is not None and self.resize == "square":
            raise ValueError("`max_patches` is for `resize: native`; squares have as many as `image_size` gives")
        if self.resize == "native" and (self.merge or self.class_token):
            raise ValueError("`merge` and `class_token` are for squares; set `resize: square`")
        if self.class_token and self.merge and self.merge.restore:
            raise ValueError("`merge.restore` puts features back in a grid, and a class token has no place in it")
        return self

    @property
    def patch(self) -> int:
        """Pixels along the side of a feature: `patch_size`, else what `options` or the model's name say."""
        in_name = re.search(r"(?:patch|-)(\d+)", self.name)  # vit_base_patch16_224, ViT-B-32
        return int(self.patch_size or self.options.get("patch_size") or (in_name and in_name[1]) or 16)

    @property
    def side(self) -> int:
        """Patches along the side of the square."""
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Patches of the square."""
        return self.side**2

    @property
    def is_grid(self) -> bool:
        """Whether there is a feature for every patch of a picture, and nothing else."""
        return not self.class_token and (self.merge is None or self.merge.restore)

    @property
    def features(self) -> int:
        """Features of a square picture that the tower gives. Asks the tower for its blocks, where they merge."""
        if self.merge is None or self.merge.restore:
            return self.patches + self.class_token
        from mm.models.merging import counts, schedule
        from mm.models.vision import depth_of

        blocks = schedule(self.merge.r, self.merge.inflect, depth_of(self))
        return counts(self.patches, blocks)[-1] + self.class_token

    def transform(self) -> "ImageTransform":
        """What is made of pictures before the tower sees them."""
        from mm.data.media import ImageTransform, Native

        size = self.image_size if self.resize == "square" else Native(self.patch, self.max_patches or self.patches)
        return ImageTransform(size, self.mean, self.std, self.crop, self.flip)


MERT_95M: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False, "hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.1, "layerdrop": 0.05,
}  # fmt: skip
"""Of MERT-v1-95M's config.json, what is read here or is not as in transformers' HubertConfig."""


class AudioEncoderConfig(Section):
    """An encoder of sound with the structure of HuBERT, as MERT is."""

    config: dict[str, Any] = {}
    """Fields of transformers' HubertConfig over those of MERT-v1-95M: `{hidden_size: 192, num_hidden_layers: 4, …}`.
    `do_stable_layer_norm: true` puts norms before the layers, as in MERT-v1-330M. `feature_extractor_cqt: true`, of
    MERT's own config, lets it read a constant-Q transform too (`feature_extractor_cqt_bins`, 336). Those of masking
    (`mask_time_prob`, …) have no effect."""
    sampling_rate: int = Field(default=24_000, ge=1)
    """Hz of the recordings that the encoder takes."""
    normalize: bool = False
    """Bring every clip to zero mean and unit variance first. MERT was trained without; its released
    preprocessor_config.json says `do_normalize: false` in one revision and true in another."""

    @model_validator(mode="after")
    def _takes_packed_clips(self) -> "AudioEncoderConfig":
        values = self.values
        if len({len(values[name]) for name in ("conv_dim", "conv_kernel", "conv_stride")}) != 1:
            raise ValueError("config.conv_dim, conv_kernel and conv_stride: expected one number for each convolution")
        if values.get("conv_pos_batch_norm"):
            raise ValueError("config.conv_pos_batch_norm: a clip would depend on the others of its micro-batch")
        if values.get("deepnorm"):
            raise ValueError("config.deepnorm: no published MERT has it, and it is not implemented")
        return self

    @property
    def values(self) -> dict[str, Any]:
        """`config` over MERT-v1-95M's."""
        return {**MERT_95M, **self.config}

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.values["conv_stride"])

    @property
    def window(self) -> int:
        """Samples that one frame is made from."""
        kernels, strides = self.values["conv_kernel"], self.values["conv_stride"]
        return 1 + sum((kernel - 1) * math.prod(strides[:number]) for number, kernel in enumerate(kernels))

    @property
    def cqt_bins(self) -> int:
        """Bins of the constant-Q transform that is read beside the waveform; 0 where none is."""
        return self.values.get("feature_extractor_cqt_bins", 336) if self.values.get("feature_extractor_cqt") else 0

    def frames(self, samples: int) -> int:
        """Of a clip; below 1 where it is shorter than `window`."""
        return (samples - self.window) // self.hop + 1

    def layout(self) -> "AudioLayout":
        """What data must know: a position of the row for every frame."""
        from mm.data.layout import AudioLayout

        return AudioLayout(self.sampling_rate, self.hop, self.window, alone=True)


class PoolMLPConfig(KindSection):
    """Average pooling, then a two-layer MLP (Open-Qwen2VL's `AvgPoolProjector`)."""

    takes_grid: ClassVar[bool] = True
    kind: str = "pool_mlp"
    tokens: int = Field(default=144, ge=1)
    """Positions that a picture takes in the row, a square number: adaptive pooling to that square. The weights do not
    depend on it."""
    pool: int | None = Field(default=None, ge=1)
    """Instead of `tokens`: a position for every window of so many by so many patches, of grids of any size."""

    @field_validator("tokens")
    @classmethod
    def _is_square(cls, tokens: int) -> int:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"expected a square number; the nearest are {side**2} and {(side + 1) ** 2}")
        return tokens

    def count(self, rows: int, columns: int) -> int:
        """Positions of a picture with such a grid of patches."""
        return self.tokens if self.pool is None else -(-rows // self.pool) * -(-columns // self.pool)

    def positions(self, vision: VisionConfig) -> int:
        """Of a square picture in the row."""
        return self.count(vision.side, vision.side)

    def build(self, width: int, out_width: int, weights: bool = True) -> Any:
        from mm.models.connectors import PoolMLP

        return PoolMLP(self.tokens, width, out_width, self.pool)


class MLPConfig(KindSection):
    """A two-layer MLP for each feature that the tower gives, in whatever order they are: one position each."""

    takes_grid: ClassVar[bool] = False
    kind: str = "mlp"

    def positions(self, vision: VisionConfig) -> int:
        """Of a square picture in the row."""
        return vision.features

    def build(self, width: int, out_width: int, weights: bool = True) -> Any:
        from mm.models.connectors import MLP

        return MLP(width, out_width)


def check_connector(vision: VisionConfig, connector: Any) -> None:
    """Raise `ValueError` where a connector cannot take what a tower gives."""
    grid: PoolMLPConfig | None = connector if connector.takes_grid else None
    if vision.resize == "native":
        if grid is None or grid.pool is None:
            raise ValueError("vision.resize native gives grids of any size: set connector.pool, not connector.tokens")
        if grid.pool**2 > (most := vision.max_patches or vision.patches):
            raise ValueError(f"connector.pool {grid.pool}: larger windows than the {most} patches of a picture")
        return
    if grid and not vision.is_grid:
        what = "vision.class_token" if vision.class_token else "vision.merge"
        raise ValueError(
            f"connector {grid.kind} pools a grid of patches, and with {what} there is none: choose connector.kind mlp"
            + (", or set vision.merge.restore=true" if vision.merge else "")
        )
    if grid and grid.positions(vision) > vision.patches:
        raise ValueError(
            f"connector.tokens {grid.tokens} is more than the {vision.patches} patches of vision at "
            f"{vision.image_size} pixels"
        )


NewRows = Literal["mean", "normal", "subtokens"]


class LanguageConfig(Section):
    """A causal language model of transformers: published (`name`), or from random weights (`config`)."""

    name: str | None = None
    """A hub name or a folder that transformers reads: `Qwen/Qwen2.5-1.5B-Instruct`. Of Chameleon the language model is
    taken, also from a folder of Meta's own layout (`models/7b`)."""
    config: dict[str, Any] | None = None
    """A transformers config with its `model_type`: `{model_type: qwen2, hidden_size: 256, …}`. `{model_type: chameleon,
    …}` is Chameleon's language model, `swin_norm: true` with the norms of its 34B and of MoMa; the dropout of 0.1 after
    attention and MLP, which its 7B was trained with, is not in transformers' layers."""
    tokenizer: str | None = None
    """A folder, hub name or `builtin:emoji`; by default that of `name`."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens to append to the tokenizer where it lacks them."""
    new_rows: NewRows | None = None
    """What the embeddings of tokens begin as that a published model's own tokenizer lacks, whether or not there are
    spare rows for them: the `mean` of its tokens' rows, drawn from the `normal` distribution that has their mean and
    covariance, or the mean of the rows of the `subtokens` that the model's own tokenizer makes of their names. By
    default spare rows stay what they are, and a model with too few is refused."""
    init: Literal["default", "scaled"] = "default"
    """Random weights of a `config`: as transformers draws them for its kind, or `scaled`: the last matrices of
    attention and MLP, which write to the residual, from a normal distribution with `initializer_range` / sqrt(2 x
    layers), as in GPT-2 and Megatron. GPT-2's own kind always has that."""

    @model_validator(mode="after")
    def _names_one_model(self) -> "LanguageConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (published weights) or `config` (random weights)")
        if self.name is None and self.tokenizer is None:
            raise ValueError("a model from a `config` needs a `tokenizer`")
        if self.name is not None and self.init != "default":
            raise ValueError("`init` is for the random weights of a `config`; with `name` weights are published ones")
        if self.new_rows == "subtokens" and self.name is None:
            raise ValueError("`new_rows: subtokens` needs a `name`, whose tokenizer splits what is new")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`: qwen2, llama, …")
        return self

    @property
    def tokenizer_name(self) -> str:
        return cast(str, self.tokenizer or self.name)


class DistillConfig(Section):
    """Other language models that one learns from, beside the text itself (Hinton et al., 1503.02531)."""

    teachers: list[str] = Field(min_length=1)
    """Hub names or folders of causal language models with the same tokenizer, such as `mm export` writes. Several are
    an ensemble: the geometric mean of what they say."""
    weight: Number = Field(default=0.5, gt=0, le=1)
    """Of the teachers' share of the loss; the text's labels have the rest."""
    temperature: Number = Field(default=1.0, gt=0)
    """What logits are divided by, of teachers and student."""


class MetaTokensConfig(Section):
    """Meta-tokens: places in a document that are no text, where a model may keep what it needs later (2509.16278). They
    are put in when documents are scanned, and nothing is learned at them."""

    rate: Number = Field(default=0.1, gt=0, le=1)
    """How many, for each token of a document."""
    token: str = "<meta>"
    """What the vocabulary calls them; appended to the tokenizer where it lacks it. In a prompt it stands for one."""
    attention: bool = True
    """Meta-attention: in every layer, between self-attention and MLP, meta-tokens attend to those before them. Without
    it they are tokens like others, which tells what is owed to them alone."""
    zero_positions: bool = False
    """In evaluation and generation meta-tokens have no position, in a model whose attention is rotated by it."""


class NoiseConfig(Section):
    """Gumbel-Sigmoid noise on the scores of routers: it makes experts that began as copies drift apart (MoMa, 2.5)."""

    steps: Count = Field(ge=1)
    """Steps from the stage's first on that have it."""
    decay: bool = False
    """It shrinks to nothing over these steps, in a straight line; false: it stays as it is and then ends."""


class ExpertsConfig(Section):
    """Experts in place of the MLPs of a language model, in groups by the modality of the token that comes in (MoMa,
    2407.21770 2.2). Each expert chooses the tokens of its modality that it scores highest; a token gets the sum of what
    its experts give, weighed by their scores, or nothing. A group of one expert has no router and takes every token."""

    text: int | None = Field(default=None, ge=1)
    """Experts for text tokens."""
    image: int | None = Field(default=None, ge=1)
    """Experts for picture tokens, begin and end of picture among them."""
    audio: int | None = Field(default=None, ge=1)
    """Experts for tokens of recordings."""
    video: int | None = Field(default=None, ge=1)
    """Experts for tokens of clips."""
    all: int | None = Field(default=None, ge=1)
    """Experts that every modality without a group of its own shares: `{all: 8}` is the paper's `moe_8x`."""
    hidden: int | None = Field(default=None, ge=1)
    """Inner width of an expert; by default that of the MLP it stands for."""
    capacity: Number | None = Field(default=None, gt=0, le=1)
    """Share of its group's tokens that an expert takes; by default 1 / the group's experts."""
    normalize: bool = False
    """Weights of a token's experts sum to 1. As published they do not, and a norm behind the experts takes the scale
    off; a model with its norm in front (most have) keeps closer to the dense one that it came from with this."""
    routing_rows: int | None = Field(default=None, ge=1)
    """Rows whose tokens the experts choose from together; by default those of a micro-batch, as published: then
    `train.micro_batch` changes results. With a number of rows nothing about how a step is split does."""
    noise: NoiseConfig | None = None
    """Noise on the scores in training; none in evaluation."""
    auxiliary: Literal["none", "along", "alone"] = "none"
    """Routers that look at one token alone, which evaluation and generation need, because the choice of a whole batch
    looks ahead. `along`: they learn beside the model, which does not notice. `alone`: they learn and nothing else
    does, the stage of its own that the paper gives them. `none`: there are none, and nothing is evaluated."""

    @property
    def groups(self) -> dict[str, int]:
        """Experts of each group."""
        names = ("text", "image", "audio", "video", "all")
        return {name: number for name in names if (number := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _has_groups(self) -> "ExpertsConfig":
        if not self.groups:
            raise ValueError("name a group: {text: 4, image: 4} or {all: 8}")
        return self


class DepthsConfig(Section):
    """Mixture of depths (Raposo et al., 2404.02258, as in MoMa 2.3): in some layers only the tokens that a router
    scores highest take part, and the others pass by unchanged. Where there are experts too, `routing_rows` and
    `auxiliary` are theirs."""

    capacity: Number = Field(default=0.25, gt=0, le=1)
    """Share of the tokens that take part in such a layer."""
    every: int = Field(default=2, ge=1)
    """Every so many layers are such."""
    first: int = Field(default=0, ge=0)
    """The first of them."""
    routing_rows: int | None = Field(default=None, ge=1)
    """As of experts, in a model without them."""
    auxiliary: Literal["none", "along", "alone"] = "none"
    """As of experts, in a model without them."""


class ContrastiveConfig(Section):
    """An objective that brings a picture and its text together and keeps them apart from all others of the step: of
    CLIP (2103.00020) or SigLIP (2303.15343), as open_clip computes them. The step's pairs are those of all
    micro-batches and ranks."""

    width: Count = Field(default=512, ge=1)
    """Numbers of a picture's or a text's feature."""
    loss: Literal["clip", "siglip"] = "clip"
    """`clip`: each picks its partner among all; `siglip`: each pair by itself is one or is none."""
    weight: Number = Field(default=1.0, ge=0)
    """Its factor in the total loss."""
    sources: tuple[str, ...] = ()
    """Names of the sources that have pairs; by default all have. A pair is a sample with one medium and text that is
    learned."""
    temperature: Number | None = None
    """What the logarithm of the factor of all similarities begins as; by default log(1 / 0.07), as CLIP's, or log(10),
    as SigLIP's, whose bias begins as -10."""

    @property
    def initial_temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return math.log(1 / 0.07) if self.loss == "clip" else math.log(10)


class BackboneSection(KindSection):
    """What the sections of systems with a language model have in common."""

    experts: ExpertsConfig | None = None
    """Experts in place of the language model's MLPs, by modality: `{text: 4, image: 4}`. From published weights, or
    from those of a stage before, every expert begins as a copy."""
    depths: DepthsConfig | None = None
    """Layers of the language model that most tokens pass by."""

    @property
    def routing(self) -> ExpertsConfig | DepthsConfig | None:
        """The section whose `routing_rows` and `auxiliary` count; None of a dense model."""
        return self.experts or self.depths


class TemplateConfig(Section):
    """How documents and conversations are spelt. The defaults are Open-Qwen2VL's for documents, Qwen's for
    conversations."""

    bos: str | None = "<s>"
    """The token that a document opens with."""
    eos: str | None = "<|im_end|>"
    """The token that a document ends with; always learned."""
    pad: str = "<|endoftext|>"
    """The token of padding and of media placeholders; never learned."""
    after_media: str = "\n"
    """Put before text that follows media; in a conversation, only behind media that open a turn."""
    chat: Chat = "chatml"
    """How conversations are spelt: `chatml`, Qwen's own form; `release` and `fixed`, as Open-Qwen2VL was fine-tuned
    before and after a change of its code; `plain`, `Question: …` and `Answer: …`, for tokenizers without chat
    tokens."""
    system: str | None = None
    """The system turn of conversations that have none; by default that of `chat`, `""` for none at all."""
    around_image: tuple[str, str] | None = None
    """Two tokens, begin and end of a picture, that its positions stand between; never cut from it. They are learned
    where the picture is."""
    bos_behind_media: bool = False
    """`bos` stands behind the media that a document opens with, between these and its text: media as a prefix, as in
    BLIP-2 and SimVLG. Of a document that is split, the first piece alone has it then."""

    def layout(self, tokenizer: "Tokenizer", **media: Any) -> "Layout":
        """The layout of a model with this tokenizer. Raises `DataError` where that lacks one of the tokens."""
        from mm.data.layout import Layout, Template

        for token in (self.bos, self.eos, *(self.around_image or ())):
            if token is not None:
                tokenizer.id(token)
        template = Template(
            self.bos, self.eos, self.after_media, self.chat, self.system, self.around_image, self.bos_behind_media
        )
        return Layout(tokenizer, template, tokenizer.id(self.pad), **media)


class FrameSlots(Section):
    """A square picture in the row."""

    tokens: int = Field(default=144, ge=0)
    """Positions that it takes."""
    cost: int = Field(default=729, ge=0)
    """Encoder tokens (patches)."""
    size: int = Field(default=384, ge=1)
    """Pixels along the side of the square that the encoder sees."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop: Number = Field(default=1.0, gt=0, le=1)
    """In training, pictures are cut to a drawn box of at least this share of their area; 1: never."""
    flip: bool = False
    """In training, every second picture is mirrored."""


class NativeSlots(Section):
    """Pictures in their own aspect ratio: a grid of whole patches, never enlarged but by rounding to them."""

    patch: int = Field(default=14, ge=1)
    """Pixels along the side of a patch."""
    max_patches: int = Field(default=729, ge=1)
    """Of a picture at most; larger ones are scaled down."""
    pool: int = Field(default=1, ge=1)
    """A position of the row stands for a window of so many by so many patches."""

    @model_validator(mode="after")
    def _windows_fit(self) -> "NativeSlots":
        if self.pool**2 > self.max_patches:
            raise ValueError(f"`pool` {self.pool}: larger windows than the {self.max_patches} patches of a picture")
        return self


class ImageSlots(FrameSlots):
    """A picture in the row."""

    native: NativeSlots | None = None
    """Keep the aspect ratio; `tokens`, `cost` and `size` are then of no effect."""


class AudioSlots(Section):
    """A recording in the row."""

    sampling_rate: int = Field(default=16_000, ge=1)
    """Hz that recordings are resampled to, in mono."""
    hop: int = Field(default=320, ge=1)
    """Samples to a position of the row."""


class VideoSlots(FrameSlots):
    """A clip in the row: `tokens` and `cost` are those of one frame."""

    frames: int = Field(default=8, ge=1)
    """Frames of a clip, evenly spaced."""


class LayoutConfig(KindSection):
    """No model, only what data must know of one: packs and loads data sets of any medium, for a loop of your own."""

    trains: ClassVar[bool] = False
    kind: str = "layout"
    tokenizer: str
    """A folder, hub name or `builtin:emoji`."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens to append to the tokenizer where it lacks them."""
    template: TemplateConfig = TemplateConfig()
    image: ImageSlots | None = None
    audio: AudioSlots | None = None
    video: VideoSlots | None = None

    def layout(self) -> "Layout":
        from mm.data.layout import AudioLayout, ImageLayout, NativeLayout, VideoLayout
        from mm.data.media import ImageTransform, Native
        from mm.data.tokenizer import Tokenizer

        def transform(slots: FrameSlots, size: int | Native) -> ImageTransform:
            return ImageTransform(size, slots.mean, slots.std, slots.crop, slots.flip)

        image, audio, video = self.image, self.audio, self.video
        pictures: ImageLayout | NativeLayout | None = None
        if image and image.native:
            native = Native(image.native.patch, image.native.max_patches)
            pictures = NativeLayout(image.native.pool, transform(image, native))
        elif image:
            pictures = ImageLayout(image.tokens, image.cost, transform(image, image.size))
        return self.template.layout(
            Tokenizer.load(self.tokenizer, self.added_tokens),
            image=pictures,
            audio=audio and AudioLayout(audio.sampling_rate, audio.hop),
            video=video and VideoLayout(video.frames, video.tokens, video.cost, transform(video, video.size)),
        )

    def build(self, weights: bool = True) -> "System":
        raise ConfigError("model.kind layout packs and loads data; it has nothing to train: choose a model")


CONNECTORS = Kinds(
    "connector",
    {
        "pool_mlp": "mm.models.config:PoolMLPConfig",
        "mlp": "mm.models.config:MLPConfig",
        "tomeformer": "mm.models.tomeformer_config:TomeFormerConfig",
    },
    default="pool_mlp",
)
ConnectorConfig = Annotated[Any, CONNECTORS]

SYSTEMS = Kinds(
    "model",
    {
        "open_qwen2vl": "mm.models.systems.open_qwen2vl.config:OpenQwen2VLConfig",
        "text_lm": "mm.models.systems.text_lm.config:TextLMConfig",
        "masked_lm": "mm.models.systems.masked_lm.config:MaskedLMConfig",
        "mert": "mm.models.systems.mert.config:MertConfig",
        "tagger": "mm.models.systems.tagger.config:TaggerConfig",
        "joint": "mm.models.systems.joint.config:JointConfig",
        "moma": "mm.models.systems.moma.config:MomaConfig",
        "vq": "mm.models.systems.vq.config:VQConfig",
        "cosmo": "mm.models.systems.cosmo.config:CosmoConfig",
        "simvlg": "mm.models.systems.simvlg.config:SimVLGConfig",
        "clip": "mm.models.systems.clip.config:ClipConfig",
        "layout": "mm.models.config:LayoutConfig",
    },
)
ModelConfig = Annotated[Any, SYSTEMS]
