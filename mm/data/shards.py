"""WebDataset shards in: which files a path names, and the members of a tar by byte range.

A tar is read as data, never extracted: a member that is not a plain file, or whose name points outside, is refused, and
so is a tar that ends early. Gzipped tars are decompressed once into an unlinked temporary file, so that every shard can
be read at random.
"""

import glob
import itertools
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mm.data import builtin
from mm.errors import DataError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK = 512


class Member(NamedTuple):
    """Where the bytes of one tar member are: offset and size in the (decompressed) tar."""

    offset: int
    size: int


def expand(path: str, root: str = "") -> list[Path]:
    """The shards that a path names, in order.

    `{root}` stands for `data.root`; `{000..127}` counts, keeping leading zeros; `*` and `?` match file names;
    `builtin:NAME/…` is a data set that ships with the package. Raises `DataError` where nothing is found.
    """
    text = path.replace("{root}", root)
    if text.startswith("pipe:"):
        raise DataError(f"{path}: pipe: URLs run shell commands and are refused; give the files themselves")
    if text.startswith("builtin:"):
        name, _, rest = text.removeprefix("builtin:").partition("/")
        try:
            text = str(builtin.folder(name) / rest)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    alternatives = [
        [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        for low, high in RANGE.findall(text)
    ]
    pieces = RANGE.split(text)[::3]
    found: list[Path] = []
    for choice in itertools.product(*alternatives):
        one = "".join(a + b for a, b in itertools.zip_longest(pieces, choice, fillvalue=""))
        matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        found += [Path(match) for match in matches]
    if not found:
        raise DataError(f"{path}: no shard matches (looked for {text}, from {Path.cwd()})")
    for shard in found:
        if not shard.is_file():
            what = "is a folder, not a tar" if shard.is_dir() else "does not exist"
            raise DataError(f"{shard}: {what}; the path in the config is {path!r}")
    return found


@dataclass(frozen=True, slots=True)
class Group:
    """The members that share a key: one sample of a WebDataset."""

    shard: "Shard"
    key: str
    members: dict[str, Member]

    def read(self, ext: str) -> bytes:
        return self.shard.read(self.members[ext])


class Shard:
    """One tar (or tar.gz), readable by byte range. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    def _open(self) -> BinaryIO:
        file = open(self.path, "rb")
        if file.read(2) != b"\x1f\x8b":
            return file
        file.seek(0)
        plain = tempfile.TemporaryFile(prefix="mm-shard-")
        inflate = zlib.decompressobj(wbits=31)
        try:
            while block := file.read(1 << 20):
                plain.write(inflate.decompress(block))
            plain.write(inflate.flush())
        except zlib.error as error:
            raise DataError(f"{self.path}: damaged gzip stream ({error}); fetch or build the shard again") from None
        finally:
            file.close()
        if not inflate.eof:
            raise DataError(f"{self.path}: truncated: the gzip stream ends early; fetch or build the shard again")
        return plain  # type: ignore[return-value]  # a file in all but its nominal type

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise DataError(f"{self.path}: truncated: {member.size} bytes expected at {member.offset}, {len(data)} found")
        return data

    def groups(self) -> Iterator[Group]:
        """Samples in file order. WebDataset's rule: the key is the name up to the first dot of its last component."""
        key, members = "", dict[str, Member]()
        for name, member in self._members():
            folder, _, base = name.rpartition("/")
            stem, _, ext = base.partition(".")
            this = f"{folder}/{stem}" if folder else stem
            if this != key:
                if members:
                    yield Group(self, key, members)
                key, members = this, {}
            if ext in members:
                raise DataError(f"{self.path}: sample {this!r} has two members {ext!r}")
            members[ext] = member
        if members:
            yield Group(self, key, members)

    def _members(self) -> Iterator[tuple[str, Member]]:
        self._file.seek(0, 2)
        size = self._file.tell()
        self._file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if info.isdir():
                        continue
                    parts = PurePosixPath(info.name).parts
                    if info.name.startswith("/") or ".." in parts:
                        raise DataError(f"{self.path}: member {info.name!r} points outside the shard; refused")
                    if not info.isreg():
                        raise DataError(f"{self.path}: member {info.name!r} is a link or device, not a file; refused")
                    if info.offset_data + info.size > size:
                        raise DataError(
                            f"{self.path}: truncated inside member {info.name!r}: it needs {info.size} bytes, "
                            f"{size - info.offset_data} are left; fetch or build the shard again"
                        )
                    name = info.name.removeprefix("./")
                    position = self._file.tell()
                    yield name, Member(info.offset_data, info.size)
                    self._file.seek(position)
        except tarfile.TarError as error:
            raise DataError(f"{self.path}: not a whole tar ({error}); fetch or build the shard again") from None
        self._file.seek(end)
        if self._file.read(BLOCK) != bytes(BLOCK):
            raise DataError(f"{self.path}: truncated: the end-of-archive mark is missing; fetch or build the shard again")
