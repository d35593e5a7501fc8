"""Pictures: their header without decoding, and their pixels with.

`probe_image` reads a few hundred bytes, so planning a billion pictures decodes none. `decode_image` has two decoders:

- `exact`: Pillow's chain (convert to RGB, bicubic resize, scale, normalise), bit-equal to the
  preprocessing that Open-Qwen2VL published as `resize-naive` (prismatic `siglip_vit.py`);
- `fast`: the same chain with libjpeg's own reduction of large JPEGs (by 2, 4 or 8, never below twice the size), and
  torch's vectorised bicubic filter on 8-bit pixels. Photographs that are not reduced come out within 2 of 255 levels of
  `exact` (4 in tall ones, where the two filter rows and columns in another order); speed and distance are in
  docs/benchmarks.md, "Decoding".

Pictures are taken as they are stored: an EXIF rotation is not applied, by neither decoder nor the header, because the
published preprocessing does not apply it. To turn such pictures, re-encode them before packing.
"""

import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Decoder = Literal["exact", "fast"]
Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

_PROBE_BYTES = 512  # read at once: most headers lie within; more than a segment of a JPEG is skipped, not read
_PROBE_STEPS = 4096  # markers and stray bytes before a JPEG's size
_LONGEST = 10  # times as long as wide: longer pictures are not resized as a whole for the square in their middle


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What can be known of a picture without decoding it. Width and height in pixels, as stored."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Native:
    """Pictures in their own aspect ratio, as a grid of at most `max_patches` whole patches of `patch` x `patch` pixels.

    The grid is the picture at the largest scale up to 1 at which its sides, rounded to whole patches, stay within the
    budget. So nothing is enlarged but by rounding, and a side is off its ratio by half a patch at most; at least one.
    """

    patch: int
    max_patches: int

    def grid(self, header: ImageHeader) -> tuple[int, int]:
        """(rows, columns) of a picture with this header."""
        width, height = header.width, header.height
        # r x c <= n whole patches cover less than (r + 0.5)(c + 0.5) <= 1.5 n + 1, so no larger scale can do.
        most = math.sqrt((1.5 * self.max_patches + 1) / (width * height))
        scale = min(1 / self.patch, most)
        rows, columns = (min(max(1, math.floor(side * scale + 0.5)), self.max_patches) for side in (height, width))
        while rows * columns > self.max_patches:
            # As the scale falls, the side that is first to round to less; both, where they do so together.
            by_rows = (2 * rows - 1) * width if rows > 1 else 0
            by_columns = (2 * columns - 1) * height if columns > 1 else 0
            rows -= by_rows >= by_columns
            columns -= by_columns >= by_rows
        return rows, columns


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Pixels that an encoder expects: a square of `size`, or a grid of patches, normalised by `mean` and `std` per
    channel (RGB).

    In training a picture may first be cut to a drawn box of at least `crop` of its area (Szegedy et al., 1409.4842),
    and every second one mirrored (`flip`). With `middle`, for squares, the square in the middle is all that is looked
    at; else the whole picture is, whatever its shape.
    """

    size: int | Native
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 1.0
    flip: bool = False
    middle: bool = False

    def pixels(self, header: ImageHeader) -> tuple[int, int]:
        """(height, width) that a picture with this header is resized to."""
        if isinstance(self.size, int):
            return self.size, self.size
        rows, columns = self.size.grid(header)
        return rows * self.size.patch, columns * self.size.patch


def probe_image(file: bytes | BinaryIO, where: str, max_pixels: int) -> ImageHeader:
    """Width and height, read from the first bytes of `file` alone (what precedes a JPEG's size is skipped).

    `where` names the sample in errors; raises `DataError`.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    size = _stored_size(file, where)
    if size is None or 0 in size:
        raise DataError(f"{where}: not a readable jpg, png or webp picture")
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{where}: {width}x{height} pixels are more than data.max_pixels = {max_pixels}; "
            "leave the picture out or raise the limit"
        )
    return ImageHeader(width, height)


def _stored_size(file: BinaryIO, where: str) -> tuple[int, int] | None:
    start, read = 0, b""

    def at(offset: int, length: int) -> bytes:
        nonlocal start, read
        if not start <= offset <= offset + length <= start + len(read):
            file.seek(offset)
            start, read = offset, file.read(_PROBE_BYTES)
        return read[offset - start : offset - start + length]

    head = at(0, 30)
    if not head:
        raise DataError(f"{where}: the picture is empty (0 bytes)")
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":  # PNG 11.2.2
        return struct.unpack(">II", head[16:24]) if len(head) >= 24 else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) == 30:  # RFC 9649
        if head[12:16] == b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        if head[12:16] == b"VP8L" and head[20] == 0x2F:
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if head[12:16] == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", head[26:30])
            return width & 0x3FFF, height & 0x3FFF
    if head[:3] == b"\xff\xd8\xff":  # ITU-T T.81, annex B
        offset = 2
        for _ in range(_PROBE_STEPS):
            marker = at(offset, 2)
            if len(marker) < 2 or marker in (b"\xff\xd9", b"\xff\xda"):  # the end, or pixels, and no size
                return None
            if marker[0] != 0xFF or marker[1] == 0xFF:  # a stray byte, which decoders skip, or padding
                offset += 1
            elif marker[1] in (0x00, 0x01) or 0xD0 <= marker[1] <= 0xD8:  # markers without a segment
                offset += 2
            elif 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):  # start of frame
                frame = at(offset + 4, 5)
                return (int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])) if len(frame) == 5 else None
            else:
                offset += 2 + max(2, int.from_bytes(at(offset + 2, 2)))
    return None


