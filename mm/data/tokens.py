"""A Sample laid out as Segments: token ids, with placeholder runs where media go.

The number of placeholder positions comes from the media header, so counting never decodes. A sample is one segment,
or, where it is longer than a row and may be split, several: cut between sentences where it can be, never in media.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mm.data.audio import planned_samples, probe_audio
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.media import probe_image
from mm.data.sample import Media, MediaKind, Text, Tokens
from mm.data.video import frame_times, probe_video
from mm.errors import DataError

# Where a text may be cut, the best last: before a word, behind a sentence, a line, a paragraph. The end of a match
# (the start, before a word) is where the next piece begins.
WORD = re.compile(r"\s+")
ENDS = tuple(map(re.compile, (r"""[.!?]["')\]]*(?=\s)|[。！？]""", r"\n", r"\n[^\S\n]*\n")))
COSTS = tuple(f"{kind}{what}" for kind in ("image", "audio", "video") for what in ("", "_tokens", "_cost"))
Visible = Text | Tokens | Media


@dataclass(frozen=True, slots=True)
class SegmentMedia:
    """Media of one segment: `length` placeholder positions from `position` on; `cost` in encoder tokens.

    `plan`: what decoding is held to – `{"samples": n}` of a recording, `{"times": […]}` of a clip's frames, in seconds.
    """

    kind: MediaKind
    position: int
    length: int
    cost: int
    media: Media
    plan: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """One document for one model, with one attention scope. All positions count from the segment's start."""

    ids: np.ndarray
    """int32 [n]; media positions hold the pad id."""
    loss: tuple[tuple[int, int], ...]
    """Half-open spans of positions that the model learns to predict."""
    media: tuple[SegmentMedia, ...]
    inserted: int = 0
    """Positions that the template put in: begin and end of text."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        # A segment's first token has nothing before it to be predicted from.
        return sum(stop - max(start, 1) for start, stop in self.loss)


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of text tokens, or one medium (`ids` are its placeholders).

    `starts`: gives the character of `text` that each token starts at. `quality` [n]: how well the text may be cut
    before each token, 0 (inside a word) to 4 (a new paragraph).
    """

    ids: np.ndarray
    loss: bool
    text: str | None = None
    starts: Callable[[], list[int]] | None = None
    media: SegmentMedia | None = None
    quality: np.ndarray | None = None


class DoesNotFit(DataError):
    """A medium that takes more than a whole row."""


def make_segment(
    parts: tuple[Visible, ...], layout: Layout, where: str, limits: Limits, closed: bool = True
) -> Segment:
    """Lay out drawn parts by the layout's template: bos, then the parts in order, then eos (unless not `closed`).

    Text that follows media opens with `template.after_media`; adjacent text with the same `loss` is tokenised as one
    run. The end-of-text token is a target wherever the last text is. Raises `DataError` for unreadable media.
    """
    return join_units(read_units(parts, layout, where, limits), layout, closed)


def join_units(units: list[Unit], layout: Layout, closed: bool = True) -> Segment:
    """One segment of all units."""
    return _join(units, layout, closed, _learns_end(units))


def split_units(units: list[Unit], layout: Layout, where: str, capacities: Mapping[str, int]) -> list[Segment]:
    """The same units as several segments, each within `capacities` (`tokens`, and media by `costs_of`'s names).

    Every piece opens with bos, the last ends with eos; together they hold every token once, in order. A medium that
    does not fit in a piece of its own raises `DoesNotFit`.
    """
    template = layout.template
    most = {**capacities, "tokens": capacities["tokens"] - (template.bos is not None) - (template.eos is not None)}
    pieces: list[list[Unit]] = [[]]
    left = dict(most)
    for unit in units:
        rest: Unit | None = unit if len(unit.ids) or unit.media else None
        while rest is not None:
            costs = {"tokens": len(rest.ids), **costs_of([rest.media] if rest.media else [])}
            over = [name for name in most if costs[name] > left[name]]
            if not over:
                pieces[-1].append(rest)
                left = {name: left[name] - costs[name] for name in most}
                break
            if rest.media is None:
                head, rest = _cut(rest, left["tokens"], fresh=not pieces[-1])
                pieces[-1] += [head] if len(head.ids) else []
            elif not pieces[-1]:
                raise DoesNotFit(
                    f"{where}: its {rest.media.kind} takes {costs[over[0]]} {over[0]}, over {most[over[0]]}"
                )
            pieces.append([])
            left = dict(most)
    last = len(pieces) - 1
    return [_join(piece, layout, number == last, _learns_end(units)) for number, piece in enumerate(pieces)]


def costs_of(media: Iterable[SegmentMedia]) -> dict[str, int]:
    """Of each kind the number (`image`), row positions (`image_tokens`) and encoder tokens (`image_cost`)."""
    costs = dict.fromkeys(COSTS, 0)
    for one in media:
        costs[one.kind] += 1
        costs[f"{one.kind}_tokens"] += one.length
        costs[f"{one.kind}_cost"] += one.cost
    return costs


