"""`check` finds what is wrong, whichever file is wrong, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm.data.check import check
from mm.data.packed import PackedDataset


@pytest.fixture
def folder(packed: PackedDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "train"))


def test_a_fresh_set_is_whole(packed: PackedDataset) -> None:
    assert list(check(packed)) == []


def test_a_changed_byte_is_found(packed: PackedDataset, folder: Path) -> None:
    place = packed.place(7)
    data = bytearray((folder / place["shard"]).read_bytes())
    data[place["offset"] + 600] ^= 1
    (folder / place["shard"]).write_bytes(data)
    (line,) = check(PackedDataset(folder))
    assert "pack 7 is damaged" in line


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [("tokens", 3, "the index says 3"), ("image", 0, "the index says 0"), ("source", "other", "the index says other")],
)
def test_an_index_that_says_otherwise_is_found(folder: Path, column: str, value: Any, words: str) -> None:
    index = pq.read_table(folder / "index.parquet")
    values = index[column].to_pylist()
    values[5] = value
    position = index.schema.get_field_index(column)
    changed = index.set_column(position, column, pa.array(values, type=index.schema.field(column).type))
    pq.write_table(changed, folder / "index.parquet")
    lines = list(check(PackedDataset(folder)))
    assert lines and all("pack 5" in line and words in line for line in lines)
