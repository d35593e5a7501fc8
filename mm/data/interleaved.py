"""Interleaved documents: text and media in reading order, one JSON a document.

Three layouts are told apart by their keys: our own ordered `parts`, OBELICS' parallel lists of `texts` and pictures,
and MMC4's sentences with pictures matched to them. Pictures are members of the group, or base64 in the JSON.

`packed_json` are Open-Qwen2VL's packs of such documents. A pack is taken apart: what shares a row is decided anew.
"""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field

from mm.data.limits import Limits
from mm.data.sample import Media, Part, Sample, Special, Text
from mm.data.shards import Folder, Group, Shard, folders_with
from mm.data.sources import (
    MEDIA_EXTENSIONS,
    Fields,
    FilesConfig,
    FilesSource,
    check_length,
    check_text,
    decoded_picture,
    is_small,
    read_json,
    sample_id,
    shortened,
)
from mm.errors import DataError


class InterleavedConfig(FilesConfig):
    """Documents of text and media in order: `KEY.json`, with media in base64 or as members `KEY.NAME`.

    `parts`: a list of `{"text": …}`, `{"image": "0000.png"}`, `{"audio": …}`, `{"video": …}` (names of members).
    OBELICS-like: lists `texts` and `images` or `image_info`, of which each place has one or the other (null elsewhere).
    MMC4-like: `text_list` and `image_info`, each picture before the sentence `matched_text_index`.
    """

    kind: str = "interleaved"
    min_side: int = Field(default=1, ge=1)
    """Pictures with a shorter side, in pixels, are left out and counted. Open-Qwen2VL: 2."""
    end_of_chunk: str = ""
    """Of `texts`: a special token behind every text, in place of the empty line between two; every picture is followed
    by the template's break, even by another picture. Open-Qwen2VL: `<|endofchunk|>`."""

    def build(self, root: str) -> "Interleaved":
        return Interleaved(self, root)


class PackedJsonConfig(InterleavedConfig):
    """Open-Qwen2VL's packs in JSON: folders of `UUID_packed.json`, `{"data": [document, …], "lengths": […]}`.

    `path` names a folder that they lie in, at any depth. Every document is a sample of its own.
    """

    kind: str = "packed_json"

    def build(self, root: str) -> "PackedJson":
        return PackedJson(self, root)


class Interleaved(FilesSource):
    """See `InterleavedConfig`."""

    chunks_from = 0
    """Documents with fewer pictures have no `end_of_chunk`."""

    def __init__(self, config: InterleavedConfig, root: str) -> None:
        super().__init__(config, root)
        self._min_side, self._end_of_chunk = config.min_side, config.end_of_chunk

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        join: Callable[[list[Part]], list[Part]] = list
        try:
            if "parts" in fields:
                parts = _parts(group, fields["parts"], where)
            elif "texts" in fields:
                parts, join = _obelics(group, fields, where), self._joined
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
        kept = [part for part in parts if not is_small(part, self._min_side, where, limits)]
        meta = {k: v for k, v in fields.items() if isinstance(v, str | int | float)}
        return [Sample(id, tuple(join(kept)), meta, len(parts) - len(kept))] if kept else []

    def _joined(self, parts: list[Part]) -> list[Part]:
        """Texts that follow each other as paragraphs, or as chunks that end in a token."""
        joined: list[Part] = []
        chunks = self._end_of_chunk and sum(isinstance(part, Media) for part in parts) >= self.chunks_from
        for part in parts:
            if isinstance(part, Text) and not chunks and joined and isinstance(joined[-1], Text):
                part = Text("\n\n" + part.text)
            joined.append(part)
            if chunks:  # no text behind a picture has the template put its break there
                joined.append(Special(self._end_of_chunk, True) if isinstance(part, Text) else Text(""))
        return joined


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


def _obelics(group: Group, fields: Fields, where: str) -> list[Part]:
    texts = _list(fields["texts"], "texts")
    pictures = _list(fields.get("image_info") or fields.get("images") or [None] * len(texts), "pictures")
    if len(texts) != len(pictures):
        raise DataError(f"{where}: {len(texts)} texts and {len(pictures)} pictures; the lists run in parallel")
    parts: list[Part] = []
    for number, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        if text and isinstance(picture, dict) and not picture.keys() & {"image_base64", "image_name"}:
            picture = None  # what is said of a picture that is not there
        if text and picture:
            raise DataError(f"{where}: place {number} has text and a picture; expected one of them, and null")
        parts += _text(text, where)
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
