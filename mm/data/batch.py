"""PackedBatch: the only thing a model ever sees.

Axes: B rows, L positions, N media items, n_i values of item i. Media are ragged (flat values, shapes, offsets), so that
native aspect ratios and clips of any length need no padding.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.data.layout import Layout
from mm.data.media import decode_image
from mm.data.packed import Pack
from mm.data.sample import keyed_rng
from mm.errors import DataError

MODALITIES = {"text": 0, "image": 1, "audio": 2, "video": 3}
IGNORE = -100


class _Tensors:
    """Moves all tensors of a dataclass."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> Any:
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: apply(one) for key, one in value.items()}
            if isinstance(value, _Tensors):
                return value._each(change)
            return change(value) if isinstance(value, Tensor) else value

        changed = {field.name: apply(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class MediaBatch(_Tensors):
    """All items of one medium in a batch.

    values: float32 [sum n_i]; item i is `values[offsets[i]:offsets[i + 1]].view(shapes[i])`, [C, H, W] for pictures.
    row, position, length: int64 [N], the row positions that item i takes; cost: int64 [N] encoder tokens.
    features: [sum length, D] in item order when the tower's output is already known, else None.
    """

    values: Tensor
    shapes: Tensor
    offsets: Tensor
    row: Tensor
    position: Tensor
    length: Tensor
    cost: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def stacked(self) -> Tensor:
        """[N, C, H, W] when all items have one shape."""
        shape = self.shapes[0]
        if not bool((self.shapes == shape).all()):
            raise ValueError("items differ in shape; this tower takes one size")
        return self.values.view(len(self), *shape.tolist())

    def slots(self, row_length: int) -> Tensor:
        """int64 [sum length]: flat positions (row * L + position) of all placeholders, in item order."""
        starts = self.row * row_length + self.position
        item = torch.repeat_interleave(torch.arange(len(self), device=starts.device), self.length)
        first = torch.cumsum(self.length, 0) - self.length
        return starts[item] + torch.arange(len(item), device=starts.device) - first[item]


@dataclass(frozen=True, slots=True)
class PackedBatch(_Tensors):
    """B packed rows of L positions; see the table in docs/design.md.

    input_ids int64 [B, L]; labels int64 [B, L], already shifted, -100 where there is no loss; segment_ids int32 [B, L],
    0 = padding; position_ids int64 [B, L], restarting at every segment (running, where segments are not isolated);
    modality uint8 [B, L]; media by name; ids: sample ids, row by row; bad: (id, reason) of items quarantined in place.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    modality: Tensor
    media: dict[str, MediaBatch]
    ids: list[list[str]]
    isolate_segments: bool = True
    bad: tuple[tuple[str, str], ...] = ()

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segment_ids > 0).sum())


def collate(
    packs: list[Pack],
    layout: Layout,
    row_length: int,
    isolate_segments: bool = True,
    quarantine: bool = False,
    draws: list[tuple[int, int]] | None = None,
) -> PackedBatch:
    """Decode media and lay packs out as rows.

    `draws` is a key for each row, from which whatever is drawn in training (crops) derives; without it nothing is.

    A damaged picture raises `DataError`, or with `quarantine` becomes zeros in a segment without loss, in place, so
    that the order of the data never shifts.
    """
    shape = (len(packs), row_length)
    ids = np.full(shape, layout.pad, dtype=np.int64)
    learned = np.zeros(shape, dtype=bool)
    segment_ids = np.zeros(shape, dtype=np.int32)
    positions = np.zeros(shape, dtype=np.int64)
    modality = np.zeros(shape, dtype=np.uint8)
    media: list[tuple[int, int, int, int, np.ndarray]] = []
    bad: list[tuple[str, str]] = []
    for row, pack in enumerate(packs):
        n = len(pack.tokens)
        if n > row_length:
            raise DataError(f"{pack.segments[0].id}: its pack of {n} tokens does not fit in rows of {row_length}")
        ids[row, :n] = pack.tokens
        positions[row, :n] = np.arange(n)
        for number, segment in enumerate(pack.segments):
            stop = segment.start + segment.length
            segment_ids[row, segment.start : stop] = number + 1
            if isolate_segments:
                positions[row, segment.start : stop] -= segment.start
            for a, b in segment.loss:
                learned[row, max(a, segment.start + 1) : b] = True
        for one in pack.media:
            segment = pack.segments[one.segment]
            if one.kind != "image" or layout.image is None:
                raise DataError(f"{segment.id}: the model takes no {one.kind}")
            modality[row, one.position : one.position + one.length] = MODALITIES[one.kind]
            rng = None if draws is None else keyed_rng("crop", *draws[row], one.position)
            try:
                pixels = decode_image(one.data, layout.image.transform, segment.id, rng)
            except DataError as error:
                if not quarantine:
                    raise
                bad.append((segment.id, str(error)))
                pixels = np.zeros((3, layout.image.transform.size, layout.image.transform.size), dtype=np.float32)
                learned[row, segment.start : segment.start + segment.length] = False
            media.append((row, one.position, one.length, one.cost, pixels))
    labels = np.full(shape, IGNORE, dtype=np.int64)
    labels[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], IGNORE)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(positions),
        modality=torch.from_numpy(modality),
        media={"image": _media_batch(media)} if media else {},
        ids=[[segment.id for segment in pack.segments] for pack in packs],
        isolate_segments=isolate_segments,
        bad=tuple(bad),
    )


def _media_batch(items: list[tuple[int, int, int, int, np.ndarray]]) -> MediaBatch:
    rows, positions, lengths, costs, values = zip(*items, strict=True)
    sizes = np.array([0, *(value.size for value in values)], dtype=np.int64)
    return MediaBatch(
        values=torch.from_numpy(np.concatenate([value.ravel() for value in values])),
        shapes=torch.tensor([value.shape for value in values]),
        offsets=torch.from_numpy(np.cumsum(sizes)),
        row=torch.tensor(rows),
        position=torch.tensor(positions),
        length=torch.tensor(lengths),
        cost=torch.tensor(costs),
    )
