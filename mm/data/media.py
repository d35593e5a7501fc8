"""Pictures: their header without decoding, and their pixels with.

`probe_image` reads sizes only, so planning a billion pictures decodes none. `decode_image` is Pillow's chain
(`exact` in the design): convert to RGB, bicubic resize to the square, scale, normalise; equal to the preprocessing that
Open-Qwen2VL published as `resize-naive` (prismatic `siglip_vit.py`).
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mm.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What can be known of a picture without decoding it. Width and height in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Pixels that an encoder expects: a square of `size`, normalised by `mean` and `std` per channel (RGB).

    In training a picture may first be cut to a drawn box of at least `crop` of its area (Szegedy et al., 1409.4842),
    and every second one mirrored (`flip`).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 1.0
    flip: bool = False


def _open(data: bytes, where: str) -> Image.Image:
    if not data:
        raise DataError(f"{where}: the picture is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked by the caller
            return Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    except UnidentifiedImageError:  # its text is a memory address, another one every time
        raise DataError(f"{where}: not a readable jpg, png or webp picture") from None
    except Exception as error:
        raise DataError(f"{where}: not a readable jpg, png or webp picture ({error})") from None


def probe_image(data: bytes, where: str, max_pixels: int) -> ImageHeader:
    """Width and height from the header. `where` names the sample in errors; raises `DataError`."""
    width, height = _open(data, where).size
    if width * height > max_pixels:
        raise DataError(
            f"{where}: {width}x{height} pixels are more than data.max_pixels = {max_pixels}; "
            "leave the picture out or raise the limit"
        )
    return ImageHeader(width, height)


def decode_image(
    data: bytes, transform: ImageTransform, where: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Encoded bytes to float32 [3, size, size]. `rng` draws crop and mirroring; without it the whole picture is used.

    Raises `DataError` for a damaged picture.
    """
    image = _open(data, where)
    try:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.new("RGB", rgba.size, "white")
            image.paste(rgba, mask=rgba.getchannel("A"))
        box = None if rng is None or transform.crop >= 1 else draw_box(image.width, image.height, transform.crop, rng)
        square = image.convert("RGB").resize((transform.size, transform.size), Image.Resampling.BICUBIC, box)
        if rng is not None and transform.flip and rng.random() < 0.5:
            square = ImageOps.mirror(square)
    except Exception as error:
        raise DataError(f"{where}: the picture is damaged ({error})") from None
    pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 255.0
    mean = np.asarray(transform.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(transform.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std)


def draw_box(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of `crop` to 1 of the area, its shape within 3:4 and 4:3 of the picture's."""
    area, ratio = rng.uniform(crop, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = width * min(1, np.sqrt(area * ratio)), height * min(1, np.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return float(left), float(top), float(left + w), float(top + h)
