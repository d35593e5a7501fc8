"""WebDataset shards in: which files a path names, and the members of a tar by byte range.

A tar is read as data, never extracted: a member that is not a plain file, or whose name points outside, is refused, and
so is a tar that ends early. Gzipped tars are decompressed once into an unlinked temporary file, so that every shard can
be read at random.
"""

import glob
import gzip
import itertools
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from mm.data import builtin
from mm.errors import DataError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK = 512
CHUNK = 1 << 20
# Media hardly compress and tars of short texts do so some twentyfold, so a shard that grows a hundredfold is made to
# fill the disk. Small ones may grow as they like: a few samples of blank pictures compress a thousandfold.
MAX_GROWTH = 100
ALWAYS_ALLOWED = 256 << 20
AGAIN = "fetch or build the shard again"


class Member(NamedTuple):
    """Where the bytes of one tar member are: offset and size in the (decompressed) tar."""

    offset: int
    size: int


def expand(path: str, root: str = "") -> list[Path]:
    """The shards that a path names, in order.

    `{root}` stands for `data.root` and `~` for the home folder; `{000..127}` counts, keeping leading zeros; `*` and `?`
    match names; `builtin:NAME/…` is a data set that ships with the package. Raises `DataError` where any of it names
    nothing, and says which folder is missing.
    """
    if path.startswith("pipe:"):
        raise DataError(f"{path}: pipe: URLs run shell commands and are refused; give the files themselves")
    if "{root}" in path and not root:
        raise DataError(f"{path}: data.root is not set; give it, or a path without {{root}}")
    text = os.path.expanduser(path.replace("{root}", root))
    if text.startswith("builtin:"):
        name, _, rest = text.removeprefix("builtin:").partition("/")
        try:
            text = str(builtin.folder(name) / rest)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    alternatives = [
        [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)] for low, high in RANGE.findall(text)
    ]
    pieces = RANGE.split(text)[::3]
    found: list[Path] = []
    for choice in itertools.product(*alternatives):
        one = "".join(a + b for a, b in itertools.zip_longest(pieces, choice, fillvalue=""))
        matches = [Path(match) for match in sorted(glob.glob(one))] if glob.has_magic(one) else [Path(one)]
        if not matches:
            raise DataError(f"{path}: no shard matches ({_missing_folder(one) or f'looked for {one}'})")
        for shard in matches:
            if not shard.is_file():
                missing = "is a folder, not a tar" if shard.is_dir() else _missing_folder(one) or "does not exist"
                raise DataError(f"{shard}: {missing}; the path in the config is {path!r}")
        found += matches
    if not found:
        raise DataError(f"{path}: no shard matches (a range counts from the smaller to the larger number)")
    return found


def _missing_folder(path: str) -> str | None:
    """The outermost folder on the way to `path` that is not there, in words."""
    for folder in reversed(Path(path).parents):
        if glob.has_magic(str(folder)):
            return None
        if not folder.is_dir():
            return f"the folder {folder} does not exist (looked from {Path.cwd()})"
    return None


@dataclass(frozen=True, slots=True)
class Group:
    """The members that share a key: one sample of a WebDataset."""

    shard: "Shard"
    key: str
    members: dict[str, Member]

    def read(self, ext: str) -> bytes:
        return self.shard.read(self.members[ext])


