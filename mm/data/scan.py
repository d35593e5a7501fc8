"""Scanning: one shard in, its segments out, as an Arrow file that planning and writing work from.

A scan reads media headers and tokenises text; it decodes nothing. Of every segment it keeps all that a pack will hold,
media apart: those stay where they are, by file and byte range, if that is a plain tar or a file of their own on this
machine. What cannot be found again that way (base64 in JSON, rows of tables, gzipped or remote shards) is copied into a
file beside the scan, so that writing packs reads at random from local files only.

    000012.arrow   a row per segment (SEGMENTS)
    000012.media   media that have no place of their own
    000012.json    counts and bad samples; written last: without it there is no scan
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from mm.data.chat import is_chat
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.sample import Sample, Visible, keyed_rng
from mm.data.shards import Extent, Placed, Stale
from mm.data.sources import Source, sample_id
from mm.data.tables import Lost
from mm.data.tokens import (
    COSTS,
    DoesNotFit,
    Segment,
    SegmentMedia,
    Unit,
    costs_of,
    join_units,
    learned_after_media,
    read_units,
    split_turns,
    split_units,
    window_of,
    with_meta_tokens,
)
from mm.errors import DataError
from mm.files import atomic

BATCH, BATCH_TOKENS = 1024, 1 << 22  # what is kept of segments before it is written, whichever comes first
COUNTED = ("tokens", "loss_tokens", "inserted_tokens", "metadata_tokens", *COSTS)
MEDIUM = pa.struct(
    [
        *((name, pa.string()) for name in ("kind", "ext", "plan", "file")),
        *((name, pa.int32()) for name in ("position", "length", "cost")),
        *((name, pa.int64()) for name in ("offset", "size", "modified")),
        ("copied", pa.bool_()),
    ]
)
SEGMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("visit", pa.int32()),
        *((name, pa.int32()) for name in COUNTED),
        ("audio_samples", pa.int64()),
        ("media_bytes", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("loss", pa.list_(pa.int32())),
        ("metadata", pa.list_(pa.int32())),
        ("media", pa.list_(MEDIUM)),
    ]
)
LEDGER = (
    "samples", "filtered", "quarantined", "left_out", "no_metadata", "pieces", "too_long", "too_long_tokens",
    "unlearned", "unlearned_tokens", "segments", "segment_tokens", "text_tokens",
    *(f"{kind}{what}" for kind in ("image", "audio", "video") for what in ("", "_tokens")),
    "audio_samples",
    "inserted_tokens", "metadata_tokens", "loss_tokens", "masked_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackSettings:
    """What decides a packed set, besides the sources and the layout."""

    context_length: int
    budgets: dict[str, int]
    visits: int
    seed: int
    too_long: str
    max_bad_fraction: float
    limits: Limits
    packing: Literal["full", "single"] = "full"

    @property
    def capacities(self) -> dict[str, int]:
        """What a row holds at most: `tokens`, and the budgets by name."""
        return {"tokens": self.context_length, **self.budgets}


class Scan:
    """A finished scan; `segments` is mapped from disk."""

    def __init__(self, path: Path) -> None:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.ledger: dict[str, int] = about["ledger"]
        self.bad: list[dict[str, str]] = about["bad"]
        self.segments: pa.Table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.shard, self.state = Path(about["shard"]), about["state"]
        """The file that media lie in unless they were copied, and what it looked like."""
        self.copies = path.with_suffix(".media")

    def check_unchanged(self) -> None:
        if file_state(self.shard) != self.state:
            raise Stale(f"{self.shard}: was changed after it had been scanned; pack the data set again")


def file_state(path: Path) -> list[int]:
    """Size and time of change, by which a file is recognised."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def is_scanned(path: Path) -> bool:
    return all(path.with_suffix(ext).exists() for ext in (".json", ".arrow", ".media"))


