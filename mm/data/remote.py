"""Remote shards as local files: urls are matched, and whole objects fetched into a bounded cache.

fsspec speaks the protocols. What it leaves open is done here: a transfer is checked against the size that the server
declared and against the identity (etag, time) that the object had when it was asked for; what breaks is tried again
from where it broke; what stalls times out. The cache is a folder that any number of processes share through flock:

    KEY/NAME    a whole object. KEY hashes url and identity, so a changed object is another entry. Who reads it holds a
                shared lock on it; only unlocked ones are removed, least recently used (by mtime) first.
    KEY.part    a download, of its final length from the start, so that its room is taken. It is renamed when whole.
    KEY.lock    held by the process that downloads; a part whose lock nobody holds is what a dead process left.
    lock        held, for moments, by who counts, removes or renames.
"""

import asyncio
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec  # type: ignore[import-untyped]

from mm.errors import DataError
from mm.files import fsync

T = TypeVar("T")

FOLDER = Path("~/.cache/mm/remote")
MAX_BYTES = 20_000_000_000
SETTING = "data.remote_cache"
CHUNK = 8 << 20  # a request each, where objects are read by block
PIECE = 1 << 20  # of a stream
HTTP = ("http", "https")
LOCAL = ("file", "local", "asynclocal")
# These read other files through themselves, local ones included.
WRAPPERS = (
    *("async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "filecache", "generic", "git"),
    *("libarchive", "reference", "simplecache", "tar", "zip"),
)
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
CREDENTIALS = {
    "s3": "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon for a public bucket",
    "hf": "run `hf auth login` or set HF_TOKEN, and accept the data set's terms if it has any",
    "http": "a signed url may have expired",
}
# What the protocols call the same thing, the most telling first.
ETAGS = ("VersionId", "ETag", "etag", "e_tag", "generation", "xet_hash", "blob_id", "content_md5", "checksum", "sha")
TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "modified", "created")
PERMANENT = (AttributeError, ImportError, IsADirectoryError, LookupError, NotImplementedError, TypeError, ValueError)
SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:sig|token|key|secret|credential|password)[^=&\s]*=)[^&\s'\"]*[^&\s'\":]")
LOGIN = re.compile(r"//[^/@\s]*:[^/@\s]*@")


class Identity(TypedDict):
    """What tells one version of an object from another, as far as the server says: JSON values only."""

    size: int | None
    etag: str | None
    mtime: str | None


@dataclass(frozen=True)
class Patience:
    """How long a server is borne with: seconds without a byte, tries in all, seconds between two tries.

    The wait doubles from `wait` to `longest` and is drawn between its half and its whole, so that a thousand processes
    do not come back at once.
    """

    timeout: float = 60.0
    attempts: int = 6
    wait: float = 1.0
    longest: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random


PATIENCE = Patience()


class _Passing(Exception):
    """What may go better next time. `restart`: not from where it broke, but from the first byte."""

    def __init__(self, problem: str, after: float = 0.0, restart: bool = False) -> None:
        super().__init__(problem)
        self.after = after
        self.restart = restart


class _Changed(_Passing):
    """The object is not the one that it was."""


