"""The sections that models are configured by. No torch here: it is imported when something is built."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, cast

from pydantic import Field, field_validator, model_validator

from mm.errors import ConfigError
from mm.settings import Kinds, KindSection, Number, Section

if TYPE_CHECKING:
    from mm.data.layout import Layout
    from mm.data.tokenizer import Tokenizer
    from mm.models.system import System


class SystemConfig(Protocol):
    """What a run asks of the config of a system, besides being a `KindSection`."""

    kind: str

    def layout(self) -> "Layout":
        """What data must know of this model. Imports no torch."""
        ...

    def build(self, weights: bool = True) -> "System":
        """The model in float32 on the default device; without `weights` nothing published is read, all is random."""
        ...


class VisionConfig(Section):
    """A vision tower of timm: a vision transformer, or a convolutional one."""

    name: str
    """`timm/vit_so400m_patch14_siglip_384`; a tag after a dot picks the published weights."""
    pretrained: bool = True
    """Take timm's published weights; `false` starts from random ones."""
    image_size: int = Field(default=384, ge=1)
    """Pictures are resized to a square of so many pixels."""
    block: int = -2
    """The block whose output is used, without the tower's final norm; -1 is the last."""
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
    options: dict[str, Any] = {}
    """Arguments of the timm model: `{patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}` makes a small one."""

    @field_validator("name")
    @classmethod
    def _is_timm(cls, name: str) -> str:
        if not name.startswith("timm/"):
            raise ValueError("expected a timm model as timm/NAME")
        return name

    @property
    def patch(self) -> int:
        """Pixels along the side of a feature: `patch_size`, else what `options` or the model's name say."""
        in_name = re.search(r"patch(\d+)", self.name)
        return int(self.patch_size or self.options.get("patch_size") or (in_name and in_name[1]) or 16)

    @property
    def patches(self) -> int:
        """Encoder tokens of a picture."""
        return int((self.image_size // self.patch) ** 2)


class PoolMLPConfig(KindSection):
    """Adaptive average pooling to a square of tokens, then a two-layer MLP (Open-Qwen2VL's `AvgPoolProjector`)."""

    kind: str = "pool_mlp"
    tokens: int = Field(default=144, ge=1)
    """Positions that a picture takes in the row: a square number. The weights do not depend on it."""

    @field_validator("tokens")
    @classmethod
    def _is_square(cls, tokens: int) -> int:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"expected a square number; the nearest are {side**2} and {(side + 1) ** 2}")
        return tokens

    def build(self, width: int, out_width: int) -> Any:
        from mm.models.connectors import PoolMLP

        return PoolMLP(self.tokens, width, out_width)


class LanguageConfig(Section):
    """A causal language model of transformers: published (`name`), or from random weights (`config`)."""

    name: str | None = None
    """A hub name or a folder that transformers reads: `Qwen/Qwen2.5-1.5B-Instruct`."""
    config: dict[str, Any] | None = None
    """A transformers config with its `model_type`: `{model_type: qwen2, hidden_size: 256, …}`."""
    tokenizer: str | None = None
    """A folder, hub name or `builtin:emoji`; by default that of `name`."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens to append to the tokenizer where it lacks them."""

    @model_validator(mode="after")
    def _names_one_model(self) -> "LanguageConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (published weights) or `config` (random weights)")
        if self.name is None and self.tokenizer is None:
            raise ValueError("a model from a `config` needs a `tokenizer`")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`: qwen2, llama, …")
        return self

    @property
    def tokenizer_name(self) -> str:
        return cast(str, self.tokenizer or self.name)


class TemplateConfig(Section):
    """How a document is spelt. The defaults are Open-Qwen2VL's."""

    bos: str | None = "<s>"
    """The token that a document opens with."""
    eos: str | None = "<|im_end|>"
    """The token that a document ends with; always learned."""
    pad: str = "<|endoftext|>"
    """The token of padding and of media placeholders; never learned."""
    after_media: str = "\n"
    """Put before text that follows media."""

    def layout(self, tokenizer: "Tokenizer", **media: Any) -> "Layout":
        """The layout of a model with this tokenizer. Raises `DataError` where that lacks one of the tokens."""
        from mm.data.layout import Layout, Template

        for token in (self.bos, self.eos):
            if token is not None:
                tokenizer.id(token)
        template = Template(self.bos, self.eos, self.after_media)
        return Layout(tokenizer, template, tokenizer.id(self.pad), **media)


class ImageSlots(Section):
    """A picture in the row."""

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


class AudioSlots(Section):
    """A recording in the row."""

    sampling_rate: int = Field(default=16_000, ge=1)
    """Hz that recordings are resampled to, in mono."""
    hop: int = Field(default=320, ge=1)
    """Samples to a position of the row."""


class VideoSlots(ImageSlots):
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
        from mm.data.layout import AudioLayout, ImageLayout, VideoLayout
        from mm.data.media import ImageTransform
        from mm.data.tokenizer import Tokenizer

        def transform(slots: ImageSlots) -> ImageTransform:
            return ImageTransform(slots.size, slots.mean, slots.std, slots.crop, slots.flip)

        image, audio, video = self.image, self.audio, self.video
        return self.template.layout(
            Tokenizer.load(self.tokenizer, self.added_tokens),
            image=image and ImageLayout(image.tokens, image.cost, transform(image)),
            audio=audio and AudioLayout(audio.sampling_rate, audio.hop),
            video=video and VideoLayout(video.frames, video.tokens, video.cost, transform(video)),
        )

    def build(self, weights: bool = True) -> "System":
        raise ConfigError("model.kind layout packs and loads data; it has nothing to train: choose a model")


CONNECTORS = Kinds("connector", {"pool_mlp": "mm.models.config:PoolMLPConfig"}, default="pool_mlp")
ConnectorConfig = Annotated[Any, CONNECTORS]

SYSTEMS = Kinds(
    "model",
    {
        "open_qwen2vl": "mm.models.systems.open_qwen2vl.config:OpenQwen2VLConfig",
        "text_lm": "mm.models.systems.text_lm.config:TextLMConfig",
        "layout": "mm.models.config:LayoutConfig",
    },
)
ModelConfig = Annotated[Any, SYSTEMS]
