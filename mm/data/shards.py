"""Shards in: which files a path names, and the samples of one, member by member.

A shard is a tar (WebDataset), a table (`mm.data.tables`) or a text. A tar is read as data, never extracted: a member
that is not a plain file, or whose name points outside, is refused. Where a tar is damaged the damage is reported and
reading goes on at the next whole header, so that one bad block does not cost the samples behind it. Gzipped tars are
decompressed once into an unlinked temporary file.
"""

import contextlib
import glob
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Protocol

from mm.data import builtin
from mm.data.limits import Limits
from mm.data.remote import expand_remote, is_remote
from mm.errors import DataError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
EXTENSIONS = re.compile(r"\.(tar|tgz|tar\.gz|jsonl?|jsonl?\.gz|jsonl?\.zst|parquet|arrow|npy|bin|txt|md)$")
BLOCK = 512
CHUNK = 1 << 20
EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
MAX_EXTENDED_HEADER = 1 << 20
MAX_EXTENDED_HEADERS = 8  # of one member
MAX_NAME = 4096  # what Linux takes
PAX_RECORD = re.compile(rb"(\d{1,8}) [^=]{1,1000}=")
# Python before 3.11.10 looks for `\d+ hdrcharset` in a pax header, which takes the square of the length of a number.
LONG_NUMBER = re.compile(rb"\d{300}")
# Media hardly compress and tars of short texts do so some twentyfold, so a shard that grows a hundredfold is made to
# fill the disk. Small ones may grow as they like: a few samples of blank pictures compress a thousandfold.
MAX_GROWTH = 100
ALWAYS_ALLOWED = 256 << 20
AGAIN = "fetch or build the shard again"


class _View(io.RawIOBase):
    """A byte range of an open file as a file of its own. `owned`: it closes that file."""

    def __init__(self, handle: int, offset: int, size: int, owned: bool = False) -> None:
        self._handle, self._offset, self._size, self._at, self._owned = handle, offset, size, 0, owned
        self.failure: OSError | None = None
        """Of the disk: decoders take it for the end of the file, or for damage."""

    def close(self) -> None:
        if self._owned and not self.closed:
            os.close(self._handle)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        try:
            data = os.pread(self._handle, max(0, min(len(buffer), self._size - self._at)), self._offset + self._at)
        except OSError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Buffered(io.BufferedReader):
    """Of a `_View`. Leaving its `with` raises what the disk did, whatever a decoder made of it."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert isinstance(self.raw, _View)
        if self.raw.failure is not None:
            raise self.raw.failure from None


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a shard by offset and size, read when asked for."""

    file: IO[bytes]
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        data = self._pread(0)
        while len(data) < self.size and (more := self._pread(len(data))):
            data += more  # the kernel gives at most 2 GB at once
        if len(data) != self.size:
            raise DataError(f"{self.path}: truncated: {self.size} bytes expected at {self.offset}, {len(data)} found")
        return data

    def _pread(self, done: int) -> bytes:
        return os.pread(self.file.fileno(), self.size - done, self.offset + done)

    def open(self) -> BinaryIO:
        return _Buffered(_View(self.file.fileno(), self.offset, self.size), 4096)


def escaped(key: str) -> str:
    """A name as part of an id, where `#` stands before the number of a piece."""
    return key.replace("%", "%25").replace("#", "%23")


def unescaped(key: str) -> str:
    return key.replace("%23", "#").replace("%25", "%")


