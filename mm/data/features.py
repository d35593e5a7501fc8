"""What a frozen tower gives for the media of a packed split, computed once and read in their place ever after.

    SPLIT/features-FINGERPRINT/features.json            what they are of, counts; written last
    SPLIT/features-FINGERPRINT/index.parquet            pack -> its features, and its text in the packed shard
    SPLIT/features-FINGERPRINT/packs-000000.safetensors the features of all media of packs-000000.tar, bfloat16
    SPLIT/features-FINGERPRINT/parts/000000.index       until all are there: the index of a shard that is whole

The fingerprint is one of everything that decides the numbers: the tower's weights and settings, the pooling, the
transform and the decoder. So features can be out of date in no run: another tower looks for another folder. Where media
come first in a pack and text last, as the writer puts them, what a run with features reads of a packed shard is the
text alone.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.filesize import decimal
from torch import Tensor

from mm.data.batch import Allocate, MediaBatch, Rows, RowSettings, lay_out, new_arrays
from mm.data.layout import Layout
from mm.data.media import Decoder
from mm.data.packed import Pack, PackedDataset, Reader, checksum, members_in, names_of, read_range
from mm.data.plan import Progress
from mm.data.workers import run_workers
from mm.data.write import join_parts, write_part
from mm.errors import ConfigError, DataError
from mm.files import atomic, fsync

FORMAT_VERSION = 1
ABOUT = "features.json"
INDEX = pa.schema(
    [
        ("pack", pa.int64()),
        ("shard", pa.string()),
        *((name, pa.int64()) for name in ("offset", "length")),
        ("checksum", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("text_offset", pa.int64()),
        ("text_checksum", pa.string()),
        ("unreadable", pa.list_(pa.struct([("id", pa.string()), ("reason", pa.string())]))),
    ]
)
BATCH_COST = 1 << 15
"""Encoder tokens that go through the tower at once, and a pack more at most: 45 pictures of 729."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Tower = dict[str, Any]
"""What decides features, in plain JSON values: `weights` (a digest), `decoder`, `layout`, settings of the tower."""
Encode = Callable[[MediaBatch], Tensor]
"""[sum of lengths, width] bfloat16 in host memory, in item order."""


def medium_of(layout: Layout) -> str:
    """The medium whose features a model can read. Raises `ConfigError` where they cannot be computed once."""
    if len(layout.media()) != 1:
        found = ", ".join(layout.media()) or "none"
        raise ConfigError(f"data.features is for models of text and one other medium; this one takes {found}")
    (medium,) = layout.media()
    transform = getattr(getattr(layout, medium), "transform", None)
    if transform is not None and (transform.crop < 1 or transform.flip):
        raise ConfigError(
            f"data.features: {medium}s are cut or mirrored anew each time, and features are computed once; "
            "set model.vision.crop=1 model.vision.flip=false, or data.features=false"
        )
    return medium


def describe(layout: Layout, medium: str, decoder: Decoder, settings: dict[str, Any], weights: str) -> Tower:
    """A `Tower` from its settings and a digest of its weights."""
    about = asdict(getattr(layout, medium))
    for drawn in ("crop", "flip"):
        about.get("transform", {}).pop(drawn, None)
    found = {"medium": medium, "layout": about, **settings, "decoder": decoder, "weights": weights}
    return json.loads(json.dumps(found))


def fingerprint(tower: Tower) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, tower], sort_keys=True).encode()).hexdigest()[:16]


class Features:
    """The features of a packed split, as they lie on disk; `PackedDataset.read_features` puts them to use."""

    def __init__(self, folder: Path, packs: int) -> None:
        self.folder = folder
        again = "remove the folder and make it again with `mm data encode`"
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self._index = pq.read_table(folder / "index.parquet", page_checksum_verification=True)
            if self.about["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{folder}: features of format {self.about['format_version']}, this version of mm reads "
                    f"{FORMAT_VERSION}; {again}"
                )
            self.medium: str = self.about["medium"]
            self.width: int = self.about["width"]
            whole = self._index.schema.equals(INDEX)
            whole = whole and np.array_equal(self._index["pack"].to_numpy(), np.arange(packs))
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{folder}: {ABOUT} or index.parquet is damaged ({reason}); {again}") from None
        if not whole:
            raise DataError(f"{folder}: index.parquet is not of the {packs} packs beside it; {again}")

    def place(self, place: dict[str, Any]) -> dict[str, Any]:
        """Where a pack is, for a `FeatureReader`, from where it is in the packed shard."""
        found: dict[str, Any] = self._index.slice(place["pack"], 1).to_pylist()[0]
        text = {
            **place,
            "offset": place["offset"] + found["text_offset"],
            "length": place["length"] - found["text_offset"],
            "checksum": found["text_checksum"],
        }
        return {"pack": place["pack"], "text": text, "features": found}

    def reader(self, packs: Path) -> "FeatureReader":
        return FeatureReader(Reader(packs), FeatureShards(self.folder), self.medium, self.width)


