"""Connectors: encoder features to embeddings in the language model's width.

One that takes a grid is two halves: `pool` has no weights, so what it gives can be computed once for a frozen tower and
kept; calling the connector on that runs what is trained. Others are called on the tower's features as they are.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm.models.grids import Grid, each_grid


class PoolMLP(nn.Module):
    """Features of patch grids to fewer positions, D_out wide: average pooling, then Linear, GELU, Linear.

    The pooling comes first and has no weights, so one set of weights serves any number of positions: 144 in
    pre-training and 729 (no pooling at all) in fine-tuning. Open-Qwen2VL, `AvgPoolProjector` (prismatic `nn_utils.py`).
    """

    def __init__(self, tokens: int, width: int, out_width: int, window: int | None = None) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        self.window = window
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def pool(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[sum rows * columns, D], row by row of each picture's grid, to [sum positions, D]."""
        return each_grid(self._pooled, features, grids)

    def _pooled(self, patches: Tensor) -> Tensor:
        patches = rearrange(patches, "n h w d -> n d h w")
        if self.window is None:
            pooled = F.adaptive_avg_pool2d(patches, self.side)
        else:  # windows that the picture's edge cuts off are the mean of what is left of them
            pooled = F.avg_pool2d(patches, self.window, ceil_mode=True, count_include_pad=False)
        return rearrange(pooled, "n d h w -> n (h w) d")

    def forward(self, pooled: Tensor) -> Tensor:
        """[..., D] pooled features to [..., D_out]."""
        return self.mlp(pooled)


class MLP(nn.Module):
    """Features, as many as there are and in no grid, to D_out wide each: Linear, GELU, Linear."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] to [..., D_out]."""
        return self.mlp(features)
