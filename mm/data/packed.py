"""Packed shards: the format on disk (docs/formats.md), written whole or not at all, read by byte range.

    SPLIT/dataset.json      what it was packed for, counts, provenance
    SPLIT/index.parquet     pack -> shard, byte range, counts, checksum
    SPLIT/plan.parquet      which samples make which pack
    SPLIT/packs-000000.tar  per pack KEY.json (layout), KEY.npy (token ids), KEY.N.EXT (media as they came)

The tars are ordinary WebDataset shards. Nothing here is ever pickled.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
OPEN_FILES = 64
ABOUT = ("layout", "settings", "packs", "ledger", "provenance")
INDEX = pa.schema(
    [
        *((name, pa.int64()) for name in ("pack", "visit")),
        *((name, pa.string()) for name in ("source", "shard")),
        *(
            (name, pa.int64())
            for name in ("offset", "length", "segments", "tokens", "loss_tokens", "image", "image_cost")
        ),
        ("checksum", pa.string()),
    ]
)


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

    Returns the contents of its `dataset.json`. The same input gives the same bytes. Whatever goes wrong, a full disk
    included (`OSError`), leaves nothing behind.
    """
    plan = make_plan(sources, layout, settings, progress)
    partial = _partial_folder(out)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            about = _write_split(partial, plan, sources, layout, settings, provenance, progress)
            partial.rename(out)
            _fsync(out.parent)
        except OSError as error:
            if (out / "dataset.json").is_file():  # another process finished the same set first
                return PackedDataset(out).about
            if error.filename is None:
                error.filename = str(out)  # a failed write does not know of which file
            raise
    return about


