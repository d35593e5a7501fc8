"""Shards made or damaged to do harm: scanning them with `max_bad_fraction = 1` never crashes, hangs or grows, and
samples whose bytes nobody touched are delivered as they are.

The scans run in a process of their own (this file as a script), whose end, time and memory are watched.
`MM_SOAK_MUTATIONS`: how many shards. `MM_SOAK_SEED`: which ones. A failure names its case, and keeps the shard.
"""

import base64
import contextlib
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from mm import files
from mm.data import shards, tables
from mm.data.layout import AudioLayout, ImageLayout, Layout, Template, VideoLayout
from mm.data.limits import Limits
from mm.data.media import ImageTransform
from mm.data.scan import PackSettings, Scan, scan_shard
from mm.data.sources import SourceConfig
from mm.data.tokenizer import Tokenizer

MEGABYTES = 300
SECONDS = 20  # a shard
SAMPLES = 12
SETTINGS = PackSettings(64, {}, 1, 0, "split", 1.0, Limits(json_bytes=1 << 20, text_chars=1 << 18, seconds=60))
Mutation = Callable[[bytearray, np.random.Generator], str]


def test_mutated_shards(tmp_path: Path) -> None:
    count = int(os.environ.get("MM_SOAK_MUTATIONS", "500"))
    command = [sys.executable, __file__, str(tmp_path), str(count), os.environ.get("MM_SOAK_SEED", "0")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60 + count)
    case = (tmp_path / "case").read_text() if (tmp_path / "case").exists() else "before the first"
    assert result.returncode == 0, f"case {case} in {tmp_path}:\n{result.stdout}{result.stderr[-4000:]}"
    found = json.loads(result.stdout)
    assert found["cases"] >= count and found["untouched"] > count and found["errors"] > count
    assert found["megabytes"] < MEGABYTES, found


# What is mutated.