class _Tries:
    """Counts the tries that one url is given."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience, self.made = url, patience, 0

    def failed(self, error: _Passing) -> None:
        """Wait, or raise `DataError` where this was the last try."""
        self.made += 1
        patience = self.patience
        if self.made >= patience.attempts:
            times = "once" if self.made == 1 else f"{self.made} times"
            raise _refusal(self.url, f"{error} (tried {times})") from error
        wait = min(patience.longest, patience.wait * 2 ** (self.made - 1)) * (1 + patience.draw()) / 2
        patience.sleep(max(wait, min(error.after, patience.longest)))

    def until_done(self, ask: Callable[[], T]) -> T:
        while True:
            try:
                with _translated(self.url):
                    return ask()
            except _Passing as error:
                self.failed(error)


def is_remote(path: str) -> bool:
    """Whether this names a remote object, by its protocol; a protocol that is none is for `expand_remote` to refuse."""
    protocol, found, _ = path.partition("://")
    return bool(found and re.fullmatch(r"[\w+.:-]+", protocol)) and protocol.lower() not in LOCAL


def expand_remote(pattern: str, patience: Patience = PATIENCE) -> list[str]:
    """The urls that a pattern names, sorted. Counts in braces must have been written out before.

    Without `*`, `?` or `[` this is the pattern itself, and no server is asked whether it is there. In http urls `?`
    begins a query. Raises `DataError` where nothing matches or the server cannot be asked.
    """
    protocol = _protocol(pattern)
    tries = _Tries(pattern, patience)
    fs, path = tries.until_done(lambda: _filesystem(pattern, patience))
    if protocol in HTTP:
        before, _, query = pattern.partition("?")
        if "*" in before or ("=" not in query and query.endswith((".tar", ".tgz", ".tar.gz"))):
            raise _refusal(pattern, f"{protocol} cannot list what there is; name the files, as in {{000..127}}.tar")
        return [pattern]
    if not glob.has_magic(pattern):
        return [pattern]

    def ask() -> dict[str, dict[str, Any]]:
        try:
            return dict(fs.glob(path, detail=True))
        except FileNotFoundError as error:
            if error.__cause__ is not None:
                raise
            return {}

    found = tries.until_done(ask)
    matches = sorted(name for name, info in found.items() if info["type"] == "file")
    if not matches:
        there = f"only folders match, such as {min(found)}" if found else f"looked for {path}"
        raise _refusal(pattern, f"no shard matches ({there})")
    urls = [name if "://" in name else f"{protocol}://{name}" for name in matches]
    where = fs._get_kwargs_from_urls(pattern)
    if any(fs._get_kwargs_from_urls(url) != where for url in urls):  # a host, which what was listed does not repeat
        raise _refusal(pattern, f"{protocol} lists no urls; name the files, as in {{000..127}}.tar")
    return urls


def identity(url: str, patience: Patience = PATIENCE) -> Identity:
    """Size, etag and time of an object, without downloading it. Raises `DataError`."""
    return _identity(url, _Tries(url, patience))


def file_name(url: str) -> str:
    """The name that the local file will have: the last part of the url, with what no file name should hold put right.

    Sample ids are made from it, as they are from a local shard's name.
    """
    path = unquote(urlsplit(url).path) if _protocol(url) in HTTP else url
    last = path.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^\w.,+=@-]", "_", last).lstrip(".")
    while len(name.encode()) > 200:  # the end tells shards apart
        name = name[1:]
    return name or "shard"


class RemoteCache:
    """A folder of fetched objects, at most `max_bytes` of them, shared by all processes that name it.

    Holds no connection and no open file, so it may be pickled and used after a fork.
    """

    def __init__(self, folder: Path = FOLDER, max_bytes: int = MAX_BYTES, patience: Patience = PATIENCE) -> None:
        self.folder = folder.expanduser()
        self.max_bytes = max_bytes
        self.patience = patience

    @contextlib.contextmanager
    def fetch(self, url: str, expected: Identity | None = None) -> Iterator[Path]:
        """A local file with the whole object, which stays in place until the context is left.

        The server is asked for the object's identity, unless the caller did so before and gives it: then a cached copy
        costs no request, and an object that is another by now is an error. Raises `DataError`, and `OSError` where the
        folder cannot be written.
        """
        path, file = self._fetch(url, expected)
        with file:  # closing it unlocks it
            yield path

    def _fetch(self, url: str, expected: Identity | None) -> tuple[Path, IO[bytes]]:
        """The file, and a handle that keeps it from being removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tries = _Tries(url, self.patience)
        known = expected or _identity(url, tries)
        while True:
            key = _key(url, known)
            path = self.folder / key / file_name(url)
            if file := _hold(path, known["size"]):
                return path, file
            with _lock(self.folder / f"{key}.lock", remove=True):
                if file := _hold(path, known["size"]):  # by the process whose lock we waited for
                    return path, file
                try:
                    return path, self._download(url, known, path, tries)
                except _Changed as error:
                    if expected:
                        raise _refusal(url, f"{error} since this run looked first; start again") from None
                    tries.failed(error)
            known = _identity(url, tries)

    def _download(self, url: str, known: Identity, path: Path, tries: _Tries) -> IO[bytes]:
        """Fetch the object to `path`, as its lock's holder. The handle that is returned keeps it there."""
        part = path.parent.with_suffix(".part")
        at, validated = 0, bool(known["etag"] or known["mtime"])
        file = open(part, "w+b")
        try:
            if known["size"] is not None:
                self._reserve(url, file, known["size"])
            while True:
                try:
                    with _transfer(url, at, known, self.patience) as (start, size, read):
                        at = start
                        if size is not None:
                            self._reserve(url, file, size)
                        while block := read():
                            if size is None:
                                self._reserve(url, file, at + len(block))
                            elif at + len(block) > size:
                                raise _Changed(f"the server sends more than the {size:,} bytes it declared")
                            with _naming(part):
                                file.seek(at)
                                file.write(block)
                            at += len(block)
                    if _protocol(url) not in HTTP:  # their transfers may be many requests that name no version
                        _require_same(known, _identity(url, tries))
                    if size is not None and at < size:
                        raise _Passing(f"the transfer ended after {at:,} of {size:,} bytes")
                    break
                except _Changed:
                    raise
                except _Passing as error:
                    tries.failed(error)
                    # Without a validator the next bytes could be another object's.
                    at = 0 if error.restart or not validated else at
            with _naming(part):
                file.flush()
                file.truncate(at)
                os.fsync(file.fileno())
            with _lock(self.folder / "lock"):
                path.parent.mkdir(exist_ok=True)
                part.replace(path)
                for folder in (path.parent, self.folder):
                    fsync(folder)
                _use(path)
                _flock(file, fcntl.LOCK_SH)
            return file
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk, once more
                file.close()
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, url: str, file: IO[bytes], size: int) -> None:
        """Make room for a download of `size` bytes, and take it by making the file as long."""
        if size > self.max_bytes:
            raise _refusal(url, f"{size:,} bytes are more than {SETTING} allows ({self.max_bytes:,}); raise it")
        mine = os.fstat(file.fileno())
        if mine.st_size >= size:
            return
        with _lock(self.folder / "lock"):
            self._sweep()
            used = size
            for part in self.folder.glob("*.part"):
                with contextlib.suppress(FileNotFoundError):  # its process has given up
                    used += 0 if os.path.samestat(part.stat(), mine) else part.stat().st_size
            entries = [(entry.stat(), entry) for entry in self.folder.glob("*/*")]
            used += sum(stat.st_size for stat, _ in entries)
            for stat, entry in sorted(entries, key=lambda pair: pair[0].st_mtime_ns):
                if used <= self.max_bytes:
                    break
                if _remove(entry):
                    used -= stat.st_size
            if used > self.max_bytes:
                raise _refusal(
                    url,
                    f"no room for {size:,} bytes: {used - size:,} of the {self.max_bytes:,} of {SETTING} are in use "
                    "by open shards; raise it",
                )
            with _naming(Path(file.name)):
                file.truncate(size)

    def _sweep(self) -> None:
        """Remove what dead processes left."""
        for part in self.folder.glob("*.part"):
            with _lock(part.with_suffix(".lock"), wait=False, remove=True) as dead:
                if dead:
                    part.unlink(missing_ok=True)
        for lock in self.folder.glob("*.lock"):
            with _lock(lock, wait=False, remove=True):
                pass


