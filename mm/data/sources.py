"""Sources: shards of one kind in, Samples out.

A source says which shards it has and turns one group (the members of a tar that share a key, or the row of a table)
into samples. Which file format a group comes from is `mm.data.shards`' business, so every kind reads tars, jsonl and
parquet alike. What is read is data: nothing in it is run, and captions are only ever text.
"""

import base64
import binascii
import json
import re
import string
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, field_validator

from mm.data.audio import AUDIO_EXTENSIONS
from mm.data.limits import Limits
from mm.data.media import IMAGE_EXTENSIONS, probe_image
from mm.data.metadata import MetadataConfig, MetadataReader
from mm.data.remote import file_name, is_remote
from mm.data.sample import Choice, Media, MediaKind, Part, Sample, Special, Text, Tokens, keyed_rng
from mm.data.shards import Group, Shard, expand, open_shard, stem
from mm.data.tables import TokenFile, sniff
from mm.data.video import VIDEO_EXTENSIONS
from mm.errors import DataError
from mm.settings import Kinds, KindSection, Number

MEDIA_EXTENSIONS: dict[MediaKind, tuple[str, ...]] = {
    "image": IMAGE_EXTENSIONS,
    "audio": AUDIO_EXTENSIONS,
    "video": VIDEO_EXTENSIONS,
}
Fields = dict[str, Any]


class Source(Protocol):
    """What planning asks of a source."""

    name: str
    elsewhere: tuple[str, ...]
    """Where its samples find what is not in the shards, as absolute paths or digests: part of a packed set's name."""

    def shards(self) -> list[str]: ...

    def shard_name(self, path: str) -> str:
        """What a shard is called in sample ids, no two alike."""
        ...

    def open(self, path: str, limits: Limits) -> Shard:
        """The shard in a local file."""
        ...

    def holds(self, group: Group) -> bool:
        """Whether a group belongs to the source. One of another part of its shards is as if it were not there."""
        ...

    def samples(self, group: Group, limits: Limits) -> Iterable[Sample]:
        """The samples in one group, in a fixed order. One without parts is left out, and so is a group without samples.

        Raises `DataError` for one that cannot be used, perhaps behind others that can.
        """
        ...