def picture(rng: np.random.Generator, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def sound(rng: np.random.Generator, format: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, rng.normal(0, 0.1, 4000), 8000, format=format)
    return file.getvalue()


def clip(rng: np.random.Generator, format: str) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def tar(samples: dict[str, dict[str, bytes]], format: int = tarfile.GNU_FORMAT, prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as out:
        for key, members in samples.items():
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{prefix}{key}.{ext}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def originals(rng: np.random.Generator) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Sound shards by file name, each with the source that reads it."""
    kinds = {
        "image": [(ext, picture(rng, format)) for ext, format in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))],
        "audio": [(ext, sound(rng, format)) for ext, format in (("flac", "FLAC"), ("wav", "WAV"), ("mp3", "MP3"))],
        "video": [(ext, clip(rng, format)) for ext, format in (("mp4", "mp4"), ("mkv", "matroska"))],
    }

    def pairs(kind: str) -> dict[str, dict[str, bytes]]:
        found = {}
        for n in range(SAMPLES):
            ext, data = kinds[kind][n % len(kinds[kind])]
            text = {"txt": f"cat {n}".encode()} if n % 2 else {"json": json.dumps({"caption": f"cat {n}"}).encode()}
            found[f"{n:04d}"] = {ext: data, **text}
        return found

    def documents(spelt: bool) -> list[dict[str, Any]]:
        encoded = base64.b64encode(kinds["image"][0][1]).decode()
        name = {"image_base64": encoded} if spelt else {"image_name": "0.png"}
        return [
            {"texts": [f"Document {n}. " * (n % 5 + 1), None, "end"], "image_info": [None, name, None]} if n % 2 else
            {"text_list": [f"One {n}.", "Two."], "image_info": [{**name, "matched_text_index": n % 2}]}
            for n in range(SAMPLES)
        ]  # fmt: skip

    in_tar = {
        f"{n:04d}": {"0.png": kinds["image"][0][1], "json": json.dumps(one).encode()}
        for n, one in enumerate(documents(False))
    }
    texts = [{"text": f"A cat sat on mat {n}.\n\n" * (n + 1)} for n in range(SAMPLES)]
    lines = "".join(json.dumps(one) + "\n" for one in texts).encode()
    spelt = "".join(json.dumps(one) + "\n" for one in documents(True)).encode()
    zst, stream = pa.BufferOutputStream(), pa.BufferOutputStream()
    with pa.CompressedOutputStream(zst, "zstd") as out:
        out.write(spelt)
    rows = pa.Table.from_pylist(
        [{"image": {"bytes": kinds["image"][n % 3][1], "path": ""}, "caption": f"cat {n}"} for n in range(SAMPLES)]
    )
    with pa.ipc.new_stream(stream, rows.schema) as out:
        out.write_table(rows, max_chunksize=5)
    parquet, ids = io.BytesIO(), io.BytesIO()
    pq.write_table(rows, parquet, row_group_size=5, use_dictionary=False, compression="none")
    packed = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(texts), packed, row_group_size=5)
    np.save(ids, rng.integers(0, 20, 400).astype(np.uint16))
    captions, text, interleaved = {"kind": "captions"}, {"kind": "text"}, {"kind": "interleaved"}
    clips = {"kind": "recordings", "seconds": 0.2, "min_seconds": 0.1, "sampling_rate": 6000}
    return {
        "plain.tar": (captions, tar(pairs("image"))),
        "pax.tar": (captions, tar(pairs("image"), tarfile.PAX_FORMAT, "Wörter/" + "n" * 120 + "/")),
        "gnu.tar": (captions, tar(pairs("image"), tarfile.GNU_FORMAT, "n" * 120 + "/")),
        "documents.tar": (interleaved, tar(in_tar)),
        "sound.tar": ({"kind": "audio"}, tar(pairs("audio"))),
        "clips-of-sound.tar": (clips, tar(pairs("audio"))),
        "clips.tar": ({"kind": "video"}, tar(pairs("video"))),
        "packed.tar.gz": (captions, gzip.compress(tar(pairs("image")), mtime=0)),
        "text.jsonl": (text, lines),
        "text.jsonl.gz": (text, gzip.compress(lines, mtime=0)),
        "documents.jsonl.zst": (interleaved, zst.getvalue().to_pybytes()),
        "pictures.parquet": (captions, parquet.getvalue()),
        "text.parquet": (text, packed.getvalue()),
        "pictures.arrow": (captions, stream.getvalue().to_pybytes()),
        "ids.npy": ({"kind": "tokens", "eos": 7}, ids.getvalue()),
    }


# How it is mutated. A mutation changes the bytes in place and says what it did.


def flip(data: bytearray, rng: np.random.Generator) -> str:
    places = rng.integers(0, len(data), rng.integers(1, 20)).tolist()
    for at in places:
        data[at] ^= 1 << rng.integers(0, 8)
    return f"bits flipped in {places}"


def flip_behind(data: bytearray, rng: np.random.Generator) -> str:
    """In the last quarter: where tables say what they hold."""
    at = int(rng.integers(len(data) * 3 // 4, len(data)))
    data[at] ^= 1 << rng.integers(0, 8)
    return f"a bit flipped at {at}"


def overwrite(data: bytearray, rng: np.random.Generator) -> str:
    at, length = int(rng.integers(0, len(data))), int(rng.choice([1, 8, 512, 700, 4096]))
    at = at // 512 * 512 if rng.random() < 0.5 else at
    new = [bytes(length), b"\xff" * length, rng.bytes(length), b"9" * length, b"[" * length][rng.integers(0, 5)]
    data[at : at + length] = new[: max(0, len(data) - at)]
    return f"{length} bytes overwritten at {at} with {new[:1]!r}…"


def truncate(data: bytearray, rng: np.random.Generator) -> str:
    at = int(rng.integers(0, len(data)))
    del data[at:]
    return f"cut at {at}"


def blocks(data: bytearray, rng: np.random.Generator) -> str:
    """Blocks taken out, put in or doubled, as a bad copy does."""
    at, length = 512 * int(rng.integers(0, len(data) // 512 + 1)), 512 * int(rng.integers(1, 6))
    what = int(rng.integers(0, 3))
    if what == 0:
        del data[at : at + length]
    else:
        data[at:at] = rng.bytes(length) if what == 1 else data[at : at + length]
    return f"blocks {length} {('taken out', 'put in', 'doubled')[what]} at {at}"


NAMES = (
    *(
        "../../etc/passwd.png",
        "/abs.png",
        "a\\..\\b.png",
        ".",
        "..",
        "x",
        ".png",
        "a.",
        "a..png",
        "\x1b[2J.png",
        "\xff.png",
    ),
    *("x" * 99, "a/b/c/../d.png", "con.png", "%s%n.png", "a\n.png"),
)
TYPES = b"0123456789LKxgSVDXZ\0\xff"


def lie(data: bytearray, rng: np.random.Generator) -> str:
    """A tar header that says something else, its checksum put right."""
    places = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not places:
        return flip(data, rng)
    at = int(rng.choice(places))
    field = ("size", "name", "type", "numbers")[rng.integers(0, 4)]
    if field == "size":
        sizes = [0, 1, 600, 5_000, 2**20, 2**33, 2**62, -512, -1024, -(2**40)]
        data[at + 124 : at + 136] = int(rng.choice(sizes)).to_bytes(12, "big", signed=True)
        data[at + 124] |= 0x80
    elif field == "name":
        data[at : at + 100] = str(rng.choice(NAMES)).encode("latin-1").ljust(100, b"\0")
    elif field == "type":
        data[at + 156] = int(rng.choice(list(TYPES)))
    else:
        offset = int(rng.choice([100, 108, 116, 124, 136, 329, 337]))
        data[at + offset : at + offset + 8] = [b"\xff" * 8, b"77777777", b"-1      ", b"\0" * 8][rng.integers(0, 4)]
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return f"{field} changed in the header at {at}"


def bomb(data: bytearray, rng: np.random.Generator) -> str:
    """Pictures that claim 60,000 x 60,000 pixels, their checksums right."""
    places = [at for at in range(len(data) - 33) if data[at : at + 4] == b"\x89PNG"]
    for at in places:
        header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + data[at + 24 : at + 29]
        data[at + 12 : at + 33] = header + zlib.crc32(header).to_bytes(4, "big")
    return f"{len(places)} picture bombs" if places else flip(data, rng)


def nonsense(data: bytearray, rng: np.random.Generator) -> str:
    """JSON whose values are of other types, of the same length."""
    spelt = bytes(data)
    words = [b'"caption"', b'"text"', b'"texts"', b'"image_info"', b'"image_name"', b'"text_list"', b"null", b'"0.png"']
    new = [
        b"[[[[[[[[[[[",
        b"1e999999999",
        b'{"a":{"a":1',
        b"-0000000000",
        b"true       ",
        b'"\\ud800   "',
        b"           ",
    ]
    word = words[rng.integers(0, len(words))]
    if (at := spelt.find(word)) < 0:
        return flip(data, rng)
    data[at : at + len(word)] = new[rng.integers(0, len(new))][: len(word)].ljust(len(word))
    return f"{word!r} overwritten at {at}"


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    flip,
    flip_behind,
    overwrite,
    overwrite,
    truncate,
    blocks,
    lie,
    lie,
    bomb,
    nonsense,
)


def prepared(folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the shards of `made`; gives their sources. In another process, whose memory is not counted."""
    folder.mkdir(exist_ok=True)
    if (pid := os.fork()) == 0:
        sources = {}
        for name, (config, data) in made().items():
            (folder / name).write_bytes(data)
            sources[name] = config
        (folder / "sources.json").write_text(json.dumps(sources))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads((folder / "sources.json").read_text())


def made() -> dict[str, tuple[dict[str, Any], bytes]]:
    """Shards that no mutation comes to."""
    zeros = bytes(64 << 20)
    digits = tarfile.TarInfo("x.png")
    digits.pax_headers = {"comment": "1" * 900_000}
    suffixes = tarfile.TarInfo("x.png")
    suffixes.pax_headers = {"comment": "2 2 " * 200_000}
    longnames = b"".join(tar({"k" * 300: {"png": b""}})[:1024] for _ in range(3000))
    nested = tar({f"{n}": {"png": b"x"} for n in range(3)})
    value = pa.table({"text": pa.array(["x" * (1 << 20)] * 64).dictionary_encode()})
    dictionary = io.BytesIO()
    pq.write_table(value, dictionary)
    ids = json.dumps({"input_ids": ["x" * 500_000, *["y"] * 50_000]}).encode()
    captions, text = {"kind": "captions"}, {"kind": "text"}
    return {
        "zeros.tar": (captions, zeros),
        "bomb.tar.gz": (captions, gzip.compress(tar({"a": {"png": zeros}}))),
        "bomb.jsonl.gz": (text, gzip.compress(b'{"text": "' + zeros + b'"}')),
        "lines.jsonl.gz": (text, gzip.compress(b"\n" * (64 << 20))),
        "digits.tar": (captions, digits.tobuf(tarfile.PAX_FORMAT) + bytes(1024)),
        "suffixes.tar": (captions, suffixes.tobuf(tarfile.PAX_FORMAT).replace(b"comment=", b"comment ") + bytes(1024)),
        "longnames.tar": (captions, longnames),
        "nested.tar": (captions, tar({"a": {"png": nested, "txt": b"x"}})),
        "dictionary.parquet": (text, dictionary.getvalue()),
        "ids.jsonl": ({"kind": "tokens"}, ids),
        "word.jsonl": (text, b'{"text": "' + b"a" * 250_000 + b'"}'),
        "ends.jsonl": (text, json.dumps({"text": ".\n" * 100_000}).encode()),
        "quotes.jsonl": (text, json.dumps({"text": '.""""' * 50_000}).encode()),
        "deep.jsonl": (text, b'{"text": ' + b'{"a":' * 200_000),
        "keys.jsonl": (text, json.dumps({f"{n}": n for n in range(60_000)}).encode()),
    }


# The process that scans.


def touched(before: bytes, after: bytes, did: str) -> set[str]:
    """Keys of the samples of a plain tar whose bytes, headers included, are not what and where they were."""
    spans: dict[str, list[int]] = {}
    with tarfile.open(fileobj=io.BytesIO(before)) as tar:
        for info in tar:
            spans.setdefault(info.name.partition(".")[0], []).extend(
                (info.offset, info.offset_data + -(-info.size // 512) * 512)
            )
    places = {key: (min(edges), max(edges)) for key, edges in spans.items()}
    if did.startswith("blocks "):
        length, at = int(did.split()[1]), int(did.split()[-1])
        end = at + (0 if "put in" in did else length)
        if "taken out" in did:  # the member they were taken from reaches as far beyond its end
            end = max([end, *(b for a, b in places.values() if a < at < b)]) + length
        return {key for key, (a, b) in places.items() if a < end and at < b}
    lost = {key for key, (a, b) in places.items() if before[a:b] != after[a:b]}
    if did.startswith("size"):  # what it swallows is not damaged, but gone
        at = int(did.split()[-1])
        end = at + 512 + tarfile.nti(after[at + 124 : at + 136])  # type: ignore[attr-defined]
        lost |= {key for key, (a, _) in places.items() if at <= a < end <= len(after)}
    if did.startswith("type"):  # an extended header speaks of the next one
        at = int(did.split()[-1])
        lost |= {key for _, key in sorted((a, key) for key, (a, _) in places.items() if a > at)[:1]}
    return lost


def layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    transform = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    media = ImageLayout(4, 9, transform), AudioLayout(8000, 1000), VideoLayout(3, 4, 9, transform)
    return Layout(tokenizer, Template("<s>", "<|im_end|>"), tokenizer.id("<|endoftext|>"), *media)


def scanned(path: Path, config: dict[str, Any], made_for: Layout) -> tuple[Scan, dict[str, Any]]:
    """A scan, and what it holds of every segment: ids and the media themselves."""
    source = TypeAdapter(SourceConfig).validate_python({"name": "s", **config, "path": str(path)}).build("")
    out = path.with_name("scan.arrow")
    scan_shard(out, source, path, "x", path.suffix == ".tar", made_for, SETTINGS)
    found = Scan(out)
    segments = {}
    with open(found.copies, "rb") as copies, open(path, "rb") as shard:
        for row in found.segments.to_pylist():
            media = []
            for one in row["media"]:
                file = copies if one["copied"] else shard
                media.append((one["plan"], os.pread(file.fileno(), one["size"], one["offset"])))
            segments[row["id"]] = row["ids"], media
    return found, segments


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def check(found: Scan) -> None:
    ledger = found.ledger
    fates = ledger["samples"] - ledger["filtered"] - ledger["quarantined"] + ledger["pieces"]
    assert fates == ledger["segments"] + ledger["too_long"], ledger
    assert ledger["segments"] == len(found.segments) and ledger["quarantined"] == len(found.bad)
    for one in found.bad:
        assert one["id"].startswith("s/x") and "\n" not in one["reason"] and len(one["reason"]) < 6000, one
    tokens = found.segments["tokens"].to_numpy()
    assert not len(tokens) or (tokens.max() <= SETTINGS.context_length and tokens.min() > 0)


def main(folder: Path, count: int, seed: int) -> None:
    shards.ALWAYS_ALLOWED = tables.ALWAYS_ALLOWED = 8 << 20
    files.os.fsync = lambda handle: None  # type: ignore[assignment]
    extra = prepared(folder / "made")
    made_for, rng = layout(), np.random.default_rng(seed)
    whole = originals(rng)
    expected = {}
    for name, (config, data) in whole.items():
        (folder / name).write_bytes(data)
        found, expected[name] = scanned(folder / name, config, made_for)
        check(found)
        assert found.ledger["quarantined"] == 0 and len({id.split("#")[0] for id in expected[name]}) >= 8, found.bad
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    untouched = errors = 0
    began = time.monotonic()
    for number in range(count + len(extra)):
        case = np.random.default_rng((seed, number))
        if number < len(extra):
            name, did = list(extra)[number], "made"
            config, path = extra[name], folder / "made" / name
        else:
            name = list(whole)[case.integers(0, len(whole))]
            config, path, mutated = whole[name][0], folder / name, bytearray(whole[name][1])
            did = MUTATIONS[case.integers(0, len(MUTATIONS))](mutated, case)
            path.write_bytes(mutated)
        (folder / "case").write_text(f"{number}: {name}, {did}")
        with time_limit():
            found, segments = scanned(path, config, made_for)
        check(found)
        errors += found.ledger["quarantined"]
        if did != "made" and path.suffix == ".tar" and name not in ("pax.tar", "gnu.tar"):
            lost = touched(whole[name][1], bytes(mutated), did)
            for id, segment in expected[name].items():
                if id.removeprefix("s/x/").split("#")[0] not in lost:
                    assert segments.get(id) == segment, f"{id} was not touched"
                    untouched += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result = {
        "cases": number + 1,
        "untouched": untouched,
        "errors": errors,
        "megabytes": round(grown),
        "before": before // 1024,
    }
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_the_shard(tmp_path: Path, name: str) -> None:
    """Whatever members are called, only the scan's own files are written."""
    data = bytearray(tar({"a": {"txt": b"cat"}, "b": {"txt": b"dog"}}))
    data[:100] = name.encode("latin-1").ljust(100, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(data)
    scanned(tmp_path / "in" / "x.tar", {"kind": "text"}, layout())
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [
        "scan.arrow",
        "scan.json",
        "scan.media",
        "x.tar",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
