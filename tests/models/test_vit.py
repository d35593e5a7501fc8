"""Towers that merge, against timm's own forward, against merging in loops, and through all that is done to blocks."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from merge_loops import Groups, joined, matched, merged
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mm.config import RunConfig
from mm.data.batch import MediaBatch, collate
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.config import VisionConfig
from mm.models.merging import schedule
from mm.models.vision import VisionTower, depth_of
from mm.train.blocks import checkpoint_activations, compile_blocks, find_blocks
from mm.train.config import CheckpointingConfig

PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
PLAIN = {"name": "timm/vit_tiny_patch16_224", "options": SMALL}
TOWERS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "no prefix": {**PLAIN, "options": {**SMALL, "class_token": False, "global_pool": "avg"}},
    "layer scale, gelu": {**PLAIN, "options": {**SMALL, "init_values": 0.5}},
    "norms in attention": {**PLAIN, "options": {**SMALL, "qk_norm": True, "scale_attn_norm": True}},
    "registers": {**PLAIN, "options": {**SMALL, "reg_tokens": 3, "no_embed_class": True, "pre_norm": True}},
    "distilled": {"name": "timm/deit_tiny_distilled_patch16_224", "options": SMALL},
    "norms behind": {"name": "timm/vit_base_patch16_rpn_224", "options": SMALL},
    "eva": {"name": "timm/eva_giant_patch14_224", "patch_size": 16, "options": {**SMALL, "patch_size": 16}},
    "eva, layer scale, apart": {
        "name": "timm/eva_giant_patch14_clip_224",
        "options": {
            **SMALL, "patch_size": 16, "init_values": 0.5, "qkv_fused": False, "qk_norm": True, "swiglu_mlp": True
        },
    },
    "eva, norms behind": {"name": "timm/eva02_enormous_patch14_clip_224", "options": {**SMALL, "patch_size": 16}},
}  # fmt: skip


def tower(merge: dict[str, Any] | None = None, **settings: Any) -> VisionTower:
    """The same weights whether or not it merges; none of them is as it begins."""
    torch.manual_seed(0)
    values = {"pretrained": False, "image_size": 64, "block": -1, "merge": merge, **settings}
    made = VisionTower(VisionConfig.model_validate(values)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


def media_of(pixels: Tensor) -> MediaBatch:
    nothing = torch.zeros(len(pixels), dtype=torch.int64)
    return MediaBatch(
        pixels.flatten(), torch.tensor([pixels.shape[1:]] * len(pixels)), torch.arange(len(pixels) + 1) * 3 * 64 * 64,
        nothing, nothing, nothing, nothing,
    )  # fmt: skip


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every value has a weight of its own."""
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {n: grad.full_tensor() if isinstance(grad, DTensor) else grad for n, grad in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(one.norm()) for one in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error <= tolerance * max(float(gradient.norm()), 1e-2 * scale), f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("block", [-1, 0])
def test_with_nothing_to_merge_it_is_the_tower_of_timm(name: str, block: int) -> None:
    """Features and all gradients; patches that are put back are where they were."""
    plain = tower(**TOWERS[name], block=block)
    expected = plain.of_squares(PIXELS)
    for merge in ({"r": 0}, {"r": 0, "restore": True}):
        ours = tower(merge, **TOWERS[name], block=block)
        found = ours.of_squares(PIXELS)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
        assert_same(gradients(ours, found), gradients(plain, plain.of_squares(PIXELS)), 2e-6)


@pytest.mark.parametrize("name", ["plain", "layer scale, gelu", "eva, layer scale, apart"])
def test_dropout_and_drop_path_draw_what_they_draw_in_timm(name: str) -> None:
    options = {**TOWERS[name]["options"], "drop_path_rate": 0.4, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}
    found = []
    for merge in (None, {"r": 0}):
        ours = tower(merge, **{**TOWERS[name], "options": options}).train()
        torch.manual_seed(3)
        found.append(ours.of_squares(PIXELS))
    torch.testing.assert_close(*found, rtol=1e-6, atol=2e-6)
    assert not torch.allclose(found[0], ours.eval().of_squares(PIXELS), atol=1e-2)


def by_hand(plain: VisionTower, pixels: Tensor, rs: list[int], proportional: bool) -> tuple[Tensor, Groups]:
    """A merging tower of one picture in loops: timm's modules of plain and register towers, attention head by head."""
    vit: Any = plain.featurizer
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels[None])))[0]
    groups: Groups = [[n] for n in range(len(x))]
    for block, r in zip(vit.blocks, rs, strict=True):
        attn, sizes = block.attn, [len(group) for group in groups]
        of_heads = attn.qkv(block.norm1(x)).chunk(3, dim=1)
        heads = [one.view(len(x), attn.num_heads, -1).transpose(0, 1) for one in of_heads]
        query, key = attn.q_norm(heads[0]), attn.k_norm(heads[1])
        weights = (query @ key.mT / query.shape[2] ** 0.5).exp()
        if proportional:
            weights = weights * torch.tensor(sizes)
        out = (weights / weights.sum(2, keepdim=True)) @ heads[2]
        x = x + block.ls1(attn.proj(attn.norm(out.transpose(0, 1).flatten(1))))
        new = matched(key.mean(0), r, vit.num_prefix_tokens)
        x, groups = merged(x, new, sizes), joined(groups, new)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x[vit.num_prefix_tokens :], groups[vit.num_prefix_tokens :]


