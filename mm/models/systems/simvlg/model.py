"""SimVLG as a composition: vision tower -> TomeFormer -> prefix of any causal language model, frozen or not.

A clip goes the same way: its frames are joined in the tower or behind it, and then it is as one picture. One stage, one
objective: the next token of the caption. Sources: arXiv 2310.03291; github yiren-jian/EVLGen,
`lavis/models/blip2_models/liptome_{opt,vicuna,video_opt}.py`.
"""

from einops import rearrange
from torch import Tensor

from mm.data.batch import MediaBatch
from mm.data.tokenizer import Tokenizer
from mm.models import backbone
from mm.models.system import GenerativeSystem, Tower
from mm.models.systems.simvlg.config import SimVLGConfig
from mm.models.temporal import TemporalAttention, TemporalMerge
from mm.models.vision import VisionTower


class SimVLG(GenerativeSystem):
    """See the module. Submodules `vision`, `connector`, `language`, and of clips `vision.temporal` (attention over time
    in each block) or `temporal` (merging across frames), are what name patterns in configs match."""

    def __init__(self, config: SimVLGConfig, weights: bool = True) -> None:
        super().__init__()
        tokenizer = Tokenizer.load(config.language.tokenizer_name, config.language.added_tokens)
        self.vision = VisionTower(config.vision, weights)
        self.language = backbone.load(config.language, len(tokenizer), weights)
        inner, width = self.vision.width, self.language.get_input_embeddings().embedding_dim
        self.connector = config.connector.build(inner, width, weights)
        self.rows = self.vision.features
        self.frames, joined = (config.video.frames, config.video.temporal) if config.video else (0, None)
        if joined == "attention":
            self.vision.set_temporal([TemporalAttention(inner) for _ in range(self.vision.block + 1)])
        self.temporal = TemporalMerge(inner, self.frames, config.vision.class_token) if joined == "merge" else None
        settings = {"vision": config.vision.model_dump(mode="json", exclude={"pretrained", "crop", "flip"})}
        rows = {"image": self.rows, "video": self.rows * self.frames if joined == "merge" else self.rows}
        self.media_towers = {
            medium: Tower("vision", inner, settings | ({"temporal": joined} if medium == "video" else {}), rows[medium])
            for medium in config.media
        }
        self.sparsify(config, config.media)

    def features(self, medium: str, media: MediaBatch) -> Tensor:
        """A row for every feature of a picture, class token first; of a clip the same, in the mean over its frames, or,
        where these are merged, for every feature of every frame."""
        features = self.vision(media)
        if medium == "image" or self.temporal is not None:
            return features
        return rearrange(features, "(n f t) d -> n f t d", f=self.frames, t=self.rows).mean(1).flatten(0, 1)

    def connect(self, medium: str, features: Tensor) -> Tensor:
        if medium == "video" and self.temporal is not None:
            found = self.temporal(rearrange(features, "(n f t) d -> n f t d", f=self.frames, t=self.rows))
        else:
            found = rearrange(features, "(n t) d -> n t d", t=self.rows)
        return self.connector(found).flatten(0, 1)