class Shard:
    """One tar (or tar.gz), readable by byte range. Use as a context manager, or close it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    @property
    def stem(self) -> str:
        """The file's name without its extensions, as it stands in sample ids."""
        return stem(self.path)

    def _open(self) -> IO[bytes]:
        file = open(self.path, "rb")
        if file.read(2) != b"\x1f\x8b":
            return file
        file.seek(0)
        with file:
            return self._decompressed(file)

    def _decompressed(self, file: IO[bytes]) -> IO[bytes]:
        limit = max(ALWAYS_ALLOWED, MAX_GROWTH * os.fstat(file.fileno()).st_size)
        plain = tempfile.TemporaryFile(prefix="mm-shard-")
        try:
            with gzip.open(file) as stream:
                while block := stream.read(CHUNK):
                    if plain.tell() + len(block) > limit:
                        raise DataError(f"{self.path}: its gzip stream grows past {limit:,} bytes; refused as a bomb")
                    plain.write(block)
            plain.flush()
        except EOFError:
            raise DataError(f"{self.path}: truncated: the gzip stream ends early; {AGAIN}") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: damaged gzip stream ({error}); {AGAIN}") from None
        except OSError as error:  # a full disk: say which
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
        return plain

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise DataError(
                f"{self.path}: truncated: {member.size} bytes expected at {member.offset}, {len(data)} found"
            )
        return data

    def groups(self) -> Iterator[Group]:
        """Samples in file order, by WebDataset's rules: the key is the name up to the first dot of its last component,
        extensions are lower case, and names without key or extension are no samples.

        Unlike WebDataset this refuses a key that comes back after another one: its members would be two half samples.
        """
        seen = set[str]()
        key, members = "", dict[str, Member]()
        for name, member in self._members():
            folder, _, base = name.rpartition("/")
            stem, _, ext = base.partition(".")
            if not stem or not ext:
                continue
            this, ext = (f"{folder}/{stem}" if folder else stem), ext.lower()
            if this != key:
                if members:
                    yield Group(self, key, members)
                if this in seen:
                    raise DataError(
                        f"{self.path}: the members of sample {this!r} do not stand together; "
                        "build the shard with its files sorted by name"
                    )
                seen.add(this)
                key, members = this, {}
            if ext in members:
                raise DataError(f"{self.path}: sample {this!r} has two members {ext!r}")
            members[ext] = member
        if members:
            yield Group(self, key, members)

    def _members(self) -> Iterator[tuple[str, Member]]:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    self._check(info, size)
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if info.isdir():
                        continue
                    position = self._file.tell()
                    yield str(PurePosixPath(info.name)), Member(info.offset_data, info.size)
                    self._file.seek(position)
        # tarfile lets some of these through where numbers or records in a header make no sense.
        except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
            raise DataError(f"{self.path}: not a whole tar ({error}); {AGAIN}") from None
        self._file.seek(end)
        after = self._file.read(BLOCK)
        if len(after) < BLOCK:
            raise DataError(f"{self.path}: truncated: the end-of-archive mark is missing; {AGAIN}")
        if after != bytes(BLOCK):
            raise DataError(f"{self.path}: damaged: no tar header at byte {end}; {AGAIN}")

    def _check(self, info: tarfile.TarInfo, size: int) -> None:
        """Refuse what is not the bytes of a plain file inside a file of `size` bytes."""
        name = info.name
        # Backslashes separate folders where the shard may have been made, or where a sample's name may end up.
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise DataError(f"{self.path}: member {name!r} points outside the shard; refused")
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
            raise DataError(f"{self.path}: member {name!r}: its name is not plain UTF-8 text; refused")
        if not (info.isdir() or info.isreg()):
            raise DataError(f"{self.path}: member {name!r} is a link or device, not a file; refused")
        if info.issparse():
            raise DataError(f"{self.path}: member {name!r} is stored sparse; refused: build the shard without --sparse")
        if info.size < 0:
            raise DataError(f"{self.path}: damaged: member {name!r} has a size of {info.size} bytes; {AGAIN}")
        if info.isreg() and info.offset_data + info.size > size:
            raise DataError(
                f"{self.path}: truncated inside member {name!r}: it needs {info.size} bytes, "
                f"{max(0, size - info.offset_data)} are left; {AGAIN}"
            )


def stem(path: Path) -> str:
    """`000.tar.gz` -> `000`. Only what makes it a tar is taken off, since other dots tell shards apart."""
    return re.sub(r"\.(tar|tgz|tar\.gz)$", "", path.name)
