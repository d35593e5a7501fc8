"""Towers against timm's own forward."""

import pytest
import torch

from mm.errors import ConfigError
from mm.models.config import VisionConfig
from mm.models.vision import VisionTower

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tower(**settings: object) -> VisionTower:
    return VisionTower(
        VisionConfig.model_validate({"pretrained": False, "image_size": 64, "block": -1, **settings})
    ).eval()


def test_a_vision_transformers_last_block_is_its_features_before_the_norm() -> None:
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    ours = tower(name="timm/vit_tiny_patch16_224", options=options)
    expected = ours.featurizer.norm(ours(PIXELS))
    torch.testing.assert_close(expected, ours.featurizer.forward_features(PIXELS)[:, 1:])
    assert ours.patches == 16 and ours.width == 32


def test_a_convolutional_tower_gives_its_map_row_by_row() -> None:
    ours = tower(name="timm/convnext_atto", patch_size=32, options={"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]})
    found = ours(PIXELS)
    assert found.shape == (2, 4, 32) and ours.patches == 4 and ours.width == 32
    # norm_pre is the identity here, so the last stage is what the head gets.
    torch.testing.assert_close(found[:, 1], ours.featurizer.forward_features(PIXELS)[:, :, 0, 1])


def test_a_stage_in_the_middle() -> None:
    ours = tower(
        name="timm/convnext_atto", block=1, patch_size=8, options={"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    )
    assert ours(PIXELS).shape == (2, 64, 16)


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
    ],
)
def test_what_cannot_be_built_is_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tower(**settings)
    assert "\n" not in str(caught.value)
