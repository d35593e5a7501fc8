"""A tiny layout, shards written by webdataset's own writer, and sets packed from them."""

import contextlib
import io
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from pydantic import TypeAdapter

from mm.data.config import DataConfig
from mm.data.layout import AudioLayout, ImageLayout, Layout, Template, VideoLayout
from mm.data.limits import Limits
from mm.data.media import ImageTransform
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers, pack_split
from mm.data.sample import Media, Sample
from mm.data.sources import SourceConfig
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError

LIMITS = Limits()
ONE = Workers()


def _layout(
    tokens: int = 4,
    cost: int = 9,
    tokenizer: Tokenizer | None = None,
    audio: AudioLayout | None = None,
    frames: int = 0,
    learned: bool = False,
    **template: Any,
) -> Layout:
    tokenizer = tokenizer or Tokenizer.load("builtin:emoji")
    transform = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    spelling = Template(**{"bos": "<s>", "eos": "<|im_end|>", "after_media": "\n", **template})
    video = VideoLayout(frames, tokens, cost, transform) if frames else None
    image = ImageLayout(tokens, cost, transform, learned)
    return Layout(tokenizer, spelling, tokenizer.id("<|endoftext|>"), image, audio, video)


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., Layout]:
    return _layout


@pytest.fixture(scope="session")
def layout() -> Layout:
    """4 positions and 9 encoder tokens a picture, squares of 8 pixels."""
    return _layout()


@pytest.fixture(scope="session")
def all_media(make_layout: Callable[..., Layout]) -> Layout:
    """Pictures as in `layout`; sound at 8 kHz, a position every 1,000 samples; clips as 3 pictures."""
    return make_layout(audio=AudioLayout(8000, 1000), frames=3)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """An encoded picture of noise, another one for every number."""

    def make(number: int = 0, format: str = "PNG", size: tuple[int, int] = (20, 12)) -> bytes:
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, format)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def sound() -> Callable[..., bytes]:
    """An encoded recording of noise, another one for every number."""
    soundfile = pytest.importorskip("soundfile")

    def make(number: int = 0, seconds: float = 1.0, format: str = "FLAC", rate: int = 8000) -> bytes:
        noise = np.random.default_rng(number).normal(0, 0.1, round(seconds * rate))
        file = io.BytesIO()
        soundfile.write(file, noise, rate, format=format)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def clip() -> Callable[..., bytes]:
    """An encoded clip of noise, `frames` pictures of 32x16 at `rate` a second."""
    av = pytest.importorskip("av")

    def make(number: int = 0, frames: int = 20, rate: int = 10, format: str = "mp4", codec: str = "mpeg4") -> bytes:
        file = io.BytesIO()
        rng = np.random.default_rng(number)
        with av.open(file, "w", format=format) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            for _ in range(frames):
                noise = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
            container.mux(stream.encode())
        return file.getvalue()

    return make


def _read(sample: Sample) -> Sample:
    parts = (replace(one, data=one.read()) if isinstance(one, Media) else one for one in sample.parts)
    return replace(sample, parts=tuple(parts))


@pytest.fixture(scope="session")
def samples_in() -> Callable[..., list[list[Sample] | DataError]]:
    """`samples_in(path, {"kind": …})`: the samples of every group of a shard, media read, or why there are none."""

    def read(path: Path, config: dict[str, Any], limits: Limits = LIMITS) -> list[list[Sample] | DataError]:
        source = TypeAdapter(SourceConfig).validate_python({"name": "s", **config, "path": str(path)}).build("")
        found: list[list[Sample] | DataError] = []
        with source.open(str(path), limits) as shard:
            for group in shard.groups():
                try:
                    samples = [] if isinstance(group, DataError) else source.samples(group, limits)
                    found.append(group if isinstance(group, DataError) else list(map(_read, samples)))
                except DataError as error:
                    found.append(error)
        return found

    return read


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Path]:
    """`write_shard(path, {"key": {"jpg": b"…", "txt": "…", "json": {…}}})`, by webdataset."""

    def write(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
        with wds.TarWriter(str(path), mtime=0) as writer:
            for key, members in samples.items():
                writer.write({"__key__": key, **members})
        return path

    return write


@pytest.fixture(scope="session")
def pack() -> Callable[..., PackedDataset]:
    """Pack shards as `mm pack` does. `source` and `settings` go into the config's sections."""

    def run(
        path: Path | str,
        out: Path,
        layout: Layout,
        source: dict[str, Any] | None = None,
        seed: int = 0,
        workers: Workers = ONE,
        **settings: Any,
    ) -> PackedDataset:
        config = {"kind": "captions", "path": str(path), "name": "pictures", **(source or {})}
        data = DataConfig.model_validate({"sources": [config], "context_length": 64, **settings})
        folder = pack_split(data, "train", layout, seed, out, workers=workers)
        assert folder is not None, "there is one slice, and it is this one"
        return PackedDataset(folder)

    return run


@pytest.fixture
def file_size_limit() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Within `with file_size_limit(n)` no file grows past n bytes: writing fails as on a full disk.

    Not for a whole test: the limit is the process's, so pytest's own output, sent to a long log, would fail as well.
    """

    @contextlib.contextmanager
    def limit(most: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


LANGUAGES = ("en", "de", "ja")


@pytest.fixture(scope="session")
def raw(
    tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> Path:
    """Two shards in a folder `raw`: 60 pictures, each with a caption of its own in three languages."""
    folder = tmp_path_factory.mktemp("shards") / "raw"
    folder.mkdir()
    words = {"en": "a cat under an umbrella", "de": "Katze unter einem Schirm", "ja": "傘と猫"}
    for shard in range(2):
        samples = {}
        for number in range(30 * shard, 30 * shard + 30):
            captions = [
                {"language": language, "text": f"{number} {' '.join(words[language].split()[: number % 5 + 1])}"}
                for language in LANGUAGES
            ]
            ext, format = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[number % 3]
            samples[f"{number:06d}"] = {ext: picture(number, format), "json": {"captions": captions}}
        write_shard(folder / f"{shard:03d}.tar", samples)
    return folder


SPELLING = {"prompt": "{language}: "}


@pytest.fixture(scope="session")
def packed(
    raw: Path, tmp_path_factory: pytest.TempPathFactory, layout: Layout, pack: Callable[..., PackedDataset]
) -> PackedDataset:
    """`raw` in rows of 64 with at most 4 pictures, three visits."""
    out = tmp_path_factory.mktemp("packed") / "train"
    return pack("{root}/*.tar", out, layout, SPELLING, root=str(raw), budgets={"image": 4}, visits=3)
