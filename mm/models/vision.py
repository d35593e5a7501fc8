"""Vision towers by timm name: the features of one block.

timm is asked for intermediate features rather than its pooled output, so vision transformers and convolutional towers
alike can be used, and the block that a published model used can be named (Open-Qwen2VL: the last but one, without the
final norm).
"""

import timm
from einops import rearrange
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.config import VisionConfig


class VisionTower(nn.Module):
    """[N, 3, S, S] pixels to [N, T, D] features, row by row of the grid, prefix tokens left out."""

    def __init__(self, config: VisionConfig, weights: bool = True) -> None:
        super().__init__()
        name = config.name.removeprefix("timm/")
        try:
            published = timm.get_pretrained_cfg(name)
            # A vision transformer is made for one size; a convolutional tower takes any and has no such argument.
            size = {"img_size": config.image_size} if published and published.fixed_input_size else {}
            self.featurizer = timm.create_model(
                name, pretrained=config.pretrained and weights, num_classes=0, **size, **config.options
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"model.vision.name {config.name}: cannot be built: {reason}") from None
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.featurizer.modules()):
            raise ConfigError(
                f"model.vision.name {config.name}: its batch normalisation would make a picture depend on the "
                "others of its micro-batch; choose a tower with layer normalisation, such as timm/convnext_tiny"
            )
        blocks = list(getattr(self.featurizer, "feature_info", ()))
        if not blocks or not hasattr(self.featurizer, "forward_intermediates"):
            raise ConfigError(f"model.vision.name {config.name}: timm gives no features of its blocks")
        if not -len(blocks) <= config.block < len(blocks):
            raise ConfigError(f"model.vision.block {config.block}: {config.name} has {len(blocks)} blocks")
        self.block = config.block % len(blocks)
        self.width: int = blocks[self.block]["num_chs"]
        self.patches = (config.image_size // blocks[self.block]["reduction"]) ** 2
        if self.patches != config.patches:
            raise ConfigError(
                f"model.vision.patch_size {config.patch}: block {config.block} of {config.name} has a feature for "
                f"every {blocks[self.block]['reduction']} pixels; set model.vision.patch_size to that"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        (features,) = self.featurizer.forward_intermediates(
            pixels, indices=[self.block], intermediates_only=True, norm=False, stop_early=True, output_fmt="NCHW"
        )
        return rearrange(features, "n d h w -> n (h w) d")
