"""COSMO's section and layout."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mm.data.layout import ImageLayout, Layout, VideoLayout
from mm.data.tokenizer import Tokenizer
from mm.models.config import ContrastiveConfig, LanguageConfig, TemplateConfig, VisionConfig
from mm.settings import KindSection, Number, Section

if TYPE_CHECKING:
    from mm.models.systems.cosmo.model import Cosmo


class ResamplerConfig(Section):
    """The perceiver resampler: a few latents that look at all features of a picture, or of all frames of a clip."""

    latents: int = Field(default=64, ge=1)
    """What is left of a picture or clip for the language model to look at. There is one more, which the contrastive
    objective compares."""
    depth: int = Field(default=6, ge=1)
    """Layers."""
    heads: int = Field(default=8, ge=1)
    """Attention heads, 64 wide each."""


class ChunkTemplateConfig(TemplateConfig):
    """How documents are spelt where the text that belongs to a picture is a chunk with an end of its own."""

    bos: str | None = "<s>"
    eos: str | None = "<|endofchunk|>"
    """The end of a document, and of its last chunk. The release has the language model's own end of text behind it."""
    pad: str = "<PAD>"
    after_media: str = ""


class CosmoConfig(KindSection):
    """A vision tower, a perceiver resampler and a causal language model whose upper layers look at the pictures through
    gated cross-attention; trained on next tokens, and contrastively at the border between both halves (2401.00849)."""

    kind: str = "cosmo"
    released: str | None = None
    """A published model to start from, a folder or a hub name: `Awiny/cosmo2.1b`. It gives the weights, and every
    setting below that is not set here."""
    vision: VisionConfig
    """The release has CLIP's ViT-L/14 with the final norm on: `{name: open_clip/ViT-L-14-quickgelu.openai,
    image_size: 224, block: -1, norm: true, …}`."""
    language: LanguageConfig
    """What `visual_token` and the template name and the tokenizer lacks is appended to it."""
    visual_token: str = "<visual>"
    """The token that stands where a picture or clip does."""
    template: ChunkTemplateConfig = ChunkTemplateConfig()
    train_new_tokens: bool = False
    """Tokens that are appended to the tokenizer get rows of the embeddings, and of the head, of their own, which are
    trained while the language model is frozen, as in OpenFlamingo (2308.01390); whole logits are then made for the
    loss. In the release they stay as they are drawn."""
    frames: int | None = Field(default=None, ge=1)
    """Frames of a clip, evenly spaced (3 in the release); by default the model takes no clips."""
    resampler: ResamplerConfig = ResamplerConfig()
    unimodal: int = Field(ge=1)
    """Layers of the language model that read text alone; behind them the contrastive objective takes the text."""
    interval: int = Field(default=1, ge=1)
    """From there on a gated block stands before every so many layers."""
    ratio: Literal[1, 2, 4, 8] = 1
    """What the inner widths of gated blocks are divided by; heads stay 8, so they become narrower."""
    immediate: bool = True
    """A token looks at the last picture before it alone; `false`: at all pictures before it in its document."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    generative: Number = Field(default=1.0, ge=0)
    """Factor of the next-token loss; 0 with a contrastive objective alone."""
    faithful: bool = False
    """Compute as the release does: the text of the contrastive objective comes from behind `unimodal` - 1 layers;
    scores of cross-attention are scaled for heads 64 wide, whatever they are; with `immediate: false`, tokens before
    the first picture of a document see the mean of all of its pictures; and the log of the contrastive factor begins as
    0.2. What depends on padding, which packed rows do not have, is not reproduced: there the text of the contrastive
    objective includes it, and that mean the pictures that a document is short of three."""

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "cosmo", cls)

    @model_validator(mode="after")
    def _fits_together(self) -> "CosmoConfig":
        if self.faithful and self.unimodal < 2:
            raise ValueError(
                "faithful: the release takes the text from behind `unimodal` - 1 layers; expected 2 or more"
            )
        if self.vision.resize == "native":
            raise ValueError("vision.resize native: the resampler takes squares; set `resize: square`")
        return self

    @property
    def named_sources(self) -> tuple[str, ...]:
        """Sources that the run has to have."""
        return self.contrastive.sources

    @property
    def initial_temperature(self) -> float:
        """Of the logarithm of the factor of all similarities."""
        given = self.contrastive
        return 0.2 if self.faithful and given.temperature is None else given.initial_temperature

    def layout(self) -> Layout:
        template, transform = self.template, self.vision.transform()
        named = (template.bos, template.eos, template.pad)
        added = (*self.language.added_tokens, self.visual_token, *(token for token in named if token is not None))
        # A picture is one position, whatever it costs: the language model looks at it from there on.
        patches = self.vision.patches
        clips = None if self.frames is None else VideoLayout(self.frames, 1, patches, transform, pooled=True)
        tokenizer = Tokenizer.load(self.language.tokenizer_name, added)
        return template.layout(tokenizer, image=ImageLayout(1, patches, transform), video=clips)

    def build(self, weights: bool = True) -> "Cosmo":
        from mm.models.systems.cosmo.model import Cosmo

        if self.released is None or not weights:
            return Cosmo(self, weights)
        from mm.models.released import fill, open_release

        return fill(Cosmo(self, weights=False), open_release(self.released, "cosmo"))
