"""From the config to packed sets: what is packed, where, and what is there already."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers, open_splits, pack_settings, pack_split
from mm.errors import DataError


def config(path: Path | str, **settings: Any) -> DataConfig:
    source = {"kind": "captions", "path": str(path), "name": "pictures"}
    return DataConfig.model_validate({"sources": [source], "context_length": 64, **settings})


def test_held_out_data_are_visited_once(raw: Path, tmp_path: Path, layout: Layout) -> None:
    source = {"kind": "captions", "path": str(raw / "000.tar"), "name": "pictures"}
    data = config(raw / "*.tar", visits=3, validation=[source], test=[source], cache=str(tmp_path))
    assert [pack_settings(data, split, 0).visits for split in ("train", "validation", "test")] == [3, 1, 1]
    opened = open_splits(data, layout, 0)
    assert {split: found.about["ledger"]["pictures"]["segments"] for split, found in opened.items()} == {
        "train": 180, "validation": 30, "test": 30,
    }  # fmt: skip
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "packed").iterdir()) == [
        "test",
        "train",
        "validation",
    ]


def test_every_limit_reaches_the_scan(raw: Path) -> None:
    data = config(raw, max_pixels=1, max_seconds=2, max_media_bytes=3, max_json_bytes=4, max_text_chars=5)
    limits = pack_settings(data, "train", 0).limits
    assert [limits.pixels, limits.seconds, limits.media_bytes, limits.json_bytes, limits.text_chars] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("max_media_bytes", [1000, 10**6])
def test_limits_are_part_of_what_decides_a_set(raw: Path, tmp_path: Path, layout: Layout, max_media_bytes: int) -> None:
    pack_split(config(raw / "*.tar"), "train", layout, 0, tmp_path / "x")
    with pytest.raises(DataError, match="holds a set packed from other shards or settings"):
        pack_split(config(raw / "*.tar", max_media_bytes=max_media_bytes), "train", layout, 0, tmp_path / "x")


def test_a_gzipped_tar_that_is_called_tar(raw: Path, tmp_path: Path, layout: Layout) -> None:
    """Its pictures cannot stay where they are, whatever its name."""
    plain = pack_split(config(raw / "000.tar"), "train", layout, 0, tmp_path / "plain")
    (tmp_path / "000.tar").write_bytes(gzip.compress((raw / "000.tar").read_bytes()))
    packed = pack_split(config(tmp_path / "000.tar"), "train", layout, 0, tmp_path / "packed")
    assert plain is not None and packed is not None
    assert (plain / "packs-000000.tar").read_bytes() == (packed / "packs-000000.tar").read_bytes()


def test_links_to_shards_are_followed(raw: Path, tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "000.tar").symlink_to(raw / "000.tar")
    found = pack_split(config(tmp_path / "000.tar"), "train", layout, 0, tmp_path / "x")
    assert found is not None and PackedDataset(found).about["ledger"]["pictures"]["segments"] == 30


def test_what_stands_in_the_way(raw: Path, tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file: not a packed data set"):
        pack_split(config(raw / "000.tar"), "train", layout, 0, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert pack_split(config(raw / "000.tar"), "train", layout, 0, tmp_path / "empty") == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_work_begun_with_other_settings_is_removed(raw: Path, tmp_path: Path, layout: Layout) -> None:
    half = config(raw / "*.tar", visits=2)
    assert pack_split(half, "train", layout, 0, tmp_path / "train", workers=Workers(slice=(0, 2))) is None
    assert pack_split(half, "train", layout, 0, tmp_path / "train2", workers=Workers(slice=(0, 2))) is None
    assert pack_split(config(raw / "*.tar"), "train", layout, 0, tmp_path / "train") == tmp_path / "train"
    names = sorted(path.name.partition("work")[0] for path in tmp_path.iterdir())
    assert names == [".train2.", "train"], "and only what was for the same place"


def test_progress_names_every_step(raw: Path, tmp_path: Path, layout: Layout) -> None:
    told: list[tuple[str, int]] = []
    pack_split(config(raw / "*.tar"), "train", layout, 0, tmp_path / "x", lambda what, n: told.append((what, n)))
    assert list(dict.fromkeys(what for what, _ in told)) == [
        "scanning pictures", "scanning shards (2 in all)", "packing pictures", "writing shards (1 in all)",
    ]  # fmt: skip
    assert max(n for what, n in told if what == "scanning pictures") == 30


def test_a_set_can_be_moved(raw: Path, tmp_path: Path, layout: Layout) -> None:
    """Nothing in it says where it was made, but for the plan, which names the shards by their paths."""
    folder = pack_split(config("{root}/*.tar", root=str(raw)), "train", layout, 0, tmp_path / "x")
    assert folder is not None
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(raw).encode() not in path.read_bytes() or path.name == "plan.parquet"
    moved = folder.rename(tmp_path / "y")
    assert len(PackedDataset(moved).read(0).tokens) > 0
    assert json.loads((moved / "dataset.json").read_text())["provenance"]["sources"][0]["path"] == "{root}/*.tar"
