"""Towers against timm's and open_clip's own forward; pictures in their own aspect ratio against each of them alone."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mm.data.batch import MediaBatch
from mm.data.layout import NativeLayout
from mm.data.media import ImageHeader, Native
from mm.errors import ConfigError
from mm.models.config import LayoutConfig, PoolMLPConfig, VisionConfig
from mm.models.connectors import PoolMLP
from mm.models.vision import VisionTower
from mm.train.blocks import compile_blocks, find_blocks

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
CLIP = {"patch_size": 16, "width": 32, "layers": 3, "head_width": 16}


def tower(**settings: object) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(
        VisionConfig.model_validate({"pretrained": False, "image_size": 64, "block": -1, **settings})
    ).eval()


def media_of(pictures: Sequence[Tensor]) -> MediaBatch:
    sizes = [one.numel() for one in pictures]
    nothing = torch.zeros(len(pictures), dtype=torch.int64)
    return MediaBatch(
        values=torch.cat([one.flatten() for one in pictures]),
        shapes=torch.tensor([one.shape for one in pictures]),
        offsets=torch.tensor([0, *np.cumsum(sizes)]),
        row=nothing,
        position=nothing,
        length=nothing,
        cost=nothing,
    )


def noise(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, height, width, generator=generator) for height, width in sizes]


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every value has a weight of its own."""
    module.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / (gradient.norm() + 1e-8))
        assert error < 1e-4 or float(gradient.norm()) < 1e-5, f"{name}: {error:.1e}"


def test_a_vision_transformers_last_block_is_its_features_before_the_norm() -> None:
    ours = tower(name="timm/vit_tiny_patch16_224", options=TINY)
    expected = ours.featurizer.norm(ours.of_squares(PIXELS))
    torch.testing.assert_close(expected, ours.featurizer.forward_features(PIXELS)[:, 1:])
    assert ours.grids(media_of(list(PIXELS))) == [(4, 4), (4, 4)] and ours.width == 32


