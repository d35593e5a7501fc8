"""Pictures: headers without decoding, and pixels equal to torchvision's chain on the same Pillow image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mm.data.media import ImageTransform, decode_image, draw_box, probe_image
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
    chain = v2.Compose(
        [
            v2.Resize((16, 16), interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(dtype=torch.float32, scale=True),
            v2.Normalize(TRANSFORM.mean, TRANSFORM.std),
        ]
    )
    expected = chain(Image.open(io.BytesIO(data)).convert("RGB")).numpy()
    found = decode_image(data, TRANSFORM, "s")
    assert found.dtype == np.float32 and found.shape == (3, 16, 16) and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert probe_image(data, "s", 10**6) == probe_image(encoded("RGB", "PNG"), "s", 10**6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pictures_lie_on_white(mode: str) -> None:
    image = Image.new(mode, (8, 8), (0,) * (len(mode) - 1) + (0,))
    file = io.BytesIO()
    image.save(file, "PNG")
    white = (1 - np.array(TRANSFORM.mean)) / np.array(TRANSFORM.std)
    found = decode_image(file.getvalue(), TRANSFORM, "s")
    np.testing.assert_allclose(found, np.broadcast_to(white[:, None, None], (3, 16, 16)), rtol=1e-5)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_cut_pictures_are_one_line_wherever_they_are_cut(format: str) -> None:
    data = encoded("RGB", format, (64, 64))
    for cut in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(DataError, match=r"^s/0/k: ") as caught:
            decode_image(data[:cut], TRANSFORM, "s/0/k")
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
