"""SimVLG's section and layout."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mm.data.layout import ImageLayout, Layout, VideoLayout
from mm.data.tokenizer import Tokenizer
from mm.models.config import BackboneSection, ConnectorConfig, LanguageConfig, TemplateConfig, VisionConfig
from mm.models.tomeformer_config import BERT, TomeFormerConfig
from mm.settings import Section

if TYPE_CHECKING:
    from mm.models.systems.simvlg.model import SimVLG


class ClipsConfig(Section):
    """Clips beside pictures. A clip takes as many positions as a picture."""

    frames: int = Field(default=4, ge=1)
    """Frames of a clip, evenly spaced."""
    temporal: Literal["attention", "mean", "merge"] = "attention"
    """What joins the frames. `attention`, as published: in every block of the tower each place looks at the same place
    of the other frames, and in the end there is the mean over frames; the tower's `temporal` is to be trained. `mean`:
    the mean alone. Both are blind to the order of frames. `merge`, ours and not published: the features of all frames,
    with a learned embedding of their frame, are merged until they are as many as one frame's."""


class SimVLGConfig(BackboneSection):
    """A vision tower, a connector that merges features, and a causal language model that reads what is left of them as
    a prefix; trained on next tokens in one stage (2310.03291). As published, tower and language model are frozen, which
    is said in `train.params`."""

    kind: str = "simvlg"
    released: str | None = None
    """A published checkpoint to start from, a file or folder as LAVIS writes them. It gives the weights, and every
    setting below that is not set here."""
    vision: VisionConfig
    connector: ConnectorConfig = TomeFormerConfig(name=BERT)
    language: LanguageConfig
    template: TemplateConfig = TemplateConfig()
    image: bool = True
    """Takes pictures."""
    video: ClipsConfig | None = None
    """Takes clips: `{frames: 4}`."""

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "simvlg", cls)

    @model_validator(mode="after")
    def _fits_together(self) -> "SimVLGConfig":
        vision, connector = self.vision, self.connector
        if connector.takes_grid:
            raise ValueError(
                f"connector.kind {connector.kind}: pools grids, and SimVLG's are features without one; use tomeformer "
                "or mlp, or `kind: open_qwen2vl`"
            )
        if vision.resize == "native":
            raise ValueError("vision.resize native: pictures are squares here, all with as many features")
        if not self.image and self.video is None:
            raise ValueError("image false: takes clips then; set `video: {frames: 4}`")
        if self.video and vision.merge:
            joined = self.video.temporal
            if joined == "attention" or (joined == "mean" and not vision.merge.restore):
                raise ValueError(
                    f"video.temporal {joined}: joins frames place by place, and vision.merge merges other places in "
                    "each frame; use `temporal: merge`, or merge in the connector alone"
                )
        return self

    @property
    def media(self) -> tuple[str, ...]:
        return (*(["image"] if self.image else []), *(["video"] if self.video else []))

    def layout(self) -> Layout:
        tokenizer = Tokenizer.load(self.language.tokenizer_name, self.language.added_tokens)
        vision, video = self.vision, self.video
        positions, cost, transform = self.connector.positions(vision), vision.patches, vision.transform()
        return self.template.layout(
            tokenizer,
            image=ImageLayout(positions, cost, transform) if self.image else None,
            video=VideoLayout(video.frames, positions, cost, transform, pooled=True) if video else None,
        )

    def build(self, weights: bool = True) -> "SimVLG":
        from mm.models.systems.simvlg.model import SimVLG

        if self.released is None or not weights:
            return SimVLG(self, weights)
        from mm.models.released import fill, open_release

        return fill(SimVLG(self, weights=False), open_release(self.released, "simvlg"))
