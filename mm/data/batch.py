"""PackedBatch: the only thing a model ever sees.

Axes: B rows, L positions, N media items, n_i values of item i. Media are ragged (flat values, shapes, offsets), so that
native aspect ratios and clips of any length need no padding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.audio import decode_audio
from mm.data.layout import Layout
from mm.data.media import Decoder, decode_image
from mm.data.packed import Pack, PackedMedia
from mm.data.sample import keyed_rng, keyed_seed
from mm.data.video import decode_video
from mm.errors import DataError

MODALITIES = {"text": 0, "image": 1, "audio": 2, "video": 3}
IGNORE = -100
ROWS = {
    "input_ids": np.int64, "labels": np.int64, "segment_ids": np.int32, "position_ids": np.int64, "modality": np.uint8,
}  # fmt: skip


class _Tensors:
    """Moves all tensors of a dataclass, but for fields that are marked `host`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        return self._each(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Keep the memory until what a stream has been given so far is done."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._each(record)

    def _each(self, change: Any) -> Any:
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: apply(one) for key, one in value.items()}
            if isinstance(value, _Tensors):
                return value._each(change)
            return change(value) if isinstance(value, Tensor) else value

        changed = {
            field.name: apply(getattr(self, field.name))
            for field in fields(self)  # type: ignore[arg-type]
            if not field.metadata.get("host")
        }
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class MediaBatch(_Tensors):
    """All items of one medium in a batch.

    values: float32 [sum n_i]; item i is `values[offsets[i]:offsets[i + 1]].view(shapes[i])`, [C, H, W] for pictures.
    shapes and offsets stay in host memory: what a tower runs on depends on them.
    row, position, length: int64 [N], the row positions that item i takes; cost: int64 [N] encoder tokens.
    unreadable: bool [N], in host memory: items that could not be read, zeros in their place; no loss depends on them.
    features: [sum length, D] in item order where what the tower gives is known already (`GenerativeSystem.features`),
        else None; `values` may then be empty. Of towers that say so (`FeatureShape.rows`) there are as many rows of
        each item, whatever its length.
    codes: int32 [sum length, K] in item order, what a teacher says of every position, where that is known already.
    dummy: not data; see `with_dummies`. positions: the sum of length, known without asking the device.
    """

    values: Tensor
    shapes: Tensor = field(metadata={"host": True})
    offsets: Tensor = field(metadata={"host": True})
    row: Tensor
    position: Tensor
    length: Tensor
    cost: Tensor
    features: Tensor | None = None
    codes: Tensor | None = None
    unreadable: Tensor = field(default=None, metadata={"host": True})  # type: ignore[assignment]
    dummy: bool = False
    positions: int = -1

    def __post_init__(self) -> None:
        if self.unreadable is None:
            object.__setattr__(self, "unreadable", torch.zeros(len(self.row), dtype=torch.bool))
        if self.positions < 0 or self.length.device.type == "cpu":
            object.__setattr__(self, "positions", int(self.length.sum()))

    def __len__(self) -> int:
        return len(self.row)

    def stacked(self) -> Tensor:
        """[N, C, H, W] when all items have one shape."""
        shape = self.shapes[0]
        if not bool((self.shapes == shape).all()):
            raise ValueError("items differ in shape; this tower takes one size")
        return self.values.view(len(self), *shape.tolist())

    def items(self) -> list[Tensor]:
        """The values of every item in its own shape."""
        values = self.values.split(self.shapes.prod(1).tolist())
        return [one.view(shape) for one, shape in zip(values, self.shapes.tolist(), strict=True)]

    def feature_rows(self, features: Tensor) -> list[int]:
        """How many rows of features each item has; see `features`."""
        return self.length.tolist() if len(features) == self.positions else [len(features) // len(self)] * len(self)

    def slots(self, row_length: int) -> Tensor:
        """int64 [sum length]: flat positions (row * L + position) of all placeholders, in item order."""
        starts = self.row * row_length + self.position
        items = torch.arange(len(self), device=starts.device)
        item = torch.repeat_interleave(items, self.length, output_size=self.positions)
        first = torch.cumsum(self.length, 0) - self.length
        return starts[item] + torch.arange(len(item), device=starts.device) - first[item]


@dataclass(frozen=True, slots=True)
class PackedBatch(_Tensors):
    """B packed rows of L positions; see the table in docs/design.md.

    input_ids int64 [B, L]; labels int64 [B, L], already shifted, -100 where there is no loss; segment_ids int32 [B, L],
    0 = padding; position_ids int64 [B, L], restarting at every segment (running, where segments are not isolated);
    modality uint8 [B, L]; draws: int64 [B], in host memory, a key for each row, from which models draw what they draw
    in training, so that nothing of it depends on how a step is split; media by name; ids: sample ids, row by row;
    bad: (id, reason) of items quarantined in place; sources: the source of each row, "" of a row of padding; targets:
    how many labels are not -100, known without asking the device.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    modality: Tensor
    media: dict[str, MediaBatch]
    ids: list[list[str]]
    draws: Tensor = field(default=None, metadata={"host": True})  # type: ignore[assignment]
    isolate_segments: bool = True
    bad: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()
    targets: int = -1

    def __post_init__(self) -> None:
        if self.draws is None:
            object.__setattr__(self, "draws", torch.zeros(len(self.labels), dtype=torch.int64))
        if self.targets < 0 or self.labels.device.type == "cpu":
            object.__setattr__(self, "targets", int((self.labels != IGNORE).sum()))

    def learned(self) -> Tensor:
        """int64 [K]: flat positions (row * L + position) whose label is not -100, in order."""
        return torch.nonzero_static(self.labels.flatten() != IGNORE, size=self.targets)[:, 0]

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segment_ids > 0).sum())


def with_dummies(batch: PackedBatch, layout: Layout) -> PackedBatch:
    """The batch with all media that the model takes, in one order: of those that it has none of, one item of zeros.

    Where towers are sharded, every rank has to run each of them as often as the others, and in the same order.
    `mm.models.system.place` leaves a dummy's features without effect, and its tower with a gradient of zero. Where
    features are read (`layout.features`), a dummy has those, and no tower runs.
    """
    device = batch.input_ids.device
    return replace(
        batch,
        media={
            kind: batch.media[kind] if kind in batch.media else _dummy(layout, kind).to(device)
            for kind in layout.media()
        },
    )


def _dummy(layout: Layout, kind: str) -> MediaBatch:
    shape, length, cost = layout.smallest(kind)
    features = None
    if kind in layout.features:
        given = layout.features[kind]
        shape, features = (0,) * len(shape), torch.zeros(given.count(length), given.width, dtype=torch.bfloat16)
    return MediaBatch(
        values=torch.zeros(math.prod(shape)),
        shapes=torch.tensor([shape]),
        offsets=torch.tensor([0, math.prod(shape)]),
        row=torch.zeros(1, dtype=torch.int64),
        position=torch.zeros(1, dtype=torch.int64),
        length=torch.tensor([length]),
        cost=torch.tensor([cost]),
        features=features,
        dummy=True,
    )


def select_rows(batch: PackedBatch, rows: Sequence[int]) -> PackedBatch:
    """Some rows of a batch, in the order given, as a batch: of each medium the items in them, if any, without dummies.

    Which these are is asked of the device.
    """
    at = {row: number for number, row in enumerate(rows)}
    index = torch.tensor(rows, dtype=torch.int64)
    on_device = index.to(batch.labels.device)
    media = {kind: _in_rows(one, at) for kind, one in batch.media.items() if not one.dummy}
    ids = [batch.ids[row] for row in rows]
    return replace(
        batch,
        **{name: getattr(batch, name)[on_device] for name in ROWS},
        draws=batch.draws[index],
        media={kind: one for kind, one in media.items() if len(one)},
        ids=ids,
        bad=tuple((id, reason) for id, reason in batch.bad if any(id in row for row in ids)),
        sources=tuple(batch.sources[row] for row in rows),
        targets=-1,
    )


def _in_rows(media: MediaBatch, at: dict[int, int]) -> MediaBatch:
    """The items of rows that are keys of `at`, each in the row that it says there."""
    placed = sorted((at[row], item) for item, row in enumerate(media.row.tolist()) if row in at)
    items = torch.tensor([item for _, item in placed], dtype=torch.int64)
    sizes, lengths = media.shapes.prod(1), media.length.tolist()
    device = media.row.device
    on_device = items.to(device)

    def pieces(values: Tensor, sizes: list[int]) -> Tensor:
        split = values.split(sizes)
        return torch.cat([values[:0], *(split[item] for _, item in placed)])

    return replace(
        media,
        values=pieces(media.values, sizes.tolist()),
        shapes=media.shapes[items],
        offsets=F.pad(sizes[items].cumsum(0), (1, 0)),
        row=torch.tensor([row for row, _ in placed], dtype=torch.int64, device=device),
        **{name: getattr(media, name)[on_device] for name in ("position", "length", "cost")},
        features=None if media.features is None else pieces(media.features, media.feature_rows(media.features)),
        codes=None if media.codes is None else pieces(media.codes, lengths),
        unreadable=media.unreadable[items],
        positions=-1,
    )


Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of every array of a batch, by name."""
Allocate = Callable[[Shapes], dict[str, np.ndarray]]
"""New arrays, their values undefined."""


def new_arrays(shapes: Shapes) -> dict[str, np.ndarray]:
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}


