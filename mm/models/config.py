"""The sections that models are configured by. No torch here: it is imported when something is built."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from pydantic import Field, field_validator, model_validator

from mm.settings import Kinds, KindSection, Number, Section

if TYPE_CHECKING:
    from mm.data.layout import Layout
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


CONNECTORS = Kinds("connector", {"pool_mlp": "mm.models.config:PoolMLPConfig"}, default="pool_mlp")
ConnectorConfig = Annotated[Any, CONNECTORS]

SYSTEMS = Kinds("model", {"open_qwen2vl": "mm.models.systems.open_qwen2vl.config:OpenQwen2VLConfig"})
ModelConfig = Annotated[Any, SYSTEMS]