@pytest.mark.parametrize("name", ["plain", "no prefix", "norms in attention", "registers"])
@pytest.mark.parametrize("merge", [{"r": 3}, {"r": 2, "inflect": -1, "proportional": False}])
def test_a_merging_tower_is_that_of_loops(name: str, merge: dict[str, Any]) -> None:
    """Features, sources and gradients of each picture."""
    ours, plain = tower(merge, **TOWERS[name]), tower(**TOWERS[name])
    rs = schedule(merge["r"], merge.get("inflect", 0), 3)
    hands = [by_hand(plain, one, rs, merge.get("proportional", True)) for one in PIXELS]
    expected = torch.stack([one for one, _ in hands])
    found = ours.of_squares(PIXELS)
    assert found.shape == (3, 16 - sum(rs), 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(ours, found), gradients(plain, expected), 1e-4)
    prefix = ours.prefix
    for picture, (_, groups) in zip(ours.sources(media_of(PIXELS)).tolist(), hands, strict=True):
        assert picture == [next(k for k, one in enumerate(groups) if n + prefix in one) for n in range(16)]


@pytest.mark.parametrize("name", ["plain", "eva, layer scale, apart", "norms behind"])
def test_attention_by_size_is_attention_to_tokens_as_often(name: str) -> None:
    ours = tower({"r": 0}, **TOWERS[name])
    block: Any = ours.featurizer.blocks[1]  # type: ignore[index]
    size = torch.tensor([1, 3, 1, 7, 2])
    x = torch.randn(1, 5, 32)
    found, _, _ = block(x, size[None], None, None)
    repeated, _, _ = block(x.repeat_interleave(size, dim=1), None, None, None)
    torch.testing.assert_close(found, repeated[:, size.cumsum(0) - 1], rtol=1e-5, atol=1e-5)


def test_pictures_do_not_depend_on_their_company() -> None:
    ours = tower({"r": 3}, **PLAIN)
    together = ours(media_of(PIXELS))
    assert ours.grids(media_of(PIXELS)) == [(1, 7)] * 3 and together.shape == (21, 32)
    for number, one in enumerate(together.split(7)):
        torch.testing.assert_close(ours(media_of(PIXELS[number : number + 1])), one, rtol=1e-6, atol=1e-6)


def test_a_picture_of_zeros_has_gradients_of_zero() -> None:
    """What a rank without pictures runs; all keys are alike but for their places, or zero."""
    ours = tower({"r": 3}, **PLAIN)
    (0.0 * ours(media_of(torch.zeros(1, 3, 64, 64))).sum()).backward()
    used = [p for name, p in ours.named_parameters() if not name.startswith("featurizer.norm.")]
    assert all(p.grad is not None and not p.grad.any() for p in used)


@pytest.mark.parametrize("name", ["plain", "norms in attention", "eva, layer scale, apart"])
def test_low_precision(name: str) -> None:
    """Under autocast, and with weights in bfloat16: near to float32, as timm's own forward is."""
    exact = tower(**TOWERS[name]).of_squares(PIXELS).detach()
    for merge in ({"r": 0}, {"r": 3, "restore": True}):
        ours = tower(merge, **TOWERS[name])
        with torch.autocast("cpu", torch.bfloat16):
            half = ours.of_squares(PIXELS)
        half.float().sum().backward()
        cast = ours.bfloat16().of_squares(PIXELS.bfloat16())
        assert cast.dtype == torch.bfloat16
        for found in (half.detach(), cast.detach()):
            assert bool(found.isfinite().all())
            if merge["r"] == 0:
                assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_restored_features_are_in_the_places_of_their_patches() -> None:
    short, ours = tower({"r": 3}, **PLAIN), tower({"r": 3, "restore": True}, **PLAIN)
    media = media_of(PIXELS)
    assert ours.grids(media) == [(4, 4)] * 3 and ours.features == 16
    merged, source = short.of_squares(PIXELS), ours.sources(media)
    expected = torch.stack([one[place] for one, place in zip(merged, source, strict=True)])
    torch.testing.assert_close(ours.of_squares(PIXELS), expected)


