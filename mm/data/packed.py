"""Packed shards: the format on disk (docs/formats.md), written whole or not at all, read by byte range.

    SPLIT/dataset.json      what it was packed for, counts, provenance
    SPLIT/index.parquet     pack -> shard, byte range, counts, checksum
    SPLIT/plan.parquet      which samples make which pack
    SPLIT/packs-000000.tar  per pack KEY.json (layout), KEY.npy (token ids), KEY.N.EXT (media as they came)

The tars are ordinary WebDataset shards. Nothing here is ever pickled.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.layout import Layout
from mm.data.plan import PackSettings, Plan, Progress, group_of, make_plan, segment_of
from mm.data.sample import Media
from mm.data.shards import Shard
from mm.data.sources import Source
from mm.errors import DataError

FORMAT_VERSION = 1
PACKS_PER_SHARD = 1000
OPEN_SHARDS = 16


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """A segment's place in its row. `loss`: half-open spans of row positions."""

    id: str
    source: str
    start: int
    length: int
    loss: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PackedMedia:
    """Media of a pack: `length` row positions from `position`, in segment number `segment`; encoded bytes."""

    kind: str
    segment: int
    position: int
    length: int
    cost: int
    ext: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Pack:
    """One row before padding. `tokens` int32 [n]; media positions hold the pad id."""

    tokens: np.ndarray
    segments: tuple[PackedSegment, ...]
    media: tuple[PackedMedia, ...]


