"""Shards in: we read what plain webdataset reads, and what is hostile or damaged gives clear errors and costs no more
than itself."""

import contextlib
import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.data import shards
from mm.data.limits import Limits
from mm.data.packed import names_of
from mm.data.shards import Group, Tar, expand, open_shard
from mm.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_bytes(files: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these files; a name that ends in / is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


Found = dict[str, dict[str, bytes]]


def read_all(path: Path) -> tuple[Found, list[DataError]]:
    """The samples of a tar, and all that is said to be wrong with it."""
    samples: Found = {}
    errors: list[DataError] = []
    with open_shard(str(path), Limits()) as shard:
        for group in shard.groups():
            if isinstance(group, DataError):
                errors.append(group)
            else:
                assert group.key not in samples
                samples[group.key] = {ext: group.read(ext) for ext in group.members}
    for error in errors:
        assert str(path) in str(error) and "\n" not in str(error)
    return samples, errors


def read(path: Path) -> Found:
    """The samples of a tar, as under `max_bad_fraction = 0`: the first thing wrong with it ends it."""
    samples, errors = read_all(path)
    for error in errors:
        raise error
    return samples


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def by_webdataset(path: Path) -> Found:
    found: Found = {}
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        key = sample["__key__"].removeprefix("./")
        found[key] = {ext: data for ext, data in sample.items() if not ext.startswith("__")}
    return found


PLAIN = [
    ("a.jpg", b"picture a"),
    ("a.txt", "Wörter".encode()),
    ("deep/folder/", b""),
    ("deep/folder/b.seg.png", b"x" * 700),
    ("deep/folder/b.TXT", b""),
    ("./c.jpg", b"y" * 1024),
    ("./c.json", b"{}"),
    ("README", b"no sample"),
    ("._c.jpg", b"what another system leaves"),
    ("傘.webp", b"z"),
]
LONG = [("f" * 60 + "/" + "k" * 90 + ".jpg", b"1"), ("g" * 300 + "/" + "k" * 200 + ".txt", b"2")]


@pytest.mark.parametrize("packing", ["tar", "tar.gz", "members"])
@pytest.mark.parametrize("format", FORMATS)
def test_reads_what_webdataset_reads(tmp_path: Path, format: str, packing: str) -> None:
    """Every tar dialect, long names, folders, ./ and files that are no samples; gzip in one member or several."""
    data = tar_bytes(PLAIN + (LONG[:1] if format == "ustar" else LONG), FORMATS[format])
    plain = tmp_path / "plain.tar"
    plain.write_bytes(data)
    path = tmp_path / f"shard.{'tar' if packing == 'tar' else 'tar.gz'}"
    path.write_bytes(
        {
            "tar": data,
            "tar.gz": gzip.compress(data),
            "members": gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(512),  # zeros may follow
        }[packing]
    )
    found = read(path)
    assert found == by_webdataset(plain)
    assert found["deep/folder/b"] == {"seg.png": b"x" * 700, "txt": b""}
    assert len(found) == (5 if format == "ustar" else 6)


def test_members_are_read_at_random_and_while_scanning(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([(f"{n:03d}.txt", b"%d" % n * n) for n in range(50)]))
    with Tar(str(tmp_path / "x.tar")) as shard:
        groups: list[Group] = []
        for group in shard.groups():
            assert isinstance(group, Group)
            groups.append(group)
            assert groups[len(groups) // 2].read("txt") == b"%d" % (len(groups) // 2) * (len(groups) // 2)
        assert [int(group.key) for group in groups] == list(range(50))
        assert [len(group.read("txt")) for group in reversed(groups)] == [
            len(b"%d" % n) * n for n in reversed(range(50))
        ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(f"000.{ext}", "000") for ext in ("tar", "tar.gz", "tgz", "parquet", "jsonl", "jsonl.gz", "jsonl.zst")],
        ("v1.02.tgz", "v1.02"),
        ("a.b.tar", "a.b"),
    ],
)
def test_stem_keeps_what_tells_shards_apart(name: str, expected: str) -> None:
    assert shards.stem(f"folder.x/{name}") == expected


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = tar_bytes([("a.jpg", b"p" * 700), ("a.txt", b"caption"), ("b.jpg", b"q" * 100)])
    end = 3 * 512 + 1024 + 512 + 512  # three headers, their data, and one block of the end mark is still to come
    path = tmp_path / "x.tar"
    for cut in [*range(0, end + 512, 100), end - 1, end, end + 511]:
        path.write_bytes(data[:cut])
        assert re.search("truncated|not a whole tar", refusal(path)), cut
    path.write_bytes(data[: end + 512])
    assert list(read(path)) == ["a", "b"]


def test_a_gzip_stream_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    stream = gzip.compress(tar_bytes(PLAIN))
    path = tmp_path / "x.tar.gz"
    for cut in range(2, len(stream), 7):
        path.write_bytes(stream[:cut])
        assert "truncated: the gzip stream ends early" in refusal(path)
    for at in range(12, len(stream), 9):
        path.write_bytes(stream[:at] + bytes([stream[at] ^ 0xFF]) + stream[at + 1 :])
        refusal(path)
    path.write_bytes(stream + b"rubbish")
    assert "damaged gzip stream" in refusal(path)


