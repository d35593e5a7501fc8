"""The section and layout of CLIP and SigLIP models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mm.data.layout import ImageLayout, Layout, Template
from mm.data.media import ImageTransform
from mm.data.open_clip import model_config
from mm.data.tokenizer import Tokenizer, open_clip_pad
from mm.errors import DataError
from mm.settings import Count, KindSection, Number

if TYPE_CHECKING:
    from mm.models.systems.clip.model import Clip

PARTS = {"vision": "vision_cfg", "text": "text_cfg"}


class ClipConfig(KindSection):
    """A model of open_clip: a tower for pictures, one for texts, and a loss that tells pairs from all else."""

    kind: str = "clip"
    released: str | None = None
    """A folder of open_clip's own layout (`open_clip_config.json`, as `mm export --to open_clip` writes it) or a hub
    name of one: `laion/CLIP-ViT-B-32-laion2B-s34B-b79K`. It gives the weights, and every setting below that is not set
    here."""
    name: str | None = None
    """A model that open_clip knows, `open_clip/ViT-B-32.laion2b_s34b_b79k`; without the tag of weights behind the dot
    all begins at random. What is set below goes over what it says."""
    weights: Path | None = None
    """A file of weights that open_clip or its trainer wrote (`epoch_32.pt`), in place of a tag."""
    embed_dim: Count | None = Field(default=None, ge=1)
    """Numbers of a picture's or a text's feature."""
    vision: dict[str, Any] = {}
    """Keys of open_clip's `vision_cfg`: `{image_size: 64, patch_size: 8, width: 128, layers: 4, head_width: 32}`, or a
    tower of timm, `{timm_model_name: vit_tiny_patch16_224, timm_pool: token, timm_proj: linear}`, with its own weights
    by `timm_model_pretrained: true`."""
    text: dict[str, Any] = {}
    """Keys of open_clip's `text_cfg`: `{context_length: 32, width: 128, heads: 4, layers: 4}`, or a tower of
    transformers, `{hf_model_name: roberta-base, hf_tokenizer_name: roberta-base}`, with weights of its own but for
    `hf_model_pretrained: false`."""
    quick_gelu: bool | None = None
    """OpenAI's faster GELU, which their weights need; the names `…-quickgelu` have it."""
    custom_text: bool | None = None
    """The text tower as a module of its own (`text.`), as newer models have it. Of a tower of transformers always."""
    loss: Literal["clip", "siglip"] | None = None
    """By default `siglip` for a model that has a bias (all SigLIP models), else `clip`."""
    weight: Number = Field(default=1.0, gt=0)
    """Factor of the loss."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per channel, taken off pixels from 0 to 1: CLIP's. SigLIP: 0.5. With weights by tag, `mean`, `std` and `resize`
    have to be theirs."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per channel, what pixels are divided by."""
    resize: Literal["shortest", "squash"] = "shortest"
    """What becomes of pictures that are not square: `shortest`, CLIP's: the square in the middle is taken; `squash`,
    SigLIP's: the whole picture is, its sides brought to one length."""
    crop: Number = Field(default=0.9, gt=0, le=1)
    """In training, pictures are cut to a drawn box of at least this share of their area; 1: never."""
    flip: bool = False
    """In training, every second picture is mirrored, left to right."""

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "clip", cls)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is None:
            return None
        if not name.startswith("open_clip/"):
            raise ValueError("expected a model of open_clip as open_clip/NAME or open_clip/NAME.WEIGHTS")
        try:
            model_config(_model_of(name))
        except DataError as error:
            raise ValueError(str(error)) from None
        return name

    @field_validator("text")
    @classmethod
    def _takes_a_tokenizer(cls, text: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "hf_model_name" in text and "hf_tokenizer_name" not in text:
            raise ValueError(f"hf_model_name needs its hf_tokenizer_name, perhaps the same: {text['hf_model_name']}")
        return text

    @model_validator(mode="after")
    def _is_whole(self) -> "ClipConfig":
        if self.weights is not None and self.tag is not None:
            raise ValueError(f"weights: name says {self.tag} already; leave the tag or the file out")
        values = self.values
        if "embed_dim" not in values or not (values["vision_cfg"] and values["text_cfg"]):
            raise ValueError("give a `name`, or `embed_dim`, `vision` and `text`: the parts of a model of open_clip")
        if "multimodal_cfg" in values:
            raise ValueError(f"{self.name}: has a decoder of text (CoCa), which is not trained here")
        if self.text_cfg.get("embed_cls"):
            raise ValueError("text.embed_cls: the class token of CoCa is not supported")
        size = values["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            raise ValueError(f"vision.image_size: expected the side of a square, found {size}")
        return self

    @property
    def values(self) -> dict[str, Any]:
        """The model as open_clip's own configs say it: `embed_dim`, `vision_cfg`, `text_cfg` and more."""
        found = {} if self.name is None else model_config(_model_of(self.name))
        for key, part in PARTS.items():
            found[part] = {**found.get(part, {}), **getattr(self, key)}
        over = {key: getattr(self, key) for key in ("embed_dim", "quick_gelu", "custom_text")}
        found |= {key: value for key, value in over.items() if value is not None}
        if "hf_model_name" in found["text_cfg"]:
            found["custom_text"] = True
        return found

    @property
    def tag(self) -> str | None:
        """Of published weights."""
        return (self.name or "").removeprefix("open_clip/").partition(".")[2] or None

    @property
    def objective(self) -> Literal["clip", "siglip"]:
        return self.loss or ("siglip" if self.values.get("init_logit_bias") is not None else "clip")

    @property
    def image_size(self) -> int:
        """Pixels along the side of the square that the tower sees."""
        size: int = self.values["vision_cfg"].get("image_size", 224)
        return size

    @property
    def text_cfg(self) -> dict[str, Any]:
        text: dict[str, Any] = self.values["text_cfg"]
        return text

    def layout(self) -> Layout:
        """A pair is what the tokenizer puts in front of a text, one position for the picture, the text, and its end."""
        tokenizer = Tokenizer.of_open_clip(self.text_cfg, self.name or "of model.text")
        middle = self.resize == "shortest"
        transform = ImageTransform(self.image_size, self.mean, self.std, self.crop, self.flip, middle)
        template = Template(*tokenizer.around())
        return Layout(tokenizer, template, open_clip_pad(tokenizer, self.text_cfg), ImageLayout(1, 1, transform))

    def build(self, weights: bool = True) -> "Clip":
        from mm.models.systems.clip.model import Clip

        if self.released is None or not weights:
            return Clip(self, weights)
        from mm.models.released import fill, open_release

        return fill(Clip(self, weights=False), open_release(self.released, "clip"))


def _model_of(name: str) -> str:
    return name.removeprefix("open_clip/").partition(".")[0]