def test_published_counts() -> None:
    """ViT-T/16 with r = 8: 197 tokens become 101. EVA-CLIP-g without its last block, r = 6."""
    config = VisionConfig(
        name="timm/vit_tiny_patch16_224", pretrained=False, image_size=224, block=-1, class_token=True, merge={"r": 8}
    )
    assert depth_of(config) == 12 and config.features == 101
    with torch.no_grad():
        assert VisionTower(config).of_squares(torch.zeros(1, 3, 224, 224)).shape == (1, 101, 192)
    eva = VisionConfig(name="timm/eva_giant_patch14_clip_224", pretrained=False, image_size=224, merge={"r": 6})
    assert depth_of(eva) == 39 and eva.features == 256 - 6 * 39


@pytest.mark.parametrize("name", ["plain", "eva"])
def test_the_class_token_stays_in_front(name: str) -> None:
    ours = tower(**TOWERS[name], class_token=True)
    vit: Any = ours.featurizer
    ((patches, token),) = vit.forward_intermediates(
        PIXELS, [2], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    found = ours.of_squares(PIXELS)
    assert torch.equal(found, torch.cat([token, patches], dim=1))
    assert ours.grids(media_of(PIXELS)) == [(1, 17)] * 3
    torch.testing.assert_close(tower({"r": 0}, **TOWERS[name], class_token=True).of_squares(PIXELS), found)
    merging = tower({"r": 3}, **TOWERS[name], class_token=True)
    without = tower({"r": 3}, **TOWERS[name]).of_squares(PIXELS)
    assert torch.equal(merging.of_squares(PIXELS)[:, 1:], without) and merging.features == 8


def test_the_class_token_of_open_clip() -> None:
    options = {"patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
    ours = tower(name="open_clip/ViT-B-32", patch_size=16, options=options, class_token=True)
    without = tower(name="open_clip/ViT-B-32", patch_size=16, options=options)
    found = ours.of_squares(PIXELS)
    assert found.shape == (3, 17, 32) and torch.equal(found[:, 1:], without.of_squares(PIXELS))
    seen: list[Tensor] = []
    ours.featurizer.transformer.resblocks[-1].register_forward_hook(lambda *about: seen.append(about[2]))  # type: ignore
    ours.of_squares(PIXELS)
    assert torch.equal(found, seen[0])


class Shift(nn.Module):
    """What comes from the frame before, of each place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        clips = x.unflatten(0, (-1, frames))
        return x + self.scale * clips.roll(1, dims=1).flatten(0, 1)


def test_clips_are_their_frames_where_nothing_looks_across() -> None:
    clips = PIXELS[torch.tensor([[0, 1, 2], [2, 2, 0]])]
    for merge in (None, {"r": 3}):
        ours = tower(merge, **PLAIN)
        found = ours.of_clips(clips)
        assert found.shape[:2] == (2, 3)
        torch.testing.assert_close(found[0], ours.of_squares(PIXELS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "eva, norms behind"])
def test_temporal_modules_stand_between_attention_and_mlp(name: str) -> None:
    clips = PIXELS[torch.tensor([[0, 1, 2], [2, 2, 0]])]
    ours = tower(**TOWERS[name])
    pictures = ours.of_squares(PIXELS)
    ours.set_temporal([Shift() for _ in range(3)])
    assert [key for key in ours.state_dict() if "temporal" in key] == [f"temporal.{n}.scale" for n in range(3)]
    torch.testing.assert_close(ours.of_squares(PIXELS), pictures, rtol=1e-6, atol=2e-6)  # not of pictures
    found = ours.of_clips(clips)
    vit: Any = ours.featurizer
    x = vit._pos_embed(vit.patch_embed(clips.flatten(0, 1)))
    x = x[0] if isinstance(x, tuple) else x
    for block in vit.blocks:
        behind = name == "eva, norms behind"
        attend = type(block.attn).forward
        x = x + (block.norm1(attend(block.attn, x)) if behind else attend(block.attn, block.norm1(x)))
        x = x + x.unflatten(0, (2, 3)).roll(1, dims=1).flatten(0, 1)
        x = x + (block.norm2(block.mlp(x)) if behind else block.mlp(block.norm2(x)))
    torch.testing.assert_close(found, x[:, 1:].unflatten(0, (2, 3)), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None for p in ours.temporal.parameters())  # type: ignore[union-attr]


ROPE = {"name": "timm/eva02_tiny_patch14_224", "image_size": 56, "options": {"depth": 1}}
TINY_CLIP = {"patch_size": 16, "width": 32, "layers": 1, "head_width": 16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**ROPE, "merge": {"r": 1}}, r"vision.merge: timm/eva02.* rotary positions, .* choose a tower without"),
        (
            {"name": "open_clip/ViT-B-32", "patch_size": 16, "options": TINY_CLIP, "merge": {"r": 1}},
            r"vision.merge: open_clip/ViT-B-32 is no plain vision transformer of timm .* choose one",
        ),
        ({"name": "timm/convnext_atto", "patch_size": 32, "merge": {"r": 1}}, "no plain vision transformer of timm"),
        ({**PLAIN, "options": {**SMALL, "patch_drop_rate": 0.5}, "merge": {"r": 1}}, "no patch dropout"),
        ({"name": "timm/vit_base_patch16_xp_224", "options": SMALL, "merge": {"r": 1}}, "attention before MLP"),
        ({**TOWERS["registers"], "class_token": True}, "has 4 tokens in front of its patches"),
        ({"name": "timm/convnext_atto", "patch_size": 32, "class_token": True}, "has 0 tokens in front"),
    ],
)
def test_what_cannot_merge_is_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tower(**settings)
    assert "\n" not in str(caught.value)
    if "merge" in settings:
        with pytest.raises(ConfigError, match=words):  # already where positions are counted
            _ = VisionConfig.model_validate({"pretrained": False, "image_size": 64, "block": -1, **settings}).features


def test_a_tower_that_merges_looks_across_no_frames() -> None:
    with pytest.raises(ConfigError, match="leave out one of the two"):
        tower({"r": 1}, **PLAIN).set_temporal([Shift() for _ in range(3)])
    with pytest.raises(ConfigError, match="open_clip/ViT-B-32 is no plain"):
        tower(name="open_clip/ViT-B-32", patch_size=16, options=TINY_CLIP).set_temporal([Shift()])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_blocks_that_merge_are_recomputed(mode: Any) -> None:
    """To the last bit: the same tokens merge again."""
    plain = tower({"r": 3}, **TOWERS["layer scale, gelu"])
    ours = copy.deepcopy(plain)
    checkpoint_activations(ours, CheckpointingConfig(mode=mode), find_blocks(ours, [r"featurizer\.blocks\.\d+"]))
    found, expected = ours.of_squares(PIXELS), plain.of_squares(PIXELS)
    assert torch.equal(found, expected)
    assert_same(gradients(ours, found), gradients(plain, expected), 0.0)


@pytest.fixture
def alone() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def test_blocks_that_merge_are_recomputed_compiled_and_sharded(alone: None) -> None:
    """One compiled graph where nothing has merged yet, one of a number of tokens, one of any number."""
    plain = tower({"r": 2}, **{**PLAIN, "options": {**SMALL, "depth": 4}})
    expected = plain.of_squares(PIXELS)
    wanted = gradients(plain, expected)
    ours = copy.deepcopy(plain)
    blocks = find_blocks(ours, [r"featurizer\.blocks\.\d+"])
    checkpoint_activations(ours, CheckpointingConfig(mode="full"), blocks)
    compile_blocks(blocks, backend="aot_eager")
    mesh = init_device_mesh("cpu", (1,))
    for block in blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    for _ in range(2):
        found = ours(media_of(PIXELS)).unflatten(0, (3, -1))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_same(gradients(ours, found), wanted, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


MERGING = ("model.vision.merge={r: 4}", "model.connector={kind: mlp}")


@pytest.mark.parametrize(
    ("overrides", "positions"),
    [
        (MERGING, 8),
        ((*MERGING, "model.vision.class_token=true", "model.vision.options.class_token=true"), 9),
        (("model.vision.merge={r: 4, restore: true}",), 4),
        (("model.connector={kind: mlp}",), 16),
    ],
)
def test_a_model_of_a_merging_tower(
    tiny_config: Callable[..., RunConfig], overrides: tuple[str, ...], positions: int
) -> None:
    """Packed, forward and backward; recomputed blocks change nothing."""
    config = tiny_config(*overrides, "model.vision.options.proj_drop_rate=0.1")
    layout = config.model.layout()
    assert layout.image is not None and layout.image.tokens == positions
    dataset = open_splits(config.data, layout, config.seed)["train"]
    batch = collate([dataset.read(0), dataset.read(1)], layout, 128)
    assert set(batch.media["image"].length.tolist()) == {positions}
    torch.manual_seed(0)
    system = config.model.build().train()
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = system(batch).losses["next_token"]
        found.append({"loss": loss.detach()[None], **gradients(system, loss[None])})
        checkpoint_activations(
            system, CheckpointingConfig(mode="full"), find_blocks(system, [r"vision\..*blocks\.\d+"])
        )
    assert all(name in found[0] for name in ("vision.featurizer.blocks.1.mlp.fc1.weight", "connector.mlp.0.weight"))
    assert_same(found[1], found[0], 0.0)


def test_a_grid_pooler_refuses_merged_features(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"pools a grid .* choose connector.kind mlp, or set vision.merge.restore"):
        tiny_config("model.vision.merge={r: 4}")
