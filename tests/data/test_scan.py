"""Scans: all that packs need of a shard, the same bytes whenever it is made, media copied only if they must be."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from pydantic import TypeAdapter

from mm.data.audio import cut_audio
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.sample import Media, Text
from mm.data.scan import PackSettings, Scan, is_scanned, scan_shard
from mm.data.shards import Placed, stem
from mm.data.sources import Source, SourceConfig
from mm.data.tokens import make_segment
from mm.errors import DataError
from mm.files import atomic, clear_partials

SETTINGS = PackSettings(64, {}, 1, 0, "error", 0.0, Limits())


@pytest.fixture
def scan(tmp_path: Path, layout: Layout) -> Callable[..., Scan]:
    """`scan(path, {"kind": …}, visits=2)`; the scan is made anew at every call."""
    numbers = iter(range(1000))

    def run(
        path: Path,
        config: dict[str, Any],
        layout: Layout = layout,
        stays: bool | None = None,
        wrap: Callable[[Source], Source] = lambda source: source,
        **settings: Any,
    ) -> Scan:
        source = TypeAdapter(SourceConfig).validate_python({"name": "s", **config, "path": str(path)}).build("")
        out = tmp_path / "scans" / f"{next(numbers)}.arrow"
        out.parent.mkdir(exist_ok=True)
        stays = path.suffix == ".tar" if stays is None else stays
        scan_shard(out, wrap(source), path, stem(str(path)), stays, layout, dataclasses.replace(SETTINGS, **settings))
        assert is_scanned(out)
        return Scan(out)

    return run


def test_what_a_killed_process_left_goes_when_nobody_writes_to_it(tmp_path: Path) -> None:
    old, new = (tmp_path / f".a.arrow.{digit * 32}" for digit in "12")
    for path in (old, new, tmp_path / ".aa.arrow.x", tmp_path / "a.arrow"):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    clear_partials(tmp_path / "a.arrow")
    assert len([*tmp_path.iterdir()]) == 4  # they may be of one process
    os.utime(new, (0, 0))
    clear_partials(tmp_path / "a.arrow", tmp_path / "a.media")
    assert {path.name for path in tmp_path.iterdir()} == {".aa.arrow.x", "a.arrow"}


def rows(found: Scan) -> list[dict[str, Any]]:
    return found.segments.to_pylist()


def media_bytes(found: Scan) -> list[bytes]:
    """The media of all segments, read from where the scan says that they are."""
    files = {True: found.copies.read_bytes(), False: found.shard.read_bytes()}
    media = [one for row in rows(found) for one in row["media"]]
    return [files[one["copied"]][one["offset"] : one["offset"] + one["size"]] for one in media]


def closes(ledger: dict[str, int], visits: int) -> bool:
    kinds = ("text", "image", "audio", "video")
    return (
        (ledger["samples"] - ledger["filtered"] - ledger["quarantined"]) * visits + ledger["pieces"]
        == ledger["segments"] + ledger["too_long"]
    ) and (
        sum(ledger[f"{kind}_tokens"] for kind in kinds)
        == ledger["segment_tokens"]
        == ledger["loss_tokens"] + ledger["masked_tokens"]
    )


@pytest.fixture
def pictures(tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> Path:
    """Twenty pictures with two captions each."""
    samples = {f"{n:02d}": {"png": picture(n), "json": {"captions": [f"{n} cat", f"{n} dog"]}} for n in range(20)}
    return write_shard(tmp_path / "x.tar", samples)


def as_gzip(tar: Path) -> Path:
    path = tar.with_name("x.tar.gz")
    path.write_bytes(gzip.compress(tar.read_bytes()))
    return path


def as_parquet(tar: Path, picture: Callable[..., bytes]) -> Path:
    path = tar.with_name("x.parquet")
    cells = [{"bytes": picture(n), "path": None} for n in range(20)]
    captions = [[f"{n} cat", f"{n} dog"] for n in range(20)]
    pq.write_table(pa.table({"image": cells, "captions": captions}), path)
    return path


def test_a_scan_is_the_same_bytes_whenever_it_is_made(
    pictures: Path, scan: Callable[..., Scan], picture: Callable[..., bytes]
) -> None:
    for path in (pictures, as_gzip(pictures), as_parquet(pictures, picture)):
        first, second = (scan(path, {"kind": "captions"}, visits=3, max_bad_fraction=0.5) for _ in range(2))
        for ext in ("arrow", "media", "json"):
            files = [one.copies.with_suffix(f".{ext}").read_bytes() for one in (first, second)]
            assert files[0] == files[1], (path.name, ext)
        assert {file.name for file in first.copies.parent.iterdir()} >= {"0.arrow", "0.media", "0.json"}
    assert not any(file.name.startswith(".") for file in first.copies.parent.iterdir())


def test_media_stay_where_they_are_or_are_copied_once_for_all_visits(
    pictures: Path, scan: Callable[..., Scan], picture: Callable[..., bytes]
) -> None:
    expected = [picture(n) for n in range(20) for _ in range(2)]
    in_place = scan(pictures, {"kind": "captions"}, visits=2)
    assert media_bytes(in_place) == expected and in_place.copies.stat().st_size == 0
    for path in (as_gzip(pictures), as_parquet(pictures, picture)):
        copied = scan(path, {"kind": "captions"}, visits=2)
        assert media_bytes(copied) == expected
        assert copied.copies.stat().st_size == sum(len(picture(n)) for n in range(20))
        assert copied.ledger == in_place.ledger
        assert [row["ids"] for row in rows(copied)] == [row["ids"] for row in rows(in_place)] or path.suffix != ".gz"
    elsewhere = scan(pictures, {"kind": "captions"}, stays=False)
    assert elsewhere.copies.stat().st_size == sum(len(picture(n)) for n in range(20)), "a tar that will not stay"


def test_a_picture_that_a_document_shows_twice_and_base64(
    tmp_path: Path, scan: Callable[..., Scan], picture: Callable[..., bytes], write_shard: Callable[..., Path]
) -> None:
    import base64

    spelt = {"image_base64": base64.b64encode(picture(1)).decode()}
    document = {"texts": [None, "cat", None], "image_info": [spelt, None, {"image_name": "a.png"}]}
    path = write_shard(tmp_path / "x.tar", {"k": {"a.png": picture(0), "json": document}})
    found = scan(path, {"kind": "interleaved"})
    assert media_bytes(found) == [picture(1), picture(0)]
    assert [one["copied"] for one in rows(found)[0]["media"]] == [True, False]
    document = {"parts": [{"image": "a.png"}, {"image": "a.png"}]}
    path = write_shard(tmp_path / "y.tar", {"k": {"a.png": picture(0), "json": document}})
    assert media_bytes(scan(path, {"kind": "interleaved"}, stays=False)) == [picture(0)] * 2


def test_a_row_is_the_segment(
    tmp_path: Path,
    scan: Callable[..., Scan],
    all_media: Layout,
    picture: Callable[..., bytes],
    sound: Callable[..., bytes],
    clip: Callable[..., bytes],
    write_shard: Callable[..., Path],
) -> None:
    files = {"a.png": picture(), "b.flac": sound(), "c.mp4": clip()}
    said = [
        {"text": "Was ist das? ", "loss": False},
        {"image": "a.png"},
        {"audio": "b.flac"},
        {"video": "c.mp4"},
        {"text": "cat"},
    ]
    path = write_shard(tmp_path / "x.tar", {"k": {**files, "json": {"parts": said}}})
    found = scan(path, {"kind": "interleaved"}, all_media)
    parts = (
        Text("Was ist das? ", loss=False), Media("image", picture(), "png"), Media("audio", sound(), "flac"),
        Media("video", clip(), "mp4"), Text("cat"),
    )  # fmt: skip
    expected = make_segment(parts, all_media, "", Limits())
    (row,) = rows(found)
    assert row["ids"] == expected.ids.tolist()
    assert row["loss"] == [edge for span in expected.loss for edge in span]
    assert [(m["kind"], m["ext"], m["position"], m["length"], m["cost"]) for m in row["media"]] == [
        (m.kind, m.media.ext, m.position, m.length, m.cost) for m in expected.media
    ]
    assert [json.loads(m["plan"] or "{}") for m in row["media"]] == [m.plan for m in expected.media]
    assert (row["tokens"], row["loss_tokens"], row["inserted_tokens"]) == (len(expected), expected.loss_tokens, 2)
    assert [row[f"{kind}{what}"] for kind in ("image", "audio", "video") for what in ("", "_tokens", "_cost")] == [
        1, 4, 9, 1, 8, 8, 1, 12, 27,
    ]  # fmt: skip
    assert row["media_bytes"] == sum(map(len, files.values()))
    assert media_bytes(found) == list(files.values()) and closes(found.ledger, 1)


def test_long_documents_in_pieces(
    tmp_path: Path, scan: Callable[..., Scan], write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    long = "A cat sat. " * 60
    samples = {"a": {"txt": "short"}, "b": {"txt": long}, "c": {"txt": "short"}}
    path = write_shard(tmp_path / "x.tar", samples)
    found = scan(path, {"kind": "text"}, visits=2, too_long="split")
    ids = [(row["id"], row["visit"]) for row in rows(found)]
    pieces = found.ledger["pieces"] // 2 + 1
    assert pieces > 3
    assert ids == [
        ("s/x/a", 0), ("s/x/a", 1), *((f"s/x/b#{k}", visit) for visit in (0, 1) for k in range(pieces)),
        ("s/x/c", 0), ("s/x/c", 1),
    ]  # fmt: skip
    assert all(row["tokens"] <= 64 for row in rows(found))
    assert closes(found.ledger, 2) and found.ledger["too_long"] == 0
    dropped = scan(path, {"kind": "text"}, visits=2, too_long="drop")
    assert closes(dropped.ledger, 2) and dropped.ledger["too_long"] == 2 and dropped.ledger["pieces"] == 0
    assert dropped.ledger["segments"] == 4
    with pytest.raises(DataError, match=r"s/x/b: \d+ tokens do not fit in data\.context_length = 64"):
        scan(path, {"kind": "text"}, max_bad_fraction=1.0)


def test_every_sample_has_one_fate(
    tmp_path: Path, scan: Callable[..., Scan], write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    samples: dict[str, Any] = {f"{n:02d}": {"json": {"text": f"cat {n}", "language": "en"}} for n in range(12)}
    samples["03"] = {"json": {"text": "Katze", "language": "de"}}
    samples["05"] = {"json": {"text": "", "language": "en"}}
    samples["07"] = {"json": b"{"}
    samples["09"] = {"json": {"text": "cat. " * 100, "language": "en"}}
    path = write_shard(tmp_path / "x.tar", samples)
    found = scan(path, {"kind": "text", "only": {"language": "en"}}, too_long="drop", max_bad_fraction=0.3)
    fates = [found.ledger[name] for name in ("samples", "filtered", "quarantined", "too_long", "segments")]
    assert fates == [12, 1, 2, 1, 8] and closes(found.ledger, 1)
    assert [one["id"] for one in found.bad] == ["s/x/05", "s/x/07"]
    assert all(one["reason"].startswith(f"{one['id']} in {path}: ") for one in found.bad)
    with pytest.raises(DataError, match="s/x/05 in "):
        scan(path, {"kind": "text", "only": {"language": "en"}}, too_long="drop")


def headers(tar: bytes) -> list[int]:
    return [at for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"]


def test_a_damaged_header_costs_its_own_sample_only(pictures: Path, scan: Callable[..., Scan]) -> None:
    """Of every header in turn one byte, and more: all samples but that one are as they were."""
    data = pictures.read_bytes()
    whole = {row["id"]: row["ids"] for row in rows(scan(pictures, {"kind": "captions"}))}
    for number, at in enumerate(headers(data)):
        for damage in (bytes([data[at] ^ 1]), bytes(512), b"\xff" * 700):
            pictures.write_bytes(data[:at] + damage + data[at + len(damage) :])
            found = scan(pictures, {"kind": "captions"}, max_bad_fraction=1.0)
            hit = f"s/x/{number // 2:02d}"
            assert {row["id"]: row["ids"] for row in rows(found)} == {k: v for k, v in whole.items() if k != hit}
            assert 1 <= found.ledger["quarantined"] <= 2 and closes(found.ledger, 1)
            with pytest.raises(DataError, match=r"x\.tar: "):
                scan(pictures, {"kind": "captions"})


def test_a_lying_size_costs_its_own_sample_only(pictures: Path, scan: Callable[..., Scan]) -> None:
    """Too long for the file, too short for the data, into the next member, and below zero."""
    from test_shards import with_size

    data = pictures.read_bytes()
    places = headers(data)
    for number in (0, 11, len(places) - 1):
        for size in (2**40, 0, 5_000, -512, -(2**30)):
            pictures.write_bytes(with_size(data, places[number], size))
            found = scan(pictures, {"kind": "captions"}, max_bad_fraction=1.0)
            lost = {f"s/x/{n:02d}" for n in range(20)} - {row["id"] for row in rows(found)}
            reached = sum(places[number] < at < places[number] + 512 + size for at in places)
            allowed = {f"s/x/{(number + n) // 2:02d}" for n in range(reached + 1)}
            assert lost <= allowed, (number, size)
            assert found.ledger["quarantined"] or size == 5_000, "a picture may have more bytes than it needs"
            assert closes(found.ledger, 1)


@pytest.mark.parametrize("name", ["x.tar", "x.jsonl", "x.parquet"])
def test_a_shard_of_rubbish_is_one_bad_sample(tmp_path: Path, scan: Callable[..., Scan], name: str) -> None:
    (tmp_path / name).write_bytes(b"rubbish")
    found = scan(tmp_path / name, {"kind": "text"}, max_bad_fraction=1.0)
    assert len(found.segments) == 0 and found.ledger["samples"] == found.ledger["quarantined"] == 1
    with pytest.raises(DataError, match=name):
        scan(tmp_path / name, {"kind": "text"})


def test_using_a_cached_shard_is_no_change(pictures: Path, layout: Layout, tmp_path: Path) -> None:
    """Its time of change is that of its last use, by whom ever."""
    config = TypeAdapter(SourceConfig).validate_python({"name": "s", "kind": "captions", "path": str(pictures)})
    given = (config.build(""), pictures, "x", False, layout, SETTINGS)
    scan_shard(tmp_path / "0.arrow", *given, lambda samples: pictures.touch(), cached=True)
    assert is_scanned(tmp_path / "0.arrow")
    with pytest.raises(DataError, match="was changed while it was read"):
        scan_shard(tmp_path / "1.arrow", *given, lambda samples: pictures.touch())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fails_is_no_damaged_recording(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders take it for the end of a file; a sample of a full set would be left out for good."""
    wave = io.BytesIO()
    soundfile.write(wave, np.zeros(400_000), 16_000, format="WAV")
    (tmp_path / "a.wav").write_bytes(wave.getvalue())
    path = tmp_path / "a.wav"
    placed = Placed(str(path), 0, path.stat().st_size, path.stat().st_mtime_ns)
    pread = os.pread

    def failing(handle: int, count: int, at: int) -> bytes:
        if at > 100_000:
            raise OSError(5, "Input/output error")
        return pread(handle, count, at)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="Input/output error"), placed.open() as file:
        for _ in cut_audio(file, "a", 1.0):
            pass


