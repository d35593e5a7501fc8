"""Gated cross-attention against dense masks, loops over tokens, and transformers' Idefics."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mm.models.gated import (
    GatedBlock,
    MediaSeen,
    PerceiverResampler,
    TextQuery,
    attend,
    ends,
    scopes,
    see,
)

SEGMENTS = torch.tensor([
    [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 0],
    [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
])  # fmt: skip
PLACES = [(0, 4), (0, 6), (1, 0), (1, 2), (1, 6), (1, 7), (1, 10), (3, 11)]
"""Rows and positions of media: none in segments 1 and 3 of the first row; first and last positions; side by side."""
MODES = [(True, False), (True, True), (False, False), (False, True)]
LENGTH = SEGMENTS.shape[1]
LATENTS, WIDTH, HEADS, DEPTH = 3, 6, 2, 4


def seen_by_loop(immediate: bool, faithful: bool) -> list[tuple[list[int], bool]]:
    """Of every position the numbers of the media that it sees, and whether it weighs them alike."""
    found: list[tuple[list[int], bool]] = []
    for row, segments in enumerate(SEGMENTS.tolist()):
        for position, segment in enumerate(segments):
            own = [n for n, (r, p) in enumerate(PLACES) if r == row and segment and segments[p] == segment]
            before = [n for n in own if PLACES[n][1] <= position]
            if immediate:
                found.append((before[-1:], False))
            elif faithful and not before:
                found.append((own, True))
            else:
                found.append((before, False))
    return found


def shuffled() -> tuple[Tensor, list[int]]:
    """Flat places of the media in another order, a dummy among them, and the number of each, -1 of the dummy."""
    numbers = [3, 7, 0, -1, 6, 1, 5, 2, 4]
    flat = [-1 if n < 0 else PLACES[n][0] * LENGTH + PLACES[n][1] for n in numbers]
    return torch.tensor(flat), numbers


def make(immediate: bool, faithful: bool) -> tuple[MediaSeen, Tensor]:
    """What positions see, and the latents as they were given."""
    places, _ = shuffled()
    latents = torch.randn(len(places), LATENTS, WIDTH, requires_grad=True)
    return see(latents, places, SEGMENTS.int(), immediate, faithful), latents


def dense(query: Tensor, key: Tensor, value: Tensor, expected: list[tuple[list[int], bool]], scale: float) -> Tensor:
    """Softmax over all latents of all media under a mask, one token after the other; key and value in number order."""
    out = []
    for q, (media, alike) in zip(query, expected, strict=True):
        if not media:
            out.append(torch.zeros_like(q))
            continue
        mask = torch.full((len(PLACES), LATENTS, 1), -torch.inf)
        mask[media] = 0
        scores = torch.einsum("hd,mkhd->mkh", 0 * q if alike else q, key) * scale + mask
        weights = scores.flatten(0, 1).softmax(0).view_as(scores)
        out.append(torch.einsum("mkh,mkhd->hd", weights, value))
    return torch.stack(out)


@pytest.mark.parametrize(("immediate", "faithful"), MODES)
def test_attention_is_that_of_a_loop_over_tokens(immediate: bool, faithful: bool) -> None:
    """Outputs and gradients, however media are ordered; nothing reaches a dummy, and nothing is seen by padding."""
    torch.manual_seed(0)
    seen, latents = make(immediate, faithful)
    _, numbers = shuffled()
    query = torch.randn(SEGMENTS.numel(), HEADS, DEPTH, requires_grad=True)
    to_key, to_value = (torch.randn(WIDTH, HEADS * DEPTH) for _ in range(2))

    def projected(given: Tensor, by: Tensor) -> Tensor:
        return (given @ by).unflatten(-1, (HEADS, DEPTH))

    out = attend(query, projected(seen.latents, to_key), projected(seen.latents, to_value), seen, 0.2)
    in_order = latents[[numbers.index(n) for n in range(len(PLACES))]]
    rule = seen_by_loop(immediate, faithful)
    expected = dense(query, projected(in_order, to_key), projected(in_order, to_value), rule, 0.2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    blind = [n for n, (media, _) in enumerate(rule) if not media]
    assert len(blind) > LENGTH and not out[blind].any()
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (query, latents))
    wanted = torch.autograd.grad((expected * weight).sum(), (query, latents))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not found[1][numbers.index(-1)].any()


@pytest.mark.parametrize(("immediate", "faithful"), MODES)
def test_some_positions_see_what_they_saw_among_all(immediate: bool, faithful: bool) -> None:
    torch.manual_seed(0)
    seen, _ = make(immediate, faithful)
    query = torch.randn(SEGMENTS.numel(), HEADS, WIDTH // HEADS)
    key = value = seen.latents.detach().unflatten(-1, (HEADS, -1))
    whole = attend(query, key, value, seen, 1.0)
    places = torch.tensor([1, 4, 5, 6, 7, 11, 13, 18, 19, 22, 23, 30, 47])
    torch.testing.assert_close(attend(query[places], key, value, seen.select(places), 1.0), whole[places])
    first = see(seen.latents, *_first_row(), immediate, faithful)
    last = [2, 8, 10]  # of segments 1, 2 and 3
    behind = first.after(torch.tensor([3, 2, 0, 2, 1]))
    alone = query[[last[2], last[1], 0, last[1], last[0]]]
    key = value = first.latents.detach().unflatten(-1, (HEADS, -1))
    found = attend(alone, key, value, behind, 1.0)
    expected = attend(query[:LENGTH], key, value, first, 1.0)
    torch.testing.assert_close(found[[0, 1, 3, 4]], expected[[last[2], last[1], last[1], last[0]]])
    assert found[1].any() and not found[2].any(), "a segment that is none sees nothing"


def _first_row() -> tuple[Tensor, Tensor]:
    places, _ = shuffled()
    return torch.where(places < LENGTH, places, -1), SEGMENTS[:1]


def test_where_nothing_is_seen_gradients_are_zero_and_there() -> None:
    """Of a rank without media, which has a dummy; and of one without even that."""
    torch.manual_seed(0)
    block = GatedBlock(8, WIDTH, 8, 0.5)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    for media in (1, 0):
        latents = torch.randn(media, LATENTS, WIDTH, requires_grad=True)
        seen = see(latents, torch.full((media,), -1), SEGMENTS, True)
        hidden = torch.randn(1, SEGMENTS.numel(), 8)
        block.zero_grad()
        out = block(hidden, seen)
        torch.testing.assert_close(out, hidden + torch.tanh(block.ff_gate) * block.ff(hidden), rtol=0, atol=0)
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())
        assert not any(parameter.grad.any() for parameter in block.attn.parameters())  # type: ignore[union-attr]
        assert latents.grad is not None and not latents.grad.any()


def test_a_text_is_pooled_by_itself() -> None:
    """Texts of any length in one call, against one after the other; of none there is nothing, with a gradient."""
    torch.manual_seed(0)
    query = TextQuery(16)
    hidden = torch.randn(SEGMENTS.numel(), 16, requires_grad=True)
    scope = scopes(SEGMENTS)
    start, end = ends(scope)
    firsts = torch.tensor([9, 0, 12, 17, 36, 3, 14])
    lengths = (end - start + 1)[firsts]
    assert torch.equal(start[firsts], firsts) and lengths.tolist() == [2, 3, 2, 7, 12, 6, 3]
    found = query(hidden, firsts, lengths)
    alone = []
    for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
        text = hidden[None, first : first + length]
        latent = query.latent[None] + query.attn(text, query.latent[None])
        alone.append(query.norm((latent + query.ff(latent))[0, 0]))
    expected = torch.stack(alone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), hidden),
        torch.autograd.grad((expected * weight).sum(), hidden), rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    none = query(hidden, firsts[:0], lengths[:0])
    none.sum().backward()
    assert none.shape == (0, 16)
    assert all(one.grad is not None and not one.grad.any() for one in query.parameters())


def idefics(width: int, media_width: int, heads: int) -> IdeficsConfig:
    return IdeficsConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=8, qk_layer_norms=False, dropout=0.0,
        alpha_initializer="ones", alpha_type="float", vision_config={"embed_dim": media_width},
        perceiver_config={"qk_layer_norms_perceiver": False}, attn_implementation="eager",
    )  # fmt: skip


def test_the_block_is_that_of_idefics() -> None:
    """At ratio 1, with our norm and feed-forward layer in its places: those of Idefics are of another kind."""
    torch.manual_seed(0)
    width = 512  # Idefics' heads divide it: 8, 64 wide
    block = GatedBlock(width, WIDTH, 1, 64**-0.5)
    theirs: Any = IdeficsGatedCrossAttentionLayer(idefics(width, WIDTH, 8), layer_idx=0)
    nn.init.constant_(block.attn_gate, 0.7), nn.init.constant_(block.ff_gate, -0.4)
    with torch.no_grad():
        theirs.alpha_cross_attn.copy_(block.attn_gate), theirs.alpha_dense.copy_(block.ff_gate)
        theirs.cross_attn.q_proj.weight.copy_(block.attn.to_q.weight)
        theirs.cross_attn.k_proj.weight.copy_(block.attn.to_kv.weight[:width])
        theirs.cross_attn.v_proj.weight.copy_(block.attn.to_kv.weight[width:])
        theirs.cross_attn.o_proj.weight.copy_(block.attn.to_out.weight)
    theirs.input_layernorm, theirs.post_attention_layernorm, theirs.mlp = block.attn.norm, nn.Identity(), block.ff
    seen, latents = make(False, False)
    hidden = torch.randn(1, SEGMENTS.numel(), width, requires_grad=True)
    out = block(hidden, seen)
    _, numbers = shuffled()
    sees = torch.zeros(SEGMENTS.numel(), len(numbers), dtype=torch.bool)
    for position, (media, _) in enumerate(seen_by_loop(False, False)):
        sees[position, [numbers.index(n) for n in media]] = True
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min).repeat_interleave(LATENTS, dim=1)[None, None]
    expected = theirs(
        hidden, image_hidden_states=latents.flatten(0, 1)[None], image_attention_mask=mask,
        cross_attention_gate=sees.any(1)[None].float(),
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (hidden, latents))
    wanted = torch.autograd.grad((expected * weight).sum(), (hidden, latents))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_resampler_is_that_of_idefics() -> None:
    """With GELU in place of its ReLU."""
    torch.manual_seed(0)
    width, latents, depth, heads = 24, 5, 3, 2
    ours = PerceiverResampler(width, latents, depth, heads)
    theirs: Any = IdeficsPerceiverResampler(idefics(32, width, 2), width, depth, heads, 64, 1 + latents)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
        theirs.latents.copy_(ours.latents)
        for (attention, mlp), layer in zip(theirs.blocks, ours.layers, strict=True):
            own, feed = layer
            key, value = own.to_kv.weight.chunk(2)
            attention.k_proj.weight.copy_(key), attention.v_proj.weight.copy_(value)
            attention.q_proj.weight.copy_(own.to_q.weight), attention.output_proj.weight.copy_(own.to_out.weight)
            mlp.fc.weight.copy_(feed[1].weight), mlp.c_proj.weight.copy_(feed[3].weight)
            attention.context_layer_norm, attention.latents_layer_norm = own.norm_media, own.norm_latents
            mlp.ln, mlp.act = feed[0], nn.GELU()
    theirs.layer_norm = ours.norm
    features = torch.randn(2, 7, width, requires_grad=True)
    out, expected = ours(features), theirs(features)
    assert out.shape == (2, 1 + latents, width)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), features),
        torch.autograd.grad((expected * weight).sum(), features), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("ratio", "millions"), [(1, 36.7), (2, 18.4), (4, 9.2)])
def test_a_block_of_published_size(ratio: int, millions: float) -> None:
    """In OPT-IML-1.3B, under CLIP's ViT-L/14."""
    with torch.device("meta"):
        block = GatedBlock(2048, 1024, ratio, 0.125)
    assert round(sum(parameter.numel() for parameter in block.parameters()) / 1e6, 1) == millions


def test_narrower_heads_and_the_scale_of_wide_ones() -> None:
    """`ratio` leaves 8 heads, and the release goes on to divide their scores by 8: written out for one token."""
    torch.manual_seed(0)
    latents = torch.randn(1, LATENTS, WIDTH)
    seen = see(latents, torch.tensor([0]), torch.ones(1, 1, dtype=torch.int32), True)
    for ratio, scale in ((4, 64**-0.5), (4, 16**-0.5), (8, 8**-0.5)):
        block = GatedBlock(32, WIDTH, ratio, scale)
        hidden = torch.randn(1, 1, 32)
        query = block.attn.to_q(F.layer_norm(hidden[0, 0], (32,))).view(8, 64 // ratio)
        key, value = block.attn.to_kv(latents[0]).view(LATENTS, 2, 8, 64 // ratio).unbind(1)
        weights = (torch.einsum("hd,khd->kh", query, key) * scale).softmax(0)
        expected = block.attn.to_out(torch.einsum("kh,khd->hd", weights, value).flatten())
        torch.testing.assert_close(block.attn(hidden, seen)[0, 0], expected, rtol=1e-5, atol=1e-6)