class Stale(DataError):
    """What was scanned is no longer there as it was: scans have to be made again."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes that lie in another file than the shard: in one of their own, or a tar. Opened when they are asked for.

    `modified`: when that file was changed last, in nanoseconds; what has been changed since is not read.
    """

    path: str
    offset: int
    size: int
    modified: int

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != self.modified:
                    raise Stale(f"{self.path}: was changed after it had been scanned; pack the data set again")
                return Extent(file, self.path, self.offset, self.size).read()
        except (FileNotFoundError, NotADirectoryError):
            raise Stale(f"{self.path}: is no longer there; pack the data set again") from None

    def open(self) -> BinaryIO:
        """Raises `DataError` where it is not there; that a disk fails is no fault of the sample."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        return _Buffered(_View(handle, self.offset, self.size, owned=True), 4096)


@dataclass(frozen=True, slots=True)
class Group:
    """What makes one sample of a shard: the members that share a key, or a row of a table.

    `members`: extension -> bytes. `fields`: the plain columns of a row; None where they are a member `json`.
    """

    shard: "Shard"
    key: str
    members: Mapping[str, Extent | Placed | bytes]
    fields: dict[str, Any] | None = None

    def read(self, ext: str) -> bytes:
        member = self.members[ext]
        return member if isinstance(member, bytes) else member.read()

    def size(self, ext: str) -> int:
        member = self.members[ext]
        return len(member) if isinstance(member, bytes) else member.size


class Shard(Protocol):
    """One file with samples, whatever its format. Use it as a context manager."""

    path: str
    name: str
    """As it stands in sample ids; the path's stem, unless the path is a copy's."""

    def groups(self) -> Iterator[Group | DataError]:
        """Samples in file order; a `DataError` for what could not be read, with all that can be still to come."""
        ...

    def __enter__(self) -> "Shard": ...
    def __exit__(self, *_: object) -> None: ...


def expand(path: str, root: str = "") -> list[str]:
    """The shards that a path names, in order.

    `{root}` stands for `data.root` and `~` for the home folder; `{000..127}` counts, keeping leading zeros; `*` and `?`
    match names; `builtin:NAME/…` is a data set that ships with the package; `s3:// gs:// hf:// http(s)://` are fetched
    when they are read; a folder written by Hugging Face's `save_to_disk` stands for its files. Raises `DataError` where
    any of it names nothing, and says which folder is missing.
    """
    if path.startswith("pipe:"):
        raise DataError(f"{path}: pipe: URLs run shell commands and are refused; give the files themselves")
    text = in_root(path, root)
    if text.startswith("builtin:"):
        name, _, rest = text.removeprefix("builtin:").partition("/")
        try:
            text = str(builtin.folder(name) / rest)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    found = [
        shard for one in counted_out(text) for shard in (expand_remote(one) if is_remote(one) else _local(one, path))
    ]
    if not found:
        raise DataError(f"{path}: no shard matches (a range counts from the smaller to the larger number)")
    return found


def counted_out(path: str) -> list[str]:
    """`a{08..10}` as a08, a09, a10; a path without ranges as it is."""
    alternatives = [
        [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)] for low, high in RANGE.findall(path)
    ]
    pieces = RANGE.split(path)[::3]
    return [
        "".join(a + b for a, b in itertools.zip_longest(pieces, choice, fillvalue=""))
        for choice in itertools.product(*alternatives)
    ]


def in_root(path: str, root: str) -> str:
    """The path with `{root}` and `~` filled in."""
    if "{root}" in path and not root:
        raise DataError(f"{path}: data.root is not set; give it, or a path without {{root}}")
    return os.path.expanduser(path.replace("{root}", root))


def _local(one: str, path: str) -> list[str]:
    """The files that `one`, an alternative of `path`, names on this machine."""
    matches = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
    if not matches:
        raise DataError(f"{path}: no shard matches ({_missing_folder(one) or f'looked for {one}'})")
    found: list[str] = []
    for shard in map(Path, matches):
        if (shard / "state.json").is_file():
            found += _saved_dataset(shard)
        elif shard.is_file():
            found.append(str(shard))
        else:
            missing = "is a folder, not a shard" if shard.is_dir() else _missing_folder(one) or "does not exist"
            raise DataError(f"{shard}: {missing}; the path in the config is {path!r}")
    return found


def _saved_dataset(folder: Path) -> list[str]:
    """The Arrow files of a Hugging Face data set written by `save_to_disk`."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: its state.json is not that of a saved data set ({error})") from None
    if any(PurePosixPath(name).name != name for name in names):
        raise DataError(f"{folder}: its state.json names files outside the folder; refused")
    return [str(folder / name) for name in names]


def _missing_folder(path: str) -> str | None:
    """The outermost folder on the way to `path` that is not there, in words."""
    for folder in reversed(Path(path).parents):
        if glob.has_magic(str(folder)):
            return None
        if not folder.is_dir():
            return f"the folder {folder} does not exist (looked from {Path.cwd()})"
    return None


class _TarInfo(tarfile.TarInfo):
    """Refuses extended headers that are made to take memory or time, before `tarfile` reads them."""

    def _proc_member(self, tar: Any) -> Any:
        if self.type not in EXTENDED:
            return super()._proc_member(tar)  # type: ignore[misc]
        if not 0 <= self.size <= MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size:,} bytes")
        if self.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            start = tar.fileobj.tell()
            _check_records(tar.fileobj.read(self.size))
            tar.fileobj.seek(start)
        tar.extended = getattr(tar, "extended", 0) + 1
        try:
            if tar.extended > MAX_EXTENDED_HEADERS:
                raise tarfile.ReadError(f"over {MAX_EXTENDED_HEADERS} extended headers of one member")
            return super()._proc_member(tar)  # type: ignore[misc]
        finally:
            tar.extended -= 1


