"""The section of the TomeFormer, a connector that merges features."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from mm.errors import ConfigError
from mm.models.config import VisionConfig
from mm.settings import KindSection

BERT = "google-bert/bert-base-uncased"
"""What SimVLG's connector begins as."""


class TomeFormerConfig(KindSection):
    """A BERT that reads features in place of words and, in each layer, merges those that are most alike (SimVLG,
    2310.03291): 257 features become 29 positions. The first feature, which is the class token where the tower gives it,
    neither merges nor is merged into."""

    takes_grid: ClassVar[bool] = False
    kind: str = "tomeformer"
    name: str | None = None
    """A BERT of transformers to start from, a hub name with its owner or a folder: `google-bert/bert-base-uncased`."""
    config: dict[str, Any] | None = None
    """Random weights instead: fields of transformers' BertConfig, `{hidden_size: 128, num_hidden_layers: 3, …}`."""
    r: int = Field(default=19, ge=0)
    """Features that a layer merges away, at most half of those behind the first."""
    weighted: bool = False
    """A merged feature is the mean of all that it was made from. As published it is the plain mean of two or more
    features, however many each was made from."""
    proportional: bool = False
    """Attention counts a merged feature as often as it has been made from others; for `weighted`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TomeFormerConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (published weights) or `config` (random weights)")
        if self.proportional and not self.weighted:
            raise ValueError("`proportional` counts what a feature was made from: set `weighted: true` too")
        return self

    def values(self) -> dict[str, Any]:
        """The fields of its BertConfig. Raises `CheckpointError` where a published one is not to be had."""
        from mm.models.released.release import Repository

        return self.config if self.config is not None else Repository(str(self.name)).json("config.json")

    def positions(self, vision: VisionConfig) -> int:
        """Of a square picture in the row. Raises `ConfigError` for more features than the BERT has places for."""
        values, features = self.values(), vision.features
        if features > (most := values.get("max_position_embeddings", 512)):
            raise ConfigError(
                f"model.connector: its BERT has {most} places, model.vision gives {features} features of a picture; "
                "set another image_size, or vision.merge"
            )
        left = features - 1
        for _ in range(values.get("num_hidden_layers", 12)):  # `merging.counts`, without torch
            left -= min(self.r, left // 2)
        return 1 + left

    def build(self, width: int, out_width: int, weights: bool = True) -> Any:
        from mm.models.tomeformer import TomeFormer

        return TomeFormer(self, width, out_width, weights)
