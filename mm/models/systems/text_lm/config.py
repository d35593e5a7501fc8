"""The text-only system's section and layout."""

from typing import TYPE_CHECKING

from pydantic import model_validator

from mm.data.layout import Layout, MetaTokens
from mm.data.tokenizer import Tokenizer
from mm.models.config import BackboneSection, DistillConfig, LanguageConfig, MetaTokensConfig, TemplateConfig

if TYPE_CHECKING:
    from mm.models.systems.text_lm.model import TextLM


class TextLMConfig(BackboneSection):
    """A causal language model, trained on next tokens of text."""

    kind: str = "text_lm"
    language: LanguageConfig
    template: TemplateConfig = TemplateConfig()
    distill: DistillConfig | None = None
    """Learn from other language models too: `{teachers: [exported/a, exported/b]}`."""
    meta_tokens: MetaTokensConfig | None = None
    """Put meta-tokens into documents, with attention of their own: `{rate: 0.1}`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TextLMConfig":
        if self.meta_tokens and self.meta_tokens.attention and self.depths:
            raise ValueError("meta_tokens.attention is for layers that all tokens go through; leave out `depths`")
        return self

    def tokenizer(self) -> Tokenizer:
        added = (self.meta_tokens.token,) if self.meta_tokens else ()
        return Tokenizer.load(self.language.tokenizer_name, (*self.language.added_tokens, *added))

    def layout(self) -> Layout:
        tokenizer, meta = self.tokenizer(), self.meta_tokens
        return self.template.layout(tokenizer, meta_tokens=meta and MetaTokens(tokenizer.id(meta.token), meta.rate))

    def build(self, weights: bool = True) -> "TextLM":
        from mm.models.systems.text_lm.model import TextLM

        return TextLM(self, weights)
