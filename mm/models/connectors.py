"""Connectors: encoder features to embeddings in the language model's width."""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PoolMLP(nn.Module):
    """[N, T, D] features of a square patch grid to [N, tokens, D_out]: average pooling, then Linear, GELU, Linear.

    The pooling comes first and has no weights, so one set of weights serves any number of tokens: 144 in pre-training
    and 729 (no pooling at all) in fine-tuning. Open-Qwen2VL, `AvgPoolProjector` (prismatic `nn_utils.py`).
    """

    def __init__(self, tokens: int, width: int, out_width: int) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, features: Tensor) -> Tensor:
        grid = rearrange(features, "n (h w) d -> n d h w", h=math.isqrt(features.shape[1]))
        pooled = F.adaptive_avg_pool2d(grid, self.side)
        return self.mlp(rearrange(pooled, "n d h w -> n (h w) d"))
