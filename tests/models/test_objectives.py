"""The loss without whole logits: equal to the plain one in outputs and gradients, and small in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.models.objectives import MIN_CHUNK, linear_cross_entropy_losses, next_token_losses

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return next_token_losses(F.linear(hidden, weight, bias), targets)


def inputs(tokens: int, vocabulary: int, width: int = 24, bias: bool = True, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    biases = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return [hidden, weight, biases, targets]


def outcome(loss: Loss, given: list[Any], reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Losses, and gradients of what they are reduced to."""
    floats = [x.clone().requires_grad_() if x is not None else None for x in given[:3]]
    losses = loss(*floats, given[3])
    reduce(losses).backward()
    return losses.detach(), [x.grad for x in floats if x is not None]


def weighted(losses: Tensor) -> Tensor:
    return (losses * torch.linspace(-1, 2, len(losses))).sum()


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, weighted], ids=["sum", "mean", "weighted"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, MIN_CHUNK, 2 * MIN_CHUNK + 37])
def test_equals_plain_in_losses_and_gradients(tokens: int, bias: bool, reduce: Callable[[Tensor], Tensor]) -> None:
    if tokens == 0 and reduce is torch.mean:
        pytest.skip("the mean of nothing")
    given = inputs(tokens, 301, bias=bias)
    losses, grads = outcome(linear_cross_entropy_losses, given, reduce)
    expected, expected_grads = outcome(plain, given, reduce)
    assert losses.dtype == torch.float32 and losses.shape == (tokens,)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.14 has it")
def test_equals_torchs_own() -> None:
    given = inputs(300, 301)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)

    def torchs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)

    losses, grads = outcome(linear_cross_entropy_losses, given, torch.sum)
    expected, expected_grads = outcome(torchs, given, torch.sum)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_close_to_float32_as_plain_bfloat16(autocast: bool) -> None:
    given = inputs(2 * MIN_CHUNK + 37, 301, bias=False)
    exact, exact_grads = outcome(plain, given, torch.sum)
    if not autocast:
        given = [*(x if x is None else x.bfloat16() for x in given[:3]), given[3]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses, grads = outcome(linear_cross_entropy_losses, given, torch.sum)
        rough, rough_grads = outcome(plain, given, torch.sum)
    assert losses.dtype == torch.float32 and [g.dtype for g in grads] == [g.dtype for g in rough_grads]
    assert relative(losses, exact) < 1.1 * relative(rough, exact) < 0.02
    for grad, other, right in zip(grads, rough_grads, exact_grads, strict=True):
        assert relative(grad, right) < 1.1 * relative(other, right) + 1e-3


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    hidden, weight, _, targets = inputs(300, 301, bias=False)
    trained = weight if frozen == "hidden" else hidden
    trained.requires_grad_()
    grads = []
    for loss in (linear_cross_entropy_losses, plain):
        loss(hidden, weight, None, targets).sum().backward()
        grads.append(trained.grad)
        trained.grad = None
    assert hidden.grad is None or weight.grad is None
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_two_backward_passes_give_the_gradient_twice() -> None:
    hidden, weight, _, targets = inputs(300, 301, bias=False)
    weight.requires_grad_()
    total = linear_cross_entropy_losses(hidden, weight, None, targets).sum()
    total.backward(retain_graph=True)
    once = weight.grad.clone()
    total.backward()
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-5, atol=1e-5)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that torch held at once, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_takes_less_than_half_the_memory_at_a_vocabulary_of_150_000() -> None:
    given = inputs(384, 150_000, width=16, bias=False)
    whole = 384 * 150_000 * 4
    usual = peak_bytes(lambda: outcome(plain, given, torch.sum))
    ours = peak_bytes(lambda: outcome(linear_cross_entropy_losses, given, torch.sum))
    assert usual > 2 * whole  # logits and their gradient: the count sees what there is
    assert ours < usual / 2
    again = peak_bytes(lambda: outcome(linear_cross_entropy_losses, given, weighted))
    assert again < usual / 2