def _check_records(data: bytes) -> None:
    """Raise `ReadError` unless a pax header is a row of records: length, key=value, newline."""
    at = 0
    while at < len(data):
        record = PAX_RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise tarfile.ReadError("an extended header that makes no sense")
        at = end
    if LONG_NUMBER.search(data):
        raise tarfile.ReadError("an extended header with a number of over 300 digits")


class Tar:
    """A tar or tar.gz. Yields damage as `DataError`s and goes on behind it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = stem(path)
        self._problem: str | None = None
        self._file: IO[bytes] = open(path, "rb")
        self.is_compressed = self._file.read(2) == b"\x1f\x8b"
        if self.is_compressed:
            self._file.seek(0)
            with self._file as packed:
                self._file = self._decompressed(packed)

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
            self._problem = f"{self.path}: truncated: the gzip stream ends early; {AGAIN}"
        except (gzip.BadGzipFile, zlib.error) as error:
            self._problem = f"{self.path}: damaged gzip stream ({error}); {AGAIN}"
        except OSError as error:  # a full disk: say which
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
        return plain

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def groups(self) -> Iterator[Group | DataError]:
        """Samples by WebDataset's rules: the key is the name up to the first dot of its last component, extensions are
        lower case, and names without key or extension are no samples.

        Unlike WebDataset this refuses a key that comes back after another one: its members would be two half samples.
        """
        seen = set[str]()
        key, members, apart = "", dict[str, Extent | bytes](), False
        for found in self.members():
            if isinstance(found, DataError):
                yield found
                continue
            name, member = found
            folder, _, base = name.rpartition("/")
            stem, _, ext = base.partition(".")
            if not stem or not ext:
                continue
            this, ext = (f"{folder}/{stem}" if folder else stem), ext.lower()
            if this != key:
                if members:
                    yield Group(self, escaped(key), members)
                key, members, apart = this, {}, this in seen
                seen.add(this)
                if apart:
                    yield DataError(
                        f"{self.path}: the members of sample {this!r} do not stand together; "
                        "build the shard with its files sorted by name"
                    )
            if apart:
                continue
            if ext in members:
                yield DataError(f"{self.path}: sample {this!r} has two members {ext!r}")
            else:
                members[ext] = member
        if members:
            yield Group(self, escaped(key), members)

    def members(self) -> Iterator[tuple[str, Extent] | DataError]:
        """Every plain file by its name, in order."""
        if self._problem:
            yield DataError(self._problem)
        size = self._file.seek(0, os.SEEK_END)
        start: int | None = 0
        while start is not None:
            end = start  # of what makes sense
            problem: str | None = None
            try:
                self._file.seek(start)
                with tarfile.open(fileobj=self._file, mode="r:", tarinfo=_TarInfo) as tar:
                    for info in tar:
                        if problem := self._wrong_size(info, tar.offset, size):
                            end = info.offset_data - BLOCK
                            break
                        end = tar.offset
                        if problem := self._refusal(info):
                            yield DataError(problem)
                        elif not info.isdir():
                            extent = Extent(self._file, self.path, info.offset_data, info.size)
                            yield str(PurePosixPath(info.name)), extent
                        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member otherwise
                    else:
                        problem = self._ending(end, size)
            # tarfile lets some of these through where numbers or records in a header make no sense.
            except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
                problem = f"{self.path}: not a whole tar ({error}); {AGAIN}"
            if problem is None:
                return
            yield DataError(problem)
            start = self._next_header(end, size)

    def _ending(self, end: int, size: int) -> str | None:
        """What is wrong with a tar whose last readable member ends at `end`, if anything."""
        after = os.pread(self._file.fileno(), BLOCK, end)
        if len(after) < BLOCK:
            return f"{self.path}: truncated: the end-of-archive mark is missing; {AGAIN}"
        if after != bytes(BLOCK):
            return f"{self.path}: damaged: no tar header at byte {end}; {AGAIN}"
        if self._next_header(end, size) is not None:
            return f"{self.path}: damaged: zeros, which end a tar, at byte {end}, and more of the tar behind; {AGAIN}"
        return None

    def _next_header(self, start: int, size: int) -> int | None:
        """The first whole tar header behind the block at `start`."""
        at = start + BLOCK
        while at < size:
            chunk = os.pread(self._file.fileno(), CHUNK, at)
            for block in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if chunk[block + 257 : block + 262] == b"ustar":
                    with contextlib.suppress(tarfile.TarError, ValueError):
                        tarfile.TarInfo.frombuf(chunk[block : block + BLOCK], "utf-8", "surrogateescape")
                        return at + block
            at += CHUNK
        return None

    def _wrong_size(self, info: tarfile.TarInfo, next_header: int, size: int) -> str | None:
        """Why the data of a member cannot lie between its header and the next one in a file of `size` bytes, if so."""
        if info.size < 0 or next_header < info.offset_data:
            return f"{self.path}: damaged: member {info.name[:100]!r} has a size of {info.size} bytes; {AGAIN}"
        end = info.offset_data + info.size if info.isreg() and not info.issparse() else next_header
        if end > size:
            return (
                f"{self.path}: truncated inside member {info.name[:100]!r}: it needs {end - info.offset_data} bytes, "
                f"{max(0, size - info.offset_data)} are left; {AGAIN}"
            )
        return None

    def _refusal(self, info: tarfile.TarInfo) -> str | None:
        """Why a member is not read, if so: only plain files and folders with plain names are."""
        name = info.name
        if len(name) > MAX_NAME:
            return f"{self.path}: member {name[:100]!r}…: its name has {len(name)} characters; refused"
        # Backslashes separate folders where the shard may have been made, or where a sample's name may end up.
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            return f"{self.path}: member {name!r} points outside the shard; refused"
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
            return f"{self.path}: member {name!r}: its name is not plain UTF-8 text; refused"
        if not (info.isdir() or info.isreg()):
            return f"{self.path}: member {name!r} is a link or device, not a file; refused"
        if info.issparse():
            return f"{self.path}: member {name!r} is stored sparse; refused: build the shard without --sparse"
        return None


def place_members(path: str) -> dict[str, Placed]:
    """Where the members of a tar on this machine lie. Raises `DataError` where it is compressed or damaged."""
    with Tar(path) as tar:
        if tar.is_compressed:
            raise DataError(f"{path}: members of compressed tars have no place to be read from; decompress it")
        modified, place = os.stat(path).st_mtime_ns, os.path.abspath(path)
        found: dict[str, Placed] = {}
        for member in tar.members():
            if isinstance(member, DataError):
                raise member
            name, extent = member
            if name in found:
                raise DataError(f"{path}: two of its members are called {name}; expected names that tell them apart")
            found[name] = Placed(place, extent.offset, extent.size, modified)
        return found


class TextFile:
    """A text as it stands in a file: one sample, whose member `txt` is all of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = stem(path)
        self._file: IO[bytes] = open(path, "rb")

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def groups(self) -> Iterator[Group | DataError]:
        yield Group(self, "0", {"txt": Extent(self._file, self.path, 0, os.fstat(self._file.fileno()).st_size)})


