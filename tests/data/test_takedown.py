"""Taken-down samples are gone: from the files, from what is loaded; and nothing else has moved."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mm.data.check import check
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import PackedDataset, read_ids
from mm.data.takedown import take_down

GONE = {f"pictures/000/{n:06d}" for n in (3, 11, 12)} | {"pictures/001/000044"}


@pytest.fixture
def folder(packed: PackedDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "train"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_and_tokens_are_erased_and_the_set_stays_whole(packed: PackedDataset, folder: Path) -> None:
    counts = take_down(folder, [*GONE, "pictures/000/no-such"])
    assert counts["samples"] == 4 and counts["unknown"] == 1 and counts["segments"] == 12, "in each of three visits"
    after = PackedDataset(folder)
    tars = b"".join((folder / name).read_bytes() for name in sorted(set(after.index["shard"].to_pylist())))
    erased = 0
    for number in range(len(packed)):
        before, now = packed.read(number), after.read(number)
        assert before.segments == now.segments
        for old, new in zip(before.media, now.media, strict=True):
            gone = before.segments[old.segment].id in GONE
            assert new.data == (bytes(len(old.data)) if gone else old.data)
            assert (old.data in tars) != gone
        for segment in before.segments:
            place = slice(segment.start, segment.start + segment.length)
            if segment.id in GONE:
                assert not now.tokens[place].any()
                erased += segment.length
            else:
                assert (now.tokens[place] == before.tokens[place]).all()
    assert erased == counts["tokens"]
    assert list(check(after)) == []


def test_loading_leaves_them_out_and_moves_nothing(packed: PackedDataset, folder: Path, layout: Layout) -> None:
    """A skip list at load and a set they were erased from give the same batches."""
    take_down(folder, GONE)
    plain = PackedLoader(packed, layout, 4, seed=1)
    listed = PackedDataset(packed.folder)
    listed.drop(frozenset(GONE))
    skipping = PackedLoader(listed, layout, 4, seed=1)
    erased = PackedLoader(PackedDataset(folder), layout, 4, seed=1, workers=1)
    seen = 0
    for whole, one, other in zip(*(loader.batches(20) for loader in (plain, skipping, erased)), strict=True):
        for a, b in ((one.input_ids, other.input_ids), (one.labels, other.labels), (one.modality, other.modality)):
            assert torch.equal(a, b)
        assert one.ids == other.ids == [[id for id in ids if id not in GONE] for ids in whole.ids]
        seen += sum(id in GONE for ids in whole.ids for id in ids)
        kept = one.segment_ids > 0
        assert torch.equal(one.input_ids[kept], whole.input_ids[kept])
        assert torch.equal(one.position_ids[kept], whole.position_ids[kept])
        assert (one.labels[~kept] == -100).all() and not one.modality[~kept].any()
        if "image" in one.media:
            assert torch.equal(one.media["image"].values, other.media["image"].values)
            assert len(one.media["image"]) == sum(map(len, one.ids))
    assert seen > 5
    assert not GONE & {id for batch in one_pass(PackedDataset(folder), layout, 4) for ids in batch.ids for id in ids}


def test_ids_are_read_as_they_are(tmp_path: Path) -> None:
    """Blanks and line separators of other kinds may be in a name; a byte-order mark is none."""
    ids = ["m/0/a ", " m/0/b", "m/0/c\u2028d", "m/0/e\x85"]
    (tmp_path / "ids.txt").write_text("\ufeff" + "\r\n".join(ids) + "\n\n", newline="")
    assert read_ids(tmp_path / "ids.txt") == frozenset(ids)


def test_an_id_takes_all_pieces_with_it(
    raw: Path, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    dataset = pack("{root}/*.tar", tmp_path / "all", layout, {"captions": "all"}, root=str(raw))
    assert take_down(dataset.folder, ["pictures/000/000003"])["segments"] == 3
    assert take_down(dataset.folder, ["pictures/000/000004#1"])["segments"] == 4, "of both calls"


def test_again_or_after_an_interruption_the_files_are_the_same(packed: PackedDataset, folder: Path) -> None:
    half = folder.with_name("half")
    shutil.copytree(folder, half)
    take_down(folder, GONE)
    once = contents(folder)
    take_down(folder, [])
    assert contents(folder) == once
    # Killed in the middle of writing a pack: half of it is erased, and the index knows nothing of it.
    (half / "dropped.txt").write_bytes(once["dropped.txt"])
    changed = [n for n in range(len(packed)) if PackedDataset(folder).place(n) != packed.place(n)]
    place = packed.place(changed[0])
    with open(half / place["shard"], "r+b") as file:
        middle = place["offset"] + place["length"] // 2
        os.pwrite(file.fileno(), once[place["shard"]][place["offset"] : middle], place["offset"])
    take_down(half, GONE)
    assert contents(half) == once
