"""Objectives as pure functions: they return losses term by term, and the trainer divides by global counts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_CHUNK = 256  # tokens; fewer make matrix products slow
DRAWN = 256  # positions of a row whose labels are drawn at a time; another number draws others


def next_token_losses(logits: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """-log p(target) in nats, float32 [K], of logits [K, V] and targets int64 [K].

    z: what is added is z * (log of the sum of all exp(logit))^2, which keeps logits from drifting (PaLM, 2204.02311 5;
    Chameleon, 2405.09818 2.2).
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses + z * torch.logsumexp(logits.float(), 1).square() if z else losses


def linear_cross_entropy_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z: float = 0.0
) -> Tensor:
    """`next_token_losses` of logits hidden @ weight.T + bias that are never there all at once.

    Logits are made a chunk of tokens at a time, and with them the gradients of the *sum* of all losses, since a sum is
    what nearly every caller takes: its backward pass has only to scale them, and no logits are made twice. Any other
    gradient is worked out in the backward pass, from logits made again.

    `F.linear_cross_entropy` (torch 2.14) gives a sum so, or single losses with logits made twice, which takes some
    40 % longer than this; of bfloat16 it gives bfloat16 losses, and the trainer wants both sum and single losses.

    Args:
        hidden: [K, D]; weight: [V, D]; bias: [V]; targets: int64 [K].

    Returns:
        float32 [K]. Products are in autocast's dtype, else in that of `hidden`; all else is in float32.
    """
    return linear_cross_entropy_terms(hidden, weight, bias, targets, z)[0]