class Folder:
    """Files in a folder whose names end alike, in the order of their names: a group each, by its name less that."""

    def __init__(self, path: str, suffix: str) -> None:
        self.path = path
        self.name = PurePosixPath(path).name
        self._suffix = suffix

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def groups(self) -> Iterator[Group | DataError]:
        ext = self._suffix.rpartition(".")[2]
        for name in sorted(os.listdir(self.path)):
            path = os.path.join(self.path, name)
            if name.endswith(self._suffix) and os.path.isfile(path):
                with open(path, "rb") as file:
                    extent = Extent(file, path, 0, os.fstat(file.fileno()).st_size)
                    yield Group(self, name.removesuffix(self._suffix), {ext: extent})


def folders_with(suffix: str, path: str, root: str = "") -> list[str]:
    """The folders, in and below those that a path names (see `expand`), that hold files whose names end so."""
    found = [
        folder
        for top in sorted(glob.glob(in_root(path, root)))
        for folder, _, names in os.walk(top)
        if any(name.endswith(suffix) for name in names)
    ]
    if not found:
        raise DataError(f"{path}: no folder there holds files *{suffix}; looked for them at every depth")
    return sorted(found)


def open_shard(path: str, limits: Limits) -> Shard:
    """A shard by its file name: a tar, a text, or a table (`mm.data.tables`).

    Raises `DataError` where nothing of it can be read.
    """
    if re.search(r"\.(jsonl?|jsonl?\.gz|jsonl?\.zst|parquet|arrow)$", path):
        from mm.data.tables import open_table

        return open_table(path, limits)
    return TextFile(path) if path.endswith((".txt", ".md")) else Tar(path)


def stem(path: str) -> str:
    """`a/000.tar.gz` -> `000`. Only what says the format is taken off, since other dots tell shards apart."""
    return EXTENSIONS.sub("", PurePosixPath(path).name)