def read_units(parts: tuple[Visible, ...], layout: Layout, where: str, limits: Limits) -> list[Unit]:
    """Text tokenised and media probed: all that laying out takes time for. Raises `DataError`."""
    units = []
    for part in _text_runs(parts, layout.template.after_media):
        if isinstance(part, Media):
            one = _probe(part, layout, where, limits)
            units.append(Unit(np.full(one.length, layout.pad, dtype=np.int32), False, media=one))
        elif isinstance(part, Tokens):
            if part.ids.min() < 0 or part.ids.max() >= len(layout.tokenizer):
                raise DataError(
                    f"{where}: token ids from {part.ids.min()} to {part.ids.max()}; the tokenizer has "
                    f"{len(layout.tokenizer)}: it was tokenised for another model"
                )
            units.append(Unit(part.ids.astype(np.int32), part.loss))
        else:
            ids, starts = layout.tokenizer.encode_placed(part.text)
            units.append(Unit(np.array(ids, dtype=np.int32), part.loss, part.text, starts))
    return units


def _probe(media: Media, layout: Layout, where: str, limits: Limits) -> SegmentMedia:
    """Position 0; what the medium's header says it will take."""
    if media.size > limits.media_bytes:
        raise DataError(f"{where}: its {media.kind} has {media.size:,} bytes, over data.max_media_bytes")
    if media.kind == "image" and layout.image is not None:
        length, cost = layout.image.count(probe_image(media.open(), where, limits.pixels))
        return SegmentMedia(media.kind, 0, length, cost, media)
    if media.kind == "audio" and layout.audio is not None:
        header = probe_audio(media.open(), where, limits.seconds)
        samples = planned_samples(header, layout.audio.sampling_rate, media.span, where)
        length, cost = layout.audio.count(samples)
        plan = {"samples": samples, **({"span": list(media.span)} if media.span else {})}
        return SegmentMedia(media.kind, 0, length, cost, media, plan)
    if media.kind == "video" and layout.video is not None:
        clip = probe_video(media.open(), where, limits.pixels, limits.seconds)
        times = frame_times(clip, layout.video.frames, media.span, where)
        length, cost = layout.video.count()
        return SegmentMedia(media.kind, 0, length, cost, media, {"times": [round(time, 6) for time in times]})
    raise DataError(f"{where}: the model takes no {media.kind}")


def _learns_end(units: list[Unit]) -> bool:
    """The end of text is learned where the last text is."""
    return next((unit.loss for unit in reversed(units) if unit.media is None), True)


def _join(units: list[Unit], layout: Layout, closed: bool, learns_end: bool) -> Segment:
    template = layout.template
    runs: list[np.ndarray] = []
    loss: list[tuple[int, int]] = []
    media: list[SegmentMedia] = []
    at = inserted = 0

    def put(ids: np.ndarray | list[int], learned: bool) -> None:
        nonlocal at
        runs.append(np.asarray(ids, dtype=np.int32))
        if learned and len(ids):
            start = loss.pop()[0] if loss and loss[-1][1] == at else at
            loss.append((start, at + len(ids)))
        at += len(ids)

    if template.bos is not None:
        put([layout.tokenizer.id(template.bos)], False)
        inserted += 1
    for unit in units:
        if (one := unit.media) is not None:
            media.append(replace(one, position=at))
        put(unit.ids, unit.loss)
    if closed and template.eos is not None:
        put([layout.tokenizer.id(template.eos)], learns_end)
        inserted += 1
    ids = np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)
    return Segment(ids, tuple(loss), tuple(media), inserted)


def _cut(unit: Unit, room: int, fresh: bool) -> tuple[Unit, Unit]:
    """A text unit in two, the first of at most `room` tokens.

    The cut is the best one that fills at least half the room. Behind something else (not `fresh`) and without a
    sentence's end in reach nothing is taken, so that the text opens the next piece.
    """
    if unit.quality is None:
        unit = replace(unit, quality=_cut_quality(unit))
    assert unit.quality is not None
    reach = unit.quality[: room + 1]
    at = room if fresh or unit.text is None else 0
    for quality in (4, 3, 2, 1) if fresh else (4, 3, 2):
        places = np.flatnonzero(reach >= quality)
        if len(places) and places[-1] * 2 >= room > 0:
            at = int(places[-1])
            break
    return tuple(replace(unit, ids=unit.ids[s], quality=unit.quality[s]) for s in (slice(at), slice(at, None)))  # type: ignore[return-value]


def _cut_quality(unit: Unit) -> np.ndarray:
    quality = np.zeros(len(unit.ids), dtype=np.uint8)
    if unit.text is None or unit.starts is None:
        return quality
    starts = np.array(unit.starts())
    ends = [[match.start() for match in WORD.finditer(unit.text)]]
    ends += [[match.end() for match in kind.finditer(unit.text)] for kind in ENDS]
    for level, found in enumerate(ends, 1):  # levels rise, so the best remains
        places = np.searchsorted(starts, found)
        quality[places[(places > 0) & (places < len(quality))]] = level
    return quality


def _text_runs(parts: tuple[Visible, ...], after_media: str) -> list[Visible]:
    """Parts with neighbouring text of one `loss` joined, and the template's break put after media."""
    runs: list[Visible] = []
    for part in parts:
        before = runs[-1] if runs else None
        if isinstance(part, Text) and isinstance(before, Media):
            part = Text(after_media + part.text, part.loss)
        elif isinstance(part, Text) and isinstance(before, Text) and before.loss == part.loss:
            runs[-1] = Text(before.text + part.text, part.loss)
            continue
        runs.append(part)
    return runs
