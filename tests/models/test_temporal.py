"""What joins the frames of a clip: the published attention against loops, and our merging against what it promises."""

import pytest
import torch
from torch import Tensor

from mm.errors import ConfigError
from mm.models.temporal import TemporalAttention, TemporalMerge

CLIPS, FRAMES, TOKENS, WIDTH = 2, 3, 5, 16


def attention(alpha: float = 0.7) -> TemporalAttention:
    torch.manual_seed(0)
    module = TemporalAttention(WIDTH, hidden=12, heads=4)
    torch.nn.init.constant_(module.alpha, alpha)
    return module


def frames() -> Tensor:
    return torch.randn(CLIPS * FRAMES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_attention_is_the_published_one() -> None:
    """Place by place and head by head: scale 1 / sqrt(hidden), the input for values, nothing behind."""
    module, x = attention(), frames()
    expected = x.clone()
    with torch.no_grad():
        for clip in range(CLIPS):
            for token in range(TOKENS):
                track = x.view(CLIPS, FRAMES, TOKENS, WIDTH)[clip, :, token]
                query, key = module.query(track), module.key(track)
                for head in range(4):
                    own, values = slice(3 * head, 3 * head + 3), slice(4 * head, 4 * head + 4)
                    weights = (query[:, own] @ key[:, own].T * 12**-0.5).softmax(1)
                    for frame in range(FRAMES):
                        expected[clip * FRAMES + frame, token, values] += 0.7 * (weights @ track[:, values])[frame]
        torch.testing.assert_close(module(x, FRAMES), expected, rtol=1e-5, atol=1e-6)
    assert {name: list(p.shape) for name, p in attention().named_parameters()} == {
        "alpha": [1], "query.weight": [12, 16], "query.bias": [12], "key.weight": [12, 16], "key.bias": [12],
    }  # fmt: skip


def test_it_begins_as_nothing_and_can_learn() -> None:
    module, x = TemporalAttention(WIDTH), frames()
    assert module.query.out_features == 256 and module.heads == 8
    found = module(x, FRAMES)
    assert torch.equal(found, x)
    (found * torch.randn_like(found)).sum().backward()
    assert module.alpha.grad is not None and float(module.alpha.grad.abs()) > 0


def test_of_one_frame_it_is_a_factor() -> None:
    module, x = attention(0.5), frames()
    torch.testing.assert_close(module(x, 1), 1.5 * x)


def test_the_order_of_frames_cannot_be_seen() -> None:
    module, x = attention(), frames().view(CLIPS, FRAMES, TOKENS, WIDTH)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        found = module(x.flatten(0, 1), FRAMES).view_as(x)
        permuted = module(x[:, order].flatten(0, 1), FRAMES).view_as(x)
    torch.testing.assert_close(permuted, found[:, order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted.mean(1), found.mean(1), rtol=1e-5, atol=1e-6)


def test_a_place_sees_no_other() -> None:
    module, x = attention(), frames()
    with torch.no_grad():
        torch.testing.assert_close(module(x[:, 1:3], FRAMES), module(x, FRAMES)[:, 1:3], rtol=1e-5, atol=1e-6)


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"features of 20 numbers do not divide into 8 heads"):
        TemporalAttention(20)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("class_token", [True, False])
def test_every_feature_is_in_one_merged_feature_that_is_the_mean_of_its_own(count: int, class_token: bool) -> None:
    total = count * TOKENS
    content = torch.randn(CLIPS, count, TOKENS, 6, generator=torch.Generator().manual_seed(2))
    marks = torch.eye(total).view(1, count, TOKENS, total).expand(CLIPS, -1, -1, -1)
    merge = TemporalMerge(6 + total, count, class_token)
    found = merge(torch.cat([10 * content, marks], dim=3))
    assert found.shape == (CLIPS, TOKENS, 6 + total)
    shares = found[..., 6:]
    torch.testing.assert_close(shares.sum(2), torch.ones(CLIPS, TOKENS))
    assert bool(((shares > 0).sum(1) == 1).all()), "each is in one place"
    sizes = (shares > 0).sum(2)
    assert bool((sizes.sum(1) == total).all())
    torch.testing.assert_close(shares, (shares > 0) / sizes[..., None])
    flat = 10 * content.flatten(1, 2)
    torch.testing.assert_close(found[..., :6], shares @ flat, rtol=1e-4, atol=1e-4)
    if class_token:
        torch.testing.assert_close(found[:, 0, :6], 10 * content[:, :, 0].mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_clip_in_which_nothing_moves_is_its_picture(count: int) -> None:
    still = torch.randn(CLIPS, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    merge = TemporalMerge(WIDTH, count, class_token=True)
    torch.testing.assert_close(merge(still.expand(-1, count, -1, -1)), still[:, 0], rtol=1e-6, atol=1e-6)


def test_merging_keeps_the_order_of_frames() -> None:
    merge = TemporalMerge(WIDTH, FRAMES, class_token=False)
    x = frames().view(CLIPS, FRAMES, TOKENS, WIDTH)
    weight = torch.randn(CLIPS, TOKENS, WIDTH)
    (merge(x) * weight).sum().backward()
    grad = merge.frame.grad
    assert grad is not None and float((grad[0] - grad[2]).norm()) > 1e-3, "frames are told apart from the first step on"
    torch.nn.init.normal_(merge.frame)
    with torch.no_grad():
        forward, backward = merge(x).sort(1).values, merge(x.flip(1)).sort(1).values
    assert float((forward - backward).abs().max()) > 0.1


def test_a_clip_does_not_depend_on_the_others() -> None:
    merge = TemporalMerge(WIDTH, FRAMES, class_token=True)
    torch.nn.init.normal_(merge.frame)
    x = frames().view(CLIPS, FRAMES, TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(merge(x), torch.cat([merge(one) for one in x.split(1)]), rtol=1e-6, atol=1e-6)