@dataclass(slots=True)
class Rows:
    """A batch before it is tensors: plain arrays, which a worker can lay into shared memory.

    `arrays`: `input_ids`, … as in `PackedBatch`, and `KIND.values`, `KIND.shapes`, … as in `MediaBatch`. Of any
    `KIND.features` there are the bits of bfloat16 numbers, as uint16: numpy has no type for them.
    """

    arrays: dict[str, np.ndarray]
    ids: list[list[str]]
    isolate_segments: bool
    bad: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()

    def batch(self) -> "PackedBatch":
        """The same arrays as tensors, without a copy."""
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        media: dict[str, dict[str, Tensor]] = {}
        for name in list(tensors):
            kind, dot, column = name.partition(".")
            if dot:
                tensor = tensors.pop(name)
                media.setdefault(kind, {})[column] = tensor.view(torch.bfloat16) if column == "features" else tensor
        batches = {kind: MediaBatch(**columns) for kind, columns in media.items()}  # type: ignore[arg-type]
        return PackedBatch(
            **tensors,  # type: ignore[arg-type]
            media=batches,
            ids=self.ids,
            isolate_segments=self.isolate_segments,
            bad=self.bad,
            sources=self.sources,
        )


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How packs become rows."""

    layout: Layout
    row_length: int | None
    """None: as long as the longest of the batch."""
    isolate_segments: bool = True
    quarantine: bool = False
    """A damaged medium becomes zeros in a segment without loss, in place, so that the order of the data never shifts;
    without it, it raises `DataError`."""
    decoder: Decoder = "exact"


def collate(
    packs: list[Pack],
    layout: Layout,
    row_length: int | None,
    isolate_segments: bool = True,
    quarantine: bool = False,
    decoder: Decoder = "exact",
    draws: list[tuple[int, int]] | None = None,
) -> PackedBatch:
    """Decode media and lay packs out as rows; `Pack`s without segments are rows of padding.

    `draws` is a key for each row, from which whatever is drawn in training (crops, masks) derives; without it nothing
    is drawn here, and models draw from the ids of the samples.
    Raises `DataError` for damaged media, unless they are to be quarantined in place.
    """
    return lay_out(packs, RowSettings(layout, row_length, isolate_segments, quarantine, decoder), draws).batch()


def lay_out(
    packs: list[Pack],
    settings: RowSettings,
    draws: list[tuple[int, int]] | None = None,
    allocate: Allocate = new_arrays,
) -> Rows:
    """`collate`, into arrays from `allocate`, which is asked once."""
    media: dict[str, list[tuple[int, PackedMedia]]] = {}
    for row, pack in enumerate(packs):
        for one in pack.media:
            media.setdefault(one.kind, []).append((row, one))
    where = {id(one): packs[row].segments[one.segment].id for items in media.values() for row, one in items}
    shapes = {
        kind: [
            (0, 0, 0) if one.features is not None else decoded_shape(one, settings.layout, where[id(one)])
            for _, one in items
        ]
        for kind, items in media.items()
    }
    row_length = settings.row_length or max(8, *(len(pack.tokens) for pack in packs))
    given: dict[str, list[np.ndarray]] = {}
    codes: dict[str, list[np.ndarray]] = {}
    wanted: Shapes = {name: ((len(packs), row_length), dtype) for name, dtype in ROWS.items()}
    for kind, items in media.items():
        wanted[f"{kind}.values"] = ((sum(map(math.prod, shapes[kind])),), np.float32)
        wanted[f"{kind}.shapes"] = ((len(items), len(shapes[kind][0])), np.int64)
        wanted[f"{kind}.offsets"] = ((len(items) + 1,), np.int64)
        wanted |= {f"{kind}.{name}": ((len(items),), np.int64) for name in ("row", "position", "length", "cost")}
        wanted[f"{kind}.unreadable"] = ((len(items),), np.bool_)
        given[kind] = [one.features for _, one in items if one.features is not None]
        if given[kind]:
            wanted[f"{kind}.features"] = ((sum(map(len, given[kind])), given[kind][0].shape[1]), np.uint16)
        codes[kind] = [one.codes for _, one in items if one.codes is not None]
        if codes[kind]:
            wanted[f"{kind}.codes"] = ((sum(map(len, codes[kind])), codes[kind][0].shape[1]), np.int32)
    wanted["draws"] = ((len(packs),), np.int64)
    arrays = allocate(wanted)
    _lay_tokens(packs, settings, arrays)
    for row, pack in enumerate(packs):
        ids = [segment.id for segment in pack.segments]
        arrays["draws"][row] = 0 if not ids else keyed_seed("row", *(ids if draws is None else draws[row]))
    bad: list[tuple[str, str]] = []
    for kind, items in media.items():
        values, offsets = arrays[f"{kind}.values"], arrays[f"{kind}.offsets"]
        arrays[f"{kind}.shapes"][:] = shapes[kind]
        offsets[0] = 0
        np.cumsum(list(map(math.prod, shapes[kind])), out=offsets[1:])
        if given[kind]:
            np.concatenate(given[kind], out=arrays[f"{kind}.features"])
        if codes[kind]:
            np.concatenate(codes[kind], out=arrays[f"{kind}.codes"], casting="safe")
        for number, (row, one) in enumerate(items):
            for name, value in (("row", row), ("position", one.position), ("length", one.length), ("cost", one.cost)):
                arrays[f"{kind}.{name}"][number] = value
            out = values[offsets[number] : offsets[number + 1]].reshape(shapes[kind][number])
            arrays[f"{kind}.unreadable"][number] = False
            rng = None if draws is None else keyed_rng("crop", *draws[row], one.position)
            try:
                if one.unreadable:
                    raise DataError(one.unreadable)
                if one.features is None:
                    decode(one, settings, where[id(one)], out, rng)
            except DataError as error:
                if not settings.quarantine:
                    raise
                bad.append((where[id(one)], str(error)))
                arrays[f"{kind}.unreadable"][number] = True
                out[:] = 0
                segment = packs[row].segments[one.segment]
                arrays["labels"][row, max(0, segment.start - 1) : segment.start + segment.length] = IGNORE
    found = [[segment.id for segment in pack.segments] for pack in packs]
    sources = tuple(pack.segments[0].source if pack.segments else "" for pack in packs)
    return Rows(arrays, found, settings.isolate_segments, tuple(bad), sources)


def _lay_tokens(packs: list[Pack], settings: RowSettings, arrays: dict[str, np.ndarray]) -> None:
    ids, labels, segment_ids, positions, modality = (arrays[name] for name in ROWS)
    meta = settings.layout.meta_tokens
    ids[:] = settings.layout.pad
    labels[:] = IGNORE
    for array in (segment_ids, positions, modality):
        array[:] = 0
    for row, pack in enumerate(packs):
        n = len(pack.tokens)
        if n > ids.shape[1]:
            raise DataError(f"{pack.segments[0].id}: its pack of {n} tokens does not fit in rows of {ids.shape[1]}")
        ids[row, :n] = pack.tokens
        positions[row, :n] = np.arange(n)
        before = np.arange(n)  # the position that predicts what follows a position
        if meta is not None:
            silent = pack.tokens == meta.id
            silent[[segment.start for segment in pack.segments]] = False
            before = np.maximum.accumulate(np.where(silent, 0, before))
        for number, segment in enumerate(pack.segments):
            stop = segment.start + segment.length
            segment_ids[row, segment.start : stop] = number + 1
            if settings.isolate_segments:
                positions[row, segment.start : stop] -= segment.start
            for a, b in segment.loss:
                first = max(a, segment.start + 1)
                labels[row, before[first - 1 : b - 1]] = ids[row, first:b]
        for one in pack.media:
            modality[row, settings.layout.span(one.kind, one.position, one.length)] = MODALITIES[one.kind]


def decoded_shape(media: PackedMedia, layout: Layout, where: str) -> tuple[int, ...]:
    """[C, H, W] of a picture, [T] of a recording, [F, C, H, W] of a clip, known before decoding."""
    if media.kind == "image" and layout.image is not None:
        return layout.image.shape(media.plan)
    if media.kind == "audio" and layout.audio is not None:
        return (media.plan["samples"],)
    if media.kind == "video" and layout.video is not None:
        return (len(media.plan["times"]), *layout.video.shape()[1:])
    raise DataError(f"{where}: the model takes no {media.kind}")


def decode(
    media: PackedMedia, settings: RowSettings, where: str, out: np.ndarray, rng: np.random.Generator | None = None
) -> None:
    """The float32 values of one medium into `out`. `rng` draws crops and mirroring of pictures and frames."""
    layout = settings.layout
    if media.kind == "image" and layout.image is not None:
        decode_image(media.data, layout.image.transform, where, rng, settings.decoder, out)
    elif media.kind == "audio" and layout.audio is not None:
        span = tuple(media.plan["span"]) if "span" in media.plan else None
        out[:] = decode_audio(media.data, layout.audio.sampling_rate, len(out), where, span)
    elif media.kind == "video" and layout.video is not None:
        transform, times = layout.video.transform, media.plan["times"]
        decode_video(media.data, times, transform, where, out, rng=rng, decoder=settings.decoder)
