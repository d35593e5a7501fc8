"""The section of the VQ model, and its layout."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from mm.data.layout import ImageLayout, Layout, Template
from mm.data.media import ImageTransform
from mm.data.tokenizer import Tokenizer
from mm.settings import KindSection, Number, Section

if TYPE_CHECKING:
    from mm.models.systems.vq.model import VQ

GROUPS = 32
"""That channels are normalised in."""
HALF = (0.5, 0.5, 0.5)


class ObjectiveWeights(Section):
    """Factors of the objectives in the loss."""

    reconstruction: Number = Field(default=1.0, gt=0)
    """Of the pictures, mean over their values."""
    codebook: Number = Field(default=1.0, gt=0)
    """Of codes towards latents: all that the codebook learns from."""
    commitment: Number = Field(default=0.25, ge=0)
    """Of latents towards their codes (beta of 1711.00937)."""


class VQConfig(KindSection):
    """An image tokenizer: convolutions, a codebook, convolutions, with the structure of Janus' (LlamaGen's, VQGAN's)
    and no adversarial loss."""

    kind: str = "vq"
    size: int = Field(default=64, ge=1)
    """Pixels along the side of the square that a picture becomes."""
    codes: int = Field(default=256, ge=2, le=65_536)
    """Of the codebook."""
    code_dim: int = Field(default=8, ge=2)
    """Width in which latents and codes are compared. Few dimensions keep codes in use (ViT-VQGAN, 2110.04627 3.2)."""
    channels: int = 64
    """Of the first and the last convolution, a multiple of 32, the groups in which they are normalised. With 32 itself
    each is normalised apart, and how bright a picture is as a whole is lost."""
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 1, 1, 1), min_length=1)
    """Of the channels, level by level. From one to the next the sides are halved, so a code stands for a square of
    2 ** (levels - 1) pixels."""
    blocks: int = Field(default=0, ge=0)
    """Residual blocks of a level in the encoder, besides two at its end; in the decoder one more. With 0 multipliers
    are 1."""
    temperature: Number = Field(default=0.1, ge=0)
    """Of the shares in which codes are drawn to a latent, a softmax of cosines. 0: the nearest alone, as published, and
    codes that are nearest to none stay where they are."""
    squared: Number = Field(default=0.0, ge=0)
    """Factor of the squared error in the reconstruction, beside the absolute one."""
    weights: ObjectiveWeights = ObjectiveWeights()

    @field_validator("channels")
    @classmethod
    def _is_in_groups(cls, channels: int) -> int:
        if channels < GROUPS or channels % GROUPS:
            raise ValueError(f"expected a multiple of {GROUPS}, the groups in which they are normalised")
        return channels

    @model_validator(mode="after")
    def _is_a_grid(self) -> "VQConfig":
        if self.size % self.patch:
            raise ValueError(f"size {self.size}: expected a multiple of {self.patch}, the square of a code")
        if not self.blocks and {*self.multipliers} != {1}:
            raise ValueError("multipliers: without blocks nothing in the encoder can change its width; expected ones")
        return self

    @property
    def patch(self) -> int:
        """Pixels along the side of the square that a code stands for."""
        return 1 << len(self.multipliers) - 1

    @property
    def side(self) -> int:
        """Codes along the side of a picture."""
        return self.size // self.patch

    def layout(self) -> Layout:
        """Pictures alone, in values from -1 to 1, without text around them."""
        image = ImageLayout(self.side**2, self.side**2, ImageTransform(self.size, HALF, HALF))
        return Layout(Tokenizer.load("builtin:none"), Template(None, None), 0, image=image)

    def build(self, weights: bool = True) -> "VQ":
        from mm.models.systems.vq.model import VQ

        return VQ(self)