@pytest.mark.parametrize(
    "name", ["/abs.jpg", "../up.jpg", "a/../../up.jpg", "a/..", "\\abs.jpg", "a\\..\\up.jpg", "a/..\\up.jpg"]
)
def test_names_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([("ok.jpg", b""), (name, b"x")]))
    text = refusal(tmp_path / "x.tar")
    assert "points outside the shard" in text and repr(name) in text


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\tb.jpg", "a\udcff.jpg", "\x1b[31m.jpg"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([(name, b"x")]))
    assert "not plain UTF-8" in refusal(tmp_path / "x.tar")


def test_names_that_only_look_odd_are_read(tmp_path: Path) -> None:
    names = ["a..b.jpg", "..c.jpg/d.jpg", "s3:e.jpg", "a b　c.jpg", "back\\slash.jpg"]
    (tmp_path / "x.tar").write_bytes(tar_bytes([(name, b"x") for name in names]))
    assert list(read(tmp_path / "x.tar")) == ["a", "..c.jpg/d", "s3:e", "a b　c", "back\\slash"]


def test_a_sign_that_pieces_are_told_by_is_another_one_in_an_id(tmp_path: Path) -> None:
    files = [("C.txt", b"a"), ("C#.txt", b"b"), ("C#0.txt", b"c"), ("50%.txt", b"d")]
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    keys = [*read(tmp_path / "x.tar")]
    assert keys == ["C", "C%23", "C%230", "50%25"]
    assert [key for key in keys if "m/x/C" in names_of(f"m/x/{key}")] == ["C"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(info)
    assert "'a.jpg' is a link or device" in refusal(tmp_path / "x.tar")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 4
    info.pax_headers = {"GNU.sparse.map": "0,2,4094,2", "GNU.sparse.size": "4096"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"abcd"))
    assert "'a.jpg' is stored sparse" in refusal(tmp_path / "x.tar")


def with_size(data: bytes, header: int, size: int) -> bytes:
    """The tar with another size in the header at this offset, its checksum put right."""
    block = bytearray(data[header : header + 512])
    block[124:136] = size.to_bytes(12, "big", signed=True)  # base 256, which the top bit marks
    block[124] |= 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + 512 :]


@pytest.mark.parametrize("size", [2**60, 2**33, 6000, -512, -(2**40)])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, size: int) -> None:
    data = tar_bytes([("a.jpg", b"x"), ("b.jpg", b"y")])
    (tmp_path / "x.tar").write_bytes(with_size(data, 1024, size)[: 4 * 512 + 1024])
    assert "'b.jpg'" in refusal(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(with_size(data, 0, size)[: 4 * 512 + 1024])
    refusal(tmp_path / "x.tar")


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([("a.jpg", b"x"), ("b.jpg", b"y"), ("c.jpg", b"z")]))
    data[1024 + 3] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    assert "no tar header at byte 1024" in refusal(tmp_path / "x.tar")


def test_what_follows_an_end_mark_is_damage_and_is_read(tmp_path: Path) -> None:
    """Zeros are what a hole in a file reads as; plain readers take them for the end and lose the rest in silence."""
    one, two = (tar_bytes([(f"{name}.txt", b"x")]) for name in "ab")
    (tmp_path / "x.tar").write_bytes(one + two)
    samples, errors = read_all(tmp_path / "x.tar")
    assert list(samples) == ["a", "b"] and ["zeros, which end a tar, at byte 1024" in str(e) for e in errors] == [True]
    (tmp_path / "x.tar").write_bytes(one + bytes(100_000))
    assert list(read(tmp_path / "x.tar")) == ["a"]


