"""Interleaved documents: text and media in reading order, one JSON a document.

Four layouts are told apart by their keys: our own ordered `parts`, OBELICS' parallel lists of `texts` and pictures,
MMC4's sentences with pictures matched to them, and the `clips` of one video with what is said of each. Pictures are
members of the group, or base64 in the JSON. A layout is read as *places*, of which each is left out or kept whole.

`packed_json` are Open-Qwen2VL's packs of such documents. A pack is taken apart: what shares a row is decided anew.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mm.data.limits import Limits
from mm.data.sample import Media, Part, Sample, Special, Text, Window, keyed_rng
from mm.data.shards import Folder, Group, Shard, folders_with
from mm.data.sources import (
    MEDIA_EXTENSIONS,
    DocumentsConfig,
    DocumentsSource,
    Fields,
    check_length,
    check_text,
    decoded_picture,
    is_small,
    read_json,
    sample_id,
    shortened,
)
from mm.errors import DataError
from mm.settings import Count, Number, Section

Places = list[tuple[Part, ...]]
TIME = r"((?:\d+:){0,2}\d+(?:\.\d+)?)"
TIMES = re.compile(rf"{TIME} *- *{TIME}")
SCORE = re.compile(r"t(\d+)_i(\d+)")


class MatchConfig(Section):
    """How pictures are matched to texts anew, by the similarities that a document brings.

    The noise of a document is drawn by its id, so every visit and every seed has the same.
    """

    noise: Number = Field(default=0.025, ge=0)
    """Standard deviation of what is added to every similarity. COSMO: 0.025 for MMC4, 0.02 for OBELICS."""
    clip: Number = Field(default=0.08, ge=0)
    """At most so much is added or taken away. COSMO: 0.08 for MMC4, 0.04 for OBELICS."""
    threshold: Number = 0.24
    """Pictures whose similarity is not above it are left out, and counted as `left_out`: with the noise for MMC4, the
    best one without for OBELICS. COSMO: 0.24 (0.25 for its smaller set) for MMC4, 0 for OBELICS."""


class WindowConfig(Section):
    """What a visit sees of a document, drawn anew for each: a window around a medium that is drawn."""

    tokens: Count = Field(default=128, ge=8)
    """Positions it has at most, begin of text and those of media included."""
    media: Count = Field(default=3, ge=1)
    """Media it has at most. Between so many and the end of the document the first of them is drawn."""
    before: Count = Field(default=20, ge=0)
    """It begins up to so many tokens in front of its first medium, as far as no medium is lost for them that would fit
    without."""


class InterleavedConfig(DocumentsConfig):
    """Documents of text and media in order: `KEY.json`, with media in base64 or as members `KEY.NAME`.

    `parts`: a list of `{"text": …}`, `{"image": "0000.png"}`, `{"audio": …}`, `{"video": …}` (names of members).
    OBELICS-like: lists `texts` and `images` or `image_info`, of which each place has one or the other (null elsewhere).
    MMC4-like: `text_list` and `image_info`, each picture before the sentence `matched_text_index`.
    `clips`: a list of `{"clip": "0:05 - 0:12", "caption": …}`, parts of the one video that lies beside.
    """

    kind: str = "interleaved"
    min_side: int = Field(default=1, ge=1)
    """Pictures with a shorter side, in pixels, are left out and counted. Open-Qwen2VL: 2."""
    end_of_chunk: str = ""
    """A special token behind every chunk, which is learned: media and the text behind them, up to the next medium. Of
    `texts` without `match` it stands behind every text, in place of the empty line between two, and every picture is
    followed by the template's break, even by another picture. Open-Qwen2VL, COSMO: `<|endofchunk|>`."""
    match: MatchConfig | None = None
    """Of `text_list`: pictures stand before the sentences that `similarity_matrix` assigns to them, one each, so that
    the sum is largest. Of `texts`: every picture is followed by the text that `score` has as the most similar. Null:
    the former stand where `matched_text_index` says, the latter as they are."""
    reverse: Number = Field(default=0, ge=0, le=1)
    """Of `texts`: share of visits that see the document from its end, drawn anew for each. COSMO: 0.5."""
    learn: Literal["all", "after_media"] = "all"
    """`after_media`: text before the first medium is not learned, nor what stands between an end of chunk and the next
    medium. Documents without media are left out."""
    window: WindowConfig | None = None
    """A window of the document in place of all of it; documents without media are left out. `data.visits` is how many
    windows of each a packed set holds. COSMO: `{tokens: 128, media: 3, before: 20}`."""
    speed: Number = Field(default=1, gt=0)
    """Of `clips`: how much faster than what their times are of the stored video runs. COSMO: 5."""

    def build(self, root: str) -> "Interleaved":
        return Interleaved(self, root)


