"""A tiny COSMO on pictures of noise."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.data.batch import MediaBatch, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Text, Visible
from mm.data.tokens import make_segment
from mm.models.systems.cosmo.config import CosmoConfig
from mm.models.systems.cosmo.model import Cosmo

ROW, SIDE = 48, 16
LANGUAGE: dict[str, Any] = {
    "tokenizer": "builtin:emoji",
    "config": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": True,
    },
}  # fmt: skip
MODEL: dict[str, Any] = {
    "kind": "cosmo",
    "vision": {
        "name": "timm/vit_tiny_patch16_224", "pretrained": False, "image_size": SIDE, "block": -1, "norm": True,
        "options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    },
    "language": LANGUAGE,
    "resampler": {"latents": 3, "depth": 2, "heads": 2},
    "unimodal": 2,
    "ratio": 4,
    "contrastive": {"width": 8},
}  # fmt: skip
FROZEN: list[dict[str, Any]] = [
    {"match": "vision.*", "freeze": True},
    {"match": "language.*", "freeze": True},
    {"match": r"language\..*\.gated\..*", "freeze": False},
]


def model(**changes: Any) -> CosmoConfig:
    return CosmoConfig.model_validate({**MODEL, **changes})


def build(gate: float | None = 0.5, **changes: Any) -> Cosmo:
    """The tiny model; its gates are set to a number, or stay shut."""
    torch.manual_seed(0)
    system = model(**changes).build()
    if gate is not None:
        open_gates(system, gate)
    return system


def open_gates(system: torch.nn.Module, gate: float) -> None:
    for name, parameter in system.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, gate)


def picture(seed: int) -> Media:
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return Media("image", file.getvalue(), "png")


SAMPLES: dict[str, tuple[Visible, ...]] = {
    "pair": (picture(0), Text("a red fox")),
    "another": (picture(1), Text("en: ", False), Text("a blue hat of felt")),
    "third": (Text("seen: ", False), picture(2), Text("green")),
    "interleaved": (Text("before them"), picture(3), Text("between"), picture(4), Text("and behind them")),
    "two in a row": (picture(5), picture(6), Text("of both")),
    "no picture": (Text("only words of a longer text, more than all the others have"),),
    "unlearned": (picture(7), Text("read alone", False)),
}
PAIRS = ("pair", "another", "third")
ROWS = [["pair", "interleaved"], ["no picture", "another", "unlearned"], ["third", "two in a row"], []]


def pack(names: list[str], layout: Layout) -> Pack:
    """A row of samples; none: a row of padding."""
    items = [(name, name, make_segment(SAMPLES[name], layout, name, Limits())) for name in names]
    return join_segments(items) if items else EMPTY


def batch(rows: list[list[str]], config: CosmoConfig | None = None, length: int | None = ROW) -> PackedBatch:
    layout = (config or model()).layout()
    return collate([pack(row, layout) for row in rows], layout, length)


def clip(frames: int, row: int, position: int, seed: int = 0) -> MediaBatch:
    """One clip of noise, decoded."""
    shape = (frames, 3, SIDE, SIDE)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
    return MediaBatch(
        values=values, shapes=torch.tensor([shape]), offsets=torch.tensor([0, len(values)]),
        row=torch.tensor([row]), position=torch.tensor([position]), length=torch.tensor([1]),
        cost=torch.tensor([frames * (SIDE // 8) ** 2]),
    )  # fmt: skip
