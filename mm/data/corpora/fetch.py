"""Packages as a source of data: found in a folder, or downloaded into it; read, never installed.

A `.deb` is read here in Python, so a package that was carried over by hand builds a corpus on any machine. Downloading
is left to the machine's own clients, `apt-get` and `pip`, which check what they get against their signed or hashed
indices. Nothing needs root.
"""

import gzip
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mm.errors import DataError

CACHE = Path("~/.cache/mm/packages")
RELEASE = "bookworm"
# The versions that docs/corpora.md was measured with. Another version of a Debian package is used as it comes; a wheel
# is taken in this version only, since code in it is run.
TESTED = {
    "bible-kjv-text": "4.38",
    "debian-handbook": "11.20220922",
    "fonts-noto-color-emoji": "2.042-0+deb12u1",
    "fortunes": "1:1.99.1-7.3",
    "gimp-help-en": "2.10.34-2",
    "gnome-user-docs": "43.0-2",
    "installation-guide-amd64": "20230508+deb12u1",
    "linux-doc-6.1": "6.1.176-1",
    "manpages": "6.03-2",
    "manpages-de": "4.18.1-1",
    "manpages-dev": "6.03-2",
    "manpages-es": "4.18.1-1",
    "manpages-fr": "4.18.1-1",
    "manpages-ja": "0.5.0.0.20221215+dfsg-1",
    "manpages-ru": "4.18.1-1",
    "openclipart-png": "1:0.18+dfsg-19",
    "openclipart-svg": "1:0.18+dfsg-19",
    "opencv-doc": "4.6.0+dfsg-12",
    "python3.11-doc": "3.11.2-6+deb12u8",
    "timgm6mb-soundfont": "1.3-5",
    "tuxpaint-stamps-default": "2022.06.04-1",
    "unicode-cldr-core": "41-0.1",
    "wordnet-base": "1:3.0-37",
}


class Packages:
    """The cache folder of packages: what is there is used, what is missing is downloaded into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)

    def deb(self, name: str) -> Path:
        """The `.deb` of a Debian package; of several the one that came last. Raises `DataError`."""
        if found := list(self.folder.glob(f"{name}_*.deb")):
            return max(found, key=lambda path: path.stat().st_mtime)
        by_hand = f"fetch {name}_{TESTED.get(name, 'VERSION')}_all.deb ({self._page(name)}) and put it in {self.folder}"
        if shutil.which("apt-get") is None:
            raise DataError(f"{name}: not a Debian-like machine (no apt-get), so it is not downloaded: {by_hand}")
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.folder) as scratch:
            problem = _run(["apt-get", "download", name], scratch)
            if problem:
                # The package index is missing or stale. One of our own needs no root to be brought up to date.
                private = self._private_index()
                _run(["apt-get", *private, "update"], scratch)
                problem = _run(["apt-get", *private, "download", name], scratch)
            if problem:
                raise DataError(f"{name}: apt-get cannot download it ({problem}): {by_hand}")
            (made,) = Path(scratch).glob("*.deb")
            return Path(shutil.move(made, self.folder / made.name))

    def wheel(self, name: str, version: str) -> Path:
        """The wheel of a PyPI package that fits this Python, in exactly this version. Raises `DataError`."""
        if found := self._wheel(name, version):
            if not zipfile.is_zipfile(found):
                raise DataError(f"{found}: damaged wheel; remove it and build again")
            return found
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.folder) as scratch:
            problem = _run([*pip, "--only-binary", ":all:", f"{name}=={version}"], scratch)
            if problem:
                raise DataError(
                    f"{name}: pip cannot download it ({problem}): fetch its wheel {version} "
                    f"(https://pypi.org/project/{name}/{version}/#files) and put it in {self.folder}"
                )
            (made,) = Path(scratch).glob("*.whl")
            return Path(shutil.move(made, self.folder / made.name))

    def library(self, name: str, version: str) -> Path:
        """A folder to import the PyPI package from: its wheel unpacked in the cache, without what it depends on."""
        wheel = self.wheel(name, version)
        folder = self.folder / "libraries" / wheel.stem
        if not folder.is_dir():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as scratch:
                zipfile.ZipFile(wheel).extractall(Path(scratch) / "whole")
                (Path(scratch) / "whole").rename(folder)
        return folder

    def _wheel(self, name: str, version: str) -> Path | None:
        from packaging.tags import sys_tags
        from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

        fitting = set(sys_tags())
        for path in sorted(self.folder.glob("*.whl")):
            try:
                project, number, _, tags = parse_wheel_filename(path.name)
            except InvalidWheelFilename:
                continue
            if project == canonicalize_name(name) and str(number) == version and tags & fitting:
                return path
        return None

    def _private_index(self) -> list[str]:
        state, cache = self.folder / "apt" / "lists", self.folder / "apt" / "cache"
        (state / "partial").mkdir(parents=True, exist_ok=True)
        (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        return ["-o", f"Dir::State::lists={state}", "-o", f"Dir::Cache={cache}", "-o", "Debug::NoLocking=1"]

    def _page(self, name: str) -> str:
        return f"https://packages.debian.org/{RELEASE}/{name}"


def _run(command: list[str], folder: str) -> str:
    """Run a client; returns "" when it did its work, or else the last thing it said."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    told = [line for line in said if line.startswith(("E:", "ERROR:"))] or said
    return told[-1] if told else f"status {done.returncode}"