class PackedJsonConfig(InterleavedConfig):
    """Open-Qwen2VL's packs in JSON: folders of `UUID_packed.json`, `{"data": [document, …], "lengths": […]}`.

    `path` names a folder that they lie in, at any depth. Every document is a sample of its own.
    """

    kind: str = "packed_json"

    def build(self, root: str) -> "PackedJson":
        return PackedJson(self, root)


class Interleaved(DocumentsSource):
    """See `InterleavedConfig`."""

    chunks_from = 0
    """Documents with fewer pictures have no `end_of_chunk`."""

    def __init__(self, config: InterleavedConfig, root: str) -> None:
        super().__init__(config, root)
        self._config = config
        self._window = Window(**config.window.model_dump()) if config.window else None

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        config = self._config
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        places: Places
        left_out, between, is_obelics = 0, "", False
        try:
            if "parts" in fields:
                places = [(part,) for part in _parts(group, fields["parts"], where)]
            elif "texts" in fields:
                places, left_out = _obelics(group, fields, config.match, id, where)
                between, is_obelics = "\n\n", True
            elif "text_list" in fields:
                places, left_out = _mmc4(group, fields, config.match, id, where)
                between = " "
            elif "clips" in fields:
                places = _clips(self._media(group, "video", where), fields["clips"], config.speed, where)
            else:
                raise DataError(
                    f"{where}: neither `parts`, `texts`, `text_list` nor `clips` in its JSON; "
                    f"found {shortened(sorted(fields))}"
                )
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where}: its JSON is not laid out as a document ({type(error).__name__}: {shortened(error)})"
            ) from None
        check_length([part for place in places for part in place], where, limits)
        if not places and not left_out:
            raise DataError(f"{where}: the document is empty")
        kept = [place for place in places if not any(is_small(one, config.min_side, where, limits) for one in place)]
        count = sum(isinstance(part, Media) for place in kept for part in place)
        if not kept or (not count and (config.match or config.window or config.learn == "after_media")):
            return []  # left out, and counted so
        token = config.end_of_chunk if count >= self.chunks_from else ""
        join = _texts_ended if token and is_obelics and not config.match else _joined

        def spelt(places: Places) -> tuple[Part, ...]:
            return join([part for place in places for part in place], between, token)

        reverse = config.reverse if is_obelics else 0.0
        sample = Sample(
            id,
            spelt(kept),
            {k: v for k, v in fields.items() if isinstance(v, str | int | float)},
            left_out + len(places) - len(kept),
            reverse=reverse,
            backwards=spelt(kept[::-1]) if reverse else (),
            learn_after_media=config.learn == "after_media",
            window=self._window,
        )
        return [self._conditioned(sample, fields, where)]


def _joined(parts: list[Part], between: str, token: str) -> tuple[Part, ...]:
    """Texts that follow each other with `between` in between, and a token behind those that follow media, where the
    next medium or the end comes."""
    joined: list[Part] = []
    seen = False
    for part in parts:
        is_behind_text = bool(joined) and isinstance(joined[-1], Text)
        if isinstance(part, Text) and is_behind_text:
            part = replace(part, text=between + part.text)
        elif isinstance(part, Media):
            joined += [Special(token, True)] if token and seen and is_behind_text else []
            seen = True
        joined.append(part)
    return (*joined, Special(token, True)) if token and seen and isinstance(joined[-1], Text) else tuple(joined)


def _texts_ended(parts: list[Part], between: str, token: str) -> tuple[Part, ...]:
    """A token behind every text; no text behind every medium, which has the template put its break there."""
    return tuple(one for part in parts for one in (part, Special(token, True) if isinstance(part, Text) else Text("")))


class PackedJson(Interleaved):
    """See `PackedJsonConfig`."""

    chunks_from = 2
    """As the published loader has it; what it reads are mostly captions."""

    def shards(self) -> list[str]:
        return folders_with("_packed.json", self._path, self._root)

    def open(self, path: str, limits: Limits) -> Shard:
        return _Packs(path, limits)


