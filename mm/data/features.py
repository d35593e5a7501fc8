"""What a frozen network says of the media of a packed split, computed once and read in its place ever after: a row of
numbers for every position, or of some towers so many for every item. There are two roles. *Features* of a frozen tower
are bfloat16 numbers that are read in place of media; *codes* of a teacher are whole numbers below 65,536 that are read
beside them.

    SPLIT/codes-FINGERPRINT/codes.json                what they are of, counts; written last
    SPLIT/codes-FINGERPRINT/index.parquet             pack -> its codes, and its text in the packed shard
    SPLIT/codes-FINGERPRINT/packs-000000.safetensors  the codes of all media of packs-000000.tar
    SPLIT/codes-FINGERPRINT/parts/000000.index        until all are there: the index of a shard that is whole

The fingerprint is one of everything that decides the numbers, their *origin*: weights and settings of the network, the
layout of the medium and its decoder. So they can be out of date in no run: another network looks for another folder.
Where media come first in a pack and text last, as the writer puts them, what a run with features reads of a packed
shard is the text alone.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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

FORMAT_VERSION = 3
INDEX = pa.schema(
    [
        ("pack", pa.int64()),
        ("shard", pa.string()),
        *((name, pa.int64()) for name in ("offset", "length")),
        ("checksum", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("text_offset", pa.int64()),
        ("text_checksum", pa.string()),
        ("unreadable", pa.list_(pa.struct([("item", pa.int32()), ("id", pa.string()), ("reason", pa.string())]))),
    ]
)
BATCH_COST = 1 << 15
"""Encoder tokens that go through the network at once, and a pack more at most: 45 pictures of 729, 7 min at 75 Hz."""
MOST_CODES = 1 << 16
"""Of a codebook."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NAMES = {"image": "images", "audio": "recordings", "video": "clips"}
"""Of several of a medium, for people."""

Origin = dict[str, Any]
"""What decides the numbers, in plain JSON values: `medium`, `layout`, `weights` (a digest), settings of the network."""
Encode = Callable[[MediaBatch], Tensor]
"""[sum of rows, width] in host memory, in item order: bfloat16 features, or codes in any type of whole numbers."""


@dataclass(frozen=True, slots=True)
class Role:
    """What is stored, in 2 bytes a number. `name`: of folders, of the file that says what is in them, of the field of
    `PackedMedia` and of the setting in `data`."""

    name: str
    dtype: str
    """As safetensors has it."""
    maker: str
    replaces_media: bool

    def folder(self, split: Path, origin: Origin) -> Path:
        return split / f"{self.name}-{fingerprint(origin)}"

    @property
    def about(self) -> str:
        """The file that is written last."""
        return f"{self.name}.json"

    def sets(self, split: Path) -> list[Path]:
        """The folders of whole sets beside a split."""
        return sorted(path.parent for path in split.glob(f"{self.name}-*/{self.about}"))


FEATURES = Role("features", "BF16", "a frozen tower", replaces_media=True)
CODES = Role("codes", "U16", "a teacher", replaces_media=False)
ROLES = (FEATURES, CODES)


def medium_of(layout: Layout) -> str:
    """The medium whose features a model can read. Raises `ConfigError` where they cannot be computed once."""
    if len(layout.media()) != 1:
        found = ", ".join(layout.media()) or "none"
        raise ConfigError(f"data.features is for models of text and one other medium; this one takes {found}")
    (medium,) = layout.media()
    require_same_each_time(layout, medium, FEATURES)
    return medium


def require_same_each_time(layout: Layout, medium: str, role: Role) -> None:
    """Raise `ConfigError` where the model does not see the same of a medium each time, or takes none of it."""
    if medium not in layout.media():
        found = ", ".join(layout.media()) or "none"
        raise ConfigError(f"data.{role.name}: {role.maker} of {medium}, and the model takes {found}")
    transform = getattr(getattr(layout, medium), "transform", None)
    if transform is not None and (transform.crop < 1 or transform.flip):
        raise ConfigError(
            f"data.{role.name}: {NAMES[medium]} are cut or mirrored anew each time, and {role.name} are computed once; "
            f"set model.vision.crop=1 model.vision.flip=false, or data.{role.name}=false"
        )


def describe(layout: Layout, medium: str, decoder: Decoder, settings: Mapping[str, Any], weights: str) -> Origin:
    """An `Origin` from the settings of a network and a digest of its weights."""
    about = asdict(getattr(layout, medium))
    for spelt in ("alone", "learned"):  # what rows do with it
        about.pop(spelt, None)
    for drawn in ("crop", "flip"):
        about.get("transform", {}).pop(drawn, None)
    decoding = {} if medium == "audio" else {"decoder": decoder}  # there is one decoder of sound
    return json.loads(json.dumps({"medium": medium, "layout": about, **settings, **decoding, "weights": weights}))


