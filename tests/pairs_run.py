"""Pictures with captions and small models of open_clip, which the tests of contrastive training share."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = (
    "A red ball, rolling", "naïve CAFÉ — 12 o'clock!", "дом у моря", "the cat's 3 kittens", "日本の猫 🙂", "x",
    "one two three four five six seven eight nine ten eleven twelve thirteen", "it's   he'll\twe'd\n they've",
)  # fmt: skip
MODEL: dict[str, Any] = {
    "kind": "clip",
    "embed_dim": 16,
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text": {"context_length": 12, "width": 32, "heads": 2, "layers": 2},
    "crop": 1.0,
}
SIGLIP: dict[str, Any] = {
    **MODEL,
    "custom_text": True,
    "text": {**MODEL["text"], "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "loss": "siglip",
}


def png(seed: int, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"{CAPTIONS[number % len(CAPTIONS)]} {number}"


def write_pairs(path: Path, numbers: range) -> None:
    """A tar of pictures with captions: KEY.png and KEY.txt, where KEY is the number."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for ext, data in (("png", png(number)), ("txt", caption(number).encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{ext}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