class _Packs(Folder):
    """The documents of all packs in a folder."""

    def __init__(self, path: str, limits: Limits) -> None:
        super().__init__(path, "_packed.json")
        self._limits = limits

    def groups(self) -> Iterator[Group | DataError]:
        for pack in super().groups():
            assert isinstance(pack, Group)
            where = f"{self.path}/{pack.key}_packed.json"
            try:
                documents = read_json(pack, where, self._limits).get("data")
            except DataError as error:
                yield error
                continue
            if not isinstance(documents, list):
                yield DataError(f"{where}: no `data`, expected a list of documents")
                continue
            for number, fields in enumerate(documents):
                if isinstance(fields, dict):
                    yield Group(self, f"{pack.key}#{number}", {}, fields)
                else:
                    yield DataError(f"{where}: document {number} is a {type(fields).__name__}, expected an object")


def _parts(group: Group, entries: list[Fields], where: str) -> list[Part]:
    parts: list[Part] = []
    for number, entry in enumerate(_list(entries, "parts")):
        kinds = [kind for kind in ("text", *MEDIA_EXTENSIONS) if kind in entry]
        # In the column of a table every entry has all keys, and null in those that it does not use.
        kind = next((kind for kind in kinds if entry[kind] is not None), None)
        if kind is None and kinds:
            continue
        if kind is None:
            raise DataError(
                f"{where}: part {number} is neither text, image, audio nor video; found {shortened(sorted(entry))}"
            )
        if kind == "text":
            parts += _text(entry["text"], where, loss=bool(entry.get("loss", True)))
        else:
            parts.append(_member(group, entry[kind], kind, where))
    return parts


def _obelics(group: Group, fields: Fields, match: MatchConfig | None, id: str, where: str) -> tuple[Places, int]:
    """The places, and how many pictures were left out."""
    texts = _list(fields["texts"], "texts")
    pictures = _list(fields.get("image_info") or fields.get("images") or [None] * len(texts), "pictures")
    if len(texts) != len(pictures):
        raise DataError(f"{where}: {len(texts)} texts and {len(pictures)} pictures; the lists run in parallel")
    best: dict[int, str] = {}
    if match and any(pictures) and fields.get("score") is not None:  # documents may have none
        best = _best_texts(fields["score"], texts, pictures, match, id, where)
    places: Places = []
    left_out = 0
    for number, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        if text and isinstance(picture, dict) and not picture.keys() & {"image_base64", "image_name"}:
            picture = None  # what is said of a picture that is not there
        if text and picture:
            raise DataError(f"{where}: place {number} has text and a picture; expected one of them, and null")
        if picture and match and number not in best:
            left_out += 1
            continue
        place = [_picture(group, picture, where)] if picture else []
        said = _text(best.get(number, text) if picture else text, where)
        places += [(*place, *said)] if place or said else []
    return places, left_out


def _best_texts(
    score: Any, texts: list[Any], pictures: list[Any], match: MatchConfig, id: str, where: str
) -> dict[int, str]:
    """The text that is most like each picture, by the place of the picture; those that are like none are not there."""
    if isinstance(score, str):  # as Python writes a list, which COSMO's shards have
        score = json.loads(score.replace("'", '"'))
    found: dict[int, list[tuple[float, str]]] = {}
    for name, value in _list(score, "score"):
        places = SCORE.fullmatch(name)
        similarity = float(value)
        if places is None or not math.isfinite(similarity):
            raise DataError(f"{where}: score {shortened([name, value])}; expected `t0_i1` and a number")
        text, picture = int(places[1]), int(places[2])
        if text >= len(texts) or picture >= len(pictures):
            raise DataError(f"{where}: score of {name[:40]}; there are {len(texts)} places for texts and pictures")
        if texts[text] and pictures[picture]:
            found.setdefault(picture, []).append((similarity, texts[text]))
    rng = keyed_rng(id, "match")
    best: dict[int, str] = {}
    for picture, scores in found.items():
        similarities = np.array([similarity for similarity, _ in scores])
        noisy = similarities + _noise(rng, match, similarities.shape)
        if similarities.max() > match.threshold:
            best[picture] = scores[int(noisy.argmax())][1]
    return best


