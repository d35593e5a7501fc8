"""Interleaved documents: text and media in reading order, one JSON a document.

Three layouts are told apart by their keys: our own ordered `parts`, OBELICS' parallel lists of `texts` and pictures,
and MMC4's sentences with pictures matched to them. Pictures are members of the group, or base64 in the JSON.
"""

import base64
import binascii
from typing import Any

from mm.data.limits import Limits
from mm.data.sample import Media, Part, Sample, Text
from mm.data.shards import Group
from mm.data.sources import (
    MEDIA_EXTENSIONS,
    Fields,
    FilesConfig,
    FilesSource,
    check_length,
    check_text,
    sample_id,
    shortened,
)
from mm.data.tables import sniff
from mm.errors import DataError


class InterleavedConfig(FilesConfig):
    """Documents of text and media in order: `KEY.json`, with media in base64 or as members `KEY.NAME`.

    `parts`: a list of `{"text": …}`, `{"image": "0000.png"}`, `{"audio": …}`, `{"video": …}` (names of members).
    OBELICS-like: lists `texts` and `images` or `image_info`, of which each place has one or the other (null elsewhere).
    MMC4-like: `text_list` and `image_info`, each picture before the sentence `matched_text_index`.
    """

    kind: str = "interleaved"

    def build(self, root: str) -> "Interleaved":
        return Interleaved(self, root)


class Interleaved(FilesSource):
    """See `InterleavedConfig`."""

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        try:
            if "parts" in fields:
                parts = _parts(group, fields["parts"], where)
            elif "texts" in fields:
                parts = _obelics(group, fields, where)
            elif "text_list" in fields:
                parts = _mmc4(group, fields, where)
            else:
                raise DataError(
                    f"{where}: neither `parts`, `texts` nor `text_list` in its JSON; found {shortened(sorted(fields))}"
                )
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(
                f"{where}: its JSON is not laid out as a document ({type(error).__name__}: {shortened(error)})"
            ) from None
        check_length(parts, where, limits)
        if not parts:
            raise DataError(f"{where}: the document is empty")
        return [Sample(id, tuple(parts), {k: v for k, v in fields.items() if isinstance(v, str | int | float)})]


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


def _obelics(group: Group, fields: Fields, where: str) -> list[Part]:
    texts = _list(fields["texts"], "texts")
    pictures = _list(fields.get("image_info") or fields.get("images") or [None] * len(texts), "pictures")
    if len(texts) != len(pictures):
        raise DataError(f"{where}: {len(texts)} texts and {len(pictures)} pictures; the lists run in parallel")
    parts: list[Part] = []
    for number, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        if text and picture:
            raise DataError(f"{where}: place {number} has text and a picture; expected one of them, and null")
        parts += _text(text, where, "\n\n" if parts and isinstance(parts[-1], Text) else "")
        parts += [_picture(group, picture, where)] if picture else []
    return parts


def _mmc4(group: Group, fields: Fields, where: str) -> list[Part]:
    sentences = _list(fields["text_list"], "text_list")
    before: dict[int, list[Media]] = {}
    for number, info in enumerate(fields.get("image_info") or []):
        sentence = info.get("matched_text_index")
        if sentence is None:  # the likeliest sentence by similarity
            similarity = fields["similarity_matrix"][number]
            sentence = max(range(len(sentences)), key=lambda one: similarity[one])
        if not 0 <= int(sentence) < len(sentences):
            raise DataError(f"{where}: picture {number} belongs to sentence {int(sentence)} of {len(sentences)}")
        before.setdefault(int(sentence), []).append(_picture(group, info, where))
    parts: list[Part] = []
    for number, text in enumerate(sentences):
        parts += before.get(number, [])
        parts += _text(text, where, " " if parts and isinstance(parts[-1], Text) else "")
    return parts


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a list")
    return value


def _text(text: Any, where: str, between: str = "", loss: bool = True) -> list[Part]:
    """No part for an empty text or null."""
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a text is a {type(text).__name__}")
    return [check_text(Text(between + text, loss), where)] if text else []


def _picture(group: Group, entry: Any, where: str) -> Media:
    """A picture by base64 (`image_base64`), or by the name of a member."""
    encoded = entry.get("image_base64") if isinstance(entry, dict) else None
    if encoded is None:
        return _member(group, entry.get("image_name", "") if isinstance(entry, dict) else entry, "image", where)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where}: a picture's base64 cannot be read ({error})") from None
    ext = sniff(data)
    if ext not in MEDIA_EXTENSIONS["image"]:
        raise DataError(f"{where}: a picture in base64 is neither jpg, png nor webp")
    return Media("image", data, ext)


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
