"""Writing packed shards from a plan: token ids from the scans, media from where they lie, in the order of the packs.

WORK/out/packs-000000.tar    a packed shard
WORK/parts/000000.index      its rows of index.parquet, written last: without it there is no shard
WORK/parts/000000.plan       its rows of plan.parquet
"""

import contextlib
import io
import json
import tarfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.packed import INDEX, OPEN_FILES, TOTALS, Recent, checksum, join_segments, members_of, read_range
from mm.data.plan import Plan
from mm.data.sample import Media
from mm.data.scan import COUNTED, Scan
from mm.data.shards import Placed
from mm.data.tokens import Segment, SegmentMedia
from mm.data.video import cut_video
from mm.errors import DataError
from mm.files import atomic, clear_partials

PLAN_ROWS = pa.schema(
    [
        ("pack", pa.int64()),
        ("visit", pa.int32()),
        *((name, pa.string()) for name in ("source", "id", "shard")),
        *((name, pa.int32()) for name in COUNTED),
        ("audio_samples", pa.int64()),
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
    name = f"packs-{number:06d}.tar"
    rows = _rows(Plan.read(work / "plan.arrow").of_shard(number), scanned)
    entries: list[dict[str, Any]] = []
    clear_partials(work / "parts" / name)
    with contextlib.closing(_Files(scanned)) as files, atomic(work / "out" / name, work / "parts") as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for pack, found in groupby(rows, key=lambda row: row["pack"]):
                segments = list(found)
                made = join_segments([(row["id"], row["source"], _segment(row, files)) for row in segments])
                start = tar.offset
                _add(tar, f"{pack:08d}", members_of(made))
                place = {"pack": pack, "shard": name, "offset": start, "length": tar.offset - start}
                totals = {column: sum(row[column] for row in segments) for column in TOTALS}
                one = {"visit": segments[0]["visit"], "source": segments[0]["source"], "segments": len(segments)}
                entries.append({**place, **one, **totals})
        file.flush()
        with open(file.name, "rb") as written:
            for entry in entries:
                entry["checksum"] = checksum(read_range(written, entry["offset"], entry["length"]))
        files.check_unchanged()
    for medium in (one for row in rows for one in row["media"] if one["copied"] or one["file"]):
        medium["offset"] = None  # it is not one in the shard; a copy goes when the set is whole
    write_part(work / "parts" / f"{number:06d}.plan", pa.Table.from_pylist(rows, schema=PLAN_ROWS))
    write_part(work / "parts" / f"{number:06d}.index", pa.Table.from_pylist(entries, schema=INDEX))


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """One sample as webdataset's `TarWriter` writes it, which would bring torch into every process."""
    for ext in sorted(members):
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size, info.mode, info.uname, info.gname = len(members[ext]), 0o644, "mm", "mm"
        tar.addfile(info, io.BytesIO(members[ext]))
    tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member otherwise


def is_written(work: Path, number: int) -> bool:
    parts = (work / "parts" / f"{number:06d}.{what}" for what in ("index", "plan"))
    return all(file.exists() for file in (*parts, work / "out" / f"packs-{number:06d}.tar"))


def _rows(plan: pa.Table, scanned: list[Scanned]) -> list[dict[str, Any]]:
    """The segments of some packs as they were scanned, in the order of the plan; `from` is the number of their scan."""
    packs, scans, places = (plan[name].to_numpy() for name in ("pack", "scan", "row"))
    rows: list[dict[str, Any]] = [{}] * len(plan)
    for number in np.unique(scans).tolist():
        of_scan = np.flatnonzero(scans == number)
        about = {"from": number, "source": scanned[number].source, "shard": scanned[number].name}
        # Batch by batch: taken from the table, all of its columns would be copied first.
        batches = Scan(scanned[number].scan).segments.to_batches()
        starts = np.cumsum([0, *map(len, batches)])
        of_batch = np.searchsorted(starts, places[of_scan], "right") - 1
        for which in np.unique(of_batch).tolist():
            mine = of_scan[of_batch == which]
            taken = batches[which].take(pa.array(places[mine] - starts[which]))
            values, offsets = taken["ids"].values.to_numpy(), taken["ids"].offsets.to_numpy()
            others = taken.drop_columns(["ids"]).to_pylist()
            for place, row, first, last in zip(mine.tolist(), others, offsets[:-1], offsets[1:], strict=True):
                rows[place] = row | about | {"pack": int(packs[place]), "ids": values[first:last]}
    return rows


def _segment(row: dict[str, Any], files: "_Files") -> Segment:
    """A scanned row, with its media read."""
    media = []
    for one in row["media"]:
        data = files.read(row["from"], one)
        plan = json.loads(one["plan"]) if one["plan"] else {}
        if plan.pop("part", None) is not None:  # or every part of a long video would bring all of it along
            data, plan["times"] = cut_video(data, plan["times"], one["ext"])
        encoded = Media(one["kind"], data, one["ext"])
        media.append(SegmentMedia(one["kind"], one["position"], one["length"], one["cost"], encoded, plan))
    edges = row["loss"]
    metadata = tuple(row["metadata"]) or None
    return Segment(row["ids"], tuple(zip(edges[::2], edges[1::2], strict=True)), tuple(media), metadata=metadata)


class _Files:
    """The files that media are read from, a few open at a time."""

    def __init__(self, scanned: list[Scanned]) -> None:
        self._scanned = scanned
        self._open: Recent[tuple[int, bool], io.FileIO] = Recent(self._opened, OPEN_FILES)
        self._in_place: dict[int, Scan] = {}

    def _opened(self, which: tuple[int, bool]) -> io.FileIO:
        number, copied = which
        scan = Scan(self._scanned[number].scan)
        if not copied:
            scan.check_unchanged()
            self._in_place[number] = scan
        return open(scan.copies if copied else scan.shard, "rb", buffering=0)

    def read(self, number: int, medium: dict[str, Any]) -> bytes:
        if medium["file"] is not None:
            return Placed(medium["file"], medium["offset"], medium["size"], medium["modified"]).read()
        file = self._open[number, medium["copied"]]
        data = read_range(file, medium["offset"], medium["size"])
        if len(data) != medium["size"]:
            raise DataError(
                f"{file.name}: ends before byte {medium['offset'] + medium['size']}; pack the data set again"
            )
        return data

    def check_unchanged(self) -> None:
        """Raise `DataError` if a shard that was read is not what it was when it was scanned."""
        for scan in self._in_place.values():
            scan.check_unchanged()

    def close(self) -> None:
        self._open.close()


def write_part(path: Path, table: pa.Table) -> None:
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
