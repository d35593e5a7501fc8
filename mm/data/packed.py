"""Packed shards: the format on disk (docs/formats.md), read by byte range.

    SPLIT/dataset.json      what it was packed for, counts, provenance
    SPLIT/index.parquet     pack -> shard, byte range, counts, checksum
    SPLIT/plan.parquet      which samples make which pack
    SPLIT/packs-000000.tar  per pack KEY.json (layout), KEY.npy (token ids), KEY.N.EXT (media as they came)

The tars are ordinary WebDataset shards. Nothing here is ever pickled. `mm.data.write` writes them.
"""

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm.data.layout import Layout
from mm.data.tokens import COSTS, Segment
from mm.errors import DataError
from mm.page import seconds_of_samples

if TYPE_CHECKING:
    from mm.data.features import Beside

FORMAT_VERSION = 5
OPEN_FILES = 64
DROPPED = "dropped.txt"
ABOUT = ("layout", "settings", "packs", "ledger", "provenance")
TOTALS = ("tokens", "loss_tokens", "metadata_tokens", *COSTS, "audio_samples")
"""What the index sums over the segments of a pack. Samples of sound are counted at the rate of the layout."""
INDEX = pa.schema(
    [
        *((name, pa.int64()) for name in ("pack", "visit")),
        *((name, pa.string()) for name in ("source", "shard")),
        *((name, pa.int64()) for name in ("offset", "length", "segments", *TOTALS)),
        ("checksum", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """A segment's place in its row. `loss`: half-open spans of row positions; `metadata`: one, of what is said of the
    document in front of it."""

    id: str
    source: str
    start: int
    length: int
    loss: tuple[tuple[int, int], ...]
    metadata: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class PackedMedia:
    """Media of a pack: `length` row positions from `position`, in segment number `segment`; encoded bytes.

    `plan`: what decoding is held to: `{"samples": n}` of a recording, `{"times": […]}` of a clip's frames, in seconds,
    `{"grid": [rows, columns]}` of a picture in its own aspect ratio.
    """

    kind: str
    segment: int
    position: int
    length: int
    cost: int
    ext: str
    data: bytes
    plan: dict[str, Any] = field(default_factory=dict)
    features: np.ndarray | None = field(default=None, compare=False)
    """In place of `data` (then empty): what a frozen tower gives for it, [features, D] uint16, the bits of bfloat16."""
    codes: np.ndarray | None = field(default=None, compare=False)
    """Beside `data`: what a teacher says of every position, [length, K] uint16."""
    unreadable: str = ""
    """Why those features or codes are of nothing."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One row before padding. `tokens` int32 [n]; media positions hold the pad id."""

    tokens: np.ndarray
    segments: tuple[PackedSegment, ...]
    media: tuple[PackedMedia, ...]


class _Closable(Protocol):
    def close(self) -> None: ...


class PackReader(Protocol):
    """Reads packs by their place; goes to other processes as it is."""

    def read(self, place: dict[str, Any]) -> Pack: ...

    def text(self, place: dict[str, Any]) -> Pack:
        """At least its tokens and segments, with no more read than that takes."""
        ...

    def close(self) -> None: ...


K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=_Closable)


class Recent(Generic[K, T]):
    """Keeps the files that were used last open and closes the others, so that a set may have more than may be open."""

    def __init__(self, open: Callable[[K], T], most: int) -> None:
        self._open = open
        self._most = most
        self._kept: OrderedDict[K, T] = OrderedDict()

    def __getitem__(self, key: K) -> T:
        if key not in self._kept:
            while len(self._kept) >= self._most:
                self._kept.popitem(last=False)[1].close()
            self._kept[key] = self._open(key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def close(self) -> None:
        while self._kept:
            self._kept.popitem()[1].close()


def join_segments(items: list[tuple[str, str, Segment]]) -> Pack:
    """Place segments one after the other. `items`: (id, source name, segment)."""
    segments: list[PackedSegment] = []
    media: list[PackedMedia] = []
    start = 0
    for number, (id, source, segment) in enumerate(items):
        loss = tuple((start + a, start + b) for a, b in segment.loss)
        metadata = (start + segment.metadata[0], start + segment.metadata[1]) if segment.metadata else None
        segments.append(PackedSegment(id, source, start, len(segment), loss, metadata))
        for one in segment.media:
            place = (start + one.position, one.length, one.cost)
            media.append(PackedMedia(one.kind, number, *place, one.media.ext, one.media.read(), one.plan))
        start += len(segment)
    return Pack(np.concatenate([segment.ids for _, _, segment in items]), tuple(segments), tuple(media))


SEGMENT = tuple(one.name for one in fields(PackedSegment))


def members_of(pack: Pack) -> dict[str, bytes]:
    """The tar members of a pack: extension -> bytes."""
    members: dict[str, bytes] = {}
    media = []
    for number, one in enumerate(pack.media):
        member = f"{number:04d}.{one.ext}"
        members[member] = one.data
        described = {k: getattr(one, k) for k in ("kind", "segment", "position", "length", "cost")}
        media.append({**described, "member": member, **({"plan": one.plan} if one.plan else {})})
    segments = [{k: value for k in SEGMENT if (value := getattr(segment, k)) is not None} for segment in pack.segments]
    layout = {"segments": segments, "media": media}
    ids = io.BytesIO()
    np.save(ids, pack.tokens, allow_pickle=False)
    members["json"] = json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode()
    members["npy"] = ids.getvalue()
    return members


def read_range(file: IO[bytes], offset: int, length: int) -> bytes:
    """The bytes of a file from `offset` on, less than `length` where it ends before."""
    data = os.pread(file.fileno(), length, offset)
    while len(data) < length and (more := os.pread(file.fileno(), length - len(data), offset + len(data))):
        data += more  # the kernel gives at most 2 GB at once
    return data


def checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Reader:
    """Reads packs by their place. Knows the folder alone, so it goes to other processes as it is."""

    remedy = "pack the data set again"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        folder = self.folder  # not self: a circle would keep files open after the reader is gone
        self._files: Recent[str, io.FileIO] = Recent(lambda name: open(folder / name, "rb", buffering=0), OPEN_FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def read(self, place: dict[str, Any]) -> Pack:
        """The pack at a place (see `PackedDataset.place`). Raises `DataError` where its bytes were changed."""
        return self.parse(place, self.bytes_at(place))

    text = read

    def bytes_at(self, place: dict[str, Any]) -> bytes:
        """What a place holds. Raises `DataError` unless that is what was written."""
        pack, path = place["pack"], self.folder / place["shard"]
        data = self._range(place)
        if len(data) != place["length"]:
            raise DataError(f"{path}: truncated: pack {pack} is not all there; {self.remedy}")
        if checksum(data) != place["checksum"]:
            raise DataError(f"{path}: pack {pack} is damaged (its checksum differs); {self.remedy}")
        return data

    def _range(self, place: dict[str, Any]) -> bytes:
        """On a network disk an open file may go stale, so what fails is tried once more from the beginning."""
        shard = place["shard"]
        try:
            return read_range(self._files[shard], place["offset"], place["length"])
        except OSError:
            self._files.close()
        try:
            return read_range(self._files[shard], place["offset"], place["length"])
        except OSError as error:
            raise DataError(f"{self.folder / shard}: cannot be read ({error.strerror})") from None

    def file(self, shard: str) -> IO[bytes]:
        """An open file of the folder."""
        try:
            return self._files[shard]
        except OSError as error:
            raise DataError(f"{self.folder / shard}: cannot be opened ({error.strerror})") from None

    def parse(self, place: dict[str, Any], data: bytes, media: bool = True) -> Pack:
        """A pack from the bytes of its place, or of what comes behind its `media` there."""
        try:
            return parse_pack(data, media)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.folder / place['shard']}: pack {place['pack']} does not follow the packed format "
                f"({type(error).__name__}: {error}); {self.remedy}"
            ) from None

    def close(self) -> None:
        """Close the files that reading has opened; reading opens them again."""
        self._files.close()


def names_of(id: str) -> set[str]:
    """What a segment is meant by: its own id and, without the number of a piece or of a part, that of its sample."""
    parts = id.split("#")
    return {"#".join(parts[:count]) for count in range(1, len(parts) + 1)}


def without(pack: Pack, skip: frozenset[str], pad: int) -> Pack:
    """The pack with the segments of some samples blanked: their places become padding, their media are gone.

    An id stands for all pieces of a sample: `web/000/7` takes `web/000/7#2` with it.
    """
    if not skip:
        return pack
    kept = [n for n, segment in enumerate(pack.segments) if not names_of(segment.id) & skip]
    if len(kept) == len(pack.segments):
        return pack
    new = {old: number for number, old in enumerate(kept)}
    tokens = np.full_like(pack.tokens, pad)
    for segment in (pack.segments[n] for n in kept):
        place = slice(segment.start, segment.start + segment.length)
        tokens[place] = pack.tokens[place]
    media = tuple(replace(one, segment=new[one.segment]) for one in pack.media if one.segment in new)
    return Pack(tokens, tuple(pack.segments[n] for n in kept), media)


class PackedDataset:
    """A packed split, read by pack number. Picklable; every process opens its own files, and few at a time.

    `dropped`: ids of samples that were taken down after packing; what reads the set for use leaves them out.
    """

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
        self.reader: PackReader = Reader(folder)
        self.beside: Beside | None = None
        self.dropped = read_ids(folder / DROPPED) if (folder / DROPPED).exists() else frozenset[str]()

    def __len__(self) -> int:
        return len(self.index)

    def require(
        self,
        layout: Layout,
        context_length: int,
        budgets: Mapping[str, int] = MappingProxyType({}),
        packing: str = "full",
    ) -> None:
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
        if (found := self.about["settings"]["packing"]) != packing:
            wrong.append(f"packing {found} (data.packing is {packing})")
        for name, most in budgets.items():
            if (found := pc.max(self.index[name]).as_py()) > most:
                wrong.append(f"{name} up to {found} a row (data.budgets.{name} is {most})")
        if wrong:
            raise DataError(
                f"{self.folder}: packed for another model: {'; '.join(wrong)}; pack it again with `mm pack`"
            )

    def place(self, pack: int) -> dict[str, Any]:
        """Where a pack is, for its `reader`."""
        row = {name: self.index[name][pack].as_py() for name in ("shard", "offset", "length", "checksum")}
        place = {"pack": pack, **row}
        return place if self.beside is None else self.beside.place(place)

    def read(self, pack: int) -> Pack:
        """One pack. Raises `DataError` when its bytes are not those that were written."""
        return self.reader.read(self.place(pack))

    def kept(self, pack: int, pad: int = 0) -> Pack:
        """One pack, with the samples that were dropped as padding."""
        return without(self.read(pack), self.dropped, pad)

    def text(self, pack: int) -> Pack:
        """One pack as `kept` gives it, for its tokens: its media may be empty."""
        return without(self.reader.text(self.place(pack)), self.dropped, 0)

    def read_beside(self, beside: "Beside | None") -> None:
        """From now on media are read as their features, or with their codes; None: as they are."""
        self.beside = beside
        self.reader = Reader(self.folder) if beside is None else beside.reader(self.folder)

    def drop(self, ids: frozenset[str]) -> None:
        """Leave samples out of everything that reads the set for use; the files stay as they are."""
        self.dropped |= ids

    @property
    def audio_seconds(self) -> float:
        """Of all recordings, over all visits."""
        return seconds_of_samples(self.about, sum(counts["audio_samples"] for counts in self.about["ledger"].values()))

    def source_numbers(self) -> np.ndarray:
        """Of every pack the number of its source, in the order of the ledger."""
        names = pa.array(list(self.about["ledger"]))
        return pc.index_in(self.index["source"], value_set=names).to_numpy()

    def encoder_costs(self) -> np.ndarray:
        """[packs] encoder tokens of all media."""
        return sum(self.index[f"{kind}_cost"].to_numpy() for kind in ("image", "audio", "video"))

    def modality_costs(self) -> np.ndarray:
        """[packs, 4] positions of text, image, audio and video, as a batch's `modality` has them."""
        media = np.stack([self.index[f"{kind}_tokens"].to_numpy() for kind in ("image", "audio", "video")], axis=1)
        if self.about["layout"]["template"].get("around_image"):
            media[:, 0] += 2 * self.index["image"].to_numpy()
        return np.insert(media, 0, self.index["tokens"].to_numpy() - media.sum(axis=1), axis=1)


def read_ids(path: Path) -> frozenset[str]:
    """Sample ids, one a line. Raises `DataError` where there is no such file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected sample ids, one a line")
    # Blanks and what else may be in an id stay.
    return frozenset(filter(None, (line.removesuffix("\r") for line in path.read_text("utf-8-sig").split("\n"))))


def members_in(data: bytes) -> dict[str, bytes]:
    """Tar members by extension. The writer makes plain headers only; `tarfile` would take three times as long."""
    members: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        name, size, kind = data[at : at + 100], data[at + 124 : at + 135], data[at + 156 : at + 157]
        if kind != b"0":
            raise ValueError(f"a tar member of type {kind!r}")
        start = at + 512
        end = start + int(size, 8)
        members[name.rstrip(b"\0").decode().partition(".")[2]] = data[start:end]
        at = start + -(-(end - start) // 512) * 512
    return members


def parse_pack(data: bytes, media: bool = True) -> Pack:
    """The tar members of a pack, back to the pack. What `members_of` has written gives the same pack again.

    Without `media`, those members are not there, and the media have no bytes.
    """
    members = members_in(data)
    tokens = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
    layout = json.loads(members["json"])
    segments = tuple(
        PackedSegment(
            s["id"], s["source"], int(s["start"]), int(s["length"]), tuple((int(a), int(b)) for a, b in s["loss"]),
            (int(s["metadata"][0]), int(s["metadata"][1])) if "metadata" in s else None,
        )
        for s in layout["segments"]
    )  # fmt: skip
    found = tuple(
        PackedMedia(
            m["kind"], int(m["segment"]), int(m["position"]), int(m["length"]), int(m["cost"]),
            m["member"].rpartition(".")[2], members[m["member"]] if media else b"", dict(m.get("plan", {})),
        )
        for m in layout["media"]
    )  # fmt: skip
    if tokens.shape != (sum(segment.length for segment in segments),):
        raise ValueError(
            f"token ids of shape {tokens.shape} for segments of {[segment.length for segment in segments]}"
        )
    return Pack(tokens, segments, found)
