"""Open-Qwen2VL as a composition: timm tower -> pool + MLP -> any causal language model.

Picture features take the place of placeholder embeddings, LLaVA-style; there are no picture start or end tokens.
Source: arXiv 2504.00595 section 2.2; github Victorwz/Open-Qwen2VL, `prismatic/models/vlms/prismatic.py`.
"""

from torch import Tensor

from mm.data.batch import MediaBatch
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.system import GenerativeSystem
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.models.vision import VisionTower


class OpenQwen2VL(GenerativeSystem):
    """See the module. Submodules `vision`, `connector`, `language` are what name patterns in configs match."""

    def __init__(self, config: OpenQwen2VLConfig, weights: bool = True) -> None:
        super().__init__()
        tokenizer = Tokenizer.load(config.language.tokenizer_name, config.language.added_tokens)
        self.vision = VisionTower(config.vision, weights)
        tokens = config.connector.tokens
        if tokens > self.vision.patches:
            raise ConfigError(
                f"model.connector.tokens {tokens}: {config.vision.name} at {config.vision.image_size} pixels gives "
                f"only {self.vision.patches} patches"
            )
        self.language = backbone.load(config.language, len(tokenizer), weights)
        width = self.language.get_input_embeddings().embedding_dim
        self.connector = config.connector.build(self.vision.width, width)

    def encode(self, medium: str, media: MediaBatch) -> Tensor:
        assert medium == "image"
        return self.connector(self.vision(media.stacked())).flatten(0, 1)