def _key(url: str, known: Identity) -> str:
    """The entry of this version of the object: a new one each time where nothing would tell it from another."""
    if not any(known.values()):
        return secrets.token_hex(16)
    return hashlib.sha256(json.dumps([url, known], sort_keys=True).encode()).hexdigest()[:32]


# Locks and files


def _flock(file: IO[bytes], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        text = f"cannot lock files ({error.strerror}); put {SETTING} on a disk that supports flock"
        raise DataError(f"{file.name}: {text}") from None


def _in_place(path: Path, file: IO[bytes]) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`, made if need be; without `wait`, False where another holds it."""
    while True:
        with open(path, "ab") as file:
            try:
                _flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _in_place(path, file):  # its last holder removed it
                continue
            try:
                yield True
            finally:
                if remove:
                    path.unlink(missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_UN)  # a fork in between shares the handle: closing would not do
            return


def _hold(path: Path, size: int | None) -> IO[bytes] | None:
    """The cached file, locked against removal and marked as used now; None where it is not there, or not whole."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return None
    try:
        _flock(file, fcntl.LOCK_SH)
        if _in_place(path, file) and size in (None, os.fstat(file.fileno()).st_size):
            _use(path)
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _use(path: Path) -> None:
    now = time.time_ns()  # the file system's own clock may stand still between two uses
    with contextlib.suppress(PermissionError):  # another user's cache
        os.utime(path, ns=(now, now))


def _remove(entry: Path) -> bool:
    """Remove a cached file unless it is in use."""
    with open(entry, "rb") as file:
        try:
            _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        entry.unlink()
    with contextlib.suppress(OSError):
        entry.parent.rmdir()
    return True


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk says which."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


# Servers


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _filesystem(url: str, patience: Patience) -> tuple[Any, str]:
    """fsspec's file system for a url, and the path there. It is asked for anew each time: none survives a fork."""
    protocol = _protocol(url)
    if ":" in protocol or "::" in url:
        raise _refusal(url, "urls chained by :: are refused; give the shards themselves")
    if protocol in WRAPPERS or protocol in LOCAL:
        raise _refusal(url, f"{protocol}:// reads other files through itself and is refused; give the shards")
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        need = f'{package}: pip install "mm-pretrain[remote]"' if package else f"another package ({error})"
        raise _refusal(url, f"{protocol}:// needs {need}") from None
    except ValueError:
        raise _refusal(url, f"no protocol is called {protocol!r}; http, https, s3, gs and hf are") from None
    options: dict[str, Any] = dict(kind._get_kwargs_from_urls(url))
    if protocol in HTTP:
        import aiohttp

        # aiohttp's own limit is five minutes for the whole of a transfer. Content is kept as it is sent.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.timeout, sock_read=patience.timeout)
        ours = {"timeout": timeout, "auto_decompress": False, "trust_env": True}
        theirs = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        options |= {"client_kwargs": {**theirs, **ours}, "encoded": "%" in url}
    return fsspec.filesystem(protocol, **options), kind._strip_protocol(url)


def _identity(url: str, tries: _Tries) -> Identity:
    def ask() -> dict[str, Any]:
        fs, path = _filesystem(url, tries.patience)
        if _protocol(url) == "hf":  # one request for this file; otherwise its whole folder is listed
            return dict(fs.info(path, refresh=True, expand_info=True))
        fs.invalidate_cache(path)  # what was listed before may have changed
        return dict(fs.info(path))

    info = tries.until_done(ask)
    if _protocol(url) in HTTP:
        info["size"] = info["size"] or None  # some servers send 0 with HEAD, whatever the object
    if info.get("type") == "directory":
        raise _refusal(url, "is a folder, not a tar")
    return _identity_in(info)


def _identity_in(info: dict[str, Any]) -> Identity:
    def first(names: tuple[str, ...]) -> str | None:
        found = next((info[name] for name in names if info.get(name)), None)
        return None if found is None else str(found.isoformat() if hasattr(found, "isoformat") else found)

    size = info.get("size")
    etag = first(ETAGS)
    return {
        "size": None if size is None else int(size),
        "etag": etag and etag.removeprefix("W/"),  # some answers of a server say so and some do not
        "mtime": first(TIMES),
    }


def _require_same(known: Identity, found: Identity) -> None:
    """Raise `_Changed` where two identities contradict each other; what only one says does not."""
    pairs = {
        "size": (known["size"], found["size"]),
        "etag": (known["etag"], found["etag"]),
        # Servers that stamp each answer with the time of day have a better validator, if they have one.
        "mtime": (known["mtime"], found["mtime"]) if not (known["etag"] and found["etag"]) else (None, None),
    }
    for what, (before, now) in pairs.items():
        if before is not None and now is not None and before != now:
            raise _Changed(f"the object changed ({what} {before} before, {now} now)")


class Transfer(NamedTuple):
    """An open transfer: the offset of the first byte that `read()` gives, and the size of the whole object."""

    start: int
    size: int | None
    read: Callable[[], bytes]


@contextlib.contextmanager
def _transfer(url: str, at: int, known: Identity, patience: Patience) -> Iterator[Transfer]:
    """Open the object at byte `at`, or at its start where the server cannot do that."""
    blocks = _protocol(url) not in HTTP
    file: Any = None

    def read() -> bytes:
        with _translated(url):
            block: bytes = file.read(CHUNK if blocks else PIECE)
            return block

    try:
        with _translated(url):
            fs, path = _filesystem(url, patience)
            if not blocks:
                headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
                headers |= {"Range": f"bytes={at}-"} if at else {}
                # One request that streams. The size is not used then, but fsspec would ask for it again.
                file = fs.open(path, block_size=0, size=1, headers=headers)
                start, size = _answer(url, file.r.status, file.r.headers, at, known)
            else:
                # The hub's file system would take the size from what it listed some time ago.
                options = {"size": known["size"]} if _protocol(url) == "hf" else {}
                file = fs.open(path, "rb", block_size=CHUNK, cache_type="none", **options)
                file.seek(at)
                start, size = at, known["size"]
        yield Transfer(start, size, read)
    finally:
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()


def _answer(url: str, status: int, headers: Any, at: int, known: Identity) -> tuple[int, int | None]:
    """Where an HTTP answer starts and how large its object is, if that is the object that we know."""
    length = headers.get("Content-Length")
    size = int(length) if length is not None else None
    if status == 206:
        start, _, size = _content_range(headers.get("Content-Range", ""))
        if start != at:
            raise _Passing(f"the server was asked for bytes from {at:,} and sends others", restart=True)
    else:
        at = 0
    said = {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
    _require_same(known, _identity_in({**said, "size": size}))
    if size is None:
        size = known["size"]
    if size is None and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise _refusal(url, "the server does not declare its size, so a cut transfer would look whole; download it")
    return at, size


def _content_range(text: str) -> tuple[int | None, int | None, int | None]:
    """`bytes 5-9/10` -> 5, 9, 10."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text.strip())
    if not match:
        return None, None, None
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Whatever fsspec and its clients raise becomes `_Passing` (worth another try) or `DataError` (not)."""
    try:
        yield
    except (_Passing, DataError):
        raise
    except Exception as error:
        raise _translate(url, error) from error


def _translate(url: str, error: Exception) -> Exception:
    # fsspec's http says "not found" of whatever went wrong, and the hub's of what it hides; the cause says what it was.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    if cause is None or not (_protocol(url) in HTTP or _status(cause)):
        cause = error
    name = type(cause).__name__
    text = " ".join(str(cause).split()) or name
    status = _status(cause)
    if status in (404, 410) or (status is None and isinstance(cause, FileNotFoundError)):
        return _refusal(url, f"does not exist{f' ({status})' if status else ''}")
    if status in (401, 403) or isinstance(cause, PermissionError) or "Credentials" in name:
        protocol = {"https": "http", "s3a": "s3", "gcs": "gs"}.get(_protocol(url), _protocol(url))
        hint = f"; {CREDENTIALS[protocol]}" if protocol in CREDENTIALS else ""
        return _refusal(url, f"access refused ({status or text}){hint}")
    if status == 416:
        return _Passing("the server was asked for bytes that it does not have (416)", restart=True)
    if status is not None:
        problem = f"the server answers {status} {getattr(cause, 'message', '')}".strip()
        if status in (408, 425, 429) or status >= 500:
            after = str((getattr(cause, "headers", None) or {}).get("Retry-After", ""))
            return _Passing(problem, after=float(after) if after.isdigit() else 0.0)
        return _refusal(url, problem)
    if name == "OfflineModeIsEnabled":
        return _refusal(url, "the hub is switched off by HF_HUB_OFFLINE")
    if name == "TooManyRedirects":
        return _refusal(url, "redirects without end")
    if "Redirect" in name:
        return _refusal(url, f"redirects to what is not http ({text}); refused")
    if "Certificate" in name or isinstance(cause, PERMANENT):
        return _refusal(url, f"{name}: {text}")
    if isinstance(cause, TimeoutError | asyncio.TimeoutError) or "Timeout" in name:
        return _Passing(f"timed out ({text})")
    return _Passing(f"the connection broke ({name}: {text})")


def _status(error: BaseException) -> int | None:
    """The HTTP status in the errors of aiohttp, gcsfs and huggingface_hub."""
    response = getattr(error, "response", None)
    for found in (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    ):
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return None


def without_secrets(text: str) -> str:
    """The text without the passwords and signatures that urls carry."""
    return LOGIN.sub("//***@", SECRET.sub(r"\1***", text))


def _refusal(url: str, problem: str) -> DataError:
    """One line, without the passwords and signatures that urls carry."""
    text = " ".join(f"{url}: {problem}".split())
    return DataError(without_secrets(text)[:1000])