class FeatureShards(Reader):
    """The files of features, read by the place of a pack's."""

    remedy = "remove the folder and make it again with `mm data encode`"


@dataclass(frozen=True, slots=True)
class FeatureReader:
    """Reads packs whose media have `features` in place of bytes."""

    packs: Reader
    shards: FeatureShards
    medium: str
    width: int

    def read(self, place: dict[str, Any]) -> Pack:
        """Raises `DataError` where text or features are not what was written."""
        found = place["features"]
        pack = self.text(place)
        features = np.frombuffer(self.shards.bytes_at(found), dtype="<u2").reshape(-1, self.width)
        if sum(one.kind == self.medium for one in pack.media) != len(found["items"]):
            raise DataError(f"{self.shards.folder}: pack {place['pack']} has other media now; {self.shards.remedy}")
        ends = iter(np.cumsum(found["items"]).tolist())
        reasons = {one["id"]: one["reason"] for one in found["unreadable"]}
        media = []
        start = 0
        for one in pack.media:
            if one.kind == self.medium:
                end = next(ends)
                reason = reasons.pop(pack.segments[one.segment].id, "")  # one says so for all of a segment
                one = replace(one, features=features[start:end], unreadable=reason)
                start = end
            media.append(one)
        return replace(pack, media=tuple(media))

    def text(self, place: dict[str, Any]) -> Pack:
        """Media are empty."""
        return self.packs.parse(place["text"], self.packs.bytes_at(place["text"]), media=False)

    def close(self) -> None:
        self.packs.close()
        self.shards.close()


def find(dataset: PackedDataset, tower: Tower) -> Features:
    """The features of a split by this very tower. Raises `DataError` that says what is there instead."""
    folder = dataset.folder / f"features-{fingerprint(tower)}"
    if (folder / ABOUT).exists():
        return Features(folder, len(dataset))
    if folder.exists():
        raise DataError(f"{folder}: is not whole; `mm data encode` goes on where it stopped")
    require_any(dataset)
    others = [json.loads(path.read_text(encoding="utf-8"))["tower"] for path in _sets(dataset.folder)]
    differs = min((_differences(other, tower) for other in others), key=len)
    raise DataError(
        f"{dataset.folder}: its features are of another tower: {'; '.join(differs)}; make this one's with "
        "`mm data encode`"
    )


def require_any(dataset: PackedDataset) -> None:
    """Raise `DataError` for a split without a whole set of features, whatever tower they would have to be of."""
    if not _sets(dataset.folder):
        raise DataError(
            f"{dataset.folder}: has no features of a frozen tower, or none that are whole; make them with "
            "`mm data encode CONFIG`, or set data.features=false"
        )


def _sets(split: Path) -> list[Path]:
    return sorted(split.glob(f"features-*/{ABOUT}"))


def _differences(have: Any, want: Any, name: str = "") -> list[str]:
    if isinstance(have, dict) and isinstance(want, dict):
        return [
            line
            for key in sorted({*have, *want})
            for line in _differences(have.get(key), want.get(key), f"{name}.{key}" if name else key)
        ]
    if have == want:
        return []
    return ["other weights"] if name == "weights" else [f"{name} {json.dumps(have)} (the run has {json.dumps(want)})"]


@dataclass(frozen=True, slots=True)
class _Decode:
    """Reads and decodes some packs; runs in a worker."""

    reader: Reader
    settings: RowSettings

    def __call__(self, places: list[dict[str, Any]], allocate: Allocate) -> Rows:
        return lay_out([self.reader.read(place) for place in places], self.settings, allocate=allocate)


