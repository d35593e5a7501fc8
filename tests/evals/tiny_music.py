"""Recordings and an encoder that are small enough for tests."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]
import torch

from mm.models.audio import AudioEncoder
from mm.models.config import AudioEncoderConfig

RATE = 24_000
HUBERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def tiny_encoder() -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(AudioEncoderConfig(config=HUBERT)).eval()


def tone(hertz: float, seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """A tone in noise."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(times))
    return (0.4 * np.sin(2 * np.pi * hertz * times) + 0.02 * noise).astype(np.float32)


def flac(wave: np.ndarray, rate: int = RATE) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def write_folder(folder: Path, waves: dict[str, np.ndarray], rate: int = RATE) -> Path:
    for name, wave in waves.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(flac(wave, rate))
    return folder


def write_shard(path: Path, samples: dict[str, tuple[bytes, dict[str, Any]]]) -> Path:
    """`KEY.flac` and `KEY.json` of each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (sound, fields) in samples.items():
            for name, data in ((f"{key}.flac", sound), (f"{key}.json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_config(folder: Path) -> Path:
    """A run of a tiny MERT; nothing of its data is read here."""
    path = folder / "tiny-mert.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"kind": "mert", "encoder": {"config": HUBERT}, "weights": {"codes": 0}},
                "data": {"sources": [{"kind": "audio", "path": "nowhere.tar", "caption": ""}]},
                "train": {"max_steps": 1},
                "seed": 3,
            }
        )
    )
    return path
