"""Packed attention: every implementation against a loop over segments, outputs and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.models.attention import packed_attention, packing


def loop(q: Tensor, k: Tensor, v: Tensor, scope: Tensor, causal: bool = True) -> Tensor:
    """The definition: one query at a time, softmax over the keys of its scope, up to itself where causal."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    rows = []
    for i, number in enumerate(scope.tolist()):
        visible = [j for j in range(i + 1 if causal else len(scope)) if scope[j] == number]
        if number == 0:
            rows.append(torch.zeros_like(q[0, :, i]))
            continue
        scores = torch.einsum("hd,hjd->hj", q[0, :, i], k[0][:, visible]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hj,hjd->hd", scores.softmax(-1), v[0][:, visible]))
    return torch.stack(rows, 1)[None]


def random_rows(lengths: list[list[int]], length: int) -> Tensor:
    ids = torch.zeros(len(lengths), length, dtype=torch.int32)
    for row, segments in enumerate(lengths):
        start = 0
        for number, n in enumerate(segments):
            ids[row, start : start + n] = number + 1
            start += n
    return ids


ROWS = [[3, 9, 1, 4], [17], [1, 1, 2, 13], []]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_gap_in_a_row_is_looked_across(isolate: bool) -> None:
    """As a sample that was taken down leaves it: what is on both sides is still one scope, where rows are."""
    ids = torch.tensor([[1, 1, 0, 0, 2, 2, 0, 3], [0, 0, 4, 0, 0, 4, 4, 0]], dtype=torch.int32)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(3)]
    scope = packing(ids, isolate, "segments")
    torch.testing.assert_close(packed_attention(*tensors, scope), loop(*tensors, scope.scope, True))
    dense = packing(ids, isolate, "dense")
    torch.testing.assert_close(packed_attention(*tensors, scope), packed_attention(*tensors, dense))


@pytest.mark.parametrize("implementation", ["segments", "dense"])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_equal_the_loop(implementation: str, isolate: bool, heads_kv: int, causal: bool) -> None:
    torch.manual_seed(0)
    ids = random_rows(ROWS, 20)
    scope = packing(ids, isolate, implementation, causal)
    tensors = [torch.randn(1, h, 80, 8, dtype=torch.float64, requires_grad=True) for h in (4, heads_kv, heads_kv)]
    weight = torch.randn(1, 4, 80, 8, dtype=torch.float64)
    expected = loop(*tensors, scope.scope, causal)
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)
    found = packed_attention(*tensors, scope)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), tensors), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_equals_the_dense_mask(isolate: bool, causal: bool) -> None:
    """The GPU path's mask and scaling, run eagerly on the CPU (forward only: flex has no CPU backward)."""
    torch.manual_seed(0)
    ids = random_rows(ROWS, 32)
    q, k, v = torch.randn(1, 4, 128, 16), torch.randn(1, 2, 128, 16), torch.randn(1, 2, 128, 16)
    with torch.no_grad():
        flex = packed_attention(q, k, v, packing(ids, isolate, "flex", causal))
        dense = packed_attention(q, k, v, packing(ids, isolate, "dense", causal))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=3), st.integers(0, 1000), st.booleans())
def test_any_rows_equal_the_dense_mask(lengths: list[list[int]], seed: int, causal: bool) -> None:
    torch.manual_seed(seed)
    ids = random_rows(lengths, max(1, *(sum(row) for row in lengths)) + 2)
    n = ids.numel()
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for _ in range(3))
    segments = packed_attention(q, k, v, packing(ids, implementation="segments", causal=causal))
    dense = packed_attention(q, k, v, packing(ids, implementation="dense", causal=causal))
    torch.testing.assert_close(segments, dense, rtol=1e-9, atol=1e-11)


def test_groups_hold_every_position_once_and_pad_little() -> None:
    lengths = torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.repeat_interleave(torch.arange(1, 401), torch.tensor(lengths))[None]
    groups = packing(ids).groups
    real = torch.cat([positions[here] for positions, here in groups])
    assert real.sort().values.tolist() == list(range(sum(lengths)))
    assert sum(here.numel() for _, here in groups) < 1.3 * sum(lengths)


def test_scale_is_passed_on() -> None:
    torch.manual_seed(0)
    ids = random_rows([[5, 4]], 9)
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    found = [packed_attention(q, k, v, packing(ids, True, name), scale=0.1) for name in ("segments", "dense")]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], packed_attention(q, k, v, packing(ids, True, "segments")))