def fingerprint(origin: Origin) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, origin], sort_keys=True).encode()).hexdigest()[:16]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors by name, to the last bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


class Beside:
    """A set of features or codes as it lies beside a packed split; `PackedDataset.read_beside` puts it to use."""

    def __init__(self, folder: Path, role: Role, packs: int) -> None:
        self.folder, self.role = folder, role
        again = "remove the folder and make it again with `mm data encode`"
        try:
            self.about: dict[str, Any] = json.loads((folder / role.about).read_text(encoding="utf-8"))
            self._index = pq.read_table(folder / "index.parquet", page_checksum_verification=True)
            if self.about["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{folder}: {role.name} of format {self.about['format_version']}, this version of mm reads "
                    f"{FORMAT_VERSION}; {again}"
                )
            self.medium: str = self.about["medium"]
            self.width: int = self.about["width"]
            whole = self._index.schema.equals(INDEX)
            whole = whole and np.array_equal(self._index["pack"].to_numpy(), np.arange(packs))
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{folder}: {role.about} or index.parquet is damaged ({reason}); {again}") from None
        if not whole:
            raise DataError(f"{folder}: index.parquet is not of the {packs} packs beside it; {again}")

    def place(self, place: dict[str, Any]) -> dict[str, Any]:
        """Where a pack is, for a `BesideReader`, from where it is in the packed shard."""
        found: dict[str, Any] = self._index.slice(place["pack"], 1).to_pylist()[0]
        text = {
            **place,
            "offset": place["offset"] + found["text_offset"],
            "length": place["length"] - found["text_offset"],
            "checksum": found["text_checksum"],
        }
        return {"pack": place["pack"], "whole": place, "text": text, "beside": found}

    def reader(self, packs: Path) -> "BesideReader":
        return BesideReader(Reader(packs), BesideShards(self.folder), self.role, self.medium, self.width)


class BesideShards(Reader):
    """The files of a set, read by the place of a pack's numbers."""

    remedy = "remove the folder and make it again with `mm data encode`"


@dataclass(frozen=True, slots=True)
class BesideReader:
    """Reads packs whose media have `features` in place of their bytes, or `codes` beside them."""

    packs: Reader
    shards: BesideShards
    role: Role
    medium: str
    width: int

    def read(self, place: dict[str, Any]) -> Pack:
        """Raises `DataError` where packs or numbers are not what was written."""
        found = place["beside"]
        pack = self.text(place) if self.role.replaces_media else self.packs.read(place["whole"])
        values = np.frombuffer(self.shards.bytes_at(found), dtype="<u2").reshape(-1, self.width)
        if sum(one.kind == self.medium for one in pack.media) != len(found["items"]):
            raise DataError(f"{self.shards.folder}: pack {place['pack']} has other media now; {self.shards.remedy}")
        edges = np.cumsum([0, *found["items"]]).tolist()
        reasons = {one["item"]: one["reason"] for one in found["unreadable"]}
        media = []
        item = 0
        for one in pack.media:
            if one.kind == self.medium:
                mine: dict[str, Any] = {self.role.name: values[edges[item] : edges[item + 1]]}
                one = replace(one, **mine, unreadable=reasons.get(item, ""))
                item += 1
            media.append(one)
        return replace(pack, media=tuple(media))

    def text(self, place: dict[str, Any]) -> Pack:
        """Media are empty."""
        return self.packs.parse(place["text"], self.packs.bytes_at(place["text"]), media=False)

    def close(self) -> None:
        self.packs.close()
        self.shards.close()


def find(dataset: PackedDataset, role: Role, origin: Origin) -> Beside:
    """The set of a split by this very network. Raises `DataError` that says what is there instead."""
    folder = role.folder(dataset.folder, origin)
    if (folder / role.about).exists():
        return Beside(folder, role, len(dataset))
    if folder.exists():
        raise DataError(f"{folder}: is not whole; `mm data encode` goes on where it stopped")
    require_any(dataset, role)
    abouts = [json.loads((one / role.about).read_text(encoding="utf-8")) for one in role.sets(dataset.folder)]
    differs = min((_what_differs(about, origin) for about in abouts), key=len)
    raise DataError(
        f"{dataset.folder}: its {role.name} are of another {role.maker.split()[-1]}: {'; '.join(differs)}; make this "
        "one's with `mm data encode`"
    )


