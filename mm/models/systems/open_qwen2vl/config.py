"""Open-Qwen2VL's section and layout."""

from typing import TYPE_CHECKING

from pydantic import model_validator

from mm.data.layout import ImageLayout, Layout, Template
from mm.data.media import ImageTransform
from mm.data.tokenizer import Tokenizer
from mm.models.config import ConnectorConfig, LanguageConfig, PoolMLPConfig, VisionConfig
from mm.settings import KindSection, Section

if TYPE_CHECKING:
    from mm.models.systems.open_qwen2vl.model import OpenQwen2VL


class TemplateConfig(Section):
    """How a document is spelt. The defaults are Open-Qwen2VL's."""

    bos: str | None = "<s>"
    """The token that a document opens with."""
    eos: str = "<|im_end|>"
    """The token that a document ends with; always learned."""
    pad: str = "<|endoftext|>"
    """The token of padding and of media placeholders; never learned."""
    after_media: str = "\n"
    """Put before text that follows a picture."""


class OpenQwen2VLConfig(KindSection):
    """A vision tower, a pooling connector and a causal language model, trained on next tokens (2504.00595 2.2)."""

    kind: str = "open_qwen2vl"
    vision: VisionConfig
    connector: ConnectorConfig = PoolMLPConfig()
    language: LanguageConfig
    template: TemplateConfig = TemplateConfig()

    def layout(self) -> Layout:
        tokenizer = Tokenizer.load(self.language.tokenizer_name, self.language.added_tokens)
        tokens = self.connector.tokens
        vision = self.vision
        transform = ImageTransform(vision.image_size, vision.mean, vision.std, vision.crop, vision.flip)
        template = Template(self.template.bos, self.template.eos, self.template.after_media)
        for token in (template.bos, template.eos):
            if token is not None:
                tokenizer.id(token)
        return Layout(
            tokenizer,
            template,
            tokenizer.id(self.template.pad),
            ImageLayout(tokens, self.vision.patches, transform),
        )

    @model_validator(mode="after")
    def _pools_and_does_not_stretch(self) -> "OpenQwen2VLConfig":
        tokens = getattr(self.connector, "tokens", 0)
        if tokens > self.vision.patches:
            raise ValueError(
                f"connector.tokens {tokens} is more than the {self.vision.patches} patches of vision at "
                f"{self.vision.image_size} pixels"
            )
        return self

    def build(self, weights: bool = True) -> "OpenQwen2VL":
        from mm.models.systems.open_qwen2vl.model import OpenQwen2VL

        return OpenQwen2VL(self, weights)
