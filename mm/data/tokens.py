"""A Sample laid out as Segments: token ids, with placeholder runs where media go.

The number of placeholder positions comes from the media header, so counting never decodes. A sample is one segment,
or, where it is longer than a row and may be split, several: a document is cut between sentences where it can be, never
in media; a conversation between an answer and the next question. Metadata belong to what a document opens with, as its
begin of text does: every piece and every window has them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from mm.data.audio import planned_samples, probe_audio
from mm.data.chat import Spelt, is_chat, spell
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.media import probe_image
from mm.data.sample import Media, MediaKind, Metadata, Special, Text, Tokens, Turn, Visible, Window
from mm.data.video import frame_times, probe_video, share_of
from mm.errors import DataError

# Where a text may be cut, the best last: before a word, behind a sentence, a line, a paragraph. The end of a match
# (the start, before a word) is where the next piece begins.
WORD = re.compile(r"\s+")
ENDS = tuple(map(re.compile, (r"""[.!?]["')\]]*(?=\s)|[。！？]""", r"\n", r"\n[^\S\n]*\n")))
COSTS = tuple(f"{kind}{what}" for kind in ("image", "audio", "video") for what in ("", "_tokens", "_cost"))


@dataclass(frozen=True, slots=True)
class SegmentMedia:
    """Media of one segment: `length` placeholder positions from `position` on; `cost` in encoder tokens.

    `plan`: what decoding is held to – `{"samples": n}` of a recording, `{"times": […]}` of a clip's frames, in seconds,
    and as `part` about what share of a large file they need, `{"grid": [rows, columns]}` of a picture in its own aspect
    ratio.
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
    """Special tokens that the template put in: begin and end of text and of pictures, marks of turns."""
    metadata: tuple[int, int] | None = None
    """Half-open span of what is said of the document in front of it."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def metadata_tokens(self) -> int:
        return self.metadata[1] - self.metadata[0] if self.metadata else 0

    @property
    def loss_tokens(self) -> int:
        # A segment's first token has nothing before it to be predicted from.
        return sum(stop - max(start, 1) for start, stop in self.loss)


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of text tokens, one medium (its placeholders and what is around them), or a special token of the template.

    `starts`: gives the character of `text` that each token starts at. `media`: its position is one in `ids`. `quality`
    [n]: how well the text may be cut before each token, 0 (inside a word) to 4 (a new paragraph). `inserted`: how many
    of the ids are special tokens of the template. `metadata`: what is said of the document, which is never cut.
    """

    ids: np.ndarray
    loss: bool
    text: str | None = None
    starts: Callable[[], list[int]] | None = None
    media: SegmentMedia | None = None
    quality: np.ndarray | None = None
    inserted: int = 0
    metadata: bool = False

    @property
    def is_around(self) -> bool:
        """Whether it is none of the document: begin or end of text, metadata."""
        return self.media is None and (self.metadata or self.inserted > 0)


class DoesNotFit(DataError):
    """A medium, or metadata, that take more than a whole row."""


def make_segment(
    parts: tuple[Visible, ...], layout: Layout, where: str, limits: Limits, closed: bool = True
) -> Segment:
    """Lay out drawn parts by the layout's template.

    A document is bos, the parts in order, eos. Text that follows media opens with `template.after_media`; adjacent text
    with the same `loss` is tokenised as one run, metadata apart. A picture stands between the tokens of
    `template.around_image`; where the layout says that pictures are learned, these and its placeholders are targets,
    though not in conversations. The end-of-text token is a target wherever the last text, or such a picture behind it,
    is. A conversation, which has a `Turn` among its parts, is what `mm.data.chat` makes of it. Not `closed`, the
    document or the last turn is left open: a conversation that ends with `Turn("assistant")` is a prompt for an answer.

    Raises `DataError` for unreadable media.
    """
    return join_units(read_units(parts, layout, where, limits, closed))


def join_units(units: list[Unit]) -> Segment:
    """One segment of all units."""
    loss: list[tuple[int, int]] = []
    media: list[SegmentMedia] = []
    metadata = None
    at = 0
    for unit in units:
        if unit.media is not None:
            media.append(replace(unit.media, position=at + unit.media.position))
        if unit.metadata and len(unit.ids):
            metadata = (at, at + len(unit.ids))
        if unit.loss and len(unit.ids):
            start = loss.pop()[0] if loss and loss[-1][1] == at else at
            loss.append((start, at + len(unit.ids)))
        at += len(unit.ids)
    ids = np.concatenate([unit.ids for unit in units]) if units else np.empty(0, dtype=np.int32)
    return Segment(ids, tuple(loss), tuple(media), sum(unit.inserted for unit in units), metadata)


def split_units(units: list[Unit], where: str, capacities: Mapping[str, int]) -> list[Segment]:
    """The units of a document as several segments, each within `capacities` (`tokens`, media by `costs_of`'s names).

    Every piece opens with bos and metadata, the last ends with eos; together they hold every other token once, in
    order. A medium that does not fit in a piece of its own, and metadata that leave no room, raise `DoesNotFit`.
    """
    inner = [n for n, unit in enumerate(units) if not unit.is_around] or [0]
    opening, closing = units[: inner[0]], units[inner[-1] + 1 :]
    around = sum(len(unit.ids) for unit in (*opening, *closing))
    most = {**capacities, "tokens": capacities["tokens"] - around}
    if most["tokens"] < 1:
        raise DoesNotFit(f"{where}: its metadata leave no room for text in a row of {capacities['tokens']} tokens")
    pieces: list[list[Unit]] = [[]]
    left = dict(most)
    for unit in units[inner[0] : inner[-1] + 1]:
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
    return [join_units([*opening, *piece]) for piece in pieces[:-1]] + [join_units([*opening, *pieces[-1], *closing])]


def window_of(units: list[Unit], window: Window, rng: np.random.Generator, where: str) -> list[Unit]:
    """The units of a document that one visit sees: what it opens with (begin of text, if not behind media; metadata),
    and what is around a medium that is drawn.

    This begins up to `window.before` tokens in front of that medium, no other in between, and fewer where media would
    be lost for them that fit without; where the document ends before the window is full, it begins earlier. A medium is
    there whole or not at all; text is cut between any two tokens. COSMO's windows (`sample_sequence_from_document`)
    have no begin of text unless the document begins there, and may show placeholders of media that are left out.

    Raises `DoesNotFit` where the medium takes more than a window, `DataError` for a document without media.
    """
    first = next((n for n, unit in enumerate(units) if not unit.is_around), 0)
    opening, rest = units[:first], units[first:]
    room = window.tokens - sum(len(unit.ids) for unit in opening)
    edges = [0, *np.cumsum([len(unit.ids) for unit in rest]).tolist()]
    media = [(edges[n], edges[n + 1]) for n, unit in enumerate(rest) if unit.media]
    if not media:
        raise DataError(f"{where}: no media, around which a window could be drawn")
    anchor = int(rng.integers(max(1, len(media) - window.media + 1)))  # there are enough media from it on
    begin = media[anchor][0]
    fitting = [end for _, end in media[anchor : anchor + window.media] if end - begin <= room]
    if not fitting:
        raise DoesNotFit(f"{where}: its medium {anchor} takes {media[anchor][1] - begin} tokens, a window has {room}")
    following = anchor + len(fitting)
    start = max(begin - int(rng.integers(window.before + 1)), fitting[-1] - room, media[anchor - 1][1] if anchor else 0)
    stop = min(start + room, media[following][0] if following < len(media) else edges[-1])
    if stop == edges[-1]:
        start = max(stop - room, media[-window.media - 1][1] if len(media) > window.media else 0)
        start = next((end for begin, end in media if begin < start < end), start)
    seen = list(opening)
    for unit, (begin, end) in zip(rest, pairwise(edges), strict=True):
        if start <= begin and end <= stop:
            seen.append(unit)
        elif begin < stop and end > start:
            ids = unit.ids[max(0, start - begin) : stop - begin]
            seen.append(replace(unit, ids=ids, text=None, starts=None, quality=None))
    return seen


def with_meta_tokens(segment: Segment, layout: Layout, rng: np.random.Generator) -> Segment:
    """The segment with the layout's meta-tokens, as many as it says, at places drawn uniformly from all of the result.

    None stands before the first token or behind the last, in media or in metadata. None is learned: the token behind a
    run of them is predicted from the token before it (`mm.data.batch`).
    """
    meta = layout.meta_tokens
    assert meta is not None
    tokens = len(segment)
    gaps = np.arange(1, tokens)  # before which token
    whole = [layout.span(one.kind, one.position, one.length) for one in segment.media]
    whole += [slice(*segment.metadata)] if segment.metadata else []
    for one in whole:
        gaps = gaps[(gaps <= one.start) | (gaps >= one.stop)]
    count = meta.count(tokens) if len(gaps) else 0
    # Places in what is left of the result without the tokens that no gap is before: as many as gaps and meta-tokens,
    # less one.
    places = np.sort(rng.choice(max(len(gaps) + count - 1, 0), count, replace=False))
    at = gaps[places - np.arange(count)]
    ids = np.insert(segment.ids, at, meta.id)

    def moved(position: int) -> int:
        return position + int(np.searchsorted(at, position, side="right"))

    learned = np.zeros(tokens + 1, dtype=bool)
    for start, stop in segment.loss:
        learned[start:stop] = True
    edges = np.flatnonzero(np.diff(np.insert(learned, at, False), prepend=False))
    return Segment(
        ids,
        tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)),
        tuple(replace(one, position=moved(one.position)) for one in segment.media),
        segment.inserted + count,
        segment.metadata and (moved(segment.metadata[0]), moved(segment.metadata[1] - 1) + 1),
    )


def learned_after_media(units: list[Unit]) -> list[Unit]:
    """The units of a document, of which no text is learned before the first medium, nor from behind a special token to
    the next medium. So COSMO and OpenFlamingo learn, with a token that ends what is said of a picture.

    A special token directly behind a medium, such as the begin of text of a prefix, ends nothing.
    """
    is_learned = is_behind_medium = False
    found: list[Unit] = []
    for unit in units:
        found.append(unit if is_learned or unit.media else replace(unit, loss=False))
        ends = unit.inserted and not is_behind_medium
        is_behind_medium = unit.media is not None
        is_learned = is_behind_medium or (is_learned and not ends)
    return found


def split_turns(
    parts: tuple[Visible, ...], layout: Layout, where: str, limits: Limits, capacities: Mapping[str, int]
) -> list[Segment]:
    """A conversation as several, each within `capacities`, cut between an answer and the next question.

    Every piece opens with the system turn. The media of earlier pieces, which later questions may speak of, stand in
    front of a piece's first question again. A question and its answer that do not fit raise `DoesNotFit`.
    """
    starts = [n for n, part in enumerate(parts) if isinstance(part, Turn) and part.role == "user"] or [0]
    pieces: list[Segment] = []
    said: tuple[Visible, ...] = ()
    for start, end in pairwise([*starts, len(parts)]):
        longer = said + parts[start:end]
        piece = make_segment(parts[: starts[0]] + longer, layout, where, limits)
        if said and _over(piece, capacities):
            longer = (parts[start], *(part for part in said if isinstance(part, Media)), *parts[start + 1 : end])
            piece = make_segment(parts[: starts[0]] + longer, layout, where, limits)
        elif said:
            pieces.pop()
        if over := _over(piece, capacities):
            raise DoesNotFit(f"{where}: a question with its answer takes more {over[0]} than {capacities[over[0]]}")
        pieces.append(piece)
        said = longer
    return pieces


def _over(segment: Segment, capacities: Mapping[str, int]) -> list[str]:
    costs = {"tokens": len(segment), **costs_of(segment.media)}
    return [name for name, most in capacities.items() if costs[name] > most]


def costs_of(media: Iterable[SegmentMedia]) -> dict[str, int]:
    """Of each kind the number (`image`), row positions (`image_tokens`) and encoder tokens (`image_cost`)."""
    costs = dict.fromkeys(COSTS, 0)
    for one in media:
        costs[one.kind] += 1
        costs[f"{one.kind}_tokens"] += one.length
        costs[f"{one.kind}_cost"] += one.cost
    return costs


def read_units(
    parts: tuple[Visible, ...], layout: Layout, where: str, limits: Limits, closed: bool = True
) -> list[Unit]:
    """Text tokenised and media probed: all that laying out takes time for. Raises `DataError`."""
    units = []
    is_document = not is_chat(parts)
    for part in _spelt(parts, layout, where, closed):
        if isinstance(part, Media):
            one = _probe(part, layout, where, limits)
            units.append(_media_unit(one, layout, where, is_document and layout.learns(one.kind)))
        elif isinstance(part, Special):
            ids = [_token(part.token, layout, where)]
            units.append(Unit(np.array(ids, dtype=np.int32), part.loss, inserted=1))
        elif isinstance(part, Tokens):
            if len(part.ids) and (part.ids.min() < 0 or part.ids.max() >= len(layout.tokenizer)):
                raise DataError(
                    f"{where}: token ids from {part.ids.min()} to {part.ids.max()}; the tokenizer has "
                    f"{len(layout.tokenizer)}: it was tokenised for another model"
                )
            units.append(Unit(part.ids.astype(np.int32), part.loss))
        elif isinstance(part, Metadata):
            ids = layout.tokenizer.encode(part.text)
            units.append(Unit(np.array(ids, dtype=np.int32), False, metadata=True))
        else:
            ids, starts = layout.tokenizer.encode_placed(part.text)
            units.append(Unit(np.array(ids, dtype=np.int32), part.loss, part.text, starts))
    return units


def _media_unit(one: SegmentMedia, layout: Layout, where: str, learned: bool) -> Unit:
    """The placeholders of a medium, a picture's between the tokens that the template has for that."""
    around = (layout.template.around_image or ()) if one.kind == "image" else ()
    ids = np.full(one.length + len(around), layout.pad, dtype=np.int32)
    if around:
        ids[[0, -1]] = [_token(token, layout, where) for token in around]
        one = replace(one, position=1)
    return Unit(ids, learned, media=one, inserted=len(around))


def _token(token: str, layout: Layout, where: str) -> int:
    try:
        return layout.tokenizer.id(token)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _spelt(parts: tuple[Visible, ...], layout: Layout, where: str, closed: bool) -> list[Spelt]:
    """All that stands in the row, in order; neighbouring text of one `loss` joined."""
    if is_chat(parts):
        return _text_runs(spell(parts, layout, where, closed), "")
    template = layout.template
    if layout.audio and layout.audio.alone and all(isinstance(p, Media) and p.kind == "audio" for p in parts):
        return _text_runs(parts, "")
    spelt = _text_runs(parts, template.after_media)
    if closed and template.eos is not None:
        spelt.append(Special(template.eos, _ends_learned(spelt, layout)))
    if template.bos is None:
        return spelt
    media = sum(1 for _ in takewhile(lambda part: isinstance(part, Media), spelt)) if template.bos_behind_media else 0
    return [*spelt[:media], Special(template.bos), *spelt[media:]]


def _ends_learned(spelt: list[Spelt], layout: Layout) -> bool:
    """Whether the end of a document is: as its last text, or a picture behind that which is learned."""
    for part in reversed(spelt):
        if isinstance(part, Media):
            if layout.learns(part.kind):
                return True
        elif not isinstance(part, Metadata):
            return part.loss
    return True


def _probe(media: Media, layout: Layout, where: str, limits: Limits) -> SegmentMedia:
    """Position 0; what the medium's header says it will take."""
    if media.size > limits.media_bytes:
        raise DataError(f"{where}: its {media.kind} has {media.size:,} bytes, over data.max_media_bytes")
    if media.kind == "image" and layout.image is not None:
        with media.open() as file:
            picture = probe_image(file, where, limits.pixels)
        length, cost = layout.image.count(picture)
        return SegmentMedia(media.kind, 0, length, cost, media, layout.image.plan(picture))
    if media.kind == "audio" and layout.audio is not None:
        with media.open() as file:
            header = probe_audio(file, where, limits.seconds)
        samples = planned_samples(header, layout.audio.sampling_rate, media.span, where)
        if samples < layout.audio.window:
            raise DataError(
                f"{where}: {samples} samples at {layout.audio.sampling_rate} Hz are less than the "
                f"{layout.audio.window} that the model takes at once; leave such recordings out"
            )
        length, cost = layout.audio.count(samples)
        plan = {"samples": samples, **({"span": list(media.span)} if media.span else {})}
        return SegmentMedia(media.kind, 0, length, cost, media, plan)
    if media.kind == "video" and layout.video is not None:
        with media.open() as file:
            clip = probe_video(file, where, limits.pixels, limits.seconds)
        times = frame_times(clip, layout.video.frames, media.span, where)
        length, cost = layout.video.count()
        plan = {"times": [round(time, 6) for time in times]}
        if media.span and (share := share_of(clip, times, media.ext)) < 0.5:
            plan["part"] = max(0.001, round(share, 3))
        return SegmentMedia(media.kind, 0, length, cost, media, plan)
    raise DataError(f"{where}: the model takes no {media.kind}")


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


def _text_runs(parts: Iterable[Visible], after_media: str) -> list[Spelt]:
    """Parts with neighbouring text of one `loss` joined, and the template's break put after media."""
    runs: list[Spelt] = []
    for part in parts:
        assert not isinstance(part, Turn)
        before = runs[-1] if runs else None
        if isinstance(part, Text) and isinstance(before, Media):
            part = Text(after_media + part.text, part.loss)
        elif isinstance(part, Text) and isinstance(before, Text) and before.loss == part.loss:
            runs[-1] = Text(before.text + part.text, part.loss)
            continue
        runs.append(part)
    return runs