def linear_cross_entropy_terms(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z: float
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_losses`, and these without what z adds, float32 [K] both; the latter have no gradient."""
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    losses: Tensor
    losses, plain = _LinearCrossEntropy.apply(hidden, weight, bias, targets, z, dtype, torch.is_grad_enabled())
    return losses, plain


def code_losses(
    queries: Tensor, codebooks: Sequence[Tensor], codes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """-log p of the codes of K codebooks, p being a softmax over cosines (HuBERT, 2106.07447, section II-B).

    Args:
        queries: [M, K, d]; codebooks: the embeddings of each, [V_k, d]; codes: int64 [M, K].
        temperature: what cosines are divided by.

    Returns:
        In nats, float32 [M], the sum over codebooks; and whether each code is the most likely one, bool [M, K]. All in
        float32, whatever autocast says.
    """
    losses, right = queries.new_zeros(len(queries), dtype=torch.float32), []
    for query, embeddings, code in zip(queries.unbind(1), codebooks, codes.unbind(1), strict=True):
        logits = code_logits(query, embeddings, temperature)
        losses = losses + next_token_losses(logits, code)
        right.append(logits.detach().argmax(1) == code)
    return losses, torch.stack(right, dim=1)


def code_logits(query: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """float32 [M, V], of one codebook: see `code_losses`."""
    with torch.autocast(query.device.type, enabled=False):
        return F.normalize(query.float(), dim=1) @ F.normalize(embeddings.float(), dim=1).T / temperature


@torch.no_grad()
def draw_labels(
    logits: Callable[[slice], Tensor], rows: Sequence[int], generators: Sequence[torch.Generator]
) -> Tensor:
    """Classes drawn from the softmax of logits, int64 [K]; the logits of all positions are never there at once.

    A class is the one of the largest logit - log E, E drawn from the exponential distribution (Gumbel's trick). What a
    row draws depends on its generator and its own logits, and where rounding moves these it hardly ever changes.

    Args:
        logits: of a slice of the K positions, [n, V].
        rows: how many of the positions each row has, one row behind the other; generators: one for each row.
    """
    drawn, end = [torch.zeros(0, dtype=torch.int64, device=generators[0].device)], 0
    for count, generator in zip(rows, generators, strict=True):
        start, end = end, end + count
        for first in range(start, end, DRAWN):
            some = logits(slice(first, min(first + DRAWN, end))).float()
            noise = torch.empty_like(some).exponential_(generator=generator)
            drawn.append((some - noise.log_()).argmax(1))
    return torch.cat(drawn)


def drawn_errors(predicted: Tensor, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Errors [K, D] of predictions [K, D] against targets drawn around them, for a loss that is the mean of squares
    over D: it is, but for a constant, -log p of a normal distribution of variance D / 2, which they are drawn from.

    Args:
        rows, generators: see `draw_labels`.
    """
    size = predicted.shape[1]
    noise = [
        torch.randn(count, size, generator=generator, device=predicted.device)
        for count, generator in zip(rows, generators, strict=True)
    ]
    return predicted - predicted.detach() + math.sqrt(size / 2) * torch.cat(noise)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z: float, dtype: torch.dtype,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = tuple(learns and needed for needed in ctx.needs_input_grad[:3])
        losses, plain, ctx.of_sum = _sweep(hidden, weight, bias, targets, z, dtype, wanted)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.z, ctx.dtype = z, dtype
        ctx.mark_non_differentiable(plain)
        return losses, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        # The gradient of a sum comes as one number, expanded: known without a look at the values, which would make
        # a GPU wait. Scaling is in place, so a second backward pass starts anew.
        if ctx.of_sum is not None and (grad.stride(0) == 0 or len(grad) < 2):
            grads = [one if one is None else one.mul_(grad[:1].sum()) for one in ctx.of_sum]
            ctx.of_sum = None
        else:
            grads = _sweep(hidden, weight, bias, targets, ctx.z, ctx.dtype, ctx.needs_input_grad[:3], grad)[2]
        inputs = (hidden, weight, bias)
        return (
            *(one if one is None else one.to(x.dtype) for x, one in zip(inputs, grads, strict=True)),
            *(None,) * 4,
        )


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    z: float,
    dtype: torch.dtype,
    wanted: tuple[bool, ...],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Losses [K], these without what z adds, and of hidden, weight and bias the wanted gradients of
    sum(scale * losses), in float32.

    A chunk is as long as the model is wide, so its logits take as much memory as the head's weights do.
    """
    inputs = (hidden, weight, bias)
    grads = [torch.zeros_like(x, dtype=torch.float32) if w else None for x, w in zip(inputs, wanted, strict=True)]  # type: ignore[arg-type]
    of_hidden, of_weight, of_bias = grads
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    plain = torch.empty_like(losses)
    rows = max(MIN_CHUNK, hidden.shape[1])
    buffer = losses.new_empty(min(rows, len(hidden)), len(weight))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        chunk, target = hidden[part], targets[part, None]
        logits = buffer[: len(chunk)]
        _multiply(chunk, weight.T, logits)
        if bias is not None:
            logits += bias
        most = logits.amax(1, keepdim=True)
        logits -= most
        of_target = logits.gather(1, target)
        total = logits.exp_().sum(1, keepdim=True)
        log_z = total.log() + most
        plain[part] = (total.log() - of_target)[:, 0]
        losses[part] = plain[part] + z * log_z[:, 0].square()
        if not any(wanted):
            continue
        of_logits = logits.div_(total)  # d loss / d logits = softmax - one-hot
        if z:
            of_logits *= 1 + 2 * z * log_z
        of_logits.scatter_add_(1, target, of_logits.new_full(target.shape, -1.0))
        if scale is not None:
            of_logits *= scale[part, None]
        if of_bias is not None:
            of_bias += of_logits.sum(0)
        of_logits = of_logits.to(dtype)
        if of_hidden is not None:
            _multiply(of_logits, weight, of_hidden[part])
        if of_weight is not None and dtype == torch.float32:
            torch.addmm(of_weight, of_logits.T, chunk, out=of_weight)
        elif of_weight is not None:
            of_weight += of_logits.T @ chunk
    return losses, plain, grads


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into `out`, which may be of a wider dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
