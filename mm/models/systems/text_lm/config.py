"""The text-only system's section and layout."""

from typing import TYPE_CHECKING

from mm.data.layout import Layout
from mm.data.tokenizer import Tokenizer
from mm.models.config import BackboneSection, LanguageConfig, TemplateConfig

if TYPE_CHECKING:
    from mm.models.systems.text_lm.model import TextLM


class TextLMConfig(BackboneSection):
    """A causal language model, trained on next tokens of text."""

    kind: str = "text_lm"
    language: LanguageConfig
    template: TemplateConfig = TemplateConfig()

    def layout(self) -> Layout:
        return self.template.layout(Tokenizer.load(self.language.tokenizer_name, self.language.added_tokens))

    def build(self, weights: bool = True) -> "TextLM":
        from mm.models.systems.text_lm.model import TextLM

        return TextLM(self, weights)
