"""MERT's section and layout."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from mm.data.layout import Layout, Template
from mm.data.tokenizer import Tokenizer
from mm.models.config import AudioEncoderConfig
from mm.models.teachers.config import TeacherConfig
from mm.settings import KindSection, Number, Section

if TYPE_CHECKING:
    from mm.models.systems.mert.model import Mert


class MaskConfig(Section):
    """Spans of frames that the encoder does not see and has to predict, by fairseq's rule."""

    prob: Number = Field(default=0.8, gt=0, le=1)
    """Frames in spans as a share of all, if spans never overlapped; they do."""
    length: int = Field(default=5, ge=1)
    """Frames of a span."""
    least: int = Field(default=2, ge=1)
    """Spans of a clip, however short it is."""


class NoiseConfig(Section):
    """Pieces of the other clips of the row that are added to a clip; what is predicted remains the clip alone. In
    training only."""

    prob: Number = Field(default=0.5, ge=0, le=1)
    """Share of the clips that get any; 0: none. A clip alone in its row stays as it is."""
    number: tuple[int, int] = (1, 3)
    """Pieces that a clip gets, at least and at most."""
    seconds: tuple[Number, Number] = (0.5, 1.0)
    """Their length, at least and at most."""
    gain: Number = 1.0
    """What they are multiplied by."""

    @model_validator(mode="after")
    def _are_ranges(self) -> "NoiseConfig":
        for name, (least, most) in (("number", self.number), ("seconds", self.seconds)):
            if not 0 < least <= most:
                raise ValueError(f"{name}: expected two numbers above 0 in order, found {least} and {most}")
        return self


class CQTTargetConfig(Section):
    """The constant-Q transform that is predicted, its magnitudes as nnAudio gives them."""

    fmin: Number = Field(default=32.7, gt=0)
    """Hz of the lowest bin."""
    bins: int = Field(default=336, ge=1)
    bins_per_octave: int = Field(default=48, ge=1)


class ObjectiveWeights(Section):
    """Factors of the objectives in the loss; one of weight 0 is not computed, and has no head."""

    codes: Number = Field(default=1.0, ge=0)
    """Cross-entropy of the teacher's codes, summed over codebooks, of masked frames."""
    cqt: Number = Field(default=1.0, ge=0)
    """Squared error of the constant-Q transform, mean over bins, of masked frames."""
    feature_penalty: Number = Field(default=10.0, ge=0)
    """Square of what the convolutions give, mean over channels, of all frames."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> "ObjectiveWeights":
        if not (self.codes or self.cqt):
            raise ValueError("nothing is to be learned: give codes or cqt a weight above 0")
        return self


class MertConfig(KindSection):
    """An encoder of music, trained on what a teacher hears in frames that are masked (2306.00107 3)."""

    kind: str = "mert"
    released: str | None = None
    """A published model to start from, a folder or a hub name: `m-a-p/MERT-v1-95M`. It gives the encoder's weights, and
    every setting of `encoder` that is not set here; the heads, which are not published with it, start from random
    weights."""
    encoder: AudioEncoderConfig = AudioEncoderConfig()
    teacher: TeacherConfig | None = None
    """Whose codes are predicted. It computes those that the data does not hold (`data.codes`)."""
    code_dim: int = Field(default=64, ge=1)
    """Width in which frames and codes are compared."""
    temperature: Number = Field(default=0.1, gt=0)
    """What cosines of frames and codes are divided by."""
    special_codes: int = Field(default=0, ge=0)
    """Codes in front of each codebook that never occur: 4 in fairseq, whose dictionaries begin with special symbols."""
    cqt: CQTTargetConfig = CQTTargetConfig()
    mask: MaskConfig = MaskConfig()
    mixture: NoiseConfig = NoiseConfig()
    weights: ObjectiveWeights = ObjectiveWeights()
    grad_mult: Number = Field(default=0.1, ge=0)
    """What gradients of the convolutional front end are multiplied by: 0.1 in MERT-v1-95M, 1 in 330M."""

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "mert", cls)

    def layout(self) -> Layout:
        """Recordings alone, without text around them."""
        return Layout(Tokenizer.load("builtin:none"), Template(None, None), 0, audio=self.encoder.layout())

    def build(self, weights: bool = True) -> "Mert":
        from mm.models.systems.mert.model import Mert

        if self.released is None or not weights:
            return Mert(self)
        from mm.models.released import fill, open_release

        return fill(Mert(self), open_release(self.released, "mert"))
