"""Packed sets on disk: readable by plain webdataset, the same bytes every time, whole or not there, and refused when
they are damaged or made for another model."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

import mm.data.packed as module
from mm.data import plan
from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.packed import Pack, PackedDataset, checksum, names_of
from mm.data.prepare import open_splits
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError

SPELLING = {"prompt": "{language}: "}


def equal(a: Pack, b: Pack) -> bool:
    return np.array_equal(a.tokens, b.tokens) and a.segments == b.segments and a.media == b.media


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def open_files(folder: Path) -> int:
    """How many tars in a folder this process has open. (Arrow closes its files a moment later, in a thread.)"""
    found = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    files = [link.readlink() for link in found if link.is_symlink()]
    return sum(file.is_relative_to(folder) and file.suffix == ".tar" for file in files)


def test_plain_webdataset_reads_the_packs(packed: PackedDataset, raw: Path) -> None:
    """Only json, npy and the media as they came; nothing pickled; and what they hold is what `read` gives."""
    media = {}
    for path in sorted(raw.glob("*.tar")):
        for sample in wds.WebDataset(str(path), shardshuffle=False):
            ext = next(ext for ext in sample if ext in ("jpg", "png", "webp"))
            media[f"pictures/{path.stem}/{sample['__key__']}"] = (ext, sample[ext])
    tars = sorted(packed.folder.glob("*.tar"))
    samples = [sample for path in tars for sample in wds.WebDataset(str(path), shardshuffle=False)]
    assert len(samples) == len(packed) == packed.about["packs"]
    for number, sample in enumerate(samples):
        assert sample["__key__"] == f"{number:08d}"
        pack = packed.read(number)
        tokens = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        assert tokens.dtype == np.int32 and np.array_equal(tokens, pack.tokens)
        layout = json.loads(sample["json"])
        assert [segment["id"] for segment in layout["segments"]] == [segment.id for segment in pack.segments]
        extensions = {ext for ext in sample if not ext.startswith("__")}
        assert extensions == {"json", "npy", *(one["member"] for one in layout["media"])}
        for one, described in zip(pack.media, layout["media"], strict=True):
            assert (one.ext, sample[described["member"]]) == media[pack.segments[one.segment].id]
            assert one.data == sample[described["member"]]


def test_segments_tile_their_rows(packed: PackedDataset, layout: Layout) -> None:
    for number in range(len(packed)):
        pack, row = packed.read(number), packed.index.slice(number, 1).to_pylist()[0]
        assert [s.start for s in pack.segments] == np.cumsum([0, *(s.length for s in pack.segments)])[:-1].tolist()
        assert sum(segment.length for segment in pack.segments) == len(pack.tokens) == row["tokens"]
        for one in pack.media:
            segment = pack.segments[one.segment]
            assert segment.start < one.position and one.position + one.length <= segment.start + segment.length
            assert (pack.tokens[one.position : one.position + one.length] == layout.pad).all()
        learned = sum(stop - start for segment in pack.segments for start, stop in segment.loss)
        assert (len(pack.segments), learned) == (row["segments"], row["loss_tokens"])
        assert (len(pack.media), sum(one.cost for one in pack.media)) == (row["image"], row["image_cost"])
        assert {segment.source for segment in pack.segments} == {row["source"]}


def test_packed_twice_gives_the_same_bytes(
    raw: Path, packed: PackedDataset, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    again = pack("{root}/*.tar", tmp_path / "x", layout, SPELLING, root=str(raw), budgets={"image": 4}, visits=3)
    assert digests(again.folder) == digests(packed.folder)
    assert {*digests(packed.folder)} == {"dataset.json", "index.parquet", "plan.parquet", "packs-000000.tar"}


def test_bad_samples_are_told_the_same_way_every_time(
    tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset], write_shard: Callable[..., Path], picture: Any
) -> None:
    samples = {"a": {"png": picture(), "txt": "cat"}, "b": {"png": b"no picture", "txt": "cat"}}
    path = write_shard(tmp_path / "x.tar", samples)
    sets = [pack(path, tmp_path / name, layout, max_bad_fraction=0.5) for name in "12"]
    assert digests(sets[0].folder) == digests(sets[1].folder)
    (line,) = (sets[0].folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "pictures/x/b", "reason": "pictures/x/b: not a readable jpg, png or webp picture"}


def test_provenance_is_names_and_sizes(raw: Path, packed: PackedDataset) -> None:
    text = (packed.folder / "dataset.json").read_text()
    assert str(raw) not in text and "mtime" not in text and "modified" not in text
    provenance = packed.about["provenance"]
    assert provenance["shards"] == [
        {"name": path.name, "bytes": path.stat().st_size} for path in sorted(raw.glob("*.tar"))
    ]
    assert provenance["sources"][0]["path"] == "{root}/*.tar"


def test_many_shards_are_read_with_few_files_open(
    raw: Path,
    packed: PackedDataset,
    tmp_path: Path,
    layout: Layout,
    pack: Callable[..., PackedDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "PACKS_PER_SHARD", 3)
    monkeypatch.setattr(module, "OPEN_FILES", 4)
    many = pack("{root}/*.tar", tmp_path / "x", layout, SPELLING, root=str(raw), budgets={"image": 4}, visits=3)
    out = many.folder
    assert open_files(raw) == open_files(tmp_path) == 0, "packing leaves none open"
    assert len(list(out.glob("*.tar"))) == -(-len(packed) // 3) > 10
    for number in np.random.default_rng(0).permutation(len(many)).tolist():
        assert equal(many.read(number), packed.read(number))
        assert open_files(out) <= 4
    assert open_files(out) == 4
    assert equal(pickle.loads(pickle.dumps(many)).read(1), packed.read(1))
    many.reader.close()
    assert open_files(out) == 0
    assert equal(many.read(0), packed.read(0)), "a closed set opens again"


def test_reads_that_come_in_parts(
    raw: Path,
    packed: PackedDataset,
    tmp_path: Path,
    layout: Layout,
    pack: Callable[..., PackedDataset],
    monkeypatch: Any,
) -> None:
    """As the kernel gives what is longer than 2 GB."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    again = pack("{root}/*.tar", tmp_path / "x", layout, SPELLING, root=str(raw), budgets={"image": 4}, visits=3)
    assert digests(again.folder) == digests(packed.folder)
    assert all(equal(again.read(number), packed.read(number)) for number in range(len(packed)))


def test_a_file_that_a_disk_lost_track_of_is_opened_again(
    packed: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = PackedDataset(packed.folder).reader
    place = packed.place(0)
    expected = reader.bytes_at(place)
    pread, lost = os.pread, [os.fstat(reader.file(place["shard"]).fileno()).st_ino, 1]

    def stale(handle: int, *args: int) -> bytes:
        if os.fstat(handle).st_ino == lost[0] and lost[1]:
            lost[1] -= 1
            raise OSError(116, "Stale file handle")
        return pread(handle, *args)

    monkeypatch.setattr(os, "pread", stale)
    assert reader.bytes_at(place) == expected and not lost[1]
    lost[1] = 2
    with pytest.raises(DataError, match=r"packs-000000.tar: cannot be read \(Stale file handle\)"):
        reader.bytes_at(place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 9}, r'image \{"tokens": 4, "cost": 9\} \(the model has \{"tokens": 9, "cost": 9\}\)'),
        ({"cost": 10}, r'image .* \(the model has \{"tokens": 4, "cost": 10\}\)'),
        ({"tokenizer": ("<extra>",)}, r'tokenizer "[0-9a-f]{16}" \(the model has "[0-9a-f]{16}"\)'),
        ({"after_media": ""}, r'template .*"after_media": "\\n".*\(the model has .*"after_media": ""'),
        ({"context_length": 128}, r"context_length 64 \(data\.context_length is 128\)"),
        ({"budgets": {"image": 3}}, r"image up to 4 a row \(data\.budgets\.image is 3\)"),
    ],
)
def test_another_model_is_refused_by_what_differs(
    packed: PackedDataset, make_layout: Callable[..., Layout], change: dict[str, Any], words: str
) -> None:
    change = dict(change)
    length, budgets = change.pop("context_length", 64), change.pop("budgets", {"image": 4})
    if "tokenizer" in change:
        change["tokenizer"] = Tokenizer.load("builtin:emoji", change["tokenizer"])
    with pytest.raises(DataError, match=words) as caught:
        packed.require(make_layout(**change), length, budgets)
    line = str(caught.value)
    assert line.startswith(f"{packed.folder}: packed for another model: ") and "\n" not in line
    assert line.count("(the model has") + line.count("(data.") == 1, "names what differs and nothing else"


def test_the_same_model_is_taken_whatever_its_pixels(packed: PackedDataset, layout: Layout) -> None:
    packed.require(layout, 64)
    packed.require(layout, 64, {"image": 4})


@pytest.fixture
def copy(packed: PackedDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "train"))


def rewrite(folder: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    """Change a pack's bytes in place and put its checksum right, as only a deliberate edit would."""
    index = pq.read_table(folder / "index.parquet")
    row = index.slice(number, 1).to_pylist()[0]
    path = folder / row["shard"]
    data = bytearray(path.read_bytes())
    old = bytes(data[row["offset"] : row["offset"] + row["length"]])
    new = change(old)
    assert len(new) == len(old) and new != old
    data[row["offset"] : row["offset"] + row["length"]] = new
    path.write_bytes(data)
    sums = index["checksum"].to_pylist()
    sums[number] = checksum(new)
    column = index.column_names.index("checksum")
    pq.write_table(index.set_column(column, "checksum", pa.array(sums)), folder / "index.parquet")


def refusal(folder: Path, number: int) -> str:
    with pytest.raises(DataError) as caught:
        PackedDataset(folder).read(number)
    line = str(caught.value)
    assert str(folder / "packs-000000.tar") in line and "\n" not in line
    return line


def test_damaged_and_cut_tars_are_named_with_the_pack(copy: Path) -> None:
    path, index = copy / "packs-000000.tar", pq.read_table(copy / "index.parquet").to_pylist()
    data = path.read_bytes()
    for at in range(index[5]["offset"], index[5]["offset"] + index[5]["length"], 1999):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert "pack 5 is damaged (its checksum differs)" in refusal(copy, 5)
        PackedDataset(copy).read(4)
    path.write_bytes(data[: index[5]["offset"] + 600])
    assert "truncated: pack 5 is not all there" in refusal(copy, 5)
    assert "pack 6" in refusal(copy, 6)
    path.unlink()
    assert "cannot be read (No such file or directory)" in refusal(copy, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (rb'"segments":', b'"segmenta":'),
        (rb'"start":0', b'"start":x'),
        (rb'"length":', b'"lengtt":'),
        (rb'\{"segments":\[', b'["segments",['),
        (rb'"member":"', b'"member":5'),
        (rb'"loss":\[\[(\d)', rb'"loss":[{\1'),
        (rb"\x93NUMPY", b"\x80\x04pick"),
        (rb"'<i4'", b"'|O' "),
        (rb"'shape': \((\d)", rb"'shape': (9"),
    ],
)
def test_edited_packs_do_not_follow_the_format(copy: Path, old: bytes, new: bytes) -> None:
    rewrite(copy, 2, lambda data: re.sub(old, new, data, count=1))
    assert "pack 2 does not follow the packed format" in refusal(copy, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: [], "packed format None"),
        (lambda about: {**about, "format_version": 1}, "packed format 1, this version of mm reads 5"),
        (lambda about: {k: v for k, v in about.items() if k != "settings"}, "lacks settings"),
        (lambda about: {**about, "packs": 7}, "dataset.json counts 7 packs"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    about = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(change(about)))
    with pytest.raises(DataError, match=words) as caught:
        PackedDataset(copy)
    assert str(copy) in str(caught.value)


def test_incomplete_sets_are_refused(copy: Path, tmp_path: Path) -> None:
    for name, content in (("index.parquet", b"PAR1"), ("dataset.json", b'{"format_version": 5,')):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match=r"dataset\.json or index\.parquet is damaged"):
            PackedDataset(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match=f"not a packed data set \\({re.escape(name)} is missing"):
            PackedDataset(copy)
        (copy / name).write_bytes(whole)
    index = pq.read_table(copy / "index.parquet")
    pq.write_table(index.drop_columns(["checksum"]), copy / "index.parquet")
    with pytest.raises(DataError, match="has other columns"):
        PackedDataset(copy)
    with pytest.raises(DataError, match="not a packed data set"):
        PackedDataset(tmp_path / "nowhere")


def test_an_index_damaged_anywhere_is_one_line_or_no_matter(copy: Path, packed: PackedDataset) -> None:
    data = (copy / "index.parquet").read_bytes()
    refused = 0
    for at in range(0, len(data), 23):
        (copy / "index.parquet").write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            assert equal(PackedDataset(copy).read(0), packed.read(0))
        except DataError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_a_set_that_is_there_is_used_or_refused(
    raw: Path, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    out = tmp_path / "train"
    out.mkdir()
    first = pack("{root}/000.tar", out, layout, root=str(raw))
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert digests(pack("{root}/000.tar", out, layout, root=str(raw)).folder) == digests(first.folder)
    assert times == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}, "it was not packed again"
    for change in ({"visits": 2}, {"context_length": 65}, {"max_pixels": 10**6}):
        with pytest.raises(DataError, match="holds a set packed from other shards or settings"):
            pack("{root}/000.tar", out, layout, root=str(raw), **change)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").touch()
    with pytest.raises(DataError, match="not a packed data set"):
        pack("{root}/000.tar", tmp_path / "other", layout, root=str(raw))
    assert (tmp_path / "other" / "diary.txt").exists()


def test_the_cache_knows_when_a_shard_has_changed(raw: Path, tmp_path: Path, layout: Layout) -> None:
    shutil.copy(raw / "000.tar", tmp_path / "000.tar")
    source = {"kind": "captions", "path": str(tmp_path / "000.tar"), "name": "s"}
    data = DataConfig.model_validate({"sources": [source], "context_length": 64, "cache": str(tmp_path / "cache")})

    def folder() -> Path:
        return open_splits(data, layout, 0)["train"].folder

    first = folder()
    assert folder() == first and first.parent == tmp_path / "cache" / "packed"
    os.utime(tmp_path / "000.tar", ns=(1, 1))
    second = folder()
    assert second != first and digests(second)["packs-000000.tar"] == digests(first)["packs-000000.tar"]


def test_a_packed_set_that_the_config_names(copy: Path, tmp_path: Path, layout: Layout) -> None:
    data = {"packed": str(tmp_path), "context_length": 64}
    assert [*open_splits(DataConfig.model_validate(data), layout, 0)] == ["train"]
    for change, words in (({"budgets": {"image": 3}}, "image up to 4"), ({"context_length": 32}, "context_length 64")):
        with pytest.raises(DataError, match=words):
            open_splits(DataConfig.model_validate({**data, **change}), layout, 0)
    with pytest.raises(DataError, match="no packed training set"):
        open_splits(DataConfig.model_validate({**data, "packed": str(tmp_path / "no")}), layout, 0)


def test_a_segment_is_meant_by_its_sample_and_all_that_it_is_a_piece_of() -> None:
    assert names_of("web/000/7") == {"web/000/7"}
    assert names_of("web/000/7#2") == {"web/000/7", "web/000/7#2"}
    assert names_of("packs/3/uuid#1#0") == {"packs/3/uuid", "packs/3/uuid#1", "packs/3/uuid#1#0"}
