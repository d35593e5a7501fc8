"""Token merging against loops over tokens, and what it must not change."""

import pytest
import torch
from merge_loops import joined, matched, merged
from torch import Tensor

from mm.models.merging import counts, match, schedule, unmerge

CASES = [(17, 4, 1), (18, 5, 2), (16, 100, 0), (21, 6, 5), (9, 3, 1), (5, 0, 1), (2, 1, 1), (3, 1, 1), (30, 14, 1)]
"""Tokens, how many to merge away, protected ones."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "r", "protected"), CASES)
@pytest.mark.parametrize("weighted", [True, False])
def test_three_rounds_are_those_of_loops(tokens: int, r: int, protected: int, weighted: bool) -> None:
    """Tokens, sizes, sources and the gradient of the first tokens."""
    x = draw(3, tokens, 6).double().requires_grad_()
    found, size = x, torch.ones(3, tokens, dtype=torch.int64) if weighted else None
    source = torch.arange(tokens).expand(3, -1)
    expected, groups = list(x.unbind()), [[[n] for n in range(tokens)]] * 3
    for left in counts(tokens - protected, [r] * 3):
        metric = found.detach()[:, :, :4]
        merge = match(metric, r, protected)
        found, size = merge.merge(found, size)
        source = merge.sources(source)
        assert found.shape == (3, left + protected, 6)
        for item in range(3):
            new = matched(metric[item], r, protected)
            sizes = [len(group) if weighted else 1 for group in groups[item]]
            expected[item] = merged(expected[item], new, sizes)
            groups[item] = joined(groups[item], new)
    torch.testing.assert_close(found, torch.stack(expected))
    for item in range(3):
        assert source[item].tolist() == [
            next(k for k, one in enumerate(groups[item]) if n in one) for n in range(tokens)
        ]
        assert size is None or size[item].tolist() == [len(group) for group in groups[item]]
    weights = draw(*found.shape, seed=1).double()
    ours, theirs = (torch.autograd.grad((one * weights).sum(), x)[0] for one in (found, torch.stack(expected)))
    torch.testing.assert_close(ours, theirs)


def test_weighted_means_keep_the_sum_and_plain_ones_do_not() -> None:
    x = draw(2, 65, 8)
    found, size = x, torch.ones(2, 65, dtype=torch.int64)
    plain = x
    for _ in range(6):
        found, size = match(found, 8, 1).merge(found, size)
        plain, none = match(plain, 8, 1).merge(plain)
        assert none is None
    assert size.sum(1).tolist() == [65, 65] and size.dtype == torch.int64 and size.max() > 2
    torch.testing.assert_close((found * size[..., None]).sum(1), x.sum(1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose((plain * size[..., None]).sum(1), x.sum(1), atol=0.1)


def test_an_item_does_not_depend_on_the_others() -> None:
    x = draw(5, 33, 8)
    together, size = match(x, 9, 1).merge(x, torch.ones(5, 33))
    for item in range(5):
        alone, own = match(x[item : item + 1], 9, 1).merge(x[item : item + 1], torch.ones(1, 33))
        assert torch.equal(alone[0], together[item]) and torch.equal(own[0], size[item])


@pytest.mark.parametrize("protected", [1, 2, 5])
def test_protected_tokens_stay_as_they_are_and_where_they_are(protected: int) -> None:
    """Though all tokens are alike, so that nothing but protection keeps them apart."""
    x = draw(2, 1, 4).expand(2, 20 + protected, 4) + torch.arange(20.0 + protected)[:, None]
    merge = match(torch.ones(2, 20 + protected, 3), 10, protected)
    found, size = merge.merge(x, torch.ones(2, 20 + protected))
    assert torch.equal(found[:, :protected], x[:, :protected]) and bool((size[:, :protected] == 1).all())
    source = merge.sources(torch.arange(20 + protected).expand(2, -1))
    assert source[:, :protected].tolist() == [list(range(protected))] * 2
    assert bool((source[:, protected:] >= protected).all())


def test_tokens_that_nothing_was_merged_into_are_untouched() -> None:
    x = draw(2, 33, 8)
    merge = match(x, 4, 1)
    found, size = merge.merge(x, torch.full((2, 33), 3))
    alone = size == 3
    assert int(alone.sum()) >= 2 * (29 - 4)
    assert torch.equal(found[alone], x.gather(1, merge.order[:, :29, None].expand(-1, -1, 8))[alone])


def test_rows_of_norm_zero_are_like_no_other() -> None:
    """They merge before those that point the other way and behind all that are at all alike."""
    metric = torch.tensor([[-1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [1.0, 0.0], [0.2, 1.0], [1.0, -0.1]])[None]
    orders = [match(metric, r, 0).order[0, 6 - r :].tolist() for r in (1, 2, 3)]
    assert orders == [[4], [4, 2], [4, 2, 0]]
    nothing = torch.zeros(2, 9, 4)
    found, size = match(nothing, 4, 1).merge(draw(2, 9, 3), torch.ones(2, 9))
    assert bool(found.isfinite().all()) and size.sum(1).tolist() == [9, 9]


@pytest.mark.parametrize("weighted", [True, False])
def test_unmerging_equal_tokens_gives_all_of_them_back(weighted: bool) -> None:
    x = draw(2, 4, 6).repeat_interleave(8, dim=1)
    found, size, source = x, torch.ones(2, 32) if weighted else None, torch.arange(32).expand(2, -1)
    for r in (16, 8, 4):
        merge = match(found, r, 0)
        found, size = merge.merge(found, size)
        source = merge.sources(source)
    assert found.shape == (2, 4, 6)
    torch.testing.assert_close(unmerge(found, source), x)


def test_low_precision_neither_rounds_sizes_nor_blurs_who_is_alike() -> None:
    """Means are computed in float32, similarities too, under autocast as well."""
    x = draw(2, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        order = match(x, 9, 1).order
    assert torch.equal(order, match(x, 9, 1).order)
    merge = match(x.bfloat16(), 9, 1)
    found, size = merge.merge(x.bfloat16(), torch.full((2, 40), 257))
    assert found.dtype == torch.bfloat16 and int(size.sum()) == 2 * 40 * 257
    expected, _ = merge.merge(x.bfloat16().double(), torch.full((2, 40), 257))
    assert torch.equal(found, expected.bfloat16())


def test_counts_of_published_models() -> None:
    """ViT-T/16 at 224 with r = 8; TomeFormer with r = 19 (spec 3.1)."""
    assert 1 + counts(196, [8] * 12)[-1] == 101
    tomeformer = [1 + left for left in counts(256, [19] * 12)]
    assert tomeformer == [238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29]
    assert counts(16, [10, 10, 10, 10, 10]) == [8, 4, 2, 1, 1] and counts(7, [0, 3, 9]) == [7, 4, 2]


def test_schedules_are_those_of_the_release() -> None:
    assert schedule(16, -1, 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert schedule(8, 0, 3) == [8, 8, 8] and schedule(4, 1, 5) == [0, 2, 4, 6, 8]
    assert schedule(8, 0, 1) == [8] and schedule(5, 0.5, 4) == [2, 4, 6, 8]