def decode_image(
    data: bytes,
    transform: ImageTransform,
    where: str,
    rng: np.random.Generator | None = None,
    decoder: Decoder = "exact",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Encoded bytes to float32 [3, H, W] of the size that the transform says, or of `out`, into which they are written.

    `rng` draws crop and mirroring; without it the whole picture is used. Raises `DataError` for a damaged picture.
    """
    image = _open(data, where)
    try:
        (width, height), middle, box = image.size, transform.middle, None
        size = transform.pixels(ImageHeader(width, height)) if out is None else (out.shape[1], out.shape[2])
        whole = size
        if rng is not None and transform.crop < 1:
            box = draw_box(width, height, transform.crop, rng, middle)
        elif middle and max(width, height) > _LONGEST * min(width, height):
            box = _middle_square(width, height)
        elif middle:  # first resized, then cut, as torchvision does: equal to it to the last bit
            whole = _covering(width, height, size[0])
        pixels = resize(image, whole, box) if decoder == "exact" else _fast_resize(image, data, whole, box)
        top, left = (round((have - want) / 2) for have, want in zip(whole, size, strict=True))
        pixels = pixels[top : top + size[0], left : left + size[1]]
    except Exception as error:
        raise DataError(f"{where}: the picture is damaged ({error})") from None
    if rng is not None and transform.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return normalise(pixels, transform, out)


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


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparent pictures on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image.convert("RGB")


def resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: Box | None = None, decoder: Decoder = "exact"
) -> np.ndarray:
    """uint8 [*size, 3]: a picture (or uint8 [H, W, 3]), or a box of it, resized by a bicubic filter.

    `exact` is Pillow's filter, as published; `fast` is torch's, and cuts the box out first, in whole pixels.
    """
    if decoder == "exact":
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else _rgb(image)
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box))
    import torch

    pixels = image if isinstance(image, np.ndarray) else np.array(_rgb(image))
    return _torch_resize(torch.from_numpy(pixels).permute(2, 0, 1), size, box)


def _torch_resize(pixels: "Tensor", size: tuple[int, int], box: Box | None) -> np.ndarray:
    """uint8 [3, H, W] to [*size, 3]."""
    import torch

    if box is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        pixels = pixels[:, top : max(top + 1, bottom), left : max(left + 1, right)]
    resized = torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _fast_resize(image: Image.Image, data: bytes, size: tuple[int, int], box: Box | None) -> np.ndarray:
    """Like `resize`, with a JPEG's own reduction where at least twice `size` is left."""
    if image.format == "JPEG":
        left, top, right, bottom = box or (0, 0, *image.size)
        reach = min((bottom - top) / size[0], (right - left) / size[1])
        scale = next((s for s in (8, 4, 2) if reach >= 2 * s), 1)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
            box = None if box is None else (left / scale, top / scale, right / scale, bottom / scale)
        elif image.mode in ("RGB", "L") and (pixels := _torchvision_jpeg(data)) is not None:
            return _torch_resize(pixels, size, box)
    return resize(image, size, box, "fast")


def _torchvision_jpeg(data: bytes) -> "Tensor | None":
    """uint8 [3, H, W], equal to Pillow's but 1.3 times as fast; None where Pillow must say what is wrong."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def normalise(pixels: np.ndarray, transform: ImageTransform, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W], (pixels / 255 - mean) / std, in place of `out` where it is given.

    The operations and their order are those of torchvision's `ToTensor` and `Normalize`, for equality to the last bit.
    """
    if out is None:
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    assert out.dtype == np.float32 and out.shape == (3, *pixels.shape[:2]), (out.dtype, out.shape, pixels.shape)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=out)
    out -= np.array(transform.mean, dtype=np.float32)[:, None, None]
    out /= np.array(transform.std, dtype=np.float32)[:, None, None]
    return out


def _covering(width: int, height: int, side: int) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side is brought to `side`, rounded as torchvision's `Resize` does."""
    long = int(side * max(width, height) / min(width, height))
    return (long, side) if width <= height else (side, long)


def _middle_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def draw_box(width: int, height: int, crop: float, rng: np.random.Generator, middle: bool = False) -> Box:
    """A box of `crop` to 1 of the area, its shape within 3:4 and 4:3 of the picture's, or of the middle square's."""
    if middle:
        x, y, _, _ = _middle_square(width, height)
        left, top, right, bottom = draw_box(min(width, height), min(width, height), crop, rng)
        return left + x, top + y, right + x, bottom + y
    area, ratio = rng.uniform(crop, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = width * min(1, np.sqrt(area * ratio)), height * min(1, np.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return float(left), float(top), float(left + w), float(top + h)
