"""The section and layout of masked language models."""

from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from mm.data.layout import Layout
from mm.data.tokenizer import Tokenizer
from mm.models.config import TemplateConfig
from mm.settings import KindSection, Number, Section

if TYPE_CHECKING:
    from mm.models.systems.masked_lm.model import MaskedLM


class EncoderConfig(Section):
    """A masked language model of transformers, such as BERT or RoBERTa: published (`name`), or from random weights
    (`config`)."""

    name: str | None = None
    """A hub name or a folder that transformers reads: `google-bert/bert-base-uncased`."""
    config: dict[str, Any] | None = None
    """A transformers config with its `model_type`: `{model_type: bert, hidden_size: 256, …}`."""
    tokenizer: str | None = None
    """A folder, hub name or `builtin:emoji`; by default that of `name`."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens to append to the tokenizer where it lacks them."""
    new_rows: Literal["mean", "normal"] | None = None
    """What the embeddings of tokens begin as that a published model's own tokenizer lacks, as of `text_lm`."""

    @model_validator(mode="after")
    def _names_one_model(self) -> "EncoderConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (published weights) or `config` (random weights)")
        if self.config is not None and (self.tokenizer is None or "model_type" not in self.config):
            raise ValueError("a `config` needs a `model_type`, such as bert, and a `tokenizer` beside it")
        return self

    @property
    def tokenizer_name(self) -> str:
        return cast(str, self.tokenizer or self.name)


class ClozeTemplateConfig(TemplateConfig):
    """How documents are spelt. The defaults are BERT's; RoBERTa has `<s>`, `</s>` and `<pad>`."""

    bos: str | None = "[CLS]"
    """The token that a document opens with."""
    eos: str | None = "[SEP]"
    """The token that a document ends with."""
    pad: str = "[PAD]"
    """The token of padding. RoBERTa counts positions from its id on, so there it has to be the model's own."""


class MaskingConfig(Section):
    """What is hidden from the encoder, and has to be predicted. Special tokens never are. A stage may have settings of
    its own, over the same packs: a curriculum."""

    rate: Number = Field(default=0.15, gt=0, le=1)
    """Share of the tokens that are predicted."""
    unit: Literal["token", "word", "span"] = "token"
    """What is hidden as a whole. `token`: each by itself. `word`: all tokens of a word. `span`: 1 to 10 words side by
    side, 3.8 on average, as in SpanBERT (1907.10529)."""
    corruption: tuple[Number, Number, Number] = (0.8, 0.1, 0.1)
    """Shares of what is predicted that are read as the mask token, as any token at all, and as they are. Drawn for each
    token, of spans for each span. `[1, 0, 0]`: always the mask token."""

    @model_validator(mode="after")
    def _are_shares(self) -> "MaskingConfig":
        if min(self.corruption) < 0 or abs(sum(self.corruption) - 1) > 1e-6:
            raise ValueError(f"corruption: expected three shares that sum to 1, found {[*self.corruption]}")
        return self


class MaskedLMConfig(KindSection):
    """An encoder of text, trained to predict tokens that it does not see (BERT, 1810.04805)."""

    kind: str = "masked_lm"
    language: EncoderConfig
    template: ClozeTemplateConfig = ClozeTemplateConfig()
    mask_token: str = "[MASK]"
    """What stands for a token that is hidden; RoBERTa's is `<mask>`. Appended to the tokenizer where it lacks it."""
    masking: MaskingConfig = MaskingConfig()

    def layout(self) -> Layout:
        language = self.language
        return self.template.layout(Tokenizer.load(language.tokenizer_name, (*language.added_tokens, self.mask_token)))

    def build(self, weights: bool = True) -> "MaskedLM":
        from mm.models.systems.masked_lm.model import MaskedLM

        return MaskedLM(self, weights)
