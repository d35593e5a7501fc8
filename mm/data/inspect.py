"""Looking at a packed split: one page with real rows, segment by segment, and whether the ledger closes.

The page is made from what lies on disk, not from what the packer meant: rows are read as the loader reads
them, and the ledger is held against the index.
"""

import io
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mm.data.listen import Sound, listen
from mm.data.media import ImageTransform
from mm.data.packed import Pack, PackedDataset, PackedMedia, PackedSegment
from mm.data.tokenizer import Tokenizer
from mm.data.video import decode_video
from mm.errors import DataError
from mm.page import data_uri, histogram, ledger_rows, render, seconds_of_samples, thumbnail

if TYPE_CHECKING:
    from mm.data.features import Beside

NAMES = {"image": "images", "audio": "recordings", "video": "clips"}
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
QUARANTINED_SHOWN = 200
SMALL = ImageTransform(96, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SOUND_BYTES = 12_000_000
"""Of all players of a page, an equal part for every row."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Of the circle of hues, from a code to the next: numbers that are near each other have other colours."""


def summary(dataset: PackedDataset) -> dict[str, Any]:
    """The split in numbers, ready for JSON. Lengths are in tokens, fills in shares of a row."""
    about, index = dataset.about, dataset.index
    context_length = about["settings"]["context_length"]
    tokens = int(_column(index, "tokens").sum())
    loss_tokens = int(_column(index, "loss_tokens").sum())
    return {
        "packs": len(dataset),
        "context_length": context_length,
        "tokens": tokens,
        "row_tokens": len(dataset) * context_length,
        "padding": len(dataset) * context_length - tokens,
        "fill": round(tokens / (len(dataset) * context_length), 6),
        "segments": int(_column(index, "segments").sum()),
        **{name: int(_column(index, kind).sum()) for kind, name in NAMES.items()},
        "audio_seconds": round(seconds_of_samples(about, int(_column(index, "audio_samples").sum())), 1),
        "loss_tokens": loss_tokens,
        "loss_share": round(loss_tokens / tokens, 6),
        "metadata_tokens": int(_column(index, "metadata_tokens").sum()),
        "segment_length": _percentiles(_segment_lengths(dataset)),
        "row_fill": _percentiles(_column(index, "tokens") / context_length),
        "codes": [
            {
                "folder": one.folder.name,
                "medium": one.medium,
                "codebooks": one.width,
                "of": one.about["origin"]["kind"],
                **{name: one.about[name] for name in ("items", "rows", "unreadable")},
            }
            for one in _codes(dataset)
        ],
        "ledger": about["ledger"],
        "ledger_open": [f"{row['source']}: {line}" for row in _ledger(dataset) for line in row["open"]],
    }


def inspect_page(dataset: PackedDataset, tokenizer: Tokenizer | None, rows: int = 16) -> str:
    """One HTML page of the split with `rows` packs drawn, of every source some. Without a tokenizer it shows no text.

    Raises `DataError` for a damaged pack and for a tokenizer that the split was not packed with.
    """
    about = dataset.about
    if tokenizer is not None and tokenizer.fingerprint() != about["layout"]["tokenizer"]:
        raise DataError(
            f"{dataset.folder}: packed with another tokenizer than {tokenizer.name} "
            f"({about['layout']['tokenizer']}, this one is {tokenizer.fingerprint()})"
        )
    context_length = about["settings"]["context_length"]
    shown = _spread(dataset.source_numbers(), rows)
    codes = _codes(dataset)
    read = PackedDataset(dataset.folder)
    read.read_beside(codes[-1] if codes else None)
    packs = [_Row.of(int(number), read, tokenizer, SOUND_BYTES // len(shown)) for number in shown]
    step = 2 ** max(0, int(np.ceil(np.log2(context_length / 8))))
    return render(
        "inspect.html.j2",
        title=f"{dataset.folder.name} – packed rows",
        name=dataset.folder.name,
        about=about,
        summary=summary(dataset),
        ledger=_ledger(dataset),
        context_length=context_length,
        rows=packs,
        kinds=sorted({media.kind for row in packs for media in row.media}),
        ticks=list(range(0, context_length + 1, step)),
        has_text=tokenizer is not None and len(tokenizer) > 1,
        lengths=histogram(_segment_lengths(dataset), "Segments by length", "tokens in a segment"),
        fills=histogram(
            _column(dataset.index, "tokens") / context_length,
            "Packs by fill",
            "share of the row filled",
            True,
        ),
        documents={
            "settings": json.dumps(about["settings"], indent=2, ensure_ascii=False),
            "layout": json.dumps(about["layout"], indent=2, ensure_ascii=False),
            "provenance": json.dumps(about["provenance"], indent=2, ensure_ascii=False),
            "quarantined": _quarantined(dataset),
            "codes": "\n".join(json.dumps(one.about, indent=2, ensure_ascii=False) for one in codes),
        },
    )


def _codes(dataset: PackedDataset) -> list["Beside"]:
    """The whole sets of a teacher's codes beside the split, the newest last."""
    if not any(dataset.folder.glob("codes-*")):
        return []
    from mm.data.features import CODES, Beside  # torch, which nothing else here needs

    folders = sorted(CODES.sets(dataset.folder), key=lambda folder: (folder / CODES.about).stat().st_mtime_ns)
    return [Beside(folder, CODES, len(dataset)) for folder in folders]


def drawn_codes(codes: np.ndarray) -> str:
    """A PNG as an address, a pixel a code in a colour of its own: uint16 [T, 1] of a square of patches as that square,
    [T, K] else as a row for each codebook."""
    side = math.isqrt(len(codes))
    square = codes.shape[1] == 1 and side > 1 and side * side == len(codes)
    numbers = codes.reshape(side, side) if square else codes.T
    pixels = np.empty((*numbers.shape, 3), dtype=np.uint8)
    pixels[..., 0] = numbers * GOLDEN % 1 * 256
    pixels[..., 1], pixels[..., 2] = 120 + numbers % 3 * 50, 150 + numbers % 4 * 30
    out = io.BytesIO()
    Image.frombytes("HSV", numbers.shape[::-1], pixels.tobytes()).convert("RGB").save(out, "PNG")
    return data_uri(out.getvalue(), "image/png")


def _spread(sources: np.ndarray, rows: int) -> np.ndarray:
    """Evenly spaced packs of every source, as many of each as it has or its share of the rows allows."""
    packs = [np.flatnonzero(sources == number) for number in np.unique(sources)]
    each = max(1, rows // len(packs))
    places = [np.unique(np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int)) for mine in packs]
    return np.concatenate([mine[place] for mine, place in zip(packs, places, strict=True)])


def _thumbnail(media: PackedMedia) -> str | None:
    """A picture, or the first frame that is seen of a clip; None where it cannot be read."""
    if media.kind == "image":
        return thumbnail(media.data, media.ext)
    try:
        pixels = decode_video(media.data, media.plan["times"][:1], SMALL, "")[0].transpose(1, 2, 0)
    except DataError:
        return None
    file = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(file, "PNG")
    return thumbnail(file.getvalue(), "png")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text between media, `metadata`, one medium, or a token around one (`mark`), in a segment's order. `learned`: the
    loss is on it."""

    text: str
    learned: bool
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class _Segment:
    id: str
    start: int
    length: int
    loss_tokens: int
    pieces: list[_Piece]
    thumbnails: list[str | None]
    sounds: list[Sound | None]
    codes: list[str]
    """Drawings, of each medium that has any."""

    @property
    def words(self) -> str:
        """What shows when the pointer rests on it."""
        text = "".join(piece.text for piece in self.pieces if piece.kind in ("text", "metadata")).strip()
        counts = f"{self.id}: {self.length} tokens, {self.loss_tokens} learned"
        return f"{counts}\n{text}" if text else counts


@dataclass(frozen=True, slots=True)
class _Medium:
    kind: str
    position: int
    length: int
    room: int
    """How many positions wide its picture may be: up to the next medium or the row's end; a recording's is its own."""
    picture: str | None
    words: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A pack as it is drawn. `loss`: (start, length) of the spans that are learned."""

    number: int
    source: str
    visit: int
    tokens: int
    loss_tokens: int
    segments: list[_Segment]
    media: list[_Medium]
    loss: list[tuple[int, int]]

    @classmethod
    def of(cls, number: int, dataset: PackedDataset, tokenizer: Tokenizer | None, sound_bytes: int) -> "_Row":
        pack = dataset.read(number)
        context_length = dataset.about["settings"]["context_length"]
        ends = [*(one.position for one in pack.media[1:]), context_length][: len(pack.media)]
        shown: list[str | Sound | None] = []
        media = []
        for one, end in zip(pack.media, ends, strict=True):
            id = pack.segments[one.segment].id
            if one.kind == "audio":
                rate = dataset.about["layout"]["audio"]["sampling_rate"]
                sound = listen(one, rate, one.length / context_length, sound_bytes)
                sound_bytes -= len(sound.player or "") if sound else 0
                shown.append(sound)
                words = f"{id} ({sound.words if sound else 'unreadable'})"
                drawing = sound.drawing if sound else None
                media.append(_Medium(one.kind, one.position, one.length, one.length, drawing, words))
            else:
                shown.append(uri := _thumbnail(one))
                media.append(_Medium(one.kind, one.position, one.length, end - one.position, uri, f"{id} ({one.kind})"))

        marks = dataset.about["layout"]["template"].get("around_image") or ()

        def of_segment(index: int, audio: bool) -> list[Any]:
            pairs = zip(pack.media, shown, strict=True)
            return [it for one, it in pairs if one.segment == index and (one.kind == "audio") == audio]

        spelt = {} if tokenizer is None else {tokenizer.id(mark): mark for mark in marks}
        segments = [
            _Segment(
                segment.id,
                segment.start,
                segment.length,
                sum(stop - start for start, stop in _learned(segment)),
                [] if tokenizer is None else _pieces(pack, index, tokenizer, spelt),
                of_segment(index, audio=False),
                of_segment(index, audio=True),
                [drawn_codes(one.codes) for one in pack.media if one.segment == index and one.codes is not None],
            )
            for index, segment in enumerate(pack.segments)
        ]
        return cls(
            number,
            dataset.index["source"][number].as_py(),
            dataset.index["visit"][number].as_py(),
            len(pack.tokens),
            sum(segment.loss_tokens for segment in segments),
            segments,
            media,
            [(start, stop - start) for segment in pack.segments for start, stop in _learned(segment)],
        )


def _learned(segment: PackedSegment) -> list[tuple[int, int]]:
    """Row positions that are targets: a segment's first token has nothing before it to be predicted from."""
    return [(max(start, segment.start + 1), stop) for start, stop in segment.loss]


def _pieces(pack: Pack, index: int, tokenizer: Tokenizer, marks: dict[int, str]) -> list[_Piece]:
    """A segment's text, cut where media stand and where learning begins or ends. `marks`: the tokens around pictures,
    which are shown, as other special tokens are not."""
    segment = pack.segments[index]
    media = {one.position: one for one in pack.media if one.segment == index and one.length}
    edges = {segment.start, segment.start + segment.length}
    edges |= {edge for span in (*segment.loss, segment.metadata or ()) for edge in span}
    edges |= {edge for one in media.values() for edge in (one.position, one.position + one.length)}
    own = range(segment.start, segment.start + segment.length)
    edges |= {edge for place in own if int(pack.tokens[place]) in marks for edge in (place, place + 1)}
    pieces = []
    for start, stop in zip(sorted(edges), sorted(edges)[1:], strict=False):
        learned = any(a <= start < b for a, b in segment.loss)
        if start in media:
            pieces.append(_Piece("", learned, media[start].kind))
        elif (mark := marks.get(int(pack.tokens[start]))) is not None:
            pieces.append(_Piece(mark, learned, "mark"))
        elif text := tokenizer.decode(pack.tokens[start:stop].tolist()):
            is_metadata = segment.metadata is not None and segment.metadata[0] <= start < segment.metadata[1]
            pieces.append(_Piece(text, learned, "metadata" if is_metadata else "text"))
    return pieces


def _ledger(dataset: PackedDataset) -> list[dict[str, Any]]:
    """The ledger by source, held against what the index says was written."""
    names = {
        "segments": "segments",
        "segment_tokens": "tokens",
        "loss_tokens": "loss_tokens",
        "metadata_tokens": "metadata_tokens",
        **{name: name for kind in ("image", "audio", "video") for name in (kind, f"{kind}_tokens")},
        "audio_samples": "audio_samples",
    }
    sums = dataset.index.group_by("source").aggregate([(column, "sum") for column in names.values()])
    written = {
        row["source"]: {name: row[f"{column}_sum"] for name, column in names.items()} for row in sums.to_pylist()
    }
    return ledger_rows(dataset.about, written)


def _segment_lengths(dataset: PackedDataset) -> np.ndarray:
    path = dataset.folder / "plan.parquet"
    try:
        return _column(pq.read_table(path, columns=["tokens"]), "tokens")
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: missing or damaged ({error}); pack the data set again") from None


def _quarantined(dataset: PackedDataset) -> str:
    """The samples that could not be used, one a line with the reason; empty where there are none."""
    path = dataset.folder / "quarantine.jsonl"
    if not path.exists():
        return ""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [f"{one['id']}  {one['reason']}" for one in found[:QUARANTINED_SHOWN]]
    more = len(found) - len(lines)
    return "\n".join([*lines, f"and {more} more, in {path.name}"] if more else lines)


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _percentiles(values: np.ndarray) -> dict[str, float]:
    """`min`, `p5` … `p95`, `max`, and the `mean`."""
    names = {0: "min", 100: "max"}
    found = {names.get(p, f"p{p}"): float(np.percentile(values, p)) for p in PERCENTILES}
    return {name: round(value, 4) for name, value in {**found, "mean": float(values.mean())}.items()}
