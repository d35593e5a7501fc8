"""Open-Qwen2VL as a composition: vision tower -> pool + MLP -> any causal language model.

Picture features take the place of placeholder embeddings, LLaVA-style; there are no picture start or end tokens.
Source: arXiv 2504.00595 section 2.2; github Victorwz/Open-Qwen2VL, `prismatic/models/vlms/prismatic.py`.
"""

from torch import Tensor

from mm.data.batch import MediaBatch
from mm.data.tokenizer import Tokenizer
from mm.models import backbone
from mm.models.system import GenerativeSystem, Tower
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.models.vision import VisionTower


class OpenQwen2VL(GenerativeSystem):
    """See the module. Submodules `vision`, `connector`, `language` are what name patterns in configs match."""

    def __init__(self, config: OpenQwen2VLConfig, weights: bool = True) -> None:
        super().__init__()
        tokenizer = Tokenizer.load(config.language.tokenizer_name, config.language.added_tokens)
        self.vision = VisionTower(config.vision, weights)
        self.language = backbone.load(config.language, len(tokenizer), weights)
        width = self.language.get_input_embeddings().embedding_dim
        self.connector = config.connector.build(self.vision.width, width, weights)
        tower = config.vision.model_dump(mode="json", exclude={"pretrained", "crop", "flip"})
        settings = {"vision": tower, "connector": config.connector.model_dump(mode="json")}
        self.rows = None if config.connector.takes_grid else self.vision.features
        self.media_towers = {"image": Tower("vision", self.vision.width, settings, self.rows)}
        self.sparsify(config, ("image",))

    def features(self, medium: str, media: MediaBatch) -> Tensor:
        assert medium == "image"
        features: Tensor = self.vision(media)
        return features if self.rows else self.connector.pool(features, self.vision.grids(media))

    def connect(self, medium: str, features: Tensor) -> Tensor:
        if self.rows is None:
            return self.connector(features)
        return self.connector(features.unflatten(0, (-1, self.rows))).flatten(0, 1)
