"""Objectives: pure functions from logits and targets to a sum of losses. The trainer divides by global counts."""

import torch.nn.functional as F
from torch import Tensor


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, float32 [K], of logits [K, V] and targets int64 [K]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
