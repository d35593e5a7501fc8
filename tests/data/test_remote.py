"""Remote shards: whatever a server does, what is read is the whole object of one version, or one clear error."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest
from fsspec.registry import _registry

from mm.data import remote
from mm.data.remote import Identity, Patience, RemoteCache, expand_remote, file_name, identity, is_remote
from mm.errors import DataError

PIECE = 100_000
Action = Callable[["Handler", bytes], None]


@dataclass
class Object:
    """What the server has under one path. `gets` says how the next GETs are answered, after them: plainly."""

    data: bytes = b""
    etag: str | None = None
    ranges: bool = True
    head: int | None = 200
    head_size: int | None = None
    get_size: bool = True
    gets: list[Action | None] = field(default_factory=list)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Object] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, data: bytes, *gets: Action | None, **more: Any) -> str:
        etag = f'"{hashlib.sha256(data[:1000] + data[-1000:]).hexdigest()[:8]}-{len(data)}"'
        self.objects[f"/{name}"] = Object(data, gets=list(gets), **{"etag": etag, **more})
        return f"{self.url}/{name}"

    def count(self, method: str) -> int:
        return sum(entry[0] == method for entry in self.log)

    def handle_error(self, *_: Any) -> None:
        """Clients hang up in these tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def object(self) -> Object | None:
        return self.server.objects.get(urlsplit(self.path).path)

    def status(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def start(self, body: bytes | None = None, length: int | None = None, status: int = 200, **headers: str) -> None:
        thing = self.object
        assert thing is not None
        self.send_response(status)
        for name, value in {"ETag": thing.etag, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def cut(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.server.log.append(("HEAD", self.path, None))
        if (thing := self.object) is None:
            return self.status(404)
        if thing.head != 200:
            return self.status(thing.head or 405)
        self.start(length=len(thing.data) if thing.head_size is None else thing.head_size)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.log.append(("GET", self.path, wanted))
        if (thing := self.object) is None:
            return self.status(404)
        if action := thing.gets.pop(0) if thing.gets else None:
            return action(self, thing.data)
        self.plain(thing, wanted)

    def plain(self, thing: Object, wanted: str | None) -> None:
        if wanted and thing.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            span = f"bytes {start}-{len(thing.data) - 1}/{len(thing.data)}"
            rest = thing.data[start:]
            self.start(rest, len(rest), 206, Content_Range=span)
        else:
            self.start(thing.data, len(thing.data) if thing.get_size else None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()
    thread.join()


def answer(status: int, **headers: str) -> Action:
    return lambda handler, data: handler.status(status, **headers)


def drop(after: int, meanwhile: Callable[[], object] = lambda: None) -> Action:
    """All is promised, and the connection closed early."""

    def act(handler: Handler, data: bytes) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        more = {"status": 206, "Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        handler.start(data[start : start + after], len(data) - start, **more)  # type: ignore[arg-type]
        meanwhile()
        time.sleep(0.05)  # so that the client has read what was sent
        handler.cut()

    return act


def stall(after: int) -> Action:
    def act(handler: Handler, data: bytes) -> None:
        handler.start(data[:after], len(data))
        handler.wfile.flush()
        handler.server.over.wait(5)
        handler.cut()

    return act


def slow(handler: Handler, data: bytes) -> None:
    """Pieces that each come before the timeout, and all of them long after it."""
    handler.start(length=len(data))
    for at in range(0, len(data), len(data) // 4):
        time.sleep(0.15)
        handler.wfile.write(data[at : at + len(data) // 4])


def unsized(after: int) -> Action:
    """No Content-Length: the end of the connection is the end of the object, it seems."""
    return lambda handler, data: handler.start(data[:after], None)


def chunked(after: int | None = None) -> Action:
    def act(handler: Handler, data: bytes) -> None:
        handler.start(length=None, Transfer_Encoding="chunked")
        for at in range(0, len(data) if after is None else after, PIECE):
            piece = data[at : at + PIECE]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if after is None:
            handler.wfile.write(b"0\r\n\r\n")

    return act


def random_bytes(size: int, seed: int = 0) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


DATA = random_bytes(10 * PIECE)
OTHER = random_bytes(10 * PIECE, seed=1)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    return Patience(timeout=1.0, attempts=4, wait=1.0, longest=3.0, sleep=waits.append, draw=lambda: 1.0)


@pytest.fixture
def cache(tmp_path: Path, patience: Patience) -> RemoteCache:
    return RemoteCache(tmp_path / "cache", 5_000_000, patience)


def content(cache: RemoteCache, url: str, expected: Identity | None = None) -> bytes:
    with cache.fetch(url, expected) as path:
        assert path.name == file_name(url)
        return path.read_bytes()


def refusal(ask: Callable[[], object], words: str = "") -> str:
    with pytest.raises(DataError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def entries(cache: RemoteCache) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("*/*"))


def nothing_is_left(cache: RemoteCache) -> None:
    assert not [*cache.folder.glob("*.part"), *cache.folder.glob("*.lock")]


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/a.tar", True),
        ("gs://bucket/*.tar", True),
        ("hf://datasets/a/b/{000..127}.tar", True),
        ("http://host/a.tar", True),
        ("https://host/a.tar?download=1", True),
        ("memory://a.tar", True),
        ("htps://host/a.tar", True),  # expand_remote says that there is no such thing
        ("simplecache::s3://bucket/a.tar", True),
        ("file:///a.tar", False),
        ("FILE:///a.tar", False),
        ("local://a.tar", False),
        ("pipe:cat a.tar", False),
        ("builtin:emoji/train-*.tar.gz", False),
        ("{root}/a.tar", False),
        ("a/b://c.tar", False),
        ("://a.tar", False),
        ("a.tar", False),
    ],
)
def test_protocols_that_are_remote(path: str, remote: bool) -> None:
    assert is_remote(path) is remote


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/x/000.tar", "000.tar"),
        ("http://h/x/v1.02.tar.gz?download=1#top", "v1.02.tar.gz"),
        ("http://h/x/a%20b%2Fc.tar", "c.tar"),
        ("http://h/傘.tar", "傘.tar"),
        ("s3://b/a b:c.tar", "a_b_c.tar"),
        ("http://h/", "shard"),
        ("http://h/..", "shard"),
        ("http://h/..%2f..%2f.bashrc", "bashrc"),
        ("s3://b/" + "x" * 300 + "7.tar", "x" * 195 + "7.tar"),
    ],
)
def test_local_names_are_the_urls_and_harmless(url: str, name: str) -> None:
    assert file_name(url) == name


# How servers behave


def test_fetches_once_and_asks_whether_it_is_still_the_same(server: Server, cache: RemoteCache) -> None:
    url = server.put("000.tar", DATA)
    assert content(cache, url) == DATA
    assert (server.count("HEAD"), server.count("GET")) == (1, 1)
    assert content(cache, url) == DATA
    assert (server.count("HEAD"), server.count("GET")) == (2, 1)
    known = identity(url, cache.patience)
    assert content(cache, url, known) == DATA
    assert (server.count("HEAD"), server.count("GET")) == (3, 1), "who knows the identity needs no server"
    nothing_is_left(cache)
    server.put("000.tar", OTHER)
    assert content(cache, url) == OTHER, "not served stale"
    assert content(pickle.loads(pickle.dumps(RemoteCache(cache.folder))), url) == OTHER


def test_identity_is_what_the_server_says(server: Server, patience: Patience) -> None:
    url = server.put("a.tar", DATA, etag='W/"v1"')
    found = identity(url, patience)
    assert found == {"size": len(DATA), "etag": '"v1"', "mtime": None}
    assert json.loads(json.dumps(found)) == found
    assert server.count("GET") == 0
    assert identity(server.put("a.tar", DATA, head=405), patience)["size"] == len(DATA), "HEAD may be forbidden"


BEHAVIOURS: dict[str, tuple[list[Action | None], dict[str, Any], list[str | None], int]] = {
    # what it does, what else the object is like; the ranges that are asked for, how often we wait
    "drops": ([drop(6 * PIECE)], {}, [None, "later"], 1),
    "drops, and cannot resume": ([drop(6 * PIECE)], {"ranges": False}, [None, "later"], 1),
    "drops twice": ([drop(3 * PIECE), drop(3 * PIECE)], {}, [None, "later", "later"], 2),
    "drops, without a validator": ([drop(6 * PIECE)], {"etag": None}, [None, None], 1),
    "drops before the first byte": ([drop(0)], {}, [None, None], 1),
    "stalls": ([stall(6 * PIECE)], {}, [None, "later"], 1),
    "stalls before the first byte": ([stall(0)], {}, [None, None], 1),
    "is slow": ([slow], {}, [None], 0),
    "503": ([answer(503)], {}, [None, None], 1),
    "500, 429, 503": ([answer(500), answer(429), answer(503)], {}, [None] * 4, 3),
    "416": ([drop(6 * PIECE), answer(416)], {}, [None, "later", None], 2),
    "no length, cut": ([unsized(6 * PIECE)], {"get_size": False}, [None, "later"], 1),
    "no length, whole": ([], {"get_size": False}, [None], 0),
    "no length at all, chunks": ([None, chunked()], {"get_size": False, "head": 405}, [None, None], 0),
    "no length at all, chunks cut": (
        [None, chunked(6 * PIECE), chunked()],
        {"get_size": False, "head": 405, "ranges": False},
        [None, None, "later"],
        1,
    ),
    "HEAD says 0": ([], {"head_size": 0}, [None], 0),
}


@pytest.mark.parametrize("case", BEHAVIOURS)
def test_content_is_right_whatever_the_server_does(
    server: Server, cache: RemoteCache, waits: list[float], case: str
) -> None:
    gets, more, ranges, failures = BEHAVIOURS[case]
    url = server.put("000.tar", DATA, *gets, **more)
    assert content(cache, url) == DATA
    asked = [wanted for method, _, wanted in server.log if method == "GET"]
    assert ["later" if wanted else None for wanted in asked] == ranges, asked
    assert waits == [1.0, 2.0, 3.0][:failures]
    for wanted in filter(None, asked):
        assert 0 < int(wanted[6:-1]) < len(DATA)
    nothing_is_left(cache)


@pytest.mark.parametrize(
    ("how", "words", "gets"),
    [
        ({"gets": [drop(PIECE)] * 9}, r"connection broke .*\(tried 4 times\)", 4),
        ({"gets": [drop(PIECE)] * 9, "ranges": False, "etag": None}, r"connection broke .*\(tried 4 times\)", 4),
        ({"gets": [stall(PIECE)] * 9, "ranges": False}, r"timed out .*\(tried 4 times\)", 4),
        ({"gets": [unsized(PIECE)] * 9, "get_size": False}, r"ended after 100,000 of 1,000,000 bytes", 4),
        ({"gets": [answer(503)] * 9}, r"the server answers 503 .*\(tried 4 times\)", 4),
        ({"gets": [answer(403)] * 9}, r"access refused \(403\); a signed url may have expired", 1),
        ({"gets": [answer(404)] * 9}, r"does not exist$", 1),
        ({"gets": [answer(400)] * 9}, r"the server answers 400 Bad Request$", 1),
        ({"head_size": 77}, r"the object changed \(size 77 before, 1000000 now\) \(tried 4 times\)", 4),
        ({"get_size": False, "head": 405}, r"does not declare its size", 2),
    ],
)
def test_gives_up_in_one_line(server: Server, cache: RemoteCache, how: dict[str, Any], words: str, gets: int) -> None:
    actions = how.pop("gets", [])
    url = server.put("000.tar", DATA, *actions, **how)
    text = refusal(lambda: content(cache, url), words)
    assert text.startswith(url)
    assert server.count("GET") == gets and server.count("HEAD") <= 4
    assert entries(cache) == []
    nothing_is_left(cache)
    server.objects["/000.tar"] = Object(DATA, '"x"')
    assert content(cache, url) == DATA, "and what failed stands in nobody's way"


@pytest.mark.parametrize(
    ("status", "words", "asked"),
    [
        (404, r"does not exist \(404\)", 1),
        (401, r"access refused \(401\)", 1),
        (403, r"access refused \(403\)", 1),
        (500, r"the server answers 500 .*\(tried 4 times\)", 4),
    ],
)
def test_identity_gives_up_in_one_line(server: Server, patience: Patience, status: int, words: str, asked: int) -> None:
    url = server.put("000.tar", DATA, *[answer(status)] * 9, head=status)
    refusal(lambda: identity(url, patience), words)
    assert (server.count("HEAD"), server.count("GET")) == (asked, asked)
    server.put("000.tar", DATA, answer(503), head=503)
    refusal(lambda: identity(f"{server.url}/none.tar", patience), r"does not exist \(404\)")


def test_waits_as_long_as_the_server_asks_for(server: Server, cache: RemoteCache, waits: list[float]) -> None:
    url = server.put("0.tar", DATA, answer(503, Retry_After="2"), answer(503, Retry_After="3600"))
    assert content(cache, url) == DATA
    assert waits == [2.0, 3.0]


def test_waiting_doubles_and_is_drawn() -> None:
    waits: list[float] = []
    draws = iter([0.0, 1.0, 0.5, 0.0])
    tries = remote._Tries(
        "u", Patience(attempts=5, wait=1.0, longest=6.0, sleep=waits.append, draw=lambda: next(draws))
    )
    for _ in range(4):
        tries.failed(remote._Passing("p"))
    assert waits == [0.5, 2.0, 3.0, 3.0]
    refusal(lambda: tries.failed(remote._Passing("p")), r"u: p \(tried 5 times\)")


def test_no_server_at_all(cache: RemoteCache, waits: list[float]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://user:hush@127.0.0.1:{closed.getsockname()[1]}/a.tar?X-Amz-Signature=hush&b=1"
        text = refusal(lambda: content(cache, url), r"connection broke .*\(tried 4 times\)")
    assert "hush" not in text and "b=1" in text and waits == [1.0, 2.0, 3.0]


# Changes


@pytest.mark.parametrize("ranges", [True, False])
def test_two_versions_are_never_mixed(server: Server, cache: RemoteCache, ranges: bool) -> None:
    """The object changes after its first half: resuming must not append the other's second half."""
    url = server.put("0.tar", DATA, drop(5 * PIECE, lambda: server.put("0.tar", OTHER, ranges=ranges)), ranges=ranges)
    assert content(cache, url) == OTHER
    assert entries(cache) == ["0.tar"]
    nothing_is_left(cache)


def test_who_looked_before_hears_of_the_change(server: Server, cache: RemoteCache) -> None:
    url = server.put("0.tar", DATA)
    known = identity(url, cache.patience)
    server.put("0.tar", OTHER)
    refusal(
        lambda: content(cache, url, known), r"the object changed \(etag .* since this run looked first; start again"
    )
    assert server.count("GET") == 1


def test_an_object_that_nothing_identifies_is_fetched_each_time(server: Server, cache: RemoteCache) -> None:
    more: dict[str, Any] = {"etag": None, "get_size": False, "head": 405}
    url = server.put("0.tar", DATA, None, chunked(), **more)
    assert content(cache, url) == DATA
    server.put("0.tar", OTHER, None, chunked(), **more)
    assert content(cache, url) == OTHER


# Redirects and other protocols


def test_redirects_are_followed_but_not_to_files(server: Server, cache: RemoteCache, tmp_path: Path) -> None:
    there = server.put("there.tar", DATA)
    url = server.put("0.tar", b"", answer(302, Location=there))
    server.objects["/0.tar"].head = 405
    server.objects["/0.tar"].gets *= 2
    assert content(cache, url) == DATA

    (tmp_path / "secret.tar").write_bytes(b"secret")
    for target in (f"file://{tmp_path}/secret.tar", "ftp://127.0.0.1/x", "s3://bucket/x"):
        url = server.put("1.tar", b"", *[answer(302, Location=target)] * 3, head=405)
        text = refusal(lambda: content(cache, url), "redirects to what is not http")  # noqa: B023
        assert target in text
    assert entries(cache) == ["0.tar"]

    url = server.put("2.tar", b"", *[answer(302, Location="/2.tar")] * 50, head=405)
    refusal(lambda: content(cache, url), "redirects without end")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("http://127.0.0.1/x/*.tar", r"http cannot list .*\{000\.\.127\}"),
        ("https://127.0.0.1/x/00?.tar", r"https cannot list .*\{000\.\.127\}"),
        ("htps://127.0.0.1/x.tar", r"no protocol is called 'htps'; http, https, s3, gs and hf are"),
        ("simplecache::s3://bucket/x.tar", r"chained by :: are refused"),
        ("zip://x.tar::http://127.0.0.1/x.zip", r"chained by :: are refused"),
        ("zip:///etc/x.tar", r"zip:// reads other files through itself and is refused"),
        ("reference://x.tar", r"reference:// reads other files"),
        ("file:///etc/passwd", r"file:// reads other files"),
        ("hf://datasets/a/b/*.tar", r"HF_HUB_OFFLINE"),
        ("memory://no/such/*.tar", r"no shard matches \(looked for /no/such/\*\.tar\)"),
        ("memory://shards/*", r"no shard matches \(only folders match, such as /shards/deep\)"),
    ],
)
def test_patterns_that_name_nothing(pattern: str, words: str, memory: Any, patience: Patience) -> None:
    memory.pipe("/shards/deep/0.tar", b"0")
    assert refusal(lambda: expand_remote(pattern, patience), words).startswith(pattern)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")])
def test_a_missing_package_is_named(protocol: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    words = rf'^{protocol}://b/0.tar: {protocol}:// needs {package}: pip install "mm-pretrain\[remote\]"$'
    refusal(lambda: expand_remote(f"{protocol}://b/0.tar"), words)
    refusal(lambda: identity(f"{protocol}://b/0.tar"), words)


def test_plain_urls_are_handed_on_without_asking() -> None:
    for url in ("http://127.0.0.1:1/a.tar?list=*&x=?", "memory://not/there.tar", "https://127.0.0.1:1/a?download"):
        assert expand_remote(url) == [url]


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory: it lists, and opens files by block, as those of s3 and gs do."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_what_lists_is_matched_and_fetched_by_block(
    memory: Any, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 300_000)
    for name in ("a/09.tar", "a/10.tar", "a/08.tar", "a/x/11.tar", "a/notes.txt"):
        memory.pipe(f"/{name}", DATA + name.encode())
    assert expand_remote("memory://a/*.tar") == [f"memory:///a/{n}.tar" for n in ("08", "09", "10")]
    assert expand_remote("memory://a/0?.tar") == [f"memory:///a/{n}.tar" for n in ("08", "09")]
    for url in expand_remote("memory://a/*.tar"):
        assert content(cache, url) == DATA + url[len("memory:///") :].encode()
    memory.pipe("/a/08.tar", OTHER)
    assert content(cache, "memory:///a/08.tar") == OTHER
    refusal(lambda: content(cache, "memory:///a/none.tar"), "does not exist")
    refusal(lambda: content(cache, "memory:///a"), "is a folder, not a tar")


def test_a_listing_of_before_is_not_believed(memory: Any, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file systems of s3 and gs remember what they listed."""
    listed: dict[str, Any] = {}
    real = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda fs, path: listed.setdefault(path, real(fs, path)))
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda fs, path: listed.pop(path, None))
    for data in (DATA, OTHER[:PIECE]):
        memory.pipe("/a.tar", data)
        assert content(cache, "memory://a.tar") == data


class Unruly:
    """An open file of a block protocol that fails as it is told: after so many bytes, by this."""

    def __init__(self, data: bytes, most: int, then: Exception | None) -> None:
        self.data, self.most, self.then, self.at = data, most, then, 0

    def seek(self, at: int) -> None:
        self.at = at

    def read(self, size: int) -> bytes:
        if self.most <= 0 and self.then:
            raise self.then
        block = self.data[self.at : self.at + min(size, self.most)]
        self.at += len(block)
        self.most -= len(block)
        return block

    def close(self) -> None:
        raise OSError("even that")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (ConnectionResetError("reset"), None),
        (TimeoutError(), None),
        (None, None),  # ends early
        (type("ReadTimeoutError", (Exception,), {})("slow"), None),
        (type("HttpError", (Exception,), {"code": 503, "message": "busy"})(), None),
        (PermissionError("Forbidden"), r"access refused \(Forbidden\)"),
        (type("NoCredentialsError", (Exception,), {})("none\nfound"), r"access refused \(none found\)"),
        (FileNotFoundError("x"), "does not exist"),
        (ValueError("nonsense"), "ValueError: nonsense"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_block_protocols_resume_where_they_broke(
    memory: Any, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, words: str | None
) -> None:
    monkeypatch.setattr(remote, "CHUNK", PIECE)
    memory.pipe("/a.tar", DATA)
    files: list[Unruly] = []

    def opened(*_: Any, **__: Any) -> Unruly:
        files.append(Unruly(DATA, 4 * PIECE, fault))
        return files[-1]

    monkeypatch.setattr(type(memory), "_open", opened)
    if words:
        refusal(lambda: content(cache, "memory://a.tar"), words)
        assert len(files) == 1
    else:
        assert content(cache, "memory://a.tar") == DATA
        assert [file.at for file in files] == [4 * PIECE, 8 * PIECE, 10 * PIECE]
    nothing_is_left(cache)


def test_a_change_between_blocks_is_noticed(memory: Any, cache: RemoteCache, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/a.tar", DATA)
    real, changed = type(memory)._open, []

    def opened(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        file = real(self, path, mode, **more)
        if mode == "rb" and not changed:
            changed.append(True)
            self.pipe("/a.tar", OTHER)  # behind the open file
        return file

    monkeypatch.setattr(type(memory), "_open", opened)
    assert content(cache, "memory://a.tar") == OTHER


class Hub(Server):
    """As much of the Hugging Face hub as reading a data set needs."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = HubHandler  # type: ignore[assignment]


class HubHandler(Handler):
    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url, files = urlsplit(self.path), {name: thing.data for name, thing in self.server.objects.items()}
        self.server.log.append((self.command, url.path, self.headers.get("Range")))
        about = "/api/datasets/org/name"
        if url.path.startswith("/datasets/org/name/resolve/main/"):
            data = files[url.path.removeprefix("/datasets/org/name/resolve/main")]
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())  # type: ignore[union-attr]
            return self.out(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")
        if url.path.startswith(f"{about}/tree/main"):
            under = url.path.removeprefix(f"{about}/tree/main") + "/"
            folder = {"type": "directory", "oid": "t", "size": 0, "path": "d"}
            return self.json([folder] if under == "/" else [self.entry(n) for n in files if n.startswith(under)])
        if url.path == f"{about}/paths-info/main":
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.json([self.entry(f"/{path}") for path in wanted if f"/{path}" in files])
        if url.path == about:
            return self.json({"id": "org/name", "sha": "a" * 40, "siblings": [], "tags": [], "private": False})
        self.out(401 if "/hidden/" in url.path else 404, b"{}", X_Error_Code="RepoNotFound")

    do_POST = do_GET

    def entry(self, name: str) -> dict[str, Any]:
        data = self.server.objects[name].data
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name[1:]}

    def json(self, value: Any) -> None:
        self.out(200, json.dumps(value).encode(), Content_Type="application/json")

    def out(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_hub(cache: RemoteCache, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url})
    monkeypatch.setattr(remote, "CHUNK", 4 * PIECE)
    try:
        for name in ("d/000.tar", "d/001.tar"):
            hub.put(name, DATA + name.encode())
        urls = expand_remote("hf://datasets/org/name/d/*.tar", cache.patience)
        assert urls == [f"hf://datasets/org/name/d/{n}.tar" for n in ("000", "001")]
        hub.log.clear()
        for url in urls:
            assert content(cache, url) == DATA + url[-9:].encode()
        assert hub.count("POST") == 4 and hub.count("GET") == 6, "identity before and after, and three blocks each"
        hub.put("d/001.tar", OTHER * 2)
        assert content(cache, urls[1]) == OTHER * 2, "a listing of before is not believed"
        refusal(lambda: content(cache, f"{urls[0]}x"), "does not exist")
        hidden = "hf://datasets/hidden/name/0.tar"
        refusal(lambda: content(cache, hidden), r"access refused \(401\); run `hf auth login` or set HF_TOKEN")
        refusal(lambda: expand_remote("hf://datasets/hidden/name/*.tar", cache.patience), r"access refused \(401\)")
        refusal(lambda: content(cache, "hf://datasets/org/none/0.tar"), r"does not exist \(404\)")
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


# The bound


def test_least_recently_used_go_first(server: Server, tmp_path: Path, patience: Patience) -> None:
    cache = RemoteCache(tmp_path / "cache", 3 * PIECE, patience)
    urls = [server.put(f"{n}.tar", random_bytes(PIECE, n)) for n in range(5)]
    most = 0
    for number in (0, 1, 2, 0, 3, 0, 4):
        assert content(cache, urls[number]) == random_bytes(PIECE, number)
        most = max(most, sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file()))
    assert entries(cache) == ["0.tar", "3.tar", "4.tar"] and most == 3 * PIECE
    assert len([path for path in cache.folder.iterdir() if path.is_dir()]) == 3, "no empty folders are left"
    asked = [path for method, path, _ in server.log if method == "GET"]
    assert asked == ["/0.tar", "/1.tar", "/2.tar", "/3.tar", "/4.tar"]


def test_files_in_use_stay(server: Server, tmp_path: Path, patience: Patience) -> None:
    cache = RemoteCache(tmp_path / "cache", 3 * PIECE, patience)
    urls = [server.put(f"{n}.tar", random_bytes(PIECE, n)) for n in range(5)]
    with cache.fetch(urls[0]) as first:
        for url in urls[1:]:
            content(cache, url)
        assert first.read_bytes() == random_bytes(PIECE, 0), "who downloaded it reads it"
        with cache.fetch(urls[0]) as again:
            assert first == again
        for url in urls[1:]:
            content(cache, url)
        assert first.read_bytes() == random_bytes(PIECE, 0)
        assert entries(cache) == ["0.tar", "3.tar", "4.tar"]
        with cache.fetch(urls[3]), cache.fetch(urls[4]):
            text = refusal(lambda: content(cache, urls[1]), r"no room for 100,000 bytes: 300,000 of the 300,000")
            assert "data.remote_cache are in use by open shards" in text
            assert entries(cache) == ["0.tar", "3.tar", "4.tar"]
    content(cache, urls[1])
    assert "1.tar" in entries(cache) and len(entries(cache)) == 3
    nothing_is_left(cache)


@pytest.mark.parametrize("more", [{}, {"get_size": False, "head": 405}])
def test_larger_than_the_bound(server: Server, tmp_path: Path, patience: Patience, more: dict[str, Any]) -> None:
    cache = RemoteCache(tmp_path / "cache", len(DATA) - 1, patience)
    small = server.put("small.tar", DATA[:PIECE])
    content(cache, small)
    url = server.put("0.tar", DATA, *([None, chunked()] if more else []), **more)
    refusal(lambda: content(cache, url), r"bytes are more than data\.remote_cache allows \(999,999\); raise it")
    nothing_is_left(cache)
    server.put("0.tar", DATA[:-1])
    assert content(cache, url) == DATA[:-1]
    assert entries(cache) == ["0.tar"]


def test_a_full_disk_names_the_folder(
    server: Server, cache: RemoteCache, file_size_limit: Callable[[int], contextlib.AbstractContextManager[None]]
) -> None:
    url = server.put("0.tar", DATA)
    with file_size_limit(PIECE), pytest.raises(OSError, match="File too large") as caught:
        content(cache, url)
    assert str(caught.value.filename).startswith(str(cache.folder)) and server.count("GET") <= 1
    nothing_is_left(cache)


def test_a_cached_file_that_was_cut_is_fetched_again(server: Server, cache: RemoteCache) -> None:
    url = server.put("0.tar", DATA)
    with cache.fetch(url) as path:
        os.truncate(path, PIECE)
    assert content(cache, url) == DATA
    assert server.count("GET") == 2


# Processes


SCRIPT = """
import sys, time
from pathlib import Path
from mm.data.remote import Patience, RemoteCache
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
cache = RemoteCache(Path(sys.argv[1]), 300_000_000, Patience(timeout=5, attempts=3, wait=0.01))
"""


def start(code: str, cache: RemoteCache, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT + code, str(cache.folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


FETCH = """
import hashlib
with cache.fetch(sys.argv[2]) as path:
    print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    sys.stdin.readline()
"""


def test_four_processes_download_once(server: Server, cache: RemoteCache) -> None:
    """The first sends slowly; the others wait for it, and all read it at the same time."""
    url = server.put("0.tar", DATA, slow)
    processes = [start(FETCH, cache, url) for _ in range(4)]
    try:
        assert {line(process) for process in processes} == {hashlib.sha256(DATA).hexdigest()}
        assert server.count("GET") == 1 and server.count("HEAD") == 4
        # All four still read: another process may not take the file away.
        small = RemoteCache(cache.folder, len(DATA), cache.patience)
        refusal(lambda: content(small, server.put("1.tar", OTHER)), "in use by open shards")
    finally:
        for process in processes:
            process.communicate("\n", timeout=20)
    assert content(small, f"{server.url}/1.tar") == OTHER and entries(cache) == ["1.tar"]
    nothing_is_left(cache)


def test_killed_while_downloading(server: Server, cache: RemoteCache) -> None:
    url = server.put("0.tar", DATA, stall(5 * PIECE))
    process = start(FETCH, cache, url)
    deadline = time.monotonic() + 20
    while not (server.count("GET") and list(cache.folder.glob("*.part"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert len(list(cache.folder.glob("*.part"))) == 1 and entries(cache) == []
    other = server.put("1.tar", OTHER)
    assert content(cache, other) == OTHER
    nothing_is_left(cache)  # another download cleans up
    assert content(cache, url) == DATA


def test_killed_and_fetched_again_by_one_that_waits(server: Server, cache: RemoteCache) -> None:
    url = server.put("0.tar", DATA, stall(5 * PIECE))
    process = start(FETCH, cache, url)
    deadline = time.monotonic() + 20
    while not server.count("GET") and time.monotonic() < deadline:
        time.sleep(0.01)
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    assert content(cache, url) == DATA
    assert server.count("GET") == 2
    killer.join()
    process.communicate(timeout=20)
    nothing_is_left(cache)


def test_memory_does_not_grow_with_the_object(server: Server, cache: RemoteCache) -> None:
    size = 200 << 20
    block = random_bytes(1 << 20)

    def send(handler: Handler, data: bytes) -> None:
        handler.start(length=size)
        for _ in range(size >> 20):
            handler.wfile.write(block)

    small, large = server.put("small.tar", DATA), server.put("large.tar", b"", send, head_size=size)
    code = """
with cache.fetch(sys.argv[2]): before = peak()
with cache.fetch(sys.argv[3]) as path: print(peak() - before, path.stat().st_size, flush=True)
"""
    process = start(code, cache, small, large)
    out, _ = process.communicate(timeout=60)
    grown, found = map(int, out.split())
    assert found == size and grown < 16_000, f"{grown:,} kB more for an object of 200 MB"


def test_a_fork_fetches_as_well(server: Server, cache: RemoteCache) -> None:
    """The thread that fsspec reads with does not survive a fork."""
    first, second = server.put("0.tar", DATA), server.put("1.tar", OTHER)
    with cache.fetch(first):
        child = os.fork()
        if not child:
            try:
                os._exit(0 if content(cache, first) == DATA and content(cache, second) == OTHER else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.count("GET") == 2


def test_threads_share_the_cache(server: Server, cache: RemoteCache) -> None:
    """More objects than there is room for, fetched all at once: each is right, and the bound is never passed."""
    urls = [server.put(f"{n}.tar", random_bytes(PIECE, n)) for n in range(8)]
    bound = 5 * PIECE
    small = RemoteCache(cache.folder, bound, cache.patience)
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(16):
            number = (seed * 3 + step * (2 * seed + 1)) % 8
            try:
                if content(small, urls[number]) != random_bytes(PIECE, number):
                    wrong.append(number)
                with remote._lock(cache.folder / "lock"):
                    files = [*cache.folder.glob("*.part"), *cache.folder.glob("*/*")]
                    total = sum(path.stat().st_size for path in files if path.exists())
                if total > bound:
                    wrong.append(total)
            except Exception as error:
                wrong.append(error)

    together(work, 4)
    assert wrong == []
    nothing_is_left(cache)


def test_a_lock_that_is_removed_still_excludes(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work(_: int) -> None:
        for _ in range(150):
            with remote._lock(tmp_path / "x.lock", remove=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0001)
                inside[0] -= 1

    together(work, 4)
    assert most == [1] and not list(tmp_path.iterdir())


def test_a_file_removed_before_it_was_locked_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(DATA)
    monkeypatch.setattr(remote, "_flock", lambda file, how: path.unlink())
    assert remote._hold(path, len(DATA)) is None


def together(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
