"""Published packs: what was put into them comes out, token for token and pixel for pixel, and what is hostile runs not.

Packs are made here as Open-Qwen2VL's packer makes them, by `pickle.dump` of torch tensors and Pillow pictures.
"""

import contextlib
import fractions
import functools
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from mm.cli import main
from mm.data.config import DataConfig
from mm.data.convert import PickledPacks, PickledPacksConfig, convert, read_pickle, read_picture, read_tensor
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers
from mm.data.sample import Media, Sample, Text, Tokens
from mm.data.shards import Group
from mm.errors import DataError

LIMITS = Limits()
CAPTIONS = ["a cat under an umbrella", "Katze", "傘と猫, and a long tail", "two\nlines", "dog dog dog", "  spaces  "]


def photo(number: int, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Image.Image:
    """Smooth, so that JPEG keeps it apart from others."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [(x * (3 + number) + y * (5 + c) + 40 * c + 17 * number) % 256 for c in range(len(mode))]
    return Image.frombytes(mode, size, np.stack(planes, -1).astype(np.uint8).tobytes())


class Publisher:
    """Writes packs as the packer does: samples in, `{tar}/{uuid}.pkl` out."""

    def __init__(self, layout: Layout) -> None:
        self.tokenizer = layout.tokenizer
        self.bos, self.eos = (layout.tokenizer.id(name) for name in ("<s>", "<|im_end|>"))
        self.pads = {"<|endoftext|>": layout.pad, "<|pad|>": len(layout.tokenizer)}

    def caption(self, picture: Image.Image, text: str) -> tuple[list[Image.Image], list[int]]:
        return [picture], [self.bos, -200, *self.tokenizer.encode("\n" + text), self.eos]

    def document(self, parts: list[Image.Image | str]) -> tuple[list[Image.Image], list[int]]:
        """The obelics-like form: pictures are followed by a newline, texts by a token."""
        ids, text = [self.bos], ""
        for part in parts:
            if isinstance(part, str):
                ids += [*self.tokenizer.encode(text + part), self.tokenizer.id("<|endofchunk|>")]
                text = ""
            else:
                ids += [*self.tokenizer.encode(text), -200]
                text = "\n"
        return [part for part in parts if not isinstance(part, str)], [*ids, *self.tokenizer.encode(text), self.eos]

    def pack(
        self, samples: list[tuple[list[Image.Image], list[int]]], pad: str = "<|pad|>", length: int = 4096
    ) -> dict[str, Any]:
        ids = torch.cat([torch.LongTensor(ids) for _, ids in samples])
        if len(ids) < length:
            ids = torch.cat([ids, torch.full((length - len(ids),), self.pads[pad], dtype=ids.dtype)])
        return {
            "image_tensors": [picture for pictures, _ in samples for picture in pictures],
            "input_ids": ids,
            "lengths": [len(ids) + 143 * len(pictures) for pictures, ids in samples],
        }

    @staticmethod
    def write(path: Path, pack: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            pickle.dump(pack, file)
        return path


@pytest.fixture(scope="session")
def publish(layout: Layout) -> Publisher:
    return Publisher(layout)


@pytest.fixture
def read(tmp_path: Path, layout: Layout) -> Callable[..., list[Sample]]:
    """The samples of one pack, given as a value to pickle or as the bytes of a pickle."""

    def run(pack: Any, limits: Limits = LIMITS) -> list[Sample]:
        folder = tmp_path / "packs" / "7"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "u.pkl").write_bytes(pack if isinstance(pack, bytes) else pickle.dumps(pack))
        source = PickledPacks(PickledPacksConfig(path="x", name="s"), "", layout)
        with source.open(str(folder), limits) as shard:
            (samples,) = (source.samples(group, limits) for group in shard.groups() if isinstance(group, Group))
            return samples

    return run


def refusal(read: Callable[..., Any], pack: Any, limits: Limits = LIMITS) -> str:
    with pytest.raises(DataError) as found:
        read(pack, limits)
    line = str(found.value)
    assert "packs/7/u.pkl: " in line and "\n" not in line and len(line) < 1000
    return line


def pixels(picture: Image.Image) -> np.ndarray:
    return np.array(picture.convert("RGBA"))


def ids_of(sample: Sample) -> list[int]:
    """With -200 for pictures, less begin and end."""
    return [
        id for part in sample.parts for id in (part.ids.tolist() if isinstance(part, Tokens) else [-200])
    ]  # fmt: skip


def pictures_of(sample: Sample) -> list[Image.Image]:
    return [Image.open(io.BytesIO(part.read())) for part in sample.parts if isinstance(part, Media)]


@pytest.mark.parametrize("pad", ["<|pad|>", "<|endoftext|>"])
@pytest.mark.parametrize("length", [4096, 40, 0])
def test_a_pack_is_taken_apart(publish: Publisher, read: Callable[..., list[Sample]], pad: str, length: int) -> None:
    """Captions and documents, padded by either id, far, a little, or not at all."""
    captions = [publish.caption(photo(n), text) for n, text in enumerate(CAPTIONS)]
    document = publish.document([photo(10), photo(11), "Two pictures.", "And words.", photo(12), "The end."])
    samples = [*captions, document, publish.document(["Words alone."]), publish.document([photo(13)])]
    found = read(publish.pack(samples, pad, length))
    assert [one.id for one in found] == [f"s/7/u#{n}" for n in range(len(samples))]
    for sample, (pictures, ids) in zip(found, samples, strict=True):
        assert ids_of(sample) == ids[1:-1]
        assert all(part.loss for part in sample.parts if isinstance(part, Tokens))
        assert [pixels(one).tolist() for one in pictures_of(sample)] == [pixels(one).tolist() for one in pictures]


def encoded(picture: Image.Image, format: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, format, **options)
    file.seek(0)
    return file


def described() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", "傘", "ja", "題")
    info.add_text("Author", "nobody")
    return info


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x011A], found[0x0128] = TiffImagePlugin.IFDRational(72, 1), 2
    return found


PALETTE = photo(1).quantize(17)
KINDS: dict[str, Callable[[], Image.Image]] = {
    "resized": lambda: photo(1, (80, 60)).resize((38, 38), Image.Resampling.LANCZOS),
    "opened jpeg": lambda: Image.open(encoded(photo(1), "JPEG", exif=exif())),
    "opened jpeg, resized": lambda: Image.open(encoded(photo(1), "JPEG", dpi=(72, 72))).resize((9, 9)),
    "grey jpeg": lambda: Image.open(encoded(photo(1, mode="L"), "JPEG")),
    "cmyk jpeg": lambda: Image.open(encoded(photo(1).convert("CMYK"), "JPEG")),
    "opened png": lambda: Image.open(encoded(photo(1), "PNG", pnginfo=described())),
    "decoded": lambda: Image.open(encoded(photo(1), "PNG", pnginfo=described())).convert("RGB"),
    "opened webp": lambda: Image.open(encoded(photo(1), "WEBP")),
    "opened gif": lambda: Image.open(encoded(PALETTE, "GIF")),
    "grey": lambda: photo(1, mode="L"),
    "grey, transparent": lambda: photo(1, mode="LA"),
    "one colour transparent": lambda: Image.open(encoded(photo(1), "PNG", transparency=(17, 57, 97))),
    "one grey transparent": lambda: Image.open(encoded(photo(1, mode="L"), "PNG", transparency=17)),
    "palette": lambda: PALETTE,
    "palette, one transparent": lambda: Image.open(encoded(PALETTE, "PNG", transparency=3)),
    "palette, several transparent": lambda: Image.open(encoded(PALETTE, "PNG", transparency=bytes(range(17)))),
    "palette with alpha": lambda: PALETTE.convert("PA"),
    "transparent": lambda: photo(1, mode="RGBA"),
    "black and white": lambda: photo(1, (13, 7)).convert("1"),
    "YCbCr": lambda: photo(1).convert("YCbCr"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_keep_their_pixels(kind: str) -> None:
    """What decoding gives is what the picture itself would be made into, whatever its mode."""
    published = KINDS[kind]()
    data = pickle.dumps(published)
    expected = pickle.loads(data)
    found = read_picture(read_pickle(io.BytesIO(data)), LIMITS)
    picture = Image.open(io.BytesIO(found.read()))
    assert picture.format == "WEBP" and picture.size == expected.size
    transparent = expected.mode in ("LA", "PA", "RGBA") or (expected.mode == "P" and "transparency" in expected.info)
    if not transparent:
        expected.info.pop("transparency", None)
    mode = "RGBA" if transparent else "RGB"  # WebP does not keep an alpha that is all opaque
    np.testing.assert_array_equal(np.array(picture.convert(mode)), np.array(expected.convert(mode)))


def test_a_picture_opened_from_a_file(tmp_path: Path) -> None:
    """Its pickle has a path, which nobody looks at."""
    path = tmp_path / "a.jpg"
    photo(1).save(path)
    with Image.open(path) as picture:
        expected, data = np.array(picture), pickle.dumps(picture)
    path.unlink()
    found = read_picture(read_pickle(io.BytesIO(data)), LIMITS)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found.read()))), expected)


def test_long_pictures_and_what_transparency_hides() -> None:
    """WebP has at most 16,383 pixels along a side, and its encoder likes to forget colours that nobody sees."""
    for picture in (photo(1, (17_000, 2)), Image.new("RGBA", (9, 9), (200, 100, 50, 0))):
        found = read_picture(read_pickle(io.BytesIO(pickle.dumps(picture))), LIMITS)
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found.read()))), np.array(picture))


def test_16_bits_are_read_as_they_are_decoded() -> None:
    deep = Image.fromarray((np.arange(240, dtype=np.uint16) * 5).reshape(12, 20))
    assert deep.mode == "I;16"
    found = read_picture(read_pickle(io.BytesIO(pickle.dumps(deep))), LIMITS)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found.read()))), np.array(deep.convert("RGB")))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_tensors_are_torchs(protocol: int) -> None:
    for tensor in (
        torch.arange(7), torch.LongTensor([-200, 2**62, -(2**63)]), torch.arange(9)[2:5], torch.LongTensor([]),
    ):  # fmt: skip
        data = pickle.dumps(
            {"ids": tensor, "n": [1, -1, 2**40, True, None, 1.5, "傘", (1, (2, 3, 4, 5), ())]}, protocol
        )
        found = read_pickle(io.BytesIO(data))
        np.testing.assert_array_equal(read_tensor(found["ids"]), tensor.numpy())
        assert found["n"] == pickle.loads(data)["n"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(8).view(2, 4), torch.arange(8)[::2], torch.arange(8.0), torch.arange(8, dtype=torch.int32),
        torch.arange(8).to_sparse(), torch.arange(8, device="meta"), torch.nn.Parameter(torch.arange(8.0)),
        [1, 2, 3], np.arange(3), "ids", None,
    ],
)  # fmt: skip
def test_other_tensors_are_refused(publish: Publisher, read: Callable[..., Any], tensor: Any) -> None:
    refusal(read, {**publish.pack([publish.caption(photo(1), "x")]), "input_ids": tensor})


def said(dataset: PackedDataset) -> Counter[tuple[Any, ...]]:
    """Tokens, learned positions and pixels of every segment."""
    found: Counter[tuple[Any, ...]] = Counter()
    for number in range(len(dataset)):
        row = dataset.read(number)
        for k, segment in enumerate(row.segments):
            ids = row.tokens[segment.start : segment.start + segment.length].tolist()
            loss = tuple((start - segment.start, stop - segment.start) for start, stop in segment.loss)
            pictures = [pixels(Image.open(io.BytesIO(one.data))).tobytes() for one in row.media if one.segment == k]
            found[tuple(ids), loss, tuple(pictures)] += 1
    return found


@pytest.fixture
def packs(tmp_path: Path, publish: Publisher) -> Path:
    """Twenty captions in seven packs, in three folders."""
    for number in range(7):
        samples = [
            publish.caption(photo(n), f"{n} {CAPTIONS[n % 5]}") for n in range(3 * number, min(3 * number + 3, 20))
        ]
        publish.write(tmp_path / "ccs_pkl" / str(number % 3) / f"{number:032x}.pkl", publish.pack(samples))
    for tar in range(3):
        (tmp_path / "ccs_pkl" / f"{tar}_stats.json").write_text(json.dumps({"len": [4000, 4000]}))
    return tmp_path / "ccs_pkl"


@pytest.fixture
def anew(tmp_path: Path, packs: Path, layout: Layout) -> Callable[..., dict[str, Any] | None]:
    def run(out: str = "out", workers: Workers = Workers(), **data: Any) -> dict[str, Any] | None:  # noqa: B008
        config = DataConfig.model_validate({"context_length": 64, **data})
        return convert(config, layout, 0, [packs], tmp_path / out, lambda what, n: None, workers)

    return run


def test_packed_anew(
    tmp_path: Path,
    packs: Path,
    anew: Callable[..., dict[str, Any]],
    layout: Layout,
    pack: Callable[..., PackedDataset],
) -> None:
    """The same captions from published packs and from their tar: the same tokens, losses, pixels; counted by hand."""
    texts = [f"{n} {CAPTIONS[n % 5]}" for n in range(20)]
    with wds.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for n, text in enumerate(texts):
            tar.write({"__key__": f"{n:09d}", "png": photo(n), "txt": text, "json": {"key": f"{n:09d}", "uid": "0"}})
    found = anew()
    assert found["samples"] == 20 and found["refused"] == []
    ours = PackedDataset(tmp_path / "out" / "train")
    assert said(ours) == said(pack(tmp_path / "00000.tar", tmp_path / "tar", layout))
    lost = sum(len(layout.tokenizer.encode("\n" + text)) + 1 for text in texts)
    (ledger,) = ours.about["ledger"].values()
    assert (ledger["loss_tokens"], ledger["image"], ledger["segments"]) == (lost, 20, 20)
    assert ledger["segment_tokens"] == lost + 20 * (1 + 4)
    assert [one["name"] for one in ours.about["provenance"]["shards"]] == ["0", "1", "2"]


def test_the_same_set_by_slices_and_again(tmp_path: Path, anew: Callable[..., Any]) -> None:
    """Shards are folders; whoever packs them, the bytes are the same, and what is done is not done again."""
    anew()
    assert anew("sliced", Workers(slice=(0, 2))) is None, "the other slice has a folder to scan"
    anew("sliced", Workers(slice=(1, 2)))
    found = anew("sliced", Workers(slice=(0, 2)))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "sliced" / "train").iterdir()}
    assert anew("sliced") == found


def test_bad_files_are_counted(packs: Path, anew: Callable[..., Any]) -> None:
    bad = packs / "1" / "bad.pkl"
    bad.write_bytes(pickle.dumps(Made(os.getcwd)))
    with pytest.raises(DataError, match=r"/ccs_pkl/1/bad\.pkl: a pickle that imports posix\.getcwd; .* not run"):
        anew()
    found = anew(max_bad_fraction="10%")
    assert found["samples"] == 20 and [bad.name in reason for reason in found["refused"]] == [True]
    (packs / "2" / "cut.pkl").write_bytes(b"\x80\x04\x95")
    with pytest.raises(DataError, match=r"2 of 22 samples are unusable, more than"):
        anew("again", max_bad_fraction="5%")


def test_the_command(tmp_path: Path, packs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    image = {"tokens": 4, "cost": 9, "size": 8}
    config.write_text(
        json.dumps(
            {
                "data": {"packed": str(tmp_path / "out"), "context_length": 64},
                "model": {"kind": "layout", "tokenizer": "builtin:emoji", "image": image},
            }
        )
    )
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(["data", "convert", str(config), "--from", str(packs), *out, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["samples"] == 20 and said["folder"] == str(tmp_path / "out" / "train")
    assert main(["data", "convert", str(config), "--from", str(tmp_path / "nothing"), *out]) == 2
    assert "nothing: no folder there holds files *.pkl" in capsys.readouterr().err


def test_packs_of_another_tokenizer(publish: Publisher, read: Callable[..., Any]) -> None:
    good = publish.pack([publish.caption(photo(1), "a cat"), publish.caption(photo(2), "dog")])
    start = int((good["input_ids"] == -200).nonzero()[0])

    def with_id(place: int, id: int) -> dict[str, Any]:
        ids = good["input_ids"].clone()
        ids[place] = id
        return {**good, "input_ids": ids}

    bos, eos, newline = publish.bos, publish.eos, publish.tokenizer.encode("\n")[0]
    same = "; take the tokenizer and template that the packs were made with"
    assert refusal(read, with_id(0, 151666)).endswith(
        f"its sample 0 has the id 151666 where the config's <s> is {bos}{same}"
    )
    end = good["lengths"][0] - 143
    assert f"its sample 0 has the id 7 where the config's <|im_end|> is {eos}" in refusal(read, with_id(end - 1, 7))
    assert f"its sample 1 has the id 7 where the config's <s> is {bos}" in refusal(read, with_id(end, 7))
    assert good["input_ids"][start + 1] == newline
    other = publish.tokenizer.encode("cat")[0]
    assert r"has 'c" in refusal(read, with_id(start + 1, other)) and r"where '\n' belongs" in refusal(
        read, with_id(start + 1, other)
    )


def test_packs_that_do_not_add_up(publish: Publisher, read: Callable[..., Any]) -> None:
    good = publish.pack([publish.caption(photo(1), "a cat"), publish.caption(photo(2), "dog")])
    a, b = good["lengths"]
    pictures, ids = good["image_tensors"], good["input_ids"]
    assert "1 pictures for 2 places" in refusal(read, {**good, "image_tensors": pictures[:1]})
    assert "3 pictures for 2 places" in refusal(read, {**good, "image_tensors": [*pictures, photo(3)]})
    for lengths in ([a, b - 144], [a + b, 5000], [100, a + b - 100]):
        assert "lengths" in refusal(read, {**good, "lengths": lengths})
    assert "ids behind the last sample that are not padding" in refusal(read, {**good, "lengths": [a]})
    assert "ids behind the last sample that are not padding" in refusal(
        read, {**good, "input_ids": torch.cat([ids, torch.LongTensor([5])])}
    )
    for lengths in ([], [0, a + b], [-1, a + b + 1], [2**70], [True], [1.0], "ab", None, [a + b] * 2):
        assert refusal(read, {**good, "lengths": lengths})
    for key in good:
        assert f"KeyError: '{key}'" in refusal(read, {k: v for k, v in good.items() if k != key})
    for other in (torch.rand(3, 8, 8), "a.jpg", b"\xff\xd8\xff", None, np.zeros((8, 8, 3), np.uint8)):
        assert refusal(read, {**good, "image_tensors": [other, photo(1)]})
    refusal(read, [good])
    refusal(read, {**good, "input_ids": ids.int()})
    assert "bytes are more than data.max_media_bytes" in refusal(read, good, Limits(media_bytes=100))
    assert "a picture of 20x12 pixels, data.max_pixels is 200" in refusal(read, good, Limits(pixels=200))


class Made:
    """Pickles as a call with these arguments, and a state for what is made by it."""

    def __init__(self, call: Any, *arguments: Any, state: Any = None) -> None:
        self._reduced = (call, arguments) if state is None else (call, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced

    def __call__(self) -> None:
        """So that it can be what another one calls."""


def hostile(marker: Path) -> dict[str, Any]:
    """Pickles, or what to make them of, that touch `marker` when Python loads them."""
    command, statement = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    system = Made(os.system, command)
    words = command.encode()
    return {
        "a call": system,
        "eval": Made(eval, statement),
        "exec": Made(exec, statement),
        "a process": Made(subprocess.getoutput, command),
        "getattr": Made(Made(getattr, Made(__import__, "os"), "system"), command),
        "a method": Made(operator.methodcaller("touch"), marker),
        "map": Made(list, Made(map, os.system, [command])),
        "partial": Made(functools.partial(os.system, command)),
        "another pickle": Made(pickle.loads, pickle.dumps(system)),
        "another pickle in a storage": Made(torch.storage._load_from_bytes, pickle.dumps(system)),
        "an argument": Made(fractions.Fraction, system),
        "a state": Made(Image.Image, state=[{}, "RGB", (20, 12), system, photo(1).tobytes()]),
        "what is said of a picture": Made(
            Image.Image, state=[{"a": system}, "RGB", (20, 12), None, photo(1).tobytes()]
        ),
        "an entry": {"image_tensors": [], "input_ids": [], "lengths": [], "more": [system]},
        "GLOBAL": b"cposix\nsystem\n(V" + words + b"\ntR.",
        "INST": b"(V" + words + b"\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nV" + words + b"\no.",
        "behind an admitted name": b"cPIL.Image\nImage\n0cposix\nsystem\n(V" + words + b"\ntR.",
    }


def test_nothing_runs(tmp_path: Path, publish: Publisher, read: Callable[..., Any]) -> None:
    """What touches a file when Python loads it is refused, as a pack and in one."""
    marker = tmp_path / "touched"
    good = publish.pack([publish.caption(photo(1), "a cat")])
    for name, what in hostile(marker).items():
        data = what if isinstance(what, bytes) else pickle.dumps(what)
        with contextlib.suppress(Exception):
            pickle.loads(data)
        for _ in range(200):  # a process may take a moment
            if marker.exists():
                break
            time.sleep(0.01)
        assert marker.exists(), f"{name} is not hostile"
        marker.unlink()
        lines = [refusal(read, data)]
        if isinstance(what, Made):
            packs = {**good, "image_tensors": [what]}, {**good, "input_ids": what}, {**good, "lengths": what}
            lines += [refusal(read, pack) for pack in packs]
        assert not marker.exists(), name
        assert name == "another pickle in a storage" or all("it was not run" in line for line in lines), lines
    storage = pickle.dumps(Made(os.system, f"touch {marker}"))
    for inner in (storage, inner_storage(key=Made(os.system, f"touch {marker}"))):
        line = refusal(read, {**good, "input_ids": tensor_of(inner)})
        assert "imports posix.system" in line and not marker.exists(), "where it would be read"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"cos\nsystem\n.", "imports os.system; published packs hold plain values, tensors and Pillow pictures alone"),
        (b"cPIL.Image\nopen\n.", "imports PIL.Image.open"),
        (b"cPIL.ImageShow\nshow\n.", "imports PIL.ImageShow.show"),
        (b"\x80\x04\x8c\x09PIL.Image\x8c\x13Image.open.__self__\x93.", r"imports PIL.Image.Image.open.__self__"),
        (b"\x80\x04\x8c\x09PIL.Image\x8c\x06Image\n\x93.", r"imports PIL.Image.Image\n"),
        (b"\x80\x04\x8c\x00\x8c\x02\xe2\x82\x93.", "UnicodeDecodeError"),
        (b"ctorch\nload\n.", "imports torch.load"),
        (b"ctorch._utils\n_rebuild_tensor\n.", "imports torch._utils._rebuild_tensor;"),
        (b"ctorch\nFloatStorage\n.", "imports torch.FloatStorage"),
        (b"ccopyreg\n_reconstructor\n.", "imports copyreg._reconstructor"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "imports numpy.core.multiarray._reconstruct"),
        (b"cPIL.Image\nImage\n}b.", "Name in place of Call"),  # would set attributes of the class
        (b"cPIL.Image\nImage\n(N}(X\x04\x00\x00\x00openNutb.", "Name in place of Call"),
        (b"cPIL.Image\nImage\n)R)R.", "Call in place of Name"),  # would call a picture
        (b"\x80\x04N)R.", "NoneType in place of Name"),
        (b"\x80\x04]}b.", "list in place of Call"),
        (b"\x80\x04cPIL.Image\nImage\n)}\x92.", "instruction NEWOBJ_EX"),
        (b"\x82\x01.", "instruction EXT1, which published packs do not hold; it was not run"),
        (b"Pname\n.", "instruction PERSID"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "expected 1099511627776 bytes"),
        (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", "expected 1152921504606846976 bytes"),
        (b"\x80\x04\x8f.", "instruction EMPTY_SET"),
        (b"\x80\x04N2.", "instruction DUP"),
        (b"Nr\xff\xff\xff\xff.", "NoneType in place of dict"),  # room for 4 billion memos, in Python's
        (b"h\x00.", "KeyError: 0"),
        (b"", "pickle exhausted before seeing STOP"),
        (b".", "IndexError"),
        (b"}", "pickle exhausted"),
        (b"\xff", "opcode b'\\xff' unknown"),
        (b"t.", "IndexError"),
        (b"(.", "IndexError"),
        (b"\x80\x04}Ns.", "IndexError"),
        (b"\x80\x04](Ns.", "IndexError"),
        (b"L" + b"9" * 10_000 + b"L\n.", "ValueError"),
        (b"L9L\n.", "instruction LONG"),
        (b"N" * 200_001 + b".", "over 200,000 instructions"),
        (b"]" * 150_000 + b"a" * 149_999 + b".", "instructions"),
        (b"]" * 90_000 + b"a" * 89_999 + b".", "list in place of dict"),
        (b"]\x94h\x00a.", "list in place of dict"),
    ],
)  # fmt: skip
def test_what_is_no_pack_is_named(read: Callable[..., Any], data: bytes, words: str) -> None:
    assert words in refusal(read, data)


def doubled(levels: int = 80) -> bytes:
    """The piece of a pickle of a tuple of two tuples of two tuples …: to hash, compare or print it takes for ever."""
    return b")" + b"".join(
        b"r" + struct.pack("<I", 1000 + n) + b"j" + struct.pack("<I", 1000 + n) + b"\x86" for n in range(levels)
    )


GOOD = [{}, "RGB", (20, 12), None, photo(1).tobytes()]


def test_hostile_pictures(publish: Publisher, read: Callable[..., Any]) -> None:
    """An admitted class with a state that is made to hurt."""
    pack = publish.pack([publish.caption(photo(1), "a cat")])

    def say(**changed: Any) -> str:
        names = ("info", "mode", "size", "palette", "data")
        state = [changed.get(name, value) for name, value in zip(names, GOOD, strict=True)]
        return refusal(read, {**pack, "image_tensors": [Made(Image.Image, state=state)]})

    assert "a picture of 100000x100000 pixels, data.max_pixels is 100,000,000" in say(size=(100_000, 100_000))
    assert "a picture of 9000x9000 pixels with 720 bytes in place of 243000000" in say(size=(9000, 9000))
    for size in ((0, 12), (-20, -12), (20.0, 12), (True, True), ("20", 12), (20, 12, 1), 7, (2**70, 1), None):
        say(size=size)
    assert "a picture of mode 'F;64', expected one of 1, L," in say(mode="F;64")
    for mode in ("", "rgb", None, 3, "RGB\0", "x" * 9999, "F", b"RGB"):
        say(mode=mode)
    for data in (b"", photo(1).tobytes() + b"0", "text", None, [0] * 720):
        say(data=data)
    for palette in (None, "red", [300], [-1], [1.5], [0] * 10_000, [[0]], {}):
        say(mode="P", data=bytes(240), palette=palette)
    indexed = {"mode": "P", "data": bytes(240), "palette": [0, 0, 0]}
    for transparency in ("red", [1], {}, (1, 2, 3), 1.5, True):
        assert "for its transparency" in say(**indexed, info={"transparency": transparency})
    for info in (None, [], "info", [("transparency", 1)]):
        say(info=info)
    for state in ([], {}, "state", (1, 2), {"__class__": "x"}, (None, {"mode": "x"}), GOOD[:4], tuple(GOOD)):
        refusal(read, {**pack, "image_tensors": [Made(Image.Image, state=state)]})
    refusal(read, {**pack, "image_tensors": [Made(Image.Image)]})
    again = publish.pack([publish.caption(photo(1), "x") for _ in range(500)])
    assert read(again), "pictures that are alike may be many"
    assert "pictures of over" in refusal(read, {**again, "image_tensors": [photo(1)] * 500}), (
        "one again and again may not"
    )


BOMB = "the bomb goes here"
SPELT = pickle.dumps(BOMB, 3)[2:-3]  # without what is around it


def armed(data: bytes) -> bytes:
    assert SPELT in data
    return data.replace(SPELT, doubled())


def test_what_takes_for_ever_is_not_looked_at(publish: Publisher, read: Callable[..., Any]) -> None:
    """The bomb in every place of a pack where something else belongs."""
    for data in (b"}" + doubled() + b"Ns.", doubled() + doubled() + b"\x93.", doubled() + b"."):
        assert refusal(read, data)
    good = publish.pack([publish.caption(photo(1), "a cat")])
    picture = [{}, "RGB", (20, 12), None, photo(1).tobytes()]
    states = [[*picture[:n], BOMB, *picture[n + 1 :]] for n in (0, 1, 2, 4)]
    states += [BOMB, [{}, "RGB", (BOMB, 12), None, b""], [{}, "RGB", (-1, BOMB), None, b""]]
    states += [[{"transparency": BOMB}, "P", (20, 12), [0, 0, 0], bytes(240)], [{}, "P", (20, 12), [BOMB], bytes(240)]]
    arguments = list(good["input_ids"].__reduce_ex__(2)[1])
    tensors = [[*arguments[:n], BOMB, *arguments[n + 1 :]] for n in range(4)]
    tensors += [[arguments[0], 0, (BOMB,), (2,), False, BOMB]]
    packs = [{**good, "image_tensors": [Made(Image.Image, state=state)]} for state in states]
    packs += [{**good, "input_ids": Made(torch._utils._rebuild_tensor_v2, *one)} for one in tensors]
    packs += [{**good, key: value} for key in good for value in (BOMB, [BOMB])]
    for pack in packs:
        refusal(read, armed(pickle.dumps(pack, 3)))
    for changed in ("magic", "machine", "kind", "key", "count", "view", "keys"):
        storage = armed(inner_storage(**{changed: BOMB}))
        refusal(read, pickle.dumps({**good, "input_ids": tensor_of(storage)}))
    both = armed(inner_storage(key=BOMB, keys=[BOMB]))
    refusal(read, pickle.dumps({**good, "input_ids": tensor_of(both)}))


def tensor_of(storage: bytes) -> Made:
    return Made(
        torch._utils._rebuild_tensor_v2, Made(torch.storage._load_from_bytes, storage), 0, (1,), (1,), False, {}
    )


def inner_storage(values: bytes = struct.pack("<qq", 1, 5), **changed: Any) -> bytes:
    """What torch writes of a storage of one number, with some of it changed."""
    written = {
        **{"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "machine": {"little_endian": True}, "key": "1"},
        **{"kind": torch.LongStorage, "count": 1, "view": None, "keys": ["1"], **changed},
    }

    class Pickler(pickle.Pickler):
        def persistent_id(self, what: Any) -> Any:
            named = (written[name] for name in ("kind", "key", "count", "view"))
            kind, key, count, view = named
            return ("storage", kind, key, "cpu", count, view) if what is Pickler else None

    file = io.BytesIO()
    for what in (written["magic"], written["protocol"], written["machine"], Pickler, written["keys"]):
        Pickler(file, 2).dump(what)
    return file.getvalue() + values


def test_storages_that_lie(publish: Publisher, read: Callable[..., Any]) -> None:
    assert read_tensor(read_pickle(io.BytesIO(pickle.dumps(tensor_of(inner_storage()))))).tolist() == [5]
    good = publish.pack([publish.caption(photo(1), "a cat")])
    for storage in (
        inner_storage(count=2**50), inner_storage(count=2), inner_storage(count=-1), inner_storage(count=True),
        inner_storage(values=struct.pack("<qq", 2**50, 5)), inner_storage(values=struct.pack("<q", 1)),
        inner_storage(values=b""), inner_storage(values=struct.pack("<qqb", 1, 5, 5)), inner_storage(key="2"),
        inner_storage(machine={"little_endian": False}), inner_storage(machine={}), inner_storage(machine=1),
        inner_storage(magic=1), inner_storage(protocol=1002), inner_storage(view=("1", 0, 1)), inner_storage()[:40],
        b"", b"PK\x03\x04", b"text",
    ):  # fmt: skip
        refusal(read, {**good, "input_ids": tensor_of(storage)})
    file = io.BytesIO()
    torch.save(torch.arange(3), file)  # as a zip, which may grow
    refusal(read, {**good, "input_ids": tensor_of(file.getvalue())})
    storage = Made(torch.storage._load_from_bytes, inner_storage())
    for start, size, stride in ((1, 1, 1), (-1, 1, 1), (0, 2**40, 1), (0, 2**40, 0), (0, -1, 1), (0, 1, 2)):
        tensor = Made(torch._utils._rebuild_tensor_v2, storage, start, (size,), (stride,), False, {})
        refusal(read, {**good, "input_ids": tensor})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=5)
)
def test_any_bytes_are_a_pack_or_one_clear_error(
    publish: Publisher, read: Callable[..., Any], edits: list[tuple[int, int, bytes]]
) -> None:
    """Bytes put in, taken out and written over, anywhere in a pack."""
    samples = [publish.caption(photo(1, (3, 2)), "a cat"), publish.caption(photo(2, (3, 2), "L"), "dog")]
    data = bytearray(pickle.dumps(publish.pack(samples, length=0)))
    for place, gone, put in edits:
        at = place % len(data)
        data[at : at + gone] = put
        data = data or bytearray(b".")
    with contextlib.suppress(DataError):
        for sample in read(bytes(data)):
            assert sample.parts and all(isinstance(part, Tokens | Media) for part in sample.parts)


def test_its_caption_tars(
    tmp_path: Path, samples_in: Callable[..., Any], write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    """As img2dataset and the resharder of DataComp write them: every spelling of a picture, captions in the .txt."""
    jpeg = picture(1, "JPEG")
    about = {"uid": "f" * 32, "url": "http://a", "status": "success", "error_message": None, "width": 20, "height": 12}
    members = {
        "000000001": {"jpg": jpeg, "txt": "one", "json": {**about, "key": "000000001", "caption": "one"}},
        "000000002": {"jpeg": jpeg, "txt": "two", "json": {**about, "key": "000000002", "caption": None}},
        "000000003": {"png": picture(1), "txt": "three\n", "json": {**about, "key": "000000003"}},
        "000000004": {"webp": picture(1, "WEBP"), "txt": "four"},
        "f" * 32 + "-0": {"jpg": picture(1), "txt": "a png by another name", "json": {**about, "key": "5"}},
        "000000006": {"jpg": picture(1, size=(1, 12)), "txt": "narrow", "json": about},
        "000000007": {"jpg": picture(1, size=(20, 2)), "txt": "flat, but not that flat", "json": about},
    }
    path = write_shard(tmp_path / "00000000.tar", members)
    found = samples_in(path, {"kind": "captions", "min_side": 2})
    words = ["one", "two", "three", "four", "a png by another name", None, "flat, but not that flat"]
    assert [one[0].parts[1].text if one else None for one in found] == words
    assert [one[0].id for one in found if one][4] == f"s/00000000/{'f' * 32}-0"
    assert len(samples_in(path, {"kind": "captions"})[5]) == 1

    upper = tmp_path / "1.tar"
    with tarfile.open(upper, "w") as tar:
        for name, data in (("1.JPG", jpeg), ("1.TXT", b"loud"), ("2.JPEG", jpeg), ("2.txt", b"louder")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [one[0].parts for one in samples_in(upper, {"kind": "captions"})] == [
        (Media("image", jpeg, "jpg"), Text("loud")),
        (Media("image", jpeg, "jpeg"), Text("louder")),
    ]