class FilesConfig(KindSection):
    """What every source has."""

    path: str
    """Shards: `{root}/ccs/{00000..00851}.tar`, `*`, `s3:// gs:// hf:// http(s)://`, `builtin:emoji/train-*.tar.gz`.
    Tars, jsonl and arrays of json (also .gz and .zst), parquet, folders saved by Hugging Face's `datasets`; texts in
    .txt and .md; token ids in .npy and .bin."""
    name: str = ""
    """Its name in counts, mixtures and sample ids; by default the folder that the shards are in."""
    columns: dict[str, str] = {}
    """Where a table or JSON calls things otherwise: `{text: sentence, image: photo}`, our name first."""
    part: tuple[Number, Number] = (0, 1)
    """Only documents whose place, a number from 0 to 1 drawn by shard and key, is in [from, to). `[0, 0.9]` and
    `[0.9, 1]` share none and have all between them, whatever the sources are called and whichever splits and stages
    they are in."""

    @field_validator("part")
    @classmethod
    def _is_part(cls, part: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError("a part is [from, to] with 0 <= from < to <= 1, such as [0.9, 1]")
        return part


class FilesSource:
    """Shards by path, and the fields of their groups."""

    def __init__(self, config: FilesConfig, root: str) -> None:
        self._path, self._columns, self._root = config.path, config.columns, root
        self._part = config.part
        self.elsewhere: tuple[str, ...] = ()
        self.name = config.name or _folder_name(config.path.replace("{root}", root))

    def shards(self) -> list[str]:
        return expand(self._path, self._root)

    def shard_name(self, path: str) -> str:
        return stem(file_name(path) if is_remote(path) else path)

    def open(self, path: str, limits: Limits) -> Shard:
        return open_shard(path, limits)

    def holds(self, group: Group) -> bool:
        first, last = self._part
        return last - first == 1 or first <= keyed_rng(group.shard.name, group.key, "part").random() < last

    def _fields(self, group: Group, where: str, limits: Limits) -> Fields:
        """The plain fields of a sample, by our names."""
        return self._renamed(read_json(group, where, limits) if group.fields is None else group.fields)

    def _renamed(self, fields: Fields) -> Fields:
        return {**fields, **{ours: fields[theirs] for ours, theirs in self._columns.items() if theirs in fields}}

    def _media(self, group: Group, kind: MediaKind, where: str) -> Media:
        """The one medium of a kind in a group: in a tar by its extension, in a table by its column."""
        names = [ext for ext in MEDIA_EXTENSIONS[kind] if ext in group.members]
        if not names and group.fields is not None:
            column = self._columns.get(kind)
            names = [
                name
                for name in group.members
                if name.rpartition(".")[2] in MEDIA_EXTENSIONS[kind] and column in (None, name.rpartition(".")[0])
            ]
        if not names:
            found, expected = shortened(sorted(group.members)), ", ".join(MEDIA_EXTENSIONS[kind])
            raise DataError(f"{where}: no {kind} among {found}; expected {expected}")
        return Media(kind, group.members[names[0]], names[0].rpartition(".")[2])


class DocumentsConfig(FilesConfig):
    """What sources of documents have."""

    metadata: MetadataConfig | None = None
    """What stands in front of every document and is read, not learned, such as the host that it is from."""


class DocumentsSource(FilesSource):
    """Puts metadata in front."""

    def __init__(self, config: DocumentsConfig, root: str) -> None:
        super().__init__(config, root)
        self._metadata = MetadataReader(config.metadata, root) if config.metadata else None
        self._share = config.metadata.share if config.metadata else 1.0
        self.elsewhere = self._metadata.elsewhere if self._metadata else ()

    def _conditioned(self, sample: Sample, fields: Fields, where: str) -> Sample:
        """The sample with the metadata that its fields say, where the source asks for any."""
        if self._metadata is None:
            return sample
        metadata = self._metadata.of(fields)
        check_text(Text(metadata.text), where)
        return replace(sample, metadata=metadata, metadata_share=self._share)


class TextTemplates(DocumentsConfig):
    """The texts of a sample, spelt from its fields."""

    prompt: str = ""
    """Text before it that is read but not learned, such as `{language}: `."""
    only: dict[str, str | list[str]] = {}
    """Only samples or captions with these fields: `{language: en}`, `{language: [en, de]}`."""

    @field_validator("caption", "text", "prompt", check_fields=False)
    @classmethod
    def _is_template(cls, template: str) -> str:
        for _, field, _, _ in string.Formatter().parse(template):
            if field == "":
                raise ValueError("a field in braces needs a name: {text}; literal braces are doubled: {{ }}")
        return template


class _Given(Fields):
    """Fields for a template: a list is spelt when a template names it."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return ", ".join(map(str, value)) if isinstance(value, list) else value


class TemplatesSource(DocumentsSource):
    """Fills in the templates."""

    def __init__(self, config: TextTemplates, learned: str, root: str) -> None:
        super().__init__(config, root)
        self._prompt, self._learned, self._only = config.prompt, learned, config.only

    def _wanted(self, fields: Fields) -> bool:
        return is_wanted(fields, self._only)

    def _texts(self, fields: Fields, where: str, limits: Limits) -> tuple[Text, ...]:
        given = _Given((key, value) for key, value in fields.items() if value is not None)
        try:
            prompt, text = self._prompt.format_map(given), self._learned.format_map(given)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: the text or prompt template of its data source fails "
                f"({type(error).__name__}: {shortened(error)}); there are the fields {shortened(sorted(given))}"
            ) from None
        if self._learned and not text.strip():
            raise DataError(f"{where}: the text is empty once the template {self._learned!r} is filled in")
        texts = tuple(part for part in (Text(prompt, loss=False), Text(text)) if part.text)
        check_length(texts, where, limits)
        return tuple(check_text(part, where) for part in texts)


class PairsConfig(TextTemplates):
    """A medium and its text: what pictures, recordings and clips have in common."""

    caption: str = "{text}"
    """The text that is learned; fields of the caption object in braces (`{text}`, `{keywords}`, …)."""
    captions: Literal["draw", "all", "first"] = "draw"
    """`draw`: one of the captions a visit; `all`: every caption is a sample of its own; `first`: the first one alone,
    which is what COSMO calls `noisy_only`."""
    alternatives: str = ""
    """Behind a tab a caption is followed by others, with this between them: `<EOC>` for the texts of COSMO,
    `caption TAB generated<EOC>generated`."""
    text_first: Number = Field(default=0, ge=0, le=1)
    """Share of visits that see prompt and caption before the medium, drawn anew for each: with pictures that are
    learned, from text to picture. Chameleon, MoMa: 0.5."""
    blank: Number = Field(default=0, ge=0, le=1)
    """Share of visits that see a blank in front of the caption, drawn anew for each. COSMO: 0.5."""
    end_of_chunk: str = ""
    """A special token behind the caption, which is learned. COSMO: `<|endofchunk|>`."""


class CaptionsConfig(PairsConfig):
    """Picture and caption pairs in the img2dataset layout: `KEY.jpg|png|webp` with `KEY.txt` and/or `KEY.json`.

    The JSON may hold `captions`, a list of texts or of objects with a `text` (several captions for one picture), or
    `caption`. Without either the caption is the `.txt`.
    """

    kind: str = "captions"
    min_side: int = Field(default=1, ge=1)
    """Pictures with a shorter side, in pixels, are left out, and counted as `filtered`. Open-Qwen2VL: 2."""

    def build(self, root: str) -> "Pairs":
        return Pairs(self, "image", root, min_side=self.min_side)


class AudioConfig(PairsConfig):
    """Recordings with text or labels: `KEY.flac|wav|ogg|mp3` with `KEY.txt` and/or `KEY.json`.

    Captions are given as for pictures. Labels are fields of the JSON, for the template:
    `caption: "{instrument} at {tempo} bpm"`. `caption: ""` is sound alone.
    """

    kind: str = "audio"

    def build(self, root: str) -> "Pairs":
        return Pairs(self, "audio", root)


class VideoConfig(PairsConfig):
    """Clips with text: `KEY.mp4|webm|mkv|mov|avi` with `KEY.txt` and/or `KEY.json`, captions as for pictures."""

    kind: str = "video"
    timed: bool = False
    """Every entry of `timed` in the JSON (`{start, end, text}`, in seconds) is a sample: that part with that text."""

    def build(self, root: str) -> "Pairs":
        return Pairs(self, "video", root, timed=self.timed)


class Pairs(TemplatesSource):
    """One medium and its text. See `CaptionsConfig`, `AudioConfig`, `VideoConfig`."""

    def __init__(self, config: PairsConfig, kind: MediaKind, root: str, timed: bool = False, min_side: int = 1) -> None:
        super().__init__(config, config.caption, root)
        self._config, self._kind, self._timed, self._min_side = config, kind, timed, min_side
        self._end = (Special(config.end_of_chunk, True),) if config.end_of_chunk and config.caption else ()

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        media = self._media(group, self._kind, where)
        fields = self._fields(group, where, limits)

        def sample(id: str, *parts: Part) -> Sample:
            config = self._config
            made = Sample(id, (*parts, *self._end), fields, text_first=config.text_first, blank=config.blank)
            return self._conditioned(made, fields, where)

        if self._timed:
            return [
                sample(f"{id}#{k}", replace(media, span=span), *self._texts(one, where, limits))
                for k, (span, one) in enumerate(_timed(fields, where))
                if self._wanted(one)
            ]
        captions = [one for one in self._captions(group, fields, where, limits) if self._wanted({**fields, **one})]
        if not captions or is_small(media, self._min_side, where, limits):
            return []  # left out, and counted so
        if self._config.captions == "first":
            captions = captions[:1]
        options = tuple(self._texts({**fields, **caption}, where, limits) for caption in captions)
        if self._config.captions == "all" and len(options) > 1:
            return [sample(f"{id}#{k}", media, *option) for k, option in enumerate(options)]
        return [sample(id, media, Choice(options)) if len(options) > 1 else sample(id, media, *options[0])]

    def _captions(self, group: Group, fields: Fields, where: str, limits: Limits) -> list[Fields]:
        """The captions as objects with a `text` that says something, if the templates ask for one."""
        found = fields.get("captions") or fields.get("caption")
        if not found and "txt" in group.members:
            found = read_text(group, "txt", where, limits)
        found = found or fields.get("text")
        if not found:
            if "{text" not in self._learned + self._prompt:
                return [fields]
            raise DataError(f"{where}: no caption; expected a .txt, or `caption` or `captions` in the .json")
        if self._config.alternatives and isinstance(found, str):
            first, _, others = found.partition("\t")
            texts = [first, *others.split(self._config.alternatives)]
            found = [one for one in texts if one.strip()] or [first]
        captions = []
        for number, one in enumerate(found if isinstance(found, list) else [found]):
            caption = one if isinstance(one, dict) else {"text": one}
            text = caption.get("text")
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"{where}: caption {number} is empty or not text; expected words, found {str(one)[:40]!r}"
                )
            captions.append({**caption, "text": text.strip()})
        return captions


def _timed(fields: Fields, where: str) -> list[tuple[tuple[float, float], Fields]]:
    """The spans and fields of timed captions."""
    entries = fields.get("timed")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: no `timed` captions in its JSON; expected a list of {{start, end, text}}")
    found = []
    for number, one in enumerate(entries):
        try:
            start, end = float(one["start"]), float(one["end"])
        except (LookupError, TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: timed caption {number} has no start and end in seconds") from None
        if not 0 <= start < end < float("inf"):
            raise DataError(f"{where}: timed caption {number} runs from {start} to {end}; expected 0 <= start < end")
        found.append(((start, end), {**fields, **one}))
    return found


class TextConfig(TextTemplates):
    """Text: rows of jsonl or parquet with a `text`, `.txt` members of tars, or whole `.txt` and `.md` files."""

    kind: str = "text"
    text: str = "{text}"
    """The text that is learned; fields of the row in braces."""

    def build(self, root: str) -> "Documents":
        return Documents(self, self.text, root)


class Documents(TemplatesSource):
    """See `TextConfig`."""

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        if "txt" in group.members:
            fields = {**fields, "text": read_text(group, "txt", where, limits)}
        if not self._wanted(fields):
            return []
        return [self._conditioned(Sample(id, self._texts(fields, where, limits), fields), fields, where)]


class TokensConfig(DocumentsConfig):
    """Text that is tokens already, made with the model's own tokenizer.

    `.npy` (one row of integers) or `.bin` (raw), documents ending in `eos`; or rows of jsonl or parquet with
    `input_ids`. The template's own begin and end of text are put around every document.
    """

    kind: str = "tokens"
    eos: int = Field(default=0, ge=0)
    """The id that ends a document in `.npy` and `.bin`."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Of the numbers in `.bin`."""

    def build(self, root: str) -> "TokenDocuments":
        return TokenDocuments(self, root)


class TokenDocuments(DocumentsSource):
    """See `TokensConfig`."""

    def __init__(self, config: TokensConfig, root: str) -> None:
        super().__init__(config, root)
        self._eos, self._dtype = config.eos, config.dtype

    def open(self, path: str, limits: Limits) -> Shard:
        return TokenFile(path, self._eos, self._dtype) if path.endswith((".npy", ".bin")) else open_shard(path, limits)

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        ids = fields.get("input_ids")
        if isinstance(ids, list) and {*map(type, ids)} == {int}:
            ids = np.asarray(ids)
        if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"{where}: no `input_ids`; expected a list of token ids")
        return [self._conditioned(Sample(id, (Tokens(ids),)), fields, where)]