@dataclass(frozen=True)
class Unpacked:
    """A package's files below `folder`, and what it says of itself."""

    folder: Path
    name: str
    version: str


def unpack(deb: Path, folder: Path, keep: Callable[[str], bool] = lambda path: True) -> Unpacked:
    """Unpack the files of a Debian package whose path (`usr/share/…`) is wanted. Raises `DataError`.

    Symbolic links are left out: in these packages they repeat a file that is there. A hard link becomes a copy.
    """
    parts = _parts(deb)
    try:
        with _tar(parts, "control", deb) as tar:
            control = next(tar.extractfile(member) for member in tar if member.name in ("./control", "control"))
            assert control is not None
            fields = dict(line.split(": ", 1) for line in control.read().decode().splitlines() if ": " in line)
        with _tar(parts, "data", deb) as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if (member.isreg() or member.islnk()) and keep(path):
                    target = _inside(folder, path, deb)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if member.islnk():
                        shutil.copyfile(_inside(folder, member.linkname.removeprefix("./"), deb), target)
                    else:
                        content = tar.extractfile(member)
                        assert content is not None
                        with open(target, "wb") as file:
                            shutil.copyfileobj(content, file)
    except (tarfile.TarError, lzma.LZMAError, EOFError, StopIteration) as error:
        raise DataError(
            f"{deb}: damaged package ({type(error).__name__}: {error}); remove it and build again"
        ) from None
    return Unpacked(folder, fields["Package"], fields["Version"])


def _parts(deb: Path) -> dict[str, bytes]:
    """The members of the `ar` archive that a Debian package is: control.tar.*, data.tar.*."""
    parts: dict[str, bytes] = {}
    with open(deb, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{deb}: not a Debian package; remove it and build again")
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            content = file.read(size)
            if len(content) != size:
                raise DataError(f"{deb}: truncated; remove it and build again")
            parts[header[:16].decode().rstrip(" /")] = content
            file.seek(size % 2, io.SEEK_CUR)
    return parts


def _tar(parts: dict[str, bytes], part: str, deb: Path) -> tarfile.TarFile:
    name = next((name for name in parts if name.startswith(f"{part}.tar")), None)
    if name is None:
        raise DataError(f"{deb}: lacks its {part}.tar; remove it and build again")
    raw = io.BytesIO(parts[name])
    stream: IO[bytes] | Any
    if name.endswith(".xz"):
        stream = lzma.open(raw)
    elif name.endswith(".gz"):
        stream = gzip.open(raw)
    elif name.endswith(".zst"):
        import pyarrow as pa

        stream = pa.CompressedInputStream(raw, "zstd")
    else:
        stream = raw
    return tarfile.open(fileobj=stream, mode="r|")


def _inside(folder: Path, path: str, deb: Path) -> Path:
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise DataError(f"{deb}: member {path!r} points outside the package; refused")
    return folder / path
