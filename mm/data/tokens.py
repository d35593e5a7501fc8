"""A Sample laid out as a Segment: token ids, with placeholder runs where media go.

The number of placeholder positions comes from the media header, so counting never decodes.
"""

from dataclasses import dataclass

import numpy as np

from mm.data.layout import Layout
from mm.data.media import probe_image
from mm.data.sample import Media, MediaKind, Text
from mm.errors import DataError


@dataclass(frozen=True, slots=True)
class SegmentMedia:
    """Media of one segment: `length` placeholder positions from `position` on; `cost` in encoder tokens."""

    kind: MediaKind
    position: int
    length: int
    cost: int
    part: int
    """Which part of the sample holds the bytes."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One document for one model, with one attention scope. All positions count from the segment's start."""

    ids: np.ndarray
    """int32 [n]; media positions hold the pad id."""
    loss: tuple[tuple[int, int], ...]
    """Half-open spans of positions that the model learns to predict."""
    media: tuple[SegmentMedia, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        # A segment's first token has nothing before it to be predicted from.
        return sum(stop - max(start, 1) for start, stop in self.loss)


def make_segment(
    parts: tuple[Text | Media, ...], layout: Layout, where: str, max_pixels: int, closed: bool = True
) -> Segment:
    """Lay out drawn parts by the layout's template: bos, then the parts in order, then eos (unless not `closed`).

    Text that follows media opens with `template.after_media`; adjacent text with the same `loss` is tokenised as one
    run. The end-of-text token is a target wherever the last text is. Raises `DataError` for unreadable media.
    """
    template = layout.template
    ids: list[int] = [] if template.bos is None else [layout.tokenizer.id(template.bos)]
    loss: list[tuple[int, int]] = []
    media: list[SegmentMedia] = []
    trains = True
    runs = _text_runs(parts, template.after_media)
    for index, part in runs:
        if isinstance(part, Media):
            if part.kind != "image" or layout.image is None:
                raise DataError(f"{where}: the model takes no {part.kind}")
            length, cost = layout.image.count(probe_image(part.data, where, max_pixels))
            media.append(SegmentMedia(part.kind, len(ids), length, cost, index))
            ids += [layout.pad] * length
        else:
            start = len(ids)
            ids += layout.tokenizer.encode(part.text)
            trains = part.loss
            if part.loss and len(ids) > start:
                loss.append((start, len(ids)))
    if closed:
        end = len(ids)
        ids.append(layout.tokenizer.id(template.eos))
        if trains:
            start = loss.pop()[0] if loss and loss[-1][1] == end else end  # never across media that come last
            loss.append((start, end + 1))
    return Segment(np.asarray(ids, dtype=np.int32), tuple(loss), tuple(media))


def _text_runs(parts: tuple[Text | Media, ...], after_media: str) -> list[tuple[int, Text | Media]]:
    """Parts with neighbouring text of one `loss` joined, and the template's break put after media."""
    runs: list[tuple[int, Text | Media]] = []
    for index, part in enumerate(parts):
        if isinstance(part, Text) and runs:
            _, before = runs[-1]
            if isinstance(before, Media):
                part = Text(after_media + part.text, part.loss)
            elif before.loss == part.loss:
                runs[-1] = (runs[-1][0], Text(before.text + part.text, part.loss))
                continue
        runs.append((index, part))
    return runs
