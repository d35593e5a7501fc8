"""A tiny SimVLG, and pictures and clips of noise for it."""

import io
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from mm.data.batch import MediaBatch, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Text, Visible
from mm.data.tokens import make_segment
from mm.models.systems.simvlg.config import SimVLGConfig

ROW = 96
FRAMES = 3
FEATURES, POSITIONS = 17, 11
"""Of a picture: 4 x 4 patches and the class token; 16 - 2 * 3 of them, and the class token."""
VISION: dict[str, Any] = {
    "name": "timm/vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "block": -1, "class_token": True,
    "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}  # fmt: skip
BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 8,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "tokenizer": "builtin:emoji",
    "config": {
        "model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.2, "dropout": 0.0,
    },
}  # fmt: skip
TEMPLATE: dict[str, Any] = {"bos": "<s>", "eos": "<|im_end|>", "after_media": "", "bos_behind_media": True}
MODEL: dict[str, Any] = {
    "kind": "simvlg",
    "vision": VISION,
    "connector": {"kind": "tomeformer", "config": BERT, "r": 3},
    "language": LANGUAGE,
    "template": TEMPLATE,
}


def model(**changes: Any) -> SimVLGConfig:
    return SimVLGConfig.model_validate({**MODEL, **changes})


def picture(seed: int) -> Media:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((32, 32), Image.Resampling.NEAREST).save(file, "PNG")
    return Media("image", file.getvalue(), "png")


def clip(seed: int) -> Media:
    """Six frames of squares that change."""
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=6)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(6):
            noise = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return Media("video", file.getvalue(), "mp4")


SAMPLES: dict[str, tuple[Visible, ...]] = {
    "red": (picture(0), Text("a red square")),
    "asked": (picture(1), Text("en: ", loss=False), Text("a cat")),
    "moving": (clip(0), Text("a car that goes by")),
    "long": (picture(2), Text("a man under an umbrella in the rain")),
    "still": (clip(1), Text("nothing")),
    "text": (Text("no picture at all"),),
}
ROWS = [["red", "asked", "text"], ["moving", "still"], ["long"]]


def pack(names: list[str], layout: Layout) -> Pack:
    return join_segments([(name, "s", make_segment(SAMPLES[name], layout, name, Limits())) for name in names])


def batch(rows: list[list[str]], config: SimVLGConfig) -> PackedBatch:
    layout = config.layout()
    return collate([pack(names, layout) for names in rows], layout, ROW)


def media_of(values: torch.Tensor, positions: int = POSITIONS) -> MediaBatch:
    """Items [n, …] as a batch has them, all in one row."""
    n, shape = len(values), values.shape[1:]
    return MediaBatch(
        values=values.flatten(),
        shapes=torch.tensor([[*shape]] * n),
        offsets=torch.arange(n + 1) * shape.numel(),
        row=torch.zeros(n, dtype=torch.int64),
        position=torch.arange(n) * positions,
        length=torch.full((n,), positions),
        cost=torch.zeros(n, dtype=torch.int64),
    )
