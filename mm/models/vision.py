"""Vision towers by timm name: the patch features of one block.

timm is asked for intermediate features rather than its pooled output, so any of its vision transformers works, and the
block that a published model used can be named (Open-Qwen2VL: the last but one, without the final norm).
"""

import timm
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.config import VisionConfig


class VisionTower(nn.Module):
    """[N, 3, S, S] pixels to [N, T, D] patch features, row by row of the patch grid, prefix tokens left out."""

    def __init__(self, config: VisionConfig, weights: bool = True) -> None:
        super().__init__()
        name = config.name.removeprefix("timm/")
        try:
            self.featurizer = timm.create_model(
                name,
                pretrained=config.pretrained and weights,
                num_classes=0,
                img_size=config.image_size,
                **config.options,
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"model.vision.name {config.name}: cannot be built: {reason}") from None
        depth = len(getattr(self.featurizer, "blocks", ()))
        if not depth:
            raise ConfigError(f"model.vision.name {config.name}: not a vision transformer (it has no blocks)")
        if not -depth <= config.block < depth:
            raise ConfigError(f"model.vision.block {config.block}: {config.name} has {depth} blocks")
        self.block = config.block % depth
        self.width: int = self.featurizer.embed_dim
        self.grid: tuple[int, int] = self.featurizer.patch_embed.grid_size

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Tensor) -> Tensor:
        (features,) = self.featurizer.forward_intermediates(
            pixels,
            indices=[self.block],
            intermediates_only=True,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
        )
        return features