def is_wanted(fields: Fields, only: dict[str, str | list[str]]) -> bool:
    """Whether every field that is asked for has a value that is asked for."""
    return all(fields.get(name) in (value if isinstance(value, list) else [value]) for name, value in only.items())


def is_small(part: Part, min_side: int, where: str, limits: Limits) -> bool:
    """Whether it is a picture with a shorter side than that, in pixels. Raises `DataError` for an unreadable one."""
    if min_side == 1 or not isinstance(part, Media) or part.kind != "image":
        return False
    with part.open() as file:
        header = probe_image(file, where, limits.pixels)
    return min(header.width, header.height) < min_side


def sample_id(source: str, group: Group) -> str:
    """How a sample is called from here on, and what it is called when it cannot be used."""
    return f"{source}/{group.shard.name}/{group.key}"


def decoded_picture(encoded: Any, where: str) -> Media:
    """A picture from base64."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where}: a picture's base64 cannot be read ({error})") from None
    ext = sniff(data)
    if ext not in IMAGE_EXTENSIONS:
        raise DataError(f"{where}: a picture in base64 is neither jpg, png nor webp")
    return Media("image", data, ext)


def read_text(group: Group, ext: str, where: str, limits: Limits) -> str:
    if group.size(ext) > limits.json_bytes:
        raise DataError(f"{where}: its .{ext} has {group.size(ext)} bytes, over data.max_json_bytes")
    try:
        return group.read(ext).decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .{ext} is not UTF-8 (byte {error.start}); re-encode it") from None


def read_json(group: Group, where: str, limits: Limits) -> Fields:
    if "json" not in group.members:
        return {}
    try:
        fields = json.loads(read_text(group, "json", where, limits))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its JSON cannot be read ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: its JSON is a {type(fields).__name__}, expected an object")
    return fields


def check_length(parts: Iterable[Part], where: str, limits: Limits) -> None:
    length = sum(len(part.text) for part in parts if isinstance(part, Text))
    if length > limits.text_chars:
        raise DataError(f"{where}: {length:,} characters are more than data.max_text_chars = {limits.text_chars:,}")


def shortened(what: object) -> str:
    """What is quoted from a sample in an error: some of it."""
    text = str(what)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_text(part: Text, where: str) -> Text:
    if found := re.search("[\0\ud800-\udfff]", part.text):
        raise DataError(
            f"{where}: its text holds U+{ord(found[0]):04X}, which is no text (is it UTF-16?); re-encode it"
        )
    return part


def _folder_name(path: str) -> str:
    """The innermost folder of a path that is spelt out, or else the file's own name."""
    if path.startswith("builtin:"):
        return path.removeprefix("builtin:").split("/")[0]
    plain = [folder.name for folder in PurePosixPath(path).parents if not re.search(r"[*?\[{:]", folder.name)]
    return next(filter(None, plain), PurePosixPath(path).name.split(".")[0])


SOURCES = Kinds(
    "data source",
    {
        "captions": "mm.data.sources:CaptionsConfig",
        "interleaved": "mm.data.interleaved:InterleavedConfig",
        "packed_json": "mm.data.interleaved:PackedJsonConfig",
        "conversations": "mm.data.conversations:ConversationsConfig",
        "text": "mm.data.sources:TextConfig",
        "audio": "mm.data.sources:AudioConfig",
        "recordings": "mm.data.recordings:RecordingsConfig",
        "video": "mm.data.sources:VideoConfig",
        "tokens": "mm.data.sources:TokensConfig",
    },
)
SourceConfig = Annotated[Any, SOURCES]
