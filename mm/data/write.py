"""Writing packed shards from a plan: token ids from the scans, media from where they lie, in the order of the packs.

WORK/out/packs-000000.tar    a packed shard
WORK/parts/000000.index      its rows of index.parquet, written last: without it there is no shard
WORK/parts/000000.plan       its rows of plan.parquet
"""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.packed import INDEX, OPEN_FILES, Recent, checksum, join_segments, members_of
from mm.data.plan import Plan
from mm.data.sample import Media
from mm.data.scan import COUNTED, Scan, atomic
from mm.data.tokens import COSTS, Segment, SegmentMedia
from mm.errors import DataError

PLAN_ROWS = pa.schema(
    [
        ("pack", pa.int64()),
        ("visit", pa.int32()),
        *((name, pa.string()) for name in ("source", "id", "shard")),
        *((name, pa.int32()) for name in COUNTED),
        ("media", pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))),
    ]
)


@dataclass(frozen=True, slots=True)
class Scanned:
    """A shard as the writer sees it: its scan, the source it belongs to, and what it is called in the plan."""

    scan: Path
    source: str
    name: str


def write_shard(work: Path, number: int, scanned: list[Scanned]) -> None:
    """Write packed shard `number` of the plan in `work`: whole or not at all, and the same bytes whenever it is done.

    Raises `DataError` where a shard has been changed since it was scanned.
    """
    import webdataset as wds

    name = f"packs-{number:06d}.tar"
    rows = _rows(Plan.read(work / "plan.arrow").of_shard(number), scanned)
    entries: list[dict[str, Any]] = []
    with contextlib.closing(_Files(scanned)) as files, atomic(work / "out" / name, work / "parts") as file:
        with wds.TarWriter(file, user="mm", group="mm", mode=0o644, mtime=0) as writer:
            for pack, found in groupby(rows, key=lambda row: row["pack"]):
                segments = list(found)
                made = join_segments([(row["id"], row["source"], _segment(row, files)) for row in segments])
                start = writer.tarstream.offset
                writer.write({"__key__": f"{pack:08d}", **members_of(made)})
                place = {"pack": pack, "shard": name, "offset": start, "length": writer.tarstream.offset - start}
                totals = {column: sum(row[column] for row in segments) for column in ("tokens", "loss_tokens", *COSTS)}
                one = {"visit": segments[0]["visit"], "source": segments[0]["source"], "segments": len(segments)}
                entries.append({**place, **one, **totals})
        file.flush()
        with open(file.name, "rb") as written:
            for entry in entries:
                entry["checksum"] = checksum(os.pread(written.fileno(), entry["length"], entry["offset"]))
    _write_part(work / "parts" / f"{number:06d}.plan", pa.Table.from_pylist(rows, schema=PLAN_ROWS))
    _write_part(work / "parts" / f"{number:06d}.index", pa.Table.from_pylist(entries, schema=INDEX))


def is_written(work: Path, number: int) -> bool:
    return (work / "parts" / f"{number:06d}.index").exists()


def _rows(plan: pa.Table, scanned: list[Scanned]) -> list[dict[str, Any]]:
    """The segments of some packs as they were scanned, in the order of the plan; `from` is the number of their scan."""
    packs, scans, places = (plan[name].to_numpy() for name in ("pack", "scan", "row"))
    rows: list[dict[str, Any]] = [{}] * len(plan)
    for number in np.unique(scans).tolist():
        mine = np.flatnonzero(scans == number)
        segments = Scan(scanned[number].scan).segments.take(places[mine])
        ids = segments["ids"].combine_chunks()
        values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        for at, (place, row) in enumerate(zip(mine.tolist(), segments.drop_columns("ids").to_pylist(), strict=True)):
            row["ids"] = values[offsets[at] : offsets[at + 1]]
            about = {"pack": int(packs[place]), "from": number, "source": scanned[number].source}
            rows[place] = row | about | {"shard": scanned[number].name}
    return rows


def _segment(row: dict[str, Any], files: "_Files") -> Segment:
    """A scanned row, with its media read."""
    media = []
    for one in row["media"]:
        encoded = Media(one["kind"], files.read(row["from"], one), one["ext"])
        plan = json.loads(one["plan"]) if one["plan"] else {}
        media.append(SegmentMedia(one["kind"], one["position"], one["length"], one["cost"], encoded, plan))
    edges = row["loss"]
    return Segment(row["ids"], tuple(zip(edges[::2], edges[1::2], strict=True)), tuple(media))


class _Files:
    """The files that media are read from, a few open at a time."""

    def __init__(self, scanned: list[Scanned]) -> None:
        self._scanned = scanned
        self._open: Recent[tuple[int, bool], io.FileIO] = Recent(self._opened, OPEN_FILES)

    def _opened(self, which: tuple[int, bool]) -> io.FileIO:
        number, copied = which
        scan = Scan(self._scanned[number].scan)
        if not copied:
            scan.check_unchanged()
        return open(scan.copies if copied else scan.shard, "rb", buffering=0)

    def read(self, number: int, medium: dict[str, Any]) -> bytes:
        file = self._open[number, medium["copied"]]
        data = os.pread(file.fileno(), medium["size"], medium["offset"])
        if len(data) != medium["size"]:
            raise DataError(
                f"{file.name}: ends before byte {medium['offset'] + medium['size']}; pack the data set again"
            )
        return data

    def close(self) -> None:
        self._open.close()


def _write_part(path: Path, table: pa.Table) -> None:
    with atomic(path) as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)


def join_parts(work: Path, what: str, shards: int, schema: pa.Schema, out: Path) -> None:
    """The parts of all packed shards as one parquet file, in order; one part in memory at a time."""
    with (
        atomic(out, work / "parts") as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for number in range(shards):
            with pa.memory_map(str(work / "parts" / f"{number:06d}.{what}")) as part:
                writer.write_table(pa.ipc.open_file(part).read_all())
