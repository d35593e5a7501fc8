"""A causal language model alone: what every generative system is on a batch without media."""

from mm.data.tokenizer import Tokenizer
from mm.models import backbone
from mm.models.system import GenerativeSystem
from mm.models.systems.text_lm.config import TextLMConfig


class TextLM(GenerativeSystem):
    """See the module. Its one submodule is `language`."""

    def __init__(self, config: TextLMConfig, weights: bool = True) -> None:
        super().__init__()
        tokenizer = Tokenizer.load(config.language.tokenizer_name, config.language.added_tokens)
        self.language = backbone.load(config.language, len(tokenizer), weights)
        self.sparsify(config, ())