def test_a_shard_that_changes_while_it_is_read_is_noticed(
    pictures: Path, scan: Callable[..., Scan], tmp_path: Path
) -> None:
    class Changing:
        """A source during whose reading somebody touches the shard."""

        def __init__(self, source: Any) -> None:
            self.name, self.open, self.holds, self._source = source.name, source.open, source.holds, source

        def samples(self, group: Any, limits: Limits) -> Any:
            if group.key == "07":
                pictures.touch()
            return self._source.samples(group, limits)

    with pytest.raises(DataError, match=r"x\.tar: was changed while it was read; pack the data set again"):
        scan(pictures, {"kind": "captions"}, wrap=Changing)
    assert not is_scanned(tmp_path / "scans" / "0.arrow")


@pytest.mark.parametrize("most", [100, 5_000])
def test_a_full_disk_is_named_and_leaves_no_scan(
    pictures: Path,
    tmp_path: Path,
    scan: Callable[..., Scan],
    file_size_limit: Callable[[int], contextlib.AbstractContextManager[None]],
    most: int,
) -> None:
    with file_size_limit(most), pytest.raises(OSError, match="File too large") as caught:
        scan(pictures, {"kind": "captions"}, stays=False)
    assert str(caught.value.filename).startswith(str(tmp_path / "scans" / "0."))
    assert not is_scanned(tmp_path / "scans" / "0.arrow")
    assert not [file for file in (tmp_path / "scans").iterdir() if file.name.startswith(".")]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()

    def files() -> Iterator[str]:
        return (str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file())

    with atomic(tmp_path / "x", tmp_path / "aside") as file:
        file.write(b"half")
        (name,) = files()
        assert name.startswith("aside/.x.")
    assert list(files()) == ["x"]
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "x") as file:
        file.write(b"other")
        raise KeyboardInterrupt
    assert list(files()) == ["x"] and (tmp_path / "x").read_bytes() == b"half"
