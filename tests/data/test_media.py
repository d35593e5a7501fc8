"""Pictures: headers without decoding; pixels equal to torchvision's chain on the same Pillow image; fast ones near;
grids in a picture's own aspect ratio against a search over scales."""

import io
import math
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from multiprocessing import shared_memory
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin
from torchvision import transforms

from mm.data.layout import NativeLayout
from mm.data.media import Decoder, ImageHeader, ImageTransform, Native, decode_image, draw_box, probe_image
from mm.data.sample import keyed_rng
from mm.errors import DataError

TRANSFORM = ImageTransform(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def encoded(mode: str, format: str, size: tuple[int, int] = (40, 24)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").convert("RGB" if mode in ("CMYK", "P", "1") else mode).convert(mode)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


MODES = [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("L", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")]


@pytest.mark.parametrize(("mode", "format"), [*MODES, ("P", "PNG"), ("1", "PNG")])
def test_pixels_are_those_of_the_published_preprocessing(mode: str, format: str) -> None:
    data = encoded(mode, format)
    chain = transforms.Compose(
        [
            transforms.Resize((16, 16), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(TRANSFORM.mean, TRANSFORM.std),
        ]
    )
    expected = chain(Image.open(io.BytesIO(data)).convert("RGB")).numpy()
    found = decode_image(data, TRANSFORM, "s")
    assert found.dtype == np.float32 and found.shape == (3, 16, 16) and found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, expected)
    assert probe_image(data, "s", 10**6) == probe_image(encoded("RGB", "PNG"), "s", 10**6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pictures_lie_on_white(mode: str) -> None:
    image = Image.new(mode, (8, 8), (0,) * (len(mode) - 1) + (0,))
    file = io.BytesIO()
    image.save(file, "PNG")
    white = (1 - np.array(TRANSFORM.mean)) / np.array(TRANSFORM.std)
    found = decode_image(file.getvalue(), TRANSFORM, "s")
    np.testing.assert_allclose(found, np.broadcast_to(white[:, None, None], (3, 16, 16)), rtol=1e-5)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_cut_pictures_are_one_line_wherever_they_are_cut(format: str, decoder: Decoder) -> None:
    data = encoded("RGB", format, (64, 64))
    for cut in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(DataError, match=r"^s/0/k: ") as caught:
            decode_image(data[:cut], TRANSFORM, "s/0/k", None, decoder)
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_crops_are_boxes_of_the_drawn_share_and_depend_on_the_key_alone() -> None:
    boxes = [draw_box(200, 100, 0.5, keyed_rng("box", i)) for i in range(200)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 200.001 and 0 <= top < bottom <= 100.001
        share = (right - left) * (bottom - top) / 20000
        assert 0.5 * 3 / 4 - 1e-6 <= share <= 1 + 1e-6
    assert boxes[7] == draw_box(200, 100, 0.5, keyed_rng("box", 7))
    assert len(set(boxes)) == 200


def test_a_crop_is_pillows_resize_of_that_box() -> None:
    noise = Image.effect_noise((80, 60), 90).convert("RGB")
    out = io.BytesIO()
    noise.save(out, "PNG")
    transform = ImageTransform(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop=0.3)
    box = draw_box(80, 60, 0.3, keyed_rng(1))
    expected = np.asarray(noise.resize((16, 16), Image.Resampling.BICUBIC, box), dtype=np.float32) / 255
    found = decode_image(out.getvalue(), transform, "x", keyed_rng(1)).transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    whole = decode_image(out.getvalue(), transform, "x").transpose(1, 2, 0)
    np.testing.assert_allclose(whole, np.asarray(noise.resize((16, 16), 3), dtype=np.float32) / 255, atol=1e-6)


def test_every_second_picture_is_mirrored_in_training_only() -> None:
    noise = Image.effect_noise((24, 24), 90).convert("RGB")
    out = io.BytesIO()
    noise.save(out, "PNG")
    transform = ImageTransform(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), flip=True)
    whole = decode_image(out.getvalue(), transform, "x")
    seen = [decode_image(out.getvalue(), transform, "x", keyed_rng("flip", i)) for i in range(100)]
    mirrored = sum(np.array_equal(pixels, whole[:, :, ::-1]) for pixels in seen)
    assert mirrored + sum(np.array_equal(pixels, whole) for pixels in seen) == 100 and 30 < mirrored < 70


DECODERS: tuple[Decoder, ...] = ("exact", "fast")
PLAIN = ImageTransform(48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def levels(data: bytes, transform: ImageTransform, decoder: Decoder, rng: np.random.Generator | None = None) -> Any:
    """int [3, size, size]: pixels of 0 to 255."""
    return np.rint(decode_image(data, transform, "s", rng, decoder) * 255).astype(int)


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth and with edges, as photographs are; noise would be all that no reduction can keep."""
    rng = np.random.default_rng(seed)
    width, height = size
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    for _ in range(6):
        w, h = rng.integers(10, 60) * width // 200, rng.integers(10, 60) * height // 200
        patch = Image.new("RGB", (int(w), int(h)), tuple(rng.integers(0, 256, 3).tolist()))
        image.paste(patch, (int(rng.integers(0, width - w)), int(rng.integers(0, height - h))))
    return image


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


MIDDLE = ImageTransform(48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), middle=True)


@pytest.mark.parametrize("size", [(41, 410), (410, 41), (41, 411), (411, 41), (7, 2000)])
def test_the_middle_square_is_torchvisions(size: tuple[int, int]) -> None:
    """To the last bit; nearly so in pictures more than ten times as long as wide, of which the rest is not resized."""
    image = photo(size)
    chain = transforms.Compose(
        [
            transforms.Resize(48, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(48),
            transforms.PILToTensor(),
        ]
    )
    expected = chain(image).numpy().astype(int)
    found = levels(saved(image, "PNG"), MIDDLE, "exact")
    if max(size) <= 10 * min(size):
        assert np.array_equal(found, expected)
    else:
        assert np.abs(found - expected).mean() < 1
    for data in (saved(image, "PNG"), saved(image, "JPEG", quality=100, subsampling=0)):
        assert np.abs(levels(data, MIDDLE, "fast") - expected).mean() < 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_very_long_picture_takes_no_memory_of_its_length(decoder: Decoder) -> None:
    """Resized as a whole it would be 450 GB."""
    picture = saved(Image.new("RGB", (3_000_000, 1), (10, 200, 90)), "PNG")
    found = levels(picture, replace(MIDDLE, size=224), decoder)
    assert np.array_equal(found, np.broadcast_to(np.array([10, 200, 90])[:, None, None], (3, 224, 224)))


class Counting(io.BytesIO):
    """A file that counts what is read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def with_much_before_the_size(format: str) -> bytes:
    image = photo((321, 123))
    exif = Image.Exif()
    exif[0x010E] = "x" * 50_000
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(400_000)
    if format != "PNG":
        return saved(image, format, exif=exif.tobytes(), icc_profile=profile)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "y" * 400_000)
    return saved(image, format, pnginfo=text, exif=exif.tobytes(), icc_profile=profile)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_probing_reads_little_however_much_precedes_the_pixels(format: str) -> None:
    data = with_much_before_the_size(format)
    file = Counting(data)
    header = probe_image(file, "s", 10**6)
    assert (header.width, header.height) == (321, 123)
    assert file.bytes_read <= (8192 if format == "JPEG" else 512) < len(data) // 20
    assert decode_image(data, PLAIN, "s").shape == (3, 48, 48)


def lottery() -> list[bytes]:
    """Pictures of all sizes, modes and encodings that should be read alike."""
    rng = np.random.default_rng(3)
    found = []
    for i in range(60):
        size = int(rng.integers(1, 400)), int(rng.integers(1, 400))
        image = Image.effect_noise(size, 90).convert("RGB")
        modes = {
            "JPEG": ("RGB", "L", "CMYK"),
            "PNG": ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"),
            "WEBP": ("RGB", "RGBA"),
        }
        format = ("JPEG", "PNG", "WEBP")[i % 3]
        mode = str(rng.choice(modes[format]))
        image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        options: dict[str, Any] = {"progressive": bool(i % 2), "quality": 60} if format == "JPEG" else {}
        if format == "WEBP":
            options = {"lossless": bool(i % 2)} | ({"save_all": True, "append_images": [image]} if i % 4 == 0 else {})
        found.append(saved(image, format, **options))
    return found


def test_sizes_are_those_that_pillow_finds() -> None:
    for data in lottery():
        header = probe_image(data, "s", 10**6)
        assert (header.width, header.height) == Image.open(io.BytesIO(data)).size
    jpeg = saved(photo((60, 50)), "JPEG")
    after = 4 + int.from_bytes(jpeg[4:6])  # the first segment
    for padded in (jpeg[:2] + b"\xff\xff\xff" + jpeg[2:], jpeg[:after] + b"\x00\x17" + jpeg[after:]):
        assert probe_image(padded, "s", 10**6).height == Image.open(io.BytesIO(padded)).height == 50


@pytest.mark.parametrize("decoder", DECODERS)
def test_exif_rotation_is_left_alone_by_header_and_pixels(decoder: Decoder) -> None:
    image, exif = photo((90, 60)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for format in ("JPEG", "PNG", "WEBP"):
        turned, plain = saved(image, format, exif=exif.tobytes()), saved(image, format)
        assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
        header = probe_image(turned, "s", 10**6)
        assert (header.width, header.height) == (90, 60)
        assert np.array_equal(levels(turned, PLAIN, decoder), levels(plain, PLAIN, decoder))


def rgb16(size: tuple[int, int]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    width, height = size
    values = np.random.default_rng(1).integers(0, 2**16, (height, width, 3), dtype=np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_fast_is_within_two_levels_of_exact_where_no_jpeg_is_reduced() -> None:
    photos = [photo((40, 30)), photo((150, 190)), photo((190, 150)), photo((60, 160)), photo((500, 60))]
    pictures = [saved(image, format) for image in photos for format in ("JPEG", "PNG", "WEBP")]
    pictures += [saved(photos[1], "JPEG", subsampling=0), saved(photos[2].quantize(16), "PNG", transparency=3)]
    pictures += [saved(photos[2], "PNG", transparency=(0, 0, 0)), rgb16((90, 70))]
    for data in pictures:
        image = Image.open(io.BytesIO(data))
        distance = np.abs(levels(data, PLAIN, "fast") - levels(data, PLAIN, "exact"))
        # Pillow filters tall pictures by columns first, and both round in between.
        assert distance.max() <= (2 if image.width >= image.height else 4), image
    for data in lottery():  # pure noise
        image = Image.open(io.BytesIO(data))
        if image.format != "JPEG" or min(image.size) < 4 * PLAIN.size:
            distance = np.abs(levels(data, PLAIN, "fast") - levels(data, PLAIN, "exact"))
            assert distance.max() <= 2 if image.width >= image.height else distance.mean() < 1, image


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_fast_reduces_large_jpegs_and_stays_near(mode: str, reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo((PLAIN.size * 2 * reduction + 11, PLAIN.size * 3 * reduction)).convert(mode)
    data = saved(image, "JPEG", quality=90)
    reduced: list[tuple[int, int]] = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self: Any, mode: Any, size: Any) -> Any:
        found = draft(self, mode, size)
        reduced.append(self.size)
        return found

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    distance = np.abs(levels(data, PLAIN, "fast") - levels(data, PLAIN, "exact"))
    assert reduced == [(-(-image.width // reduction), -(-image.height // reduction))]
    assert distance.mean() < 2.5 and np.quantile(distance, 0.99) < 20


@pytest.mark.parametrize("size", [(150, 120), (700, 620)])
def test_both_decoders_draw_the_same_crop_and_mirroring(size: tuple[int, int]) -> None:
    transform = ImageTransform(48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop=0.3, flip=True)
    image = photo(size)
    data = saved(image, "JPEG", quality=95, subsampling=0)
    mirrored = 0
    for i in range(20):
        found = levels(data, transform, "fast", keyed_rng(i))
        box = tuple(round(edge) for edge in draw_box(*size, 0.3, keyed_rng(i)))
        cut = Image.open(io.BytesIO(data)).crop(box)
        expected = np.asarray(cut.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
        both = [np.abs(found - expected), np.abs(found - expected[:, :, ::-1])]
        mirrored += (flipped := int(both[1].mean() < both[0].mean()))
        distance = both[flipped]
        assert distance.max() <= 2 if size == (150, 120) else distance.mean() < 2
        near = np.abs(found - levels(data, transform, "exact", keyed_rng(i)))
        assert near.mean() < 3
    assert 3 < mirrored < 17


@pytest.mark.parametrize("decoder", DECODERS)
def test_pixels_are_written_into_the_array_that_is_given(decoder: Decoder) -> None:
    data = saved(photo((90, 80)), "JPEG")
    memory = shared_memory.SharedMemory(create=True, size=4 * 3 * 3 * 16 * 16)
    try:
        batch = np.ndarray((3, 3, 16, 16), dtype=np.float32, buffer=memory.buf)
        batch[:] = 7
        assert decode_image(data, TRANSFORM, "s", None, decoder, out=batch[1]).base is not None
        np.testing.assert_array_equal(batch[1], decode_image(data, TRANSFORM, "s", None, decoder))
        assert (batch[[0, 2]] == 7).all()
        del batch
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_mutated_pictures_are_decoded_or_refused_in_one_line(format: str, decoder: Decoder) -> None:
    data = saved(photo((70, 60)), format)
    rng = np.random.default_rng(5)
    refused = 0
    for i in range(120):
        mutated = bytearray(data)
        reach = 64 if i % 2 else len(data)  # every second time in the header
        for at in rng.integers(0, min(reach, len(data)), rng.integers(1, 8)):
            mutated[at] = rng.integers(0, 256)
        if i % 5 == 0:
            del mutated[int(rng.integers(0, len(data))) :]
        for read in (
            lambda data: probe_image(data, "s/0/k", 10**6),
            lambda data: decode_image(data, PLAIN, "s/0/k", None, decoder),
        ):
            try:
                found = read(bytes(mutated))
                assert not isinstance(found, np.ndarray) or np.isfinite(found).all()
            except DataError as error:
                refused += 1
                assert str(error).startswith("s/0/k: ") and "\n" not in str(error) and " at 0x" not in str(error)
    assert refused > 20


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    image = saved(Image.new("1", (8, 8)), "PNG")
    head = struct.pack(">II", 60_000, 60_000) + image[24:29]
    bomb = image[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + image[33:]
    with pytest.raises(DataError, match=r"^s: 60000x60000 pixels are more than data.max_pixels = 1000000"):
        probe_image(bomb, "s", 10**6)
    for decoder in DECODERS:
        with pytest.raises(DataError, match=r"^s: .*decompression bomb"):
            decode_image(bomb, PLAIN, "s", None, decoder)
    for data in (b"", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 100_000, b"\xff\xd8" + bytes(100_000), b"RIFF", b"GIF89a"):
        with pytest.raises(DataError, match=r"^s: "):
            probe_image(io.BytesIO(data), "s", 10**6)


FORKED = """
import os, signal, sys
import numpy as np, torch
from mm.data.media import ImageTransform, decode_image
torch.set_num_threads(2)
transform = ImageTransform(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
data = sys.stdin.buffer.read()
(torch.randn(800, 800) @ torch.randn(800, 800)).sum()
torch.nn.functional.interpolate(torch.zeros(1, 3, 1500, 1500), (1200, 1200), mode="bicubic", antialias=True)
expected = decode_image(data, transform, "s", None, "fast")
for threads in (1, None):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        if threads:
            torch.set_num_threads(threads)
        same = all(np.array_equal(decode_image(data, transform, "s", None, "fast"), expected) for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0, threads
"""


def test_fast_decoding_works_in_a_process_forked_after_torch_used_its_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], input=saved(photo((700, 600)), "JPEG"), capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()


def grid_by_search(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """The largest scale up to 1 at which the rounded sides stay within the budget, tried at every scale where one of
    them changes, in exact fractions."""
    sides = height, width
    steps = {Fraction(1)} | {
        Fraction((2 * k + 1) * patch, 2 * side) for side in sides for k in range(1, min(side // patch + 1, most + 1))
    }
    for scale in sorted((step for step in steps if step <= 1), reverse=True):
        for below in (False, True):  # at this scale, and just under it, where this side rounds to less
            grid = []
            for side in sides:
                patches = side * scale / patch
                rounded = math.floor(patches + Fraction(1, 2))
                grid.append(max(1, rounded - (below and patches + Fraction(1, 2) == rounded)))
            if grid[0] * grid[1] <= most:
                return grid[0], grid[1]
    return 1, 1


def test_a_grid_is_the_largest_scale_that_keeps_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    cases = [(384, 384, 14, 729), (378, 378, 14, 729), (1, 1, 16, 1), (4000, 3000, 14, 729), (10000, 3, 14, 729)]
    cases += [(5, 9000, 16, 64), (100, 100, 16, 1), (24, 24, 16, 100), (3000, 20, 8, 9), (640, 480, 14, 10**6)]
    for _ in range(300):
        width, height = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
        cases.append((width, height, int(rng.choice([7, 8, 14, 16, 32])), int(rng.integers(1, 800))))
    for width, height, patch, most in cases:
        rows, columns = Native(patch, most).grid(ImageHeader(width, height))
        assert (rows, columns) == grid_by_search(width, height, patch, most), (width, height, patch, most)
        assert rows >= 1 and columns >= 1 and rows * columns <= most
        # Never enlarged but by rounding, and turned pictures have turned grids.
        assert rows * patch <= max(patch, height + patch / 2) and columns * patch <= max(patch, width + patch / 2)
        turned = Native(patch, most).grid(ImageHeader(height, width))
        assert turned == (columns, rows)
    assert Native(14, 729).grid(ImageHeader(1000, 1000)) == (27, 27)
    assert Native(14, 729).grid(ImageHeader(1600, 900)) == (20, 36)


def test_counting_a_hostile_header_takes_no_time() -> None:
    for size in ((10**8, 1), (1, 10**8), (2**31, 2**31)):
        rows, columns = Native(14, 729).grid(ImageHeader(*size))
        assert rows * columns <= 729


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_positions_are_windows_and_the_fullest_picture_is_whole_windows(pool: int) -> None:
    transform = ImageTransform(Native(8, 50), (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]
    layout = NativeLayout(pool, transform)
    header = ImageHeader(50, 31)  # 6.25 by 3.9 patches
    assert layout.plan(header) == {"grid": [4, 6]} and layout.shape(layout.plan(header)) == (3, 32, 48)
    assert layout.count(header) == (math.ceil(4 / pool) * math.ceil(6 / pool), 24)
    plan, length, cost = layout.largest()
    rows, columns = plan["grid"]
    assert rows % pool == columns % pool == 0 and (length, cost) == (rows * columns // pool**2, rows * columns)
    whole = [(r, c) for r in range(pool, 51, pool) for c in range(pool, 51, pool) if r * c <= 50]
    assert cost == max(r * c for r, c in whole)
    assert layout.shape(layout.smallest()[0]) == (3, 8, 8) and layout.smallest()[1:] == (1, 1)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [(90, 50), (50, 90), (700, 420), (7, 7)])
def test_a_picture_keeps_its_aspect_ratio(size: tuple[int, int], decoder: Decoder) -> None:
    transform = ImageTransform(Native(8, 24), (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
    image = photo(size) if min(size) > 20 else Image.effect_noise(size, 90).convert("RGB")
    data = saved(image, "JPEG", quality=95, subsampling=0)
    rows, columns = Native(8, 24).grid(probe_image(data, "s", 10**6))
    found = decode_image(data, transform, "s", None, decoder)
    assert found.shape == (3, 8 * rows, 8 * columns)
    whole = Image.open(io.BytesIO(data)).resize((8 * columns, 8 * rows), Image.Resampling.BICUBIC)
    expected = np.asarray(whole).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found, expected, atol=1e-6 if decoder == "exact" else 25 / 255)
    assert np.abs(found - expected).mean() < 3 / 255
    # With a crop the box is resized to the same grid: what was planned from the header holds.
    cropped = ImageTransform(Native(8, 24), (0.0,) * 3, (1.0,) * 3, crop=0.3)  # type: ignore[arg-type]
    out = np.empty_like(found)
    decode_image(data, cropped, "s", keyed_rng(1), decoder, out)
    assert out.shape == found.shape and not np.array_equal(out, found)
