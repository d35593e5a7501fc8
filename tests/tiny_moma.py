"""A tiny MoMa on pictures of noise, with a teacher that needs no weights."""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Text, Visible
from mm.data.tokens import make_segment
from mm.models.systems.moma.config import MomaConfig
from mm.settings import KindSection

ROW = 64
CODES, POSITIONS = 12, 4
LANGUAGE: dict[str, Any] = {
    "tokenizer": "builtin:emoji",
    "config": {
        "model_type": "chameleon", "swin_norm": True, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2,
    },
}  # fmt: skip
MODEL: dict[str, Any] = {
    "kind": "moma",
    "language": LANGUAGE,
    "teacher": {"kind": "tiny_moma:BrightnessConfig"},
}


class BrightnessConfig(KindSection):
    """How bright each quarter of a picture of 8 x 8 pixels is."""

    kind: str = "tiny_moma:BrightnessConfig"
    size: int = 8

    def sizes(self) -> tuple[int, ...]:
        return (CODES,)

    def positions(self) -> int:
        return POSITIONS

    def build(self) -> "Brightness":
        return Brightness()


class Brightness:
    medium = "image"
    sizes = (CODES,)
    size, positions, decodes = 8, POSITIONS, True

    def check(self, layout: Layout) -> None: ...

    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        quarters = F.avg_pool2d(torch.stack(items).mean(1, keepdim=True), 4).flatten()  # from -1 to 1
        return ((quarters + 0.503) * CODES).long().clamp(0, CODES - 1)[:, None]

    def pictures(self, codes: Tensor) -> Tensor:
        quarters = ((codes + 0.5) / CODES - 0.503).view(-1, 1, 2, 2)
        return F.interpolate(quarters, scale_factor=4).expand(-1, 3, -1, -1)

    def describe(self) -> dict[str, Any]:
        return {"kind": "brightness", "weights": ""}


def model(**changes: Any) -> MomaConfig:
    return MomaConfig.model_validate({**MODEL, **changes})


def picture(seed: int) -> Media:
    """Four quarters, each of a grey of its own."""
    greys = np.random.default_rng(seed).integers(70, 180, (2, 2, 1), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(greys.repeat(4, 0).repeat(4, 1).repeat(3, 2)).save(file, "PNG")
    return Media("image", file.getvalue(), "png")


def codes_of(media: Media) -> list[int]:
    """What the teacher says, worked out from the file."""
    pixels = np.asarray(Image.open(io.BytesIO(media.read())).convert("RGB"), dtype=np.float64)[2::4, 2::4, 0]
    return [int(np.clip((2 * grey / 255 - 1 + 0.503) * CODES, 0, CODES - 1)) for grey in pixels.flatten()]


SAMPLES: dict[str, tuple[Visible, ...]] = {
    "picture first": (picture(0), Text("en: ", False), Text("a red fox")),
    "text first": (Text("en: ", False), Text("a blue hat"), picture(1)),
    "in the middle": (Text("before it"), picture(2), Text("and behind it")),
    "two in a row": (Text("both"), picture(3), picture(4), Text("of them")),
    "no picture": (Text("only words of a longer text, more than all the others have"),),
    "alone": (picture(5),),
}
ROWS = [["picture first", "text first"], ["in the middle", "alone"], ["two in a row", "no picture"], []]


def pack(names: list[str], layout: Layout) -> Pack:
    """A row of samples; none: a row of padding."""
    items = [(name, "s", make_segment(SAMPLES[name], layout, name, Limits())) for name in names]
    return join_segments(items) if items else EMPTY


def batch(rows: list[list[str]], config: MomaConfig | None = None, first: int = 0, **settings: Any) -> PackedBatch:
    """Rows of samples, as in training; `first` is the number of the first of them, from which its key derives."""
    layout = (config or model()).layout()
    draws = [(5, first + number) for number in range(len(rows))]
    return collate([pack(row, layout) for row in rows], layout, ROW, draws=draws, **settings)