def pax(name: str, records: bytes) -> bytes:
    """An empty member with extended header records that are taken as they are."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    padded = records.ljust(-(-len(records) // 512) * 512, b"\0")
    return header.tobuf(tarfile.USTAR_FORMAT) + padded + tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (b"14 comment=xy\n", ""),
        (b"1" * 900_000, "makes no sense"),
        (b"900018 comment=" + b"1" * 900_002 + b"\n", "a number of over 300 digits"),
        (b"2 2 2 2 2 2 2 2 2 2=\n", "makes no sense"),
        (b"0 a=b\n", "makes no sense"),
        (b"99 a=b\n", "makes no sense"),
        (b"6 a=b\n6 a=b\n6", "makes no sense"),
        (b"16 size=-1024000\n", "makes no sense"),
        (b"18 size=-10240000\n", "has a size of -10240000 bytes"),
        (b"20 size=10000000000\n", "truncated inside member"),
    ],
)
def test_extended_headers_that_would_cost_much_are_refused(tmp_path: Path, records: bytes, words: str) -> None:
    """Some take `tarfile` hours, gigabytes, or back to where it has been."""
    path = tmp_path / "x.tar"
    path.write_bytes(pax("a.jpg", records) + tar_bytes([("b.jpg", b"y")]))
    samples, errors = read_all(path)
    assert "b" in samples and len(errors) == (words != "")
    assert all(words in str(error) for error in errors)


def test_chains_of_extended_headers_are_refused(tmp_path: Path) -> None:
    longname = tar_bytes([("k" * 300 + ".jpg", b"")])[:1024]
    for count, refused in ((4, False), (9, True), (300, True)):
        (tmp_path / "x.tar").write_bytes(longname * count + tar_bytes([("k.jpg", b"x")]))
        samples, errors = read_all(tmp_path / "x.tar")
        assert bool(errors) is refused and len(samples) == 1
        assert not refused or "over 8 extended headers of one member" in str(errors[0])


def test_names_longer_than_a_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_bytes([("d/" * 2046 + "a.b", b""), ("d/" * 500_000 + "c.jpg", b""), ("e.f", b"")])
    )
    samples, (error,) = read_all(tmp_path / "x.tar")
    assert len(samples) == 2 and "its name has 1000005 characters" in str(error) and len(str(error)) < 400


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar at all " * 100, b"\x1f\x8b"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    refusal(tmp_path / "x.tar")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 9000))
def test_any_damage_is_samples_or_one_clear_error(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(tar_bytes([*PLAIN[:4], LONG[1]], tarfile.PAX_FORMAT))
    for at, value in changes:
        data[at] = value
    path = tmp_path / "x.tar"
    path.write_bytes(data[: 12000 - cut])
    with contextlib.suppress(DataError):
        read_all(path)


def test_a_bomb_is_refused_before_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ALWAYS_ALLOWED", 4 << 20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes([("a.jpg", bytes(3 << 20))])))
    assert len(read(path)["a"]["jpg"]) == 3 << 20, "a small one may grow as it likes"
    path.write_bytes(gzip.compress(tar_bytes([("a.jpg", bytes(32 << 20))])))
    assert "refused as a bomb" in refusal(path)


def test_members_of_a_sample_must_stand_together(tmp_path: Path) -> None:
    files = [("a.jpg", b""), ("b.jpg", b""), ("a.txt", b""), ("b.txt", b"")]
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    assert "sample 'a' do not stand together" in refusal(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a.jpg", b""), ("a.JPG", b"")]))
    assert "sample 'a' has two members 'jpg'" in refusal(tmp_path / "x.tar")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_expand_counts_and_matches_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "a/08.tar", "a/09.tar", "a/10.tar", "b/08.tar", "b/09.tar", "b/10.tar", "b/notes.txt")
    names = lambda path, root="": [os.path.relpath(found, tmp_path) for found in expand(path, root)]  # noqa: E731
    assert names(f"{tmp_path}/a/{{08..10}}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar"]
    assert names("{root}/b/*.tar", str(tmp_path)) == ["b/08.tar", "b/09.tar", "b/10.tar"]
    assert names("{root}/?/{09..10}.tar", str(tmp_path)) == ["a/09.tar", "b/09.tar", "a/10.tar", "b/10.tar"]
    assert len(expand("builtin:emoji/train-*.tar.gz")) == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{root}/no/such/folder/{000..003}.tar", r"the folder .*/no does not exist"),
        ("{root}/no/such/*.tar", r"the folder .*/no does not exist"),
        ("{root}/a/sub/00.tar", r"the folder .*/a/sub does not exist"),
        ("{root}/a/{00..02}.tar", r"/a/02\.tar: does not exist"),
        ("{root}/a/*.tgz", r"no shard matches \(looked for .*/a/\*\.tgz\)"),
        ("{root}/a/{00..01}*.x", r"no shard matches \(looked for .*/a/00\*\.x\)"),
        ("{root}/a/{05..01}.tar", r"no shard matches \(a range counts"),
        ("{root}/a", r"/a: is a folder, not a shard"),
        ("pipe:cat x.tar", r"pipe: URLs run shell commands"),
        ("builtin:imagenet/x.tar", r"no shipped data set is called 'imagenet'.*emoji"),
    ],
)
def test_expand_says_what_is_missing(tmp_path: Path, path: str, words: str) -> None:
    touch(tmp_path, "a/00.tar", "a/01.tar")
    with pytest.raises(DataError, match=words) as caught:
        expand(path, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_expand_wants_the_root_that_it_needs() -> None:
    with pytest.raises(DataError, match=r"data\.root is not set"):
        expand("{root}/x.tar")


def test_full_disk_while_decompressing_names_the_disk(
    tmp_path: Path, file_size_limit: Callable[[int], contextlib.AbstractContextManager[None]]
) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes([("a.jpg", bytes(2 << 20))])))
    with file_size_limit(1 << 20), pytest.raises(OSError, match="File too large") as caught:
        read(path)
    assert caught.value.filename