def _partial_folder(out: Path) -> Path:
    """Where `out` is written until it is whole. Removes what processes of this machine that are no more have left."""
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = left.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    return out.with_name(f"{prefix}{os.getpid()}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _write_split(
    folder: Path,
    plan: Plan,
    sources: list[Source],
    layout: Layout,
    settings: PackSettings,
    provenance: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    plan.write(folder / "plan.parquet")
    index = _write_shards(folder, plan, sources, layout, settings, progress)
    pq.write_table(index, folder / "index.parquet", compression="zstd", write_page_checksum=True)
    if plan.bad:
        lines = (json.dumps({"id": id, "reason": reason}, ensure_ascii=False) for id, reason in plan.bad)
        (folder / "quarantine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    row_tokens = plan.packs * settings.context_length
    tokens = sum(counts["segment_tokens"] for counts in plan.ledger.values())
    about = {
        "format_version": FORMAT_VERSION,
        "fingerprint": layout.fingerprint(),
        "layout": layout.describe(),
        "settings": asdict(settings),
        "packs": plan.packs,
        "tokens": tokens,
        "row_tokens": row_tokens,
        "padding": row_tokens - tokens,
        "fill": round(tokens / row_tokens, 6),
        "ledger": plan.ledger,
        "provenance": provenance,
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in (*folder.iterdir(), folder):
        _fsync(file)
    return about


def _write_shards(
    folder: Path, plan: Plan, sources: list[Source], layout: Layout, settings: PackSettings, progress: Progress
) -> pa.Table:
    """Write the tars; returns the index. Its counts and checksums are those of what was written, not of the plan."""
    import webdataset as wds

    index: list[dict[str, Any]] = []
    with contextlib.closing(_Recent(lambda path: Shard(Path(path)), OPEN_SHARDS)) as shards:
        for number, packs in groupby(_by_pack(plan), key=lambda pack: pack[0] // PACKS_PER_SHARD):
            name = f"packs-{number:06d}.tar"
            entries = []
            with wds.TarWriter(str(folder / name), user="mm", group="mm", mode=0o644, mtime=0) as writer:
                for pack, rows in packs:
                    made = _make_pack(rows, shards, sources, layout, settings)
                    start = writer.tarstream.offset
                    writer.write({"__key__": f"{pack:08d}", **_members(made)})
                    length = writer.tarstream.offset - start
                    position = {"pack": pack, "shard": name, "offset": start, "length": length}
                    entries.append({**position, "visit": rows[0]["visit"], **_counts(made)})
                    progress("writing packs", pack + 1)
            with open(folder / name, "rb") as file:
                for entry in entries:
                    entry["checksum"] = checksum(os.pread(file.fileno(), entry["length"], entry["offset"]))
            index += entries
    return pa.Table.from_pylist(index, schema=INDEX)


def _counts(pack: Pack) -> dict[str, Any]:
    images = [media for media in pack.media if media.kind == "image"]
    return {
        "source": pack.segments[0].source,
        "segments": len(pack.segments),
        "tokens": len(pack.tokens),
        "loss_tokens": sum(b - max(a, one.start + 1) for one in pack.segments for a, b in one.loss),
        "image": len(images),
        "image_cost": sum(media.cost for media in images),
    }


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class _Recent(Generic[T]):
    """Keeps the files that were used last open and closes the others, so that a set may have more than may be open."""

    def __init__(self, open: Callable[[str], T], most: int) -> None:
        self._open = open
        self._most = most
        self._kept: OrderedDict[str, T] = OrderedDict()

    def __getitem__(self, name: str) -> T:
        if name not in self._kept:
            while len(self._kept) >= self._most:
                self._kept.popitem(last=False)[1].close()
            self._kept[name] = self._open(name)
        self._kept.move_to_end(name)
        return self._kept[name]

    def close(self) -> None:
        while self._kept:
            self._kept.popitem()[1].close()


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
    rows: list[dict[str, Any]],
    shards: _Recent[Shard],
    sources: list[Source],
    layout: Layout,
    settings: PackSettings,
) -> Pack:
    items = []
    for row in rows:
        samples = sources[row["source"]].samples(group_of(row, shards[row["shard"]]))
        sample = next((sample for sample in samples if sample.id == row["id"]), None)
        segment = None if sample is None else segment_of(sample, layout, settings, row["visit"])
        if sample is None or segment is None or len(segment) != row["tokens"]:
            raise DataError(
                f"{row['id']} in {row['shard']}: not as long as when the plan was made; the shard changed meanwhile: "
                "pack again"
            )
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
            media.append(PackedMedia(one.kind, number, start + one.position, one.length, one.cost, part.ext, part.data))
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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _opener(folder: Path) -> _Recent[io.FileIO]:
    # Knows the folder and not the data set: a circle between the two would keep files open after the set is gone.
    return _Recent(lambda shard: open(folder / shard, "rb", buffering=0), OPEN_FILES)


class PackedDataset:
    """A packed split, read by pack number. Picklable; every process opens its own files, and few at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            self.index = pq.read_table(folder / "index.parquet", page_checksum_verification=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            lacks = Path(error.filename).name if error.filename else "index.parquet"
            raise DataError(f"{folder}: not a packed data set ({lacks} is missing)") from None
        except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # not the file's fault; for damaged pages pyarrow raises an OSError without a number
            reason = str(error).partition("\n")[0]
            raise DataError(f"{folder}: dataset.json or index.parquet is damaged ({reason}); pack it again") from None
        version = self.about.get("format_version") if isinstance(self.about, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder}: packed format {version}, this version of mm reads {FORMAT_VERSION}; pack it again"
            )
        missing = {*ABOUT} - {*self.about}
        if missing:
            raise DataError(f"{folder}: dataset.json lacks {min(missing)}; pack it again")
        if not self.index.schema.equals(INDEX):
            raise DataError(f"{folder}: index.parquet has other columns than a packed set's; pack it again")
        if self.about["packs"] != len(self.index):
            raise DataError(
                f"{folder}: dataset.json counts {self.about['packs']} packs, index.parquet {len(self.index)}; "
                "pack it again"
            )
        self._files = _opener(folder)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = _opener(self.folder)

    def close(self) -> None:
        """Close the files that reading has opened; reading opens them again."""
        self._files.close()

    def require(self, layout: Layout, context_length: int, budgets: Mapping[str, int] = MappingProxyType({})) -> None:
        """Raise `DataError`, naming what differs, unless this set was packed for this model and obeys these budgets."""
        have, want = self.about["layout"], layout.describe()
        wrong = [
            f"{name} {json.dumps(have.get(name), ensure_ascii=False)} (the model has {json.dumps(value)})"
            for name, value in want.items()
            if have.get(name) != value
        ]
        packed_length = self.about["settings"]["context_length"]
        if packed_length != context_length:
            wrong.append(f"context_length {packed_length} (data.context_length is {context_length})")
        for name, most in budgets.items():
            if (found := pc.max(self.index[name]).as_py()) > most:
                wrong.append(f"{name} up to {found} a row (data.budgets.{name} is {most})")
        if wrong:
            raise DataError(
                f"{self.folder}: packed for another model: {'; '.join(wrong)}; pack it again with `mm pack`"
            )

    def read(self, pack: int) -> Pack:
        """One pack. Raises `DataError` when its bytes are not those that were written."""
        row = {name: self.index[name][pack].as_py() for name in ("shard", "offset", "length", "checksum")}
        path = self.folder / row["shard"]
        try:
            file = self._files[row["shard"]]
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror})") from None
        data = os.pread(file.fileno(), row["length"], row["offset"])
        if len(data) != row["length"]:
            raise DataError(f"{path}: truncated: pack {pack} is not all there; pack the data set again")
        if checksum(data) != row["checksum"]:
            raise DataError(f"{path}: pack {pack} is damaged (its checksum differs); pack the data set again")
        try:
            return _parse(data)
        except (LookupError, TypeError, ValueError, AttributeError, tarfile.TarError) as error:
            raise DataError(
                f"{path}: pack {pack} does not follow the packed format ({type(error).__name__}: {error}); "
                "pack the data set again"
            ) from None


def _parse(data: bytes) -> Pack:
    """The tar members of a pack, back to the pack. What `_members` has written gives the same pack again."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            members[info.name.partition(".")[2]] = data[info.offset_data : info.offset_data + info.size]
    tokens = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
    layout = json.loads(members["json"])
    segments = tuple(
        PackedSegment(
            s["id"], s["source"], int(s["start"]), int(s["length"]), tuple((int(a), int(b)) for a, b in s["loss"])
        )
        for s in layout["segments"]
    )
    media = tuple(
        PackedMedia(
            m["kind"], int(m["segment"]), int(m["position"]), int(m["length"]), int(m["cost"]),
            m["member"].rpartition(".")[2], members[m["member"]],
        )
        for m in layout["media"]
    )  # fmt: skip
    if tokens.shape != (sum(segment.length for segment in segments),):
        raise ValueError(
            f"token ids of shape {tokens.shape} for segments of {[segment.length for segment in segments]}"
        )
    return Pack(tokens, segments, media)