def _noise(rng: np.random.Generator, match: MatchConfig, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(0, match.noise, shape).clip(-match.clip, match.clip)


def _mmc4(group: Group, fields: Fields, match: MatchConfig | None, id: str, where: str) -> tuple[Places, int]:
    """The places, and how many pictures were left out."""
    sentences = _list(fields["text_list"], "text_list")
    pictures = list(fields.get("image_info") or [])
    matched: list[int | None] = []
    if match and pictures:
        matched = _assigned(fields["similarity_matrix"], len(pictures), len(sentences), match, id, where)
    for number, info in enumerate(() if match else pictures):
        sentence = info.get("matched_text_index")
        if sentence is None:  # the likeliest sentence by similarity
            similarity = fields["similarity_matrix"][number]
            sentence = max(range(len(sentences)), key=lambda one: similarity[one])
        if not 0 <= int(sentence) < len(sentences):
            raise DataError(f"{where}: picture {number} belongs to sentence {int(sentence)} of {len(sentences)}")
        matched.append(int(sentence))
    before: dict[int, list[Media]] = {}
    for info, sentence in zip(pictures, matched, strict=True):
        if sentence is not None:
            before.setdefault(sentence, []).append(_picture(group, info, where))
    places: Places = []
    for number, text in enumerate(sentences):
        places += [(part,) for part in (*before.get(number, []), *_text(text, where))]
    return places, matched.count(None)


def _assigned(
    similarity: Any, pictures: int, sentences: int, match: MatchConfig, id: str, where: str
) -> list[int | None]:
    """The sentence of each picture, no two alike, so that the sum of similarities is largest; None where it is low."""
    from scipy.optimize import linear_sum_assignment

    scores = np.asarray(similarity, dtype=np.float64)
    if scores.shape != (pictures, sentences):
        raise DataError(
            f"{where}: a similarity_matrix of {' x '.join(map(str, scores.shape))}; expected {pictures} pictures x "
            f"{sentences} sentences"
        )
    if not np.isfinite(scores).all():
        raise DataError(f"{where}: its similarity_matrix has values that are no numbers")
    scores = scores + _noise(keyed_rng(id, "match"), match, scores.shape)
    matched: list[int | None] = [None] * pictures
    for picture, sentence in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
        if scores[picture, sentence] > match.threshold:
            matched[picture] = int(sentence)
    return matched


def _clips(video: Media, clips: Any, speed: float, where: str) -> Places:
    """Parts of a video, each with its caption."""
    if isinstance(clips, str):  # JSON in JSON, as Howto-Interlink7M's shards have it
        clips = json.loads(clips)
    places: Places = []
    for number, clip in enumerate(_list(clips, "clips")):
        times = TIMES.fullmatch(clip["clip"])
        start, end = map(_seconds, times.groups()) if times else (0.0, 0.0)
        if not start < end:
            raise DataError(
                f"{where}: clip {number} is {shortened(clip['clip'])!r}; expected `m:s - m:s`, the earlier first"
            )
        places.append((replace(video, span=(start / speed, end / speed)), *_text(clip["caption"], where)))
    return places


def _seconds(time: str) -> float:
    return sum(float(part) * 60**power for power, part in enumerate(reversed(time.split(":"))))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a list")
    return value


def _text(text: Any, where: str, loss: bool = True) -> list[Part]:
    """No part for an empty text or null."""
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a text is a {type(text).__name__}")
    return [check_text(Text(text, loss), where)] if text else []


def _picture(group: Group, entry: Any, where: str) -> Media:
    """A picture by base64 (`image_base64`), or by the name of a member."""
    encoded = entry.get("image_base64") if isinstance(entry, dict) else None
    if encoded is None:
        return _member(group, entry.get("image_name", "") if isinstance(entry, dict) else entry, "image", where)
    return decoded_picture(encoded, where)


def _member(group: Group, name: str, kind: Any, where: str) -> Media:
    found = name if name in group.members else name.lower()  # in tars they are lower case
    if found not in group.members:
        raise DataError(
            f"{where}: its {kind} {name[:80]!r} is not in the shard; there are {shortened(sorted(group.members))}"
        )
    ext = found.rpartition(".")[2]
    if ext not in MEDIA_EXTENSIONS[kind]:
        raise DataError(f"{where}: {name[:80]!r} is no {kind}; expected {', '.join(MEDIA_EXTENSIONS[kind])}")
    return Media(kind, group.members[found], ext)
