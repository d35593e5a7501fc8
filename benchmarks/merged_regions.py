"""A picture of what token merging merges: photographs, and the regions of them that are one token in the end.

    python -m benchmarks.merged_regions [--run runs/NAME] [--out docs/merged-regions.png]

The photographs are scikit-learn's two (china.jpg and flower.jpg, CC BY 2.0, danielbuechele and vultilion). A region is
filled with its mean colour; lines are where one token ends and another begins, so a token of several parts is several
regions of one colour. Without `--run` the tower has random weights: then a key is a random projection of a patch's
pixels and of its place, and what looks alike is merged. With it, it is the trained tower of a run with `model.vision`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import mm
from mm.data.batch import MediaBatch
from mm.models.config import MergeConfig, VisionConfig
from mm.models.vision import VisionTower

VISION: dict[str, Any] = {
    "name": "timm/vit_small_patch16_224", "pretrained": False, "image_size": 448, "block": -1,
}  # fmt: skip
PARTS = (0.5, 0.75, 0.9)
"""Shares of the patches that are merged away."""
PANEL, GAP = 320, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder whose tower is used")
    parser.add_argument("--out", default="docs/merged-regions.png", type=Path)
    options = parser.parse_args()
    vision, weights = of_run(options.run) if options.run else (VisionConfig.model_validate(VISION), None)
    rows = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = square(Image.fromarray(load_sample_image(name)), vision.image_size)
        panels = [np.asarray(photograph)]
        for part in PARTS:
            source = sources(vision, weights, photograph, part)
            panels.append(regions(panels[0], source, vision.side))
            print(f"{name}: {vision.patches} patches, {source.max() + 1} tokens")
        rows.append(panels)
    sheet = Image.new("RGB", (len(rows[0]) * (PANEL + GAP) - GAP, len(rows) * (PANEL + GAP) - GAP), "white")
    for top, panels in enumerate(rows):
        for left, panel in enumerate(panels):
            small = Image.fromarray(panel).resize((PANEL, PANEL), Image.Resampling.LANCZOS)
            sheet.paste(small, (left * (PANEL + GAP), top * (PANEL + GAP)))
    sheet.quantize(192, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(options.out)


def of_run(folder: str) -> tuple[VisionConfig, dict[str, Tensor]]:
    """The tower's section and weights of a trained model."""
    system, _, config = mm.load(folder)
    vision: Any = system.vision
    return config.model.vision, vision.state_dict()


def square(photograph: Image.Image, size: int) -> Image.Image:
    """Its middle."""
    side = min(photograph.size)
    left, top = ((length - side) // 2 for length in photograph.size)
    return photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def sources(
    vision: VisionConfig, weights: dict[str, Tensor] | None, photograph: Image.Image, part: float
) -> np.ndarray:
    """int64 [patches], the token that each patch is in, of a tower that merges such a part of them."""
    torch.manual_seed(0)
    blocks = VisionTower(vision).block + 1
    merge = MergeConfig(r=round(part * vision.patches / blocks))
    torch.manual_seed(0)
    tower = VisionTower(vision.model_copy(update={"merge": merge}), weights=False).eval()
    if weights is not None:
        tower.load_state_dict(weights)
    mean, std = torch.tensor(vision.mean), torch.tensor(vision.std)
    pixels = ((torch.from_numpy(np.array(photograph)) / 255 - mean) / std).permute(2, 0, 1)
    nothing = torch.zeros(1, dtype=torch.int64)
    media = MediaBatch(
        pixels.flatten(), torch.tensor([pixels.shape]), torch.tensor([0, pixels.numel()]), *[nothing] * 4
    )
    return tower.sources(media)[0].numpy()


def regions(photograph: np.ndarray, source: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3]: every token in the mean colour of its patches, with lines around."""
    pixels = len(photograph) // side
    token = np.kron(source.reshape(side, side), np.ones((pixels, pixels), dtype=np.int64))
    counts = np.bincount(token.ravel())
    colours = [np.bincount(token.ravel(), photograph[..., channel].ravel()) / counts for channel in range(3)]
    drawn = np.stack(colours, axis=1)[token]
    edge = np.zeros(token.shape, dtype=bool)
    edge[1:] |= token[1:] != token[:-1]
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    drawn[edge] = 0.35 * drawn[edge] + 0.65 * 255
    return drawn.round().astype(np.uint8)


if __name__ == "__main__":
    main()