class Encoding:
    """Computing the features of one split. Its items are packed shards, each done whole or not at all, so a killed one
    goes on, and several processes can share the work.

    Args:
        dataset: with its media as they are.
        width: of the tower's features.
        encode: runs the tower.
        about: what `features.json` says besides.
        workers: processes that decode.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        layout: Layout,
        tower: Tower,
        width: int,
        encode: Encode,
        about: dict[str, Any],
        workers: int = 0,
        progress: Progress = lambda what, n: None,
    ) -> None:
        self.dataset, self.tower, self.width = dataset, tower, width
        self.medium: str = tower["medium"]
        self.folder = dataset.folder / f"features-{fingerprint(tower)}"
        self._encode, self._about, self._workers, self._progress = encode, about, workers, progress
        self._reader = Reader(dataset.folder)
        self._packs = 0
        # A picture that cannot be read is one of zeros, as in a run; its reason goes along.
        settings = RowSettings(layout, None, quarantine=True, decoder=tower["decoder"])
        self._decode = _Decode(self._reader, settings)
        self._costs = dataset.index[f"{self.medium}_cost"].to_numpy()
        self._positions = dataset.index[f"{self.medium}_tokens"].to_numpy()
        found = groupby(enumerate(dataset.index["shard"].to_pylist()), key=lambda one: one[1])
        self._shards = [(name, [pack for pack, _ in packs]) for name, packs in found]

    @property
    def items(self) -> int:
        """Media in the split."""
        return int(self.dataset.index[self.medium].to_numpy().sum())

    @property
    def size(self) -> int:
        """Bytes of all features."""
        return int(self._positions.sum()) * self.width * 2

    def finished(self) -> bool:
        return (self.folder / ABOUT).exists()

    def missing(self) -> int:
        """Bytes that are still to be written."""
        if self.finished():
            return 0
        left = [packs for number, (_, packs) in enumerate(self._shards) if not self._is_done(number)]
        return sum(int(self._positions[packs].sum()) for packs in left) * self.width * 2

    def run(self, slice: tuple[int, int] = (0, 1)) -> bool:
        """Do what is not done of slice (i, n); True when the features are there, False while others have work left.

        Raises `DataError` when the disk has no room for them.
        """
        if self.finished():
            return True
        missing, free = self.missing(), shutil.disk_usage(self.dataset.folder).free
        if missing > free:
            raise DataError(
                f"{self.folder}: {decimal(missing)} of features are to be written and the disk has "
                f"{decimal(free)} left; free some space, or pack onto another disk (data.cache=DIR, or mm pack --out)"
            )
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        which, of = slice
        try:
            for number in range(which, len(self._shards), of):
                if not self._is_done(number):
                    self._write(number)
            if not all(map(self._is_done, range(len(self._shards)))):
                return self.finished()  # another process may have tidied up
            self._finish()
        except OSError as error:
            if self.finished():
                return True
            if isinstance(error, FileNotFoundError):
                raise DataError(
                    f"{self.folder}: another process writes the same shards; give each a --slice of its own"
                ) from None
            if error.errno not in FULL:
                raise
            done = sum(map(self._is_done, range(len(self._shards))))
            raise DataError(
                f"{self.folder}: the disk is full; {done} of {len(self._shards)} shards are whole: free some space and "
                "run the same command again"
            ) from None
        return True

    def _part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:06d}.index"

    def _is_done(self, number: int) -> bool:
        return self._part(number).exists() and (self.folder / self._name(number)).exists()

    def _name(self, number: int) -> str:
        return f"{Path(self._shards[number][0]).stem}.safetensors"

    def _write(self, number: int) -> None:
        _, packs = self._shards[number]
        for left in (self.folder / "parts").glob(f".{self._name(number)}.*"):
            left.unlink()  # by a killed process; nobody else writes this shard
        features = int(self._positions[packs].sum())
        entries: list[dict[str, Any]] = []
        with atomic(self.folder / self._name(number), self.folder / "parts") as file:
            at = file.write(_header(self.medium, features, self.width))
            for one, data in self._encoded(packs):
                entries.append({**one, "shard": self._name(number), "offset": at, "length": len(data)})
                at += file.write(data)
                self._packs += 1
                self._progress(f"encoding {self.medium}s of packs", self._packs)
        assert sum(one["length"] for one in entries) == features * self.width * 2, "one feature a position"
        write_part(self._part(number), pa.Table.from_pylist(entries, schema=INDEX))

    def _encoded(self, packs: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Of each pack its entry in the index, but for where its features lie, and those."""
        groups = self._groups(packs)
        made: Any = (
            run_workers(self._decode, groups, self._workers)
            if self._workers
            else ((group, self._decode(group, new_arrays)) for group in groups)
        )
        with contextlib.closing(made):
            for group, rows in made:
                batch = rows.batch()
                media = batch.media.get(self.medium)
                # Position by position, item by item: all of a pack's are beside each other.
                lengths = [[] for _ in group] if media is None else _by_row(media.row, media.length, len(group))
                features = np.empty((0, self.width), dtype=np.uint16) if media is None else self._bits(media)
                start = 0
                for place, items, ids in zip(group, lengths, batch.ids, strict=True):
                    data = features[start : start + sum(items)].tobytes()
                    start += sum(items)
                    offset, text = _text_of(self._reader, place)
                    reasons = {id: reason for id, reason in batch.bad if id in ids and not self._is_dropped(id)}
                    yield (
                        {
                            "pack": place["pack"],
                            "checksum": checksum(data),
                            "items": items,
                            "text_offset": offset,
                            "text_checksum": checksum(text),
                            "unreadable": [{"id": id, "reason": reason} for id, reason in reasons.items()],
                        },
                        data,
                    )
                del rows, batch, media  # a worker's memory, to be used again

    def _bits(self, media: MediaBatch) -> np.ndarray:
        features = self._encode(media)
        assert features.shape == (media.positions, self.width) and features.dtype == torch.bfloat16, features.shape
        return features.contiguous().view(torch.int16).numpy()

    def _groups(self, packs: list[int]) -> Iterator[list[dict[str, Any]]]:
        group: list[dict[str, Any]] = []
        cost = 0
        for pack in packs:
            group.append(self.dataset.place(pack))
            cost += int(self._costs[pack])
            if cost >= BATCH_COST:
                yield group
                group, cost = [], 0
        if group:
            yield group

    def _is_dropped(self, id: str) -> bool:
        return bool(names_of(id) & self.dataset.dropped)

    def _finish(self) -> None:
        index = self.folder / "index.parquet"
        join_parts(self.folder, "index", len(self._shards), INDEX, index)
        found = pq.read_table(index)
        about = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(self.tower),
            "medium": self.medium,
            "dtype": "bfloat16",
            "width": self.width,
            "items": self.items,
            "features": int(self._positions.sum()),
            "unreadable": sum(map(len, found["unreadable"].to_pylist())),
            "tower": self.tower,
            **self._about,
        }
        with atomic(self.folder / ABOUT, self.folder / "parts") as file:
            file.write(f"{json.dumps(about, indent=2, ensure_ascii=False)}\n".encode())
        fsync(self.folder)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