def scan_shard(
    path: Path,
    source: Source,
    local: Path,
    name: str,
    stays: bool,
    layout: Layout,
    settings: PackSettings,
    progress: Callable[[int], None] = lambda samples: None,
    cached: bool = False,
) -> None:
    """Scan the shard in the file `local` into `path` (`….arrow`).

    `name` is what it is called in sample ids; `stays`: packs can be written from that very file later; `cached`: it is
    one of a cache, whose time of change is that of its last use.

    The result is there whole or not at all, and the same whenever it is made. Raises `DataError` for a sample that
    cannot be used under `max_bad_fraction = 0`, and for one longer than a row under `too_long = "error"`.
    """
    ledger = dict.fromkeys(LEDGER, 0)
    bad: list[dict[str, str]] = []
    state = file_state(local)
    with contextlib.ExitStack() as files:
        copies = files.enter_context(atomic(path.with_suffix(".media")))
        table = files.enter_context(pa.ipc.new_file(files.enter_context(atomic(path)), SEGMENTS))
        rows = _Rows(table, copies, stays)
        for id, found in _samples(source, local, name, settings.limits):
            try:
                if isinstance(found, DataError):
                    raise found
                segments, counts = _segments(found, layout, settings)
            except DataError as error:
                if settings.max_bad_fraction == 0 or isinstance(error, TooLong | Lost):
                    raise
                bad.append({"id": id, "reason": str(error)})
                segments, counts = [], {"quarantined": 1}
            rows.add(segments)
            for what, count in counts.items():
                ledger[what] += count
            ledger["samples"] += 1
            progress(ledger["samples"])
        rows.flush()
    parts = slice(1) if cached else slice(None)
    if file_state(local)[parts] != state[parts]:
        raise DataError(f"{local}: was changed while it was read; pack the data set again")
    about = {"shard": str(local.absolute()), "state": state, "ledger": ledger, "bad": bad}
    with atomic(path.with_suffix(".json")) as file:
        file.write(json.dumps(about, ensure_ascii=False).encode())


class TooLong(DataError):
    """A sample longer than a row, where the config says that there are none. It does not count as unreadable."""


def _samples(source: Source, local: Path, name: str, limits: Limits) -> Iterator[tuple[str, Sample | DataError | None]]:
    """Every sample of a shard with its id; why it cannot be used, if so; None for one that the source leaves out."""
    try:
        shard = source.open(str(local), limits)
    except DataError as error:
        yield f"{source.name}/{name}", error
        return
    with shard:
        shard.name = name
        for group in shard.groups():
            if isinstance(group, DataError):
                yield f"{source.name}/{name}", group
                continue
            if not source.holds(group):
                continue
            id = sample_id(source.name, group)
            is_empty = True
            try:
                for sample in source.samples(group, limits):
                    is_empty = False
                    yield sample.id, sample if sample.parts else None
            except DataError as error:
                yield id, error
            else:
                if is_empty:
                    yield id, None


def _segments(
    sample: Sample | None, layout: Layout, settings: PackSettings
) -> tuple[list[tuple[str, int, Segment]], dict[str, int]]:
    """The segments of all visits of a sample as (id, visit, segment), and what the ledger says of them.

    A visit has one segment, several where it is split, none where it is too long and dropped. What is nothing but
    metadata to the loss, such as a piece of pictures alone, is dropped, too.
    """
    if sample is None:
        return [], {"filtered": 1}
    found: list[tuple[str, int, Segment]] = []
    counts = dict.fromkeys(LEDGER, 0) | {"left_out": sample.left_out}
    counts["no_metadata"] = int(sample.metadata is not None and not sample.metadata.text)
    read: tuple[Visible, ...] = ()
    document: list[Unit] = []
    meta, capacities = layout.meta_tokens, settings.capacities
    if meta is not None:  # they are put in last, where there is room for them
        capacities["tokens"] = meta.room(settings.context_length)
    for visit in range(settings.visits):
        parts = sample.drawn(settings.seed, visit)
        if len(parts) != len(read) or not all(map(is_, parts, read)):  # else another window of the same
            read, document = parts, read_units(parts, layout, sample.id, settings.limits)
        units = document
        if sample.window is not None:
            rng = keyed_rng(settings.seed, visit, sample.id, "window")
            units = window_of(units, sample.window, rng, sample.id)
        if sample.learn_after_media:  # of what is seen: the medium that a text follows may be outside of it
            units = learned_after_media(units)
        whole = join_units(units)
        costs = {"tokens": len(whole), **costs_of(whole.media)}
        over = [name for name, most in capacities.items() if costs[name] > most]
        pieces = [whole]
        if over and settings.too_long == "error":
            setting = "data.context_length" if over[0] == "tokens" else f"data.budgets.{over[0]}"
            beside = " beside meta-tokens" if over[0] == "tokens" and meta is not None else ""
            most = settings.capacities[over[0]]
            raise TooLong(
                f"{sample.id}: {costs[over[0]]} {over[0]} do not fit in {setting} = {most}{beside}; "
                "raise it, or split or leave out such samples with data.too_long=split or drop"
            )
        if over:
            pieces = []
        if over and settings.too_long == "split":
            with contextlib.suppress(DoesNotFit):
                if is_chat(parts):
                    pieces = split_turns(parts, layout, sample.id, settings.limits, capacities)
                else:
                    pieces = split_units(units, sample.id, capacities)
        if not pieces:
            counts["too_long"] += 1
            counts["too_long_tokens"] += len(whole)
        counts["pieces"] += max(0, len(pieces) - 1)
        for number, piece in enumerate(pieces):
            if piece.metadata and not piece.loss_tokens:
                counts["unlearned"] += 1
                counts["unlearned_tokens"] += len(piece)
                continue
            id = sample.id if len(pieces) == 1 else f"{sample.id}#{number}"
            if meta is not None:
                piece = with_meta_tokens(piece, layout, keyed_rng(settings.seed, visit, id, "meta-tokens"))
            found.append((id, visit, piece))
    for _, _, segment in found:
        row = counts_of(segment)
        counts["segments"] += 1
        counts["segment_tokens"] += row["tokens"]
        counts["text_tokens"] += row["tokens"] - sum(row[f"{kind}_tokens"] for kind in ("image", "audio", "video"))
        counts["masked_tokens"] += row["tokens"] - row["loss_tokens"]
        for name in row.keys() & counts.keys():
            counts[name] += row[name]
    return found, counts


