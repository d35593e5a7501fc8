"""The tiny run on pictures of many sizes, in their own aspect ratio."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int) -> bytes:
    """Noise, 1 to 90 pixels along each side."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(1, 91, 2))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def native(folder: Path, count: int = 40) -> tuple[str, ...]:
    """Overrides of the tiny run's config; writes a shard of pictures with captions."""
    path = folder / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            caption = " ".join(["a", "small", "grey", "picture"][: 1 + number % 4])
            for ext, data in (("png", picture(number)), ("txt", f"{caption} {number}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return (
        f"data.sources=[{{kind: captions, path: {path}, name: pictures}}]",
        "data.validation=[]",
        "data.test=[]",
        "model.vision.resize=native",
        "model.connector.pool=2",
    )
