"""A tiny MERT on noise of all lengths, with a teacher that needs no weights."""

import io
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media
from mm.data.tokens import make_segment
from mm.models.systems.mert.config import MertConfig
from mm.models.teachers import require_rate
from mm.settings import KindSection

RATE = 24_000
ROW = 128
HUBERT: dict[str, Any] = {
    "conv_dim": [16] * 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "kind": "mert",
    "encoder": {"config": HUBERT},
    "teacher": {"kind": "music_run:LoudnessConfig"},
    "code_dim": 8,
    "cqt": {"fmin": 200, "bins": 24, "bins_per_octave": 6},
    "mixture": {"seconds": [0.05, 0.1]},
}


class LoudnessConfig(KindSection):
    """Two codebooks: how loud a frame is, and how often its waveform crosses zero."""

    kind: str = "music_run:LoudnessConfig"

    def sizes(self) -> tuple[int, ...]:
        return (6, 4)

    def build(self) -> "Loudness":
        return Loudness()


class Loudness:
    medium = "audio"
    sizes = (6, 4)

    def check(self, layout: Layout) -> None:
        require_rate(layout, RATE)

    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        assert layout.audio is not None
        hop = layout.audio.hop
        pieces = torch.cat([clip.unfold(0, hop, hop)[:count] for clip, count in zip(items, lengths, strict=True)])
        level = pieces.square().mean(1).sqrt()
        crossings = (pieces[:, 1:] * pieces[:, :-1] < 0).float().mean(1)
        return torch.stack([(12 * level).long().clamp(max=5), (6 * crossings).long().clamp(max=3)], dim=1)

    def describe(self) -> dict[str, Any]:
        return {"kind": "loudness", "weights": ""}


def model(**changes: Any) -> MertConfig:
    return MertConfig.model_validate({**MODEL, **changes})


def samples(frames: int) -> int:
    """Of a clip with so many frames, some of them left over."""
    return 400 + 320 * (frames - 1) + 37 * frames % 320


def wave(seed: int, length: int) -> np.ndarray:
    """Filtered noise whose loudness changes, float32 [length]."""
    rng = np.random.default_rng(seed)
    noise = np.convolve(rng.standard_normal(length), np.ones(1 + seed % 5) / (1 + seed % 5), "same")
    return (0.2 * noise * (1.1 + np.sin(np.arange(length) / 900 + seed))).astype(np.float32)


def wav(seed: int, length: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave(seed, length), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def pack(seed: int, frames: list[int]) -> Pack:
    """A row of clips; none: a row of padding."""
    layout = model().layout()
    items = []
    for number, count in enumerate(frames):
        one = Media("audio", wav(10 * seed + number, samples(count)), "wav")
        items.append((f"{seed}/{number}", "s", make_segment((one,), layout, "test", Limits())))
    return join_segments(items) if items else EMPTY


ROWS = [[30, 51, 17], [90], [], [17, 17, 40, 23]]
"""Frames of the clips of each row."""


def batch(rows: list[int], training: bool = True) -> PackedBatch:
    """Some of the rows, with the keys that they have in any batch."""
    draws = [(5, row) for row in rows] if training else None
    return collate([pack(row, ROWS[row]) for row in rows], model().layout(), ROW, draws=draws)
