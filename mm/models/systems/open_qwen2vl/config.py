"""Open-Qwen2VL's section and layout."""

from typing import TYPE_CHECKING

from pydantic import model_validator

from mm.data.layout import ImageLayout, Layout
from mm.data.media import ImageTransform
from mm.data.tokenizer import Tokenizer
from mm.models.config import ConnectorConfig, LanguageConfig, PoolMLPConfig, TemplateConfig, VisionConfig
from mm.settings import KindSection

if TYPE_CHECKING:
    from mm.models.systems.open_qwen2vl.model import OpenQwen2VL


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
        return self.template.layout(tokenizer, image=ImageLayout(tokens, self.vision.patches, transform))

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