def write_packed(
    out: Path,
    sources: list[Source],
    layout: Layout,
    settings: PackSettings,
    provenance: dict[str, Any],
    progress: Progress = lambda what, n: None,
) -> dict[str, Any]:
    """Plan and write one split into the folder `out`, which appears whole or not at all.

    Returns the contents of its `dataset.json`. The same input gives the same bytes.
    """
    plan = make_plan(sources, layout, settings, progress)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        partial.mkdir()
        cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
        plan.write(partial / "plan.parquet")
        index = _write_shards(partial, plan, sources, layout, settings, progress)
        pq.write_table(index, partial / "index.parquet", compression="zstd")
        if plan.bad:
            lines = (json.dumps({"id": id, "reason": reason}, ensure_ascii=False) for id, reason in plan.bad)
            (partial / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
        rows = plan.packs
        tokens = sum(counts["segment_tokens"] for counts in plan.ledger.values())
        about = {
            "format_version": FORMAT_VERSION,
            "fingerprint": layout.fingerprint(),
            "layout": layout.describe(),
            "settings": asdict(settings),
            "packs": rows,
            "tokens": tokens,
            "row_tokens": rows * settings.context_length,
            "padding": rows * settings.context_length - tokens,
            "fill": round(tokens / (rows * settings.context_length), 6),
            "ledger": plan.ledger,
            "provenance": provenance,
        }
        (partial / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        for file in partial.iterdir():
            _fsync(file)
        try:
            partial.rename(out)
        except OSError:
            if not (out / "dataset.json").is_file():  # else another process finished the same set first
                raise
    return about


def _write_shards(
    folder: Path, plan: Plan, sources: list[Source], layout: Layout, settings: PackSettings, progress: Progress
) -> pa.Table:
    import webdataset as wds

    index: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        shards = _OpenShards(stack)
        writer: Any = None
        name = ""
        for pack, rows in _by_pack(plan):
            if pack % PACKS_PER_SHARD == 0:
                if writer is not None:
                    writer.close()
                name = f"packs-{pack // PACKS_PER_SHARD:06d}.tar"
                writer = wds.TarWriter(str(folder / name), user="mm", group="mm", mode=0o644, mtime=0)
                stack.callback(writer.close)
            made = _make_pack(rows, shards, sources, layout, settings)
            start = writer.tarstream.offset
            writer.write({"__key__": f"{pack:08d}", **_members(made)})
            index.append(
                {
                    "pack": pack,
                    "visit": rows[0]["visit"],
                    "source": sources[rows[0]["source"]].name,
                    "shard": name,
                    "offset": start,
                    "length": writer.tarstream.offset - start,
                    "segments": len(made.segments),
                    "tokens": len(made.tokens),
                    "loss_tokens": sum(row["loss_tokens"] for row in rows),
                    "image": sum(row["image"] for row in rows),
                    "image_cost": sum(row["image_cost"] for row in rows),
                }
            )
            progress("writing packs", pack + 1)
        if writer is not None:
            writer.close()
    for row in index:
        with open(folder / row["shard"], "rb") as file:
            row["checksum"] = checksum(os.pread(file.fileno(), row["length"], row["offset"]))
    return pa.Table.from_pylist(index)


class _OpenShards:
    """Keeps the shards used last open, so that a plan may mix samples of many shards in one pack."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._open: OrderedDict[str, Shard] = OrderedDict()
        stack.callback(self._close)

    def __getitem__(self, path: str) -> Shard:
        if path not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].__exit__()
            self._open[path] = Shard(Path(path))
        self._open.move_to_end(path)
        return self._open[path]

    def _close(self) -> None:
        for shard in self._open.values():
            shard.__exit__()


def _by_pack(plan: Plan) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    rows: list[dict[str, Any]] = []
    for batch in plan.table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            if rows and row["pack"] != rows[0]["pack"]:
                yield rows[0]["pack"], rows
                rows = []
            rows.append(row)
    if rows:
        yield rows[0]["pack"], rows


def _make_pack(
    rows: list[dict[str, Any]], shards: _OpenShards, sources: list[Source], layout: Layout, settings: PackSettings
) -> Pack:
    items = []
    for row in rows:
        sample = sources[row["source"]].samples(group_of(row, shards[row["shard"]]))[row["piece"]]
        segment = segment_of(sample, layout, settings, row["visit"])
        if len(segment) != row["tokens"]:
            raise DataError(f"{sample.id}: {len(segment)} tokens, the plan says {row['tokens']}; its shard changed meanwhile")
        parts = sample.drawn(settings.seed, row["visit"])
        items.append((sample.id, sources[row["source"]].name, segment, parts))
    return join_segments(items)


def join_segments(items: list[tuple[str, str, Any, tuple[Any, ...]]]) -> Pack:
    """Place segments one after the other. `items`: (id, source name, Segment, the drawn parts it was made from)."""
    segments: list[PackedSegment] = []
    media: list[PackedMedia] = []
    start = 0
    for number, (id, source, segment, parts) in enumerate(items):
        loss = tuple((start + a, start + b) for a, b in segment.loss)
        segments.append(PackedSegment(id, source, start, len(segment), loss))
        for one in segment.media:
            part = parts[one.part]
            assert isinstance(part, Media)
            media.append(
                PackedMedia(one.kind, number, start + one.position, one.length, one.cost, part.ext, part.data)
            )
        start += len(segment)
    return Pack(np.concatenate([segment.ids for _, _, segment, _ in items]), tuple(segments), tuple(media))


def _members(pack: Pack) -> dict[str, bytes]:
    """The tar members of a pack: extension -> bytes."""
    members: dict[str, bytes] = {}
    media = []
    for number, one in enumerate(pack.media):
        member = f"{number:04d}.{one.ext}"
        members[member] = one.data
        described = {k: getattr(one, k) for k in ("kind", "segment", "position", "length", "cost")}
        media.append({**described, "member": member})
    layout = {"segments": [asdict(segment) for segment in pack.segments], "media": media}
    ids = io.BytesIO()
    np.save(ids, pack.tokens, allow_pickle=False)
    members["json"] = json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode()
    members["npy"] = ids.getvalue()
    return members


def checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class PackedDataset:
    """A packed split, read by pack number. Picklable, and each process opens its own files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
            self.index = pq.read_table(folder / "index.parquet")
        except FileNotFoundError as error:
            raise DataError(f"{folder}: not a packed data set ({Path(error.filename).name} is missing)") from None
        except (ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{folder}: dataset.json or index.parquet is damaged ({error}); pack it again") from None
        version = self.about.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{folder}: packed format {version}, this version of mm reads {FORMAT_VERSION}; pack it again")
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def require(self, layout: Layout, context_length: int) -> None:
        """Raise `DataError`, naming what differs, unless this set was packed for this model."""
        have, want = self.about["layout"], layout.describe()
        wrong = [
            f"{name} {json.dumps(have.get(name), ensure_ascii=False)} (the model has {json.dumps(value, ensure_ascii=False)})"
            for name, value in want.items()
            if have.get(name) != value
        ]
        packed_length = self.about["settings"]["context_length"]
        if packed_length != context_length:
            wrong.append(f"context_length {packed_length} (data.context_length is {context_length})")
        if wrong:
            raise DataError(f"{self.folder}: packed for another model: {'; '.join(wrong)}; pack it again with `mm pack`")

    def read(self, pack: int) -> Pack:
        """One pack. Raises `DataError` when its bytes are not those that were written."""
        row = {name: self.index[name][pack].as_py() for name in ("shard", "offset", "length", "checksum")}
        path = self.folder / row["shard"]
        if row["shard"] not in self._files:
            try:
                self._files[row["shard"]] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{path}: cannot be opened ({error.strerror})") from None
        data = os.pread(self._files[row["shard"]], row["length"], row["offset"])
        if checksum(data) != row["checksum"]:
            raise DataError(f"{path}: pack {pack} is damaged (its checksum differs); pack the data set again")
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                members[info.name.partition(".")[2]] = file.read()
        layout = json.loads(members["json"])
        segments = tuple(
            PackedSegment(s["id"], s["source"], s["start"], s["length"], tuple(map(tuple, s["loss"])))
            for s in layout["segments"]
        )
        media = tuple(
            PackedMedia(
                m["kind"], m["segment"], m["position"], m["length"], m["cost"],
                m["member"].rpartition(".")[2], members[m["member"]],
            )
            for m in layout["media"]
        )  # fmt: skip
        return Pack(np.load(io.BytesIO(members["npy"]), allow_pickle=False), segments, media)