def _header(name: str, features: int, width: int) -> bytes:
    """Of a safetensors file with one tensor (huggingface.co/docs/safetensors)."""
    tensor = {"dtype": "BF16", "shape": [features, width], "data_offsets": [0, features * width * 2]}
    text = json.dumps({name: tensor}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _by_row(row: Tensor, length: Tensor, rows: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(rows)]
    for number, one in zip(row.tolist(), length.tolist(), strict=True):
        found[number].append(one)
    return found


def _text_of(packs: Reader, place: dict[str, Any]) -> tuple[int, bytes]:
    """Where in a pack its text begins, behind all media, and its bytes. Reads the headers of media, not the media."""
    file, at, text = packs.file(place["shard"]), 0, b""
    with contextlib.suppress(ValueError, IndexError):  # of damaged headers
        while at < place["length"]:
            head = read_range(file, place["offset"] + at, 512)
            if head[:100].rstrip(b"\0").endswith(b".json"):
                text = read_range(file, place["offset"] + at, place["length"] - at)
                break
            at += 512 + -(-int(head[124:135], 8) // 512) * 512
    if not text or members_in(text).keys() != {"json", "npy"}:
        raise DataError(
            f"{packs.folder / place['shard']}: pack {place['pack']} has media behind its text; pack the data set again"
        )
    return at, text


def erase(split: Path, packs: list[int], ids: frozenset[str]) -> None:
    """Overwrite the features of some samples with zeros, in all sets of features beside a split, in the packs that hold
    them and from which they are erased already. Doing it twice gives the same files."""
    dataset, reader = PackedDataset(split), Reader(split)
    for folder in split.glob("features-*"):
        if not (folder / ABOUT).exists():
            shutil.rmtree(folder)  # `mm data encode` begins it anew, without them
            continue
        index = pq.read_table(folder / "index.parquet")
        about, entries = json.loads((folder / ABOUT).read_text()), index.to_pylist()
        for number in packs:
            entry, pack = entries[number], dataset.read(number)
            gone = {n for n, segment in enumerate(pack.segments) if names_of(segment.id) & ids}
            media = [one for one in pack.media if one.kind == about["medium"]]
            with open(folder / entry["shard"], "r+b") as file:
                at = entry["offset"]
                for one, length in zip(media, entry["items"], strict=True):
                    if one.segment in gone:
                        os.pwrite(file.fileno(), bytes(length * about["width"] * 2), at)
                    at += length * about["width"] * 2
                os.fsync(file.fileno())
                entry["checksum"] = checksum(read_range(file, entry["offset"], entry["length"]))
            entry["text_checksum"] = checksum(_text_of(reader, dataset.place(number))[1])
        with atomic(folder / "index.parquet") as file:
            pq.write_table(
                pa.Table.from_pylist(entries, schema=INDEX), file, compression="zstd", write_page_checksum=True
            )
