"""Building one corpus: a folder that appears whole or not at all, with `corpus.json` to say what is in it.

OUT/PREFIX-000000.tar, …    shards, by webdataset's writer, the same bytes for the same packages
OUT/corpus.json             packages and versions, licence, files, and what was kept and dropped and why
"""

import gzip
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.data.corpora import CORPORA
from mm.data.corpora.fetch import CACHE, Packages, Unpacked, unpack
from mm.errors import ConfigError, DataError
from mm.settings import nearest

Progress = Callable[[str, int], None]
SHARD_BYTES = 100_000_000
SHARD_SAMPLES = 10_000


class Workbench:
    """What a corpus is built with: packages come in, shards and counts go out."""

    def __init__(
        self, folder: Path, packages: Packages, options: Mapping[str, Any], progress: Progress = lambda what, n: None
    ) -> None:
        self.folder = folder
        self.options = options
        self.progress = progress
        self.counts = Counter[str]()
        """What was kept, and what was dropped and why."""
        self.files: dict[str, dict[str, int]] = {}
        self.versions: dict[str, str] = {}
        self._packages = packages
        self._scratch = folder / "scratch"

    def unpack(self, name: str, keep: Callable[[str], bool]) -> Path:
        """The wanted files of a Debian package, in a folder that is removed after the build."""
        self.progress(f"fetching {name}", 0)
        deb = self._packages.deb(name)
        self.progress(f"unpacking {name}", 0)
        unpacked: Unpacked = unpack(deb, self._scratch / name, keep)
        self.versions[name] = unpacked.version
        return unpacked.folder

    def wheel(self, name: str, version: str) -> Path:
        """The wheel of a PyPI package."""
        self.progress(f"fetching {name}", 0)
        self.versions[name] = version
        return self._packages.wheel(name, version)

    def library(self, name: str, version: str) -> Path:
        """A folder to import a PyPI package from."""
        self.progress(f"fetching {name}", 0)
        self.versions[name] = version
        return self._packages.library(name, version)

    @contextmanager
    def shards(self, prefix: str) -> Iterator["Shards"]:
        """Tars `PREFIX-000000.tar`, … that are entered in `files` when they are complete."""
        shards = Shards(self.folder, prefix)
        yield shards
        self.files |= shards.close()

    def lines(self, prefix: str, records: list[dict[str, Any]]) -> None:
        """One gzipped file of JSON lines, `PREFIX-000000.jsonl.gz`."""
        name = f"{prefix}-000000.jsonl.gz"
        text = "".join(dumps(record) + "\n" for record in records)
        with open(self.folder / name, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.write(text.encode())
        self.files[name] = {"bytes": (self.folder / name).stat().st_size, "samples": len(records)}


class Shards:
    """Numbered WebDataset tars, begun anew at `SHARD_BYTES` or `SHARD_SAMPLES`. Keys are unique over all of them."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._keys = set[str]()
        self._done: dict[str, dict[str, int]] = {}
        self._writer: Any = None
        self._name = ""
        self._samples = self._bytes = 0

    def write(self, key: str, members: dict[str, bytes | dict[str, Any]]) -> None:
        """Add a sample; objects are written as JSON. The key must be new and have no dot."""
        if key in self._keys or "." in key:
            raise ValueError(f"{self._prefix}: the key {key!r} comes twice or has a dot")
        self._keys.add(key)
        content = {ext: dumps(value).encode() if isinstance(value, dict) else value for ext, value in members.items()}
        size = sum(map(len, content.values()))
        if self._samples and (self._samples == SHARD_SAMPLES or self._bytes + size > SHARD_BYTES):
            self._finish()
        if self._writer is None:
            import webdataset as wds

            self._name = f"{self._prefix}-{len(self._done):06d}.tar"
            self._writer = wds.TarWriter(str(self._folder / self._name), user="mm", group="mm", mode=0o644, mtime=0)
        self._writer.write({"__key__": key, **content})
        self._samples += 1
        self._bytes += size

    def close(self) -> dict[str, dict[str, int]]:
        """File name -> bytes and samples, of all that was written."""
        self._finish()
        return self._done

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            size = (self._folder / self._name).stat().st_size
            self._done[self._name] = {"bytes": size, "samples": self._samples}
        self._writer, self._samples, self._bytes = None, 0, 0


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def build_corpus(
    name: str,
    out: Path,
    options: Mapping[str, Any] = {},
    cache: Path = CACHE,
    progress: Progress = lambda what, n: None,
) -> dict[str, Any]:
    """Build a corpus into the folder `out`; returns its `corpus.json`, with `already` when it was there before.

    Raises `ConfigError` for an unknown name or option, `DataError` when a package cannot be had or `out` holds
    something else.
    """
    if name not in CORPORA:
        raise ConfigError(f"{name}: no such corpus; {nearest(name, CORPORA)}")
    corpus = CORPORA[name]
    if unknown := [option for option in options if option not in corpus.options]:
        has = ", ".join(corpus.options) or "none"
        raise ConfigError(f"{name}: has no option {unknown[0]!r} (its options: {has})")
    chosen = {**corpus.options, **options}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return {**_existing(name, out, chosen), "already": True}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    start = time.monotonic()
    try:
        (partial / "scratch").mkdir(parents=True)
        bench = Workbench(partial, Packages(cache), chosen, progress)
        try:
            corpus.builder()(bench)
        except ImportError as error:
            raise DataError(f"{name}: building it needs {corpus.needs}: pip install {corpus.needs} ({error})") from None
        about = {
            "name": name,
            "packages": dict(sorted(bench.versions.items())),
            "options": chosen,
            "licence": corpus.licence,
            "files": dict(sorted(bench.files.items())),
            "counts": dict(sorted(bench.counts.items())),
        }
        shutil.rmtree(partial / "scratch")
        (partial / "corpus.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**about, "already": False, "seconds": round(time.monotonic() - start, 1)}


def _existing(name: str, out: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        same = about["name"] == name and about["options"] == options
        what = f"the corpus {about['name']} with {about['options']}"
    except (OSError, ValueError, LookupError, TypeError):
        same, what = False, "something else"
    if not same:
        raise DataError(f"{out}: holds {what}; choose another --out or remove it")
    return about


def jpeg(picture: Any) -> bytes:
    """A Pillow picture as JPEG of quality 90."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()


def on_white(picture: Any, side: int | None = None) -> Any:
    """A Pillow picture as RGB, transparent parts white, made smaller where a side is over `side` pixels."""
    from PIL import Image

    picture = picture.convert("RGBA")
    if side is not None:
        # The thumbnail is made of premultiplied colours: what hides under transparent pixels must not bleed in.
        picture = picture.convert("RGBa")
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")
