"""Learning from other models' distributions (Hinton et al., 1503.02531), of one teacher or of an ensemble.

An ensemble says p proportional to exp(mean of its members' log p), the geometric mean, as in *Pre-training under
infinite compute* (2509.14786). Logits of teachers and student are made a chunk of positions at a time, and made again
in the backward pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.models.objectives import MIN_CHUNK


def ensemble_log_probs(logits: Sequence[Tensor]) -> Tensor:
    """log p of the geometric mean of distributions, float32 [K, V], of each member's logits [K, V]."""
    mean = torch.stack([F.log_softmax(one.float(), dim=-1) for one in logits]).mean(0)
    return F.log_softmax(mean, dim=-1)


def distillation_losses(logits: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """T^2 KL(teacher || student) in nats, float32 [K], of distributions at temperature T.

    Args:
        logits: the student's, [K, V]; teachers: each member's, [K, V].
    """
    wanted = ensemble_log_probs([one / temperature for one in teachers])
    found = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)


def head_distillation_losses(
    hidden: Tensor, head: nn.Linear, factor: float, teachers: Sequence[tuple[Tensor, nn.Linear, float]],
    temperature: float,
) -> Tensor:  # fmt: skip
    """`distillation_losses`, float32 [K], of logits factor * head(hidden) that are never there all at once.

    Args:
        hidden: [K, D]; teachers: of each member what its head reads [K, D'], its head, and its factor. Of heads that
            are padded to different sizes the rows that not all have are left out: they belong to no token.
    """
    size = min(head.out_features, *(other.out_features for _, other, _ in teachers))

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> Tensor:
        return F.linear(hidden, weight[:size], None if bias is None else bias[:size]) * factor

    def chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, *theirs: Tensor) -> Tensor:
        with torch.no_grad():
            said = [
                logits(one, other.weight, other.bias, scale)
                for one, (_, other, scale) in zip(theirs, teachers, strict=True)
            ]
        return distillation_losses(logits(hidden, weight, bias, factor), said, temperature)

    rows = max(MIN_CHUNK, hidden.shape[1])
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        theirs = [one[part] for one, _, _ in teachers]
        parts.append(checkpoint(chunk, hidden[part], head.weight, head.bias, *theirs, use_reentrant=False))
    return torch.cat(parts)