def test_a_convolutional_tower_gives_its_map_row_by_row() -> None:
    ours = tower(name="timm/convnext_atto", patch_size=32, options={"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]})
    found = ours.of_squares(PIXELS)
    assert found.shape == (2, 4, 32) and ours.width == 32
    # norm_pre is the identity here, so the last stage is what the head gets.
    torch.testing.assert_close(found[:, 1], ours.featurizer.forward_features(PIXELS)[:, :, 0, 1])
    torch.testing.assert_close(ours(media_of(list(PIXELS))), found.flatten(0, 1))


def test_a_stage_in_the_middle() -> None:
    ours = tower(
        name="timm/convnext_atto", block=1, patch_size=8, options={"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    )
    assert ours.of_squares(PIXELS).shape == (2, 64, 16)


def test_the_published_tower_is_whole_and_its_activation_is_exact() -> None:
    """SigLIP so400m as timm has it: 27 blocks, of which the 26th is used; erf GELU, where the hub's config says tanh;
    428,225,600 parameters, what is never run (last block, norm, pooling head) included (spec 1a)."""
    config = VisionConfig(name="timm/vit_so400m_patch14_siglip_384")
    with torch.device("meta"):
        ours = VisionTower(config, weights=False)
    assert sum(p.numel() for p in ours.parameters()) == 428_225_600 and len(list(ours.parameters())) == 342
    assert ours.block == 25 and len(ours.featurizer.blocks) == 27 and ours.width == 1152 and config.patches == 729
    gelus = [module for module in ours.modules() if isinstance(module, nn.GELU)]
    norms = [module for module in ours.featurizer.blocks.modules() if isinstance(module, nn.LayerNorm)]
    assert len(gelus) == 28 and all(module.approximate == "none" for module in gelus)
    assert len(norms) == 54 and {module.eps for module in norms} == {1e-6}
    assert any(name.startswith("featurizer.attn_pool.") for name, _ in ours.named_parameters())


def by_hook(model: nn.Module, block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block gives while `run` runs."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14"])
@pytest.mark.parametrize("block", [-1, 0])
def test_an_open_clip_tower_is_the_vision_side_of_its_model(name: str, block: int) -> None:
    ours = tower(name=f"open_clip/{name}", block=block, patch_size=16, options=CLIP)
    model = open_clip.create_model(name, vision_cfg={**CLIP, "image_size": 64}).eval()
    model.visual.load_state_dict(ours.featurizer.state_dict())
    activations = {type(module).__name__ for module in ours.modules() if "GELU" in type(module).__name__}
    assert activations == {"QuickGELU" if name.endswith("quickgelu") else "GELU"}
    found = ours.of_squares(PIXELS)
    block_of_theirs = model.visual.transformer.resblocks[block]
    expected = by_hook(model, block_of_theirs, lambda: model.encode_image(PIXELS))[:, 1:]  # without the class token
    assert found.shape == (2, 16, 32)
    torch.testing.assert_close(found, expected)
    assert_gradients(gradients(ours.featurizer, found), gradients(model.visual, expected))


def test_the_published_sizes_of_open_clip_towers() -> None:
    with torch.device("meta"):
        ours = VisionTower(VisionConfig(name="open_clip/ViT-B-32", pretrained=False, image_size=224))
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    shapes = {name: tensor.shape for name, tensor in model.visual.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.featurizer.state_dict().items()} == shapes


def test_an_open_clip_model_that_is_timms_is_timms() -> None:
    with torch.device("meta"):
        ours = VisionTower(VisionConfig(name="open_clip/ViT-B-16-SigLIP-256", pretrained=False, image_size=256))
        theirs = timm.create_model("vit_base_patch16_siglip_256", num_classes=0)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.featurizer.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("timm/vit_so400m_patch14_siglip_384.webli", 14),
        ("open_clip/ViT-L-14-336-quickgelu.openai", 14),
        ("open_clip/coca_ViT-B-32.laion2b_s13b_b90k", 32),
        ("open_clip/ViT-SO400M-16-SigLIP2-384.webli", 16),
        ("timm/convnext_tiny.in12k", 16),
    ],
)
def test_the_patch_size_in_a_name(name: str, patch: int) -> None:
    assert VisionConfig(name=name).patch == patch


NATIVE = {"resize": "native", "options": TINY}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "timm/convnext_atto"}, r"a feature for every 32 pixels; set model.vision.patch_size"),
        ({"name": "timm/vit_tiny_patch16_224", "block": 12}, r"has 12 blocks"),
        (
            {"name": "timm/resnet10t", "patch_size": 32},
            r"batch normalisation .* choose a tower with layer normalisation",
        ),
        ({"name": "timm/vit_none"}, r"cannot be built"),
        ({"name": "open_clip/ViT-none"}, r"open_clip.list_models\(\) has no ViT-none"),
        ({"name": "open_clip/ViT-B-32.none", "pretrained": True}, r"no such weights .* openai, .*laion2b_s34b_b79k"),
        ({"name": "open_clip/ViT-B-32.openai", "pretrained": True}, r"with QuickGELU; take .*-quickgelu.openai"),
        ({"name": "timm/convnext_atto", "resize": "native", "patch_size": 32}, r"no plain vision transformer"),
        ({"name": "timm/eva02_tiny_patch14_224", "resize": "native", "image_size": 56}, r"no plain vision transformer"),
    ],
)
def test_what_cannot_be_built_is_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tower(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet50"}, "timm/NAME, or of open_clip"),
        ({"name": "open_clip/ViT-B-32", "pretrained": True}, "names no weights"),
        ({"name": "open_clip/ViT-B-32.openai", "resize": "native"}, "of timm, which has those of open_clip"),
        ({"name": "timm/vit_tiny_patch16_224", "max_patches": 9}, "`max_patches` is for `resize: native`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_built(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VisionConfig.model_validate({"pretrained": False, **settings})


SIZES = [(64, 64), (16, 16), (32, 80), (80, 32), (64, 64), (48, 16), (16, 48)]
TOWERS: dict[str, dict[str, Any]] = {
    "class token": {"name": "timm/vit_tiny_patch16_224", "options": TINY},
    "no prefix": {"name": "timm/vit_tiny_patch16_224", "options": {**TINY, "class_token": False, "global_pool": "avg"}},
    "no positions": {"name": "timm/vit_tiny_patch16_224", "options": {**TINY, "pos_embed": "none"}},
    "registers, positions of patches alone, norm before, gelu": {
        "name": "timm/vit_tiny_patch16_224",
        "options": {**TINY, "reg_tokens": 2, "no_embed_class": True, "pre_norm": True, "qk_norm": True},
    },
    "layer scale, attention norm": {
        "name": "timm/vit_tiny_patch16_224",
        "options": {**TINY, "init_values": 0.5, "scale_attn_norm": True, "qkv_bias": False},
    },
}


def alone(ours: VisionTower, picture: Tensor) -> Tensor:
    """timm's own forward of one picture, by a tower of the same weights with timm's own attention."""
    (features,) = ours.featurizer.forward_intermediates(
        picture[None], indices=[ours.block], intermediates_only=True, output_fmt="NLC"
    )
    return features[0]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("block", [-1, 0])
def test_pictures_together_are_each_alone_as_timm_runs_it(name: str, block: int) -> None:
    """Against timm with `dynamic_img_size`, one picture at a time: features and all gradients."""
    settings = {**TOWERS[name], "block": block}
    ours = tower(**settings, resize="native")
    theirs = tower(**{**settings, "options": {**settings["options"], "dynamic_img_size": True}})
    theirs.load_state_dict(ours.state_dict())
    pictures = noise(*SIZES)
    found = ours(media_of(pictures))
    expected = torch.cat([alone(theirs, one) for one in pictures])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_gradients(gradients(ours, found), gradients(theirs, expected))


def test_pictures_do_not_depend_on_their_company_or_order() -> None:
    ours = tower(name="timm/vit_tiny_patch16_224", resize="native", options=TINY)
    pictures = noise(*SIZES)
    lengths = [math.prod(grid) for grid in ours.grids(media_of(pictures))]
    found = ours(media_of(pictures)).split(lengths)
    for order in ([0], [3], [6, 5, 4, 3, 2, 1, 0], [2, 2, 3]):
        again = ours(media_of([pictures[number] for number in order])).split([lengths[number] for number in order])
        for number, one in zip(order, again, strict=True):
            torch.testing.assert_close(one, found[number], rtol=1e-6, atol=1e-6)


def test_a_square_of_the_towers_own_size_is_what_it_is_in_square_mode() -> None:
    native = tower(name="timm/vit_tiny_patch16_224", resize="native", options=TINY)
    square = tower(name="timm/vit_tiny_patch16_224", options=TINY)
    media = media_of(list(PIXELS))
    a, b = native(media), square(media)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert_gradients(gradients(native, a), gradients(square, b))


def test_positions_are_resampled_as_in_a_model_of_that_size() -> None:
    """timm's `set_input_size` makes a model for 32 x 80 pixels from one for 64 x 64."""
    ours = tower(name="timm/vit_tiny_patch16_224", resize="native", options=TINY)
    (picture,) = noise((32, 80))
    fixed = tower(name="timm/vit_tiny_patch16_224", options=TINY)
    fixed.load_state_dict(ours.state_dict())
    fixed.featurizer.set_input_size((32, 80))
    assert ours.featurizer.pos_embed.shape[1] == 17 and fixed.featurizer.pos_embed.shape[1] == 11
    found, expected = ours(media_of([picture])), alone(fixed, picture)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    a, b = gradients(ours, found), gradients(fixed, expected)
    a.pop("featurizer.pos_embed"), b.pop("featurizer.pos_embed")  # of another number of positions
    assert_gradients(a, b)


def test_a_picture_of_zeros_beside_others_changes_nothing_and_has_a_gradient_of_its_own() -> None:
    """What a rank without pictures runs: one patch of zeros."""
    ours = tower(name="timm/vit_tiny_patch16_224", resize="native", options=TINY)
    found = ours(media_of([torch.zeros(3, 16, 16)]))
    (0.0 * found.sum()).backward()
    used = [p for n, p in ours.named_parameters() if not n.startswith(("featurizer.norm.", "featurizer.fc_norm"))]
    assert found.shape == (1, 32) and all(p.grad is not None and not p.grad.any() for p in used)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_windows_are_means_of_what_lies_in_them(window: int) -> None:
    grids = [(4, 4), (1, 1), (5, 7), (7, 5), (4, 4), (1, 9)]
    config = PoolMLPConfig(pool=window)
    torch.manual_seed(0)
    features = torch.randn(sum(map(math.prod, grids)), 6, requires_grad=True)
    expected = []
    for (rows, columns), part in zip(grids, features.split(list(map(math.prod, grids))), strict=True):
        grid = part.view(rows, columns, 6)
        means = [
            grid[top : top + window, left : left + window].mean((0, 1))
            for top in range(0, rows, window)
            for left in range(0, columns, window)
        ]
        assert len(means) == config.count(rows, columns)
        expected += means
    connector: PoolMLP = config.build(6, 5)
    found = connector.pool(features, grids)
    torch.testing.assert_close(found, torch.stack(expected))
    weights = torch.randn_like(found)
    a, b = (torch.autograd.grad((one * weights).sum(), features)[0] for one in (found, torch.stack(expected)))
    torch.testing.assert_close(a, b)
    assert connector(found).shape == (len(expected), 5)


def test_windows_of_one_and_tokens_of_all_are_the_identity() -> None:
    features = torch.randn(2 * 9, 4)
    for config in (PoolMLPConfig(pool=1), PoolMLPConfig(tokens=9)):
        torch.testing.assert_close(config.build(4, 3).pool(features, [(3, 3), (3, 3)]), features)


def test_dropped_media_leave_shapes_on_the_host() -> None:
    media = media_of(noise((16, 16), (32, 16)))
    first, second = replace(media, values=media.values * 2).items()
    assert first.shape == (3, 16, 16) and second.shape == (3, 32, 16)
    torch.testing.assert_close(second.flatten(), 2 * media.values[768:])


def test_compiled_blocks_are_not_compiled_anew_for_every_batch() -> None:
    ours = tower(name="timm/vit_tiny_patch16_224", resize="native", options=TINY)
    compiled, frames = copy.deepcopy(ours), CompileCounter()
    compile_blocks(find_blocks(compiled, [r"featurizer\.blocks\.\d+"]), backend=frames)
    counts = []
    for number in range(1, len(SIZES) + 1):
        media = media_of(noise(*SIZES[:number]))
        torch.testing.assert_close(compiled(media), ours(media))
        counts.append(frames.frame_count)
    assert counts[2] == counts[-1] > 0


def test_a_layout_without_a_model_counts_as_the_model_does() -> None:
    """`kind: layout`, for packing alone."""
    slots = {"patch": 8, "max_patches": 30, "pool": 2}
    alone = LayoutConfig.model_validate({"tokenizer": "builtin:emoji", "image": {"native": slots}}).layout().image
    assert isinstance(alone, NativeLayout) and alone.describe() == slots
    vision = VisionConfig.model_validate({"name": "timm/vit_x_patch8_64", "resize": "native", "max_patches": 30})
    header = ImageHeader(100, 37)
    assert alone.count(header) == NativeLayout(2, vision.transform()).count(header) == (2 * 5, 3 * 9)
    default = VisionConfig(name="timm/vit_x_patch8_64", resize="native", image_size=64).transform().size
    assert default == Native(8, 64)
    with pytest.raises(ValueError, match="larger windows than the 8 patches"):
        LayoutConfig.model_validate({"tokenizer": "x", "image": {"native": {**slots, "max_patches": 8, "pool": 3}}})