def counts_of(segment: Segment) -> dict[str, int]:
    """Tokens and media of a segment, by the names that the plan and the index have for them."""
    return {
        "tokens": len(segment),
        "loss_tokens": segment.loss_tokens,
        "inserted_tokens": segment.inserted,
        "metadata_tokens": segment.metadata_tokens,
        **costs_of(segment.media),
        "audio_samples": sum(one.plan["samples"] for one in segment.media if one.kind == "audio"),
    }


class _Rows:
    """Segments on their way into the table, some at a time."""

    def __init__(self, out: pa.RecordBatchFileWriter, copies: IO[bytes], stays: bool) -> None:
        self._out, self._copies, self._stays = out, copies, stays
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0

    def add(self, segments: list[tuple[str, int, Segment]]) -> None:
        """All segments of one sample: its media are copied once for all visits."""
        copied: dict[int, int] = {}
        for id, visit, segment in segments:
            media = [self._medium(one, copied) for one in segment.media]
            self._rows.append(
                {
                    "id": id,
                    "visit": visit,
                    **counts_of(segment),
                    "media_bytes": round(sum(one.media.size * one.plan.get("part", 1) for one in segment.media)),
                    "ids": segment.ids,
                    "loss": [edge for span in segment.loss for edge in span],
                    "metadata": segment.metadata or [],
                    "media": media,
                }
            )
            self._tokens += len(segment)
        if len(self._rows) >= BATCH or self._tokens >= BATCH_TOKENS:
            self.flush()

    def _medium(self, one: SegmentMedia, copied: dict[int, int]) -> dict[str, Any]:
        data = one.media.data
        in_place = isinstance(data, Placed) or (self._stays and isinstance(data, Extent))
        if not in_place and id(data) not in copied:
            copied[id(data)] = self._copies.tell()
            self._copies.write(one.media.read())
        return {
            "kind": one.kind,
            "ext": one.media.ext,
            "plan": json.dumps(one.plan) if one.plan else "",
            "file": data.path if isinstance(data, Placed) else None,
            "modified": data.modified if isinstance(data, Placed) else None,
            "position": one.position,
            "length": one.length,
            "cost": one.cost,
            "offset": data.offset if in_place and isinstance(data, Extent | Placed) else copied[id(data)],
            "size": one.media.size,
            "copied": not in_place,
        }

    def flush(self) -> None:
        if not self._rows:
            return
        columns = {name: [row[name] for row in self._rows] for name in SEGMENTS.names}
        arrays = [
            _lists(columns[name]) if name == "ids" else pa.array(columns[name], type=SEGMENTS.field(name).type)
            for name in SEGMENTS.names
        ]
        self._out.write_batch(pa.record_batch(arrays, schema=SEGMENTS))
        self._rows.clear()
        self._tokens = 0


def _lists(values: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))