def require_any(dataset: PackedDataset, role: Role) -> None:
    """Raise `DataError` for a split without a whole set, whatever it would have to be of."""
    if not role.sets(dataset.folder):
        raise DataError(
            f"{dataset.folder}: has no {role.name} of {role.maker}, or none that are whole; make them with "
            f"`mm data encode CONFIG`, or set data.{role.name}=false"
        )


def _what_differs(about: dict[str, Any], origin: Origin) -> list[str]:
    if about["format_version"] != FORMAT_VERSION:
        return [f"format {about['format_version']} (this version of mm reads {FORMAT_VERSION})"]
    return _differences(about["origin"], origin)


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
    """Reads some packs and decodes one medium of theirs; runs in a worker."""

    reader: Reader
    settings: RowSettings
    medium: str

    def __call__(self, places: list[dict[str, Any]], allocate: Allocate) -> Rows:
        packs = [self.reader.read(place) for place in places]
        packs = [replace(pack, media=tuple(m for m in pack.media if m.kind == self.medium)) for pack in packs]
        return lay_out(packs, self.settings, allocate=allocate)


class Encoding:
    """Computing the features or codes of one split. Its items are packed shards, each done whole or not at all, so a
    killed one goes on, and several processes can share the work.

    Args:
        dataset: with its media as they are.
        width: numbers in a row.
        rows: of every item; None: as many as it has positions.
        encode: runs the network.
        about: what the set's JSON file says besides.
        workers: processes that decode.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        layout: Layout,
        role: Role,
        origin: Origin,
        width: int,
        encode: Encode,
        about: dict[str, Any],
        workers: int = 0,
        progress: Progress = lambda what, n: None,
        rows: int | None = None,
    ) -> None:
        self.dataset, self.role, self.origin, self.width, self.rows = dataset, role, origin, width, rows
        self.medium: str = origin["medium"]
        self.folder = role.folder(dataset.folder, origin)
        self._encode, self._about, self._workers, self._progress = encode, about, workers, progress
        self._reader = Reader(dataset.folder)
        self._packs = 0
        # A picture that cannot be read is one of zeros, as in a run; its reason goes along.
        settings = RowSettings(layout, None, quarantine=True, decoder=origin.get("decoder", "exact"))
        self._decode = _Decode(self._reader, settings, self.medium)
        self._costs = dataset.index[f"{self.medium}_cost"].to_numpy()
        positions, items = (dataset.index[name].to_numpy() for name in (f"{self.medium}_tokens", self.medium))
        self._rows = positions if rows is None else items * rows
        found = groupby(enumerate(dataset.index["shard"].to_pylist()), key=lambda one: one[1])
        self._shards = [(name, [pack for pack, _ in packs]) for name, packs in found]

    @property
    def items(self) -> int:
        """Media in the split."""
        return int(self.dataset.index[self.medium].to_numpy().sum())

    @property
    def size(self) -> int:
        """Bytes of all numbers."""
        return int(self._rows.sum()) * self.width * 2

    def finished(self) -> bool:
        return (self.folder / self.role.about).exists()

    def unreadable(self) -> int:
        """Media that could not be decoded, once the set is there."""
        return int(json.loads((self.folder / self.role.about).read_text(encoding="utf-8"))["unreadable"])

    def missing(self) -> int:
        """Bytes that are still to be written."""
        if self.finished():
            return 0
        left = [packs for number, (_, packs) in enumerate(self._shards) if not self._is_done(number)]
        return sum(int(self._rows[packs].sum()) for packs in left) * self.width * 2

    def run(self, slice: tuple[int, int] = (0, 1)) -> bool:
        """Do what is not done of slice (i, n); True when the set is there, False while others have work left.

        Raises `DataError` when the disk has no room for it.
        """
        if self.finished():
            return True
        missing, free = self.missing(), shutil.disk_usage(self.dataset.folder).free
        if missing > free:
            raise DataError(
                f"{self.folder}: {decimal(missing)} of {self.role.name} are to be written and the disk has "
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
        rows = int(self._rows[packs].sum())
        entries: list[dict[str, Any]] = []
        with atomic(self.folder / self._name(number), self.folder / "parts") as file:
            at = file.write(_header(self.medium, self.role.dtype, rows, self.width))
            for one, data in self._encoded(packs):
                entries.append({**one, "shard": self._name(number), "offset": at, "length": len(data)})
                at += file.write(data)
                self._packs += 1
                self._progress(f"encoding {NAMES[self.medium]} of packs", self._packs)
        assert sum(one["length"] for one in entries) == rows * self.width * 2, "as many rows of numbers as planned"
        write_part(self._part(number), pa.Table.from_pylist(entries, schema=INDEX))

    def _encoded(self, packs: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Of each pack its entry in the index, but for where its numbers lie, and those."""
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
                values = np.empty((0, self.width), dtype=np.uint16) if media is None else self._bits(media)
                items, unreadable = self._items(media, batch.bad, len(group))
                start = 0
                # Row by row, item by item: all of a pack's are beside each other.
                for place, lengths, reasons in zip(group, items, unreadable, strict=True):
                    data = values[start : start + sum(lengths)].tobytes()
                    start += sum(lengths)
                    offset, text = _text_of(self._reader, place)
                    yield (
                        {
                            "pack": place["pack"],
                            "checksum": checksum(data),
                            "items": lengths,
                            "text_offset": offset,
                            "text_checksum": checksum(text),
                            "unreadable": reasons,
                        },
                        data,
                    )
                del rows, batch, media  # a worker's memory, to be used again

    def _items(
        self, media: MediaBatch | None, bad: tuple[tuple[str, str], ...], packs: int
    ) -> tuple[list[list[int]], list[list[dict[str, Any]]]]:
        """Of each pack the rows of its items, and which of them could not be read, but for those taken down."""
        lengths: list[list[int]] = [[] for _ in range(packs)]
        unreadable: list[list[dict[str, Any]]] = [[] for _ in range(packs)]
        if media is None:
            return lengths, unreadable
        reasons = iter(bad)  # in the order of the items, of which there is one medium
        each = zip(media.row.tolist(), media.length.tolist(), media.unreadable.tolist(), strict=True)
        for row, length, is_bad in each:
            if is_bad:
                id, reason = next(reasons)
                if not names_of(id) & self.dataset.dropped:
                    unreadable[row].append({"item": len(lengths[row]), "id": id, "reason": reason})
            lengths[row].append(self.rows or length)
        return lengths, unreadable

    def _bits(self, media: MediaBatch) -> np.ndarray:
        """[rows, width] uint16."""
        values = self._encode(media)
        expected = media.positions if self.rows is None else len(media) * self.rows
        assert values.shape == (expected, self.width), values.shape
        if self.role == FEATURES:
            assert values.dtype == torch.bfloat16, values.dtype
            return values.contiguous().view(torch.int16).numpy().view(np.uint16)
        codes = values.numpy()
        assert codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() < MOST_CODES, "codes are whole numbers"
        codes = codes.astype(np.uint16)
        codes[np.repeat(media.unreadable.numpy(), media.length.numpy())] = 0
        return codes

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

    def _finish(self) -> None:
        index = self.folder / "index.parquet"
        join_parts(self.folder, "index", len(self._shards), INDEX, index)
        found = pq.read_table(index)
        about = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(self.origin),
            "medium": self.medium,
            "dtype": self.role.dtype,
            "width": self.width,
            "items": self.items,
            "rows": int(self._rows.sum()),
            "unreadable": sum(map(len, found["unreadable"].to_pylist())),
            "origin": self.origin,
            **self._about,
        }
        with atomic(self.folder / self.role.about, self.folder / "parts") as file:
            file.write(f"{json.dumps(about, indent=2, ensure_ascii=False)}\n".encode())
        fsync(self.folder)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


def _header(name: str, dtype: str, rows: int, width: int) -> bytes:
    """Of a safetensors file with one tensor (huggingface.co/docs/safetensors)."""
    tensor = {"dtype": dtype, "shape": [rows, width], "data_offsets": [0, rows * width * 2]}
    text = json.dumps({name: tensor}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


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
    """Overwrite the features and codes of some samples with zeros, in all sets beside a split, in the packs that hold
    them and from which they are erased already. Doing it twice gives the same files."""
    dataset, reader = PackedDataset(split), Reader(split)
    for role in ROLES:
        for folder in split.glob(f"{role.name}-*"):
            if (folder / role.about).exists():
                _erase(folder, role, dataset, reader, packs, ids)
            else:
                shutil.rmtree(folder)  # `mm data encode` begins it anew, without them


def _erase(
    folder: Path, role: Role, dataset: PackedDataset, reader: Reader, packs: list[int], ids: frozenset[str]
) -> None:
    about = json.loads((folder / role.about).read_text())
    entries = pq.read_table(folder / "index.parquet").to_pylist()
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
        pq.write_table(pa.Table.from_pylist(entries, schema=INDEX), file, compression="zstd", write_page_checksum=True)
