"""Sources: shards of one kind in, Samples out.

A source says which shards it has and turns one group of tar members into samples. What is read from the JSON is data:
nothing in it is run, and captions are only ever text.
"""

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Protocol

from pydantic import field_validator

from mm.data.media import IMAGE_EXTENSIONS
from mm.data.sample import Choice, Media, Sample, Text
from mm.data.shards import Group, expand
from mm.errors import DataError
from mm.settings import Kinds, KindSection

MAX_TEXT_BYTES = 8_000_000


class Source(Protocol):
    """What planning and writing ask of a source."""

    name: str

    def shards(self) -> list[Path]: ...

    def samples(self, group: Group) -> list[Sample]:
        """The samples in one group of members, in a fixed order. Raises `DataError` for one that cannot be used."""
        ...


class CaptionsConfig(KindSection):
    """Picture and caption pairs in the img2dataset layout: `KEY.jpg|png|webp` with `KEY.txt` and/or `KEY.json`.

    The JSON may hold `captions`, a list of texts or of objects with a `text` (several captions for one picture), or
    `caption`. Without either the caption is the `.txt`.
    """

    kind: str = "captions"
    path: str
    """Shards: `{root}/ccs/{00000..00851}.tar`, `*`, or `builtin:emoji/train-*.tar.gz`."""
    name: str = ""
    """Its name in counts and sample ids; by default the folder that the shards are in."""
    caption: str = "{text}"
    """The text that is learned; fields of the caption object in braces (`{text}`, `{keywords}`, …)."""
    prompt: str = ""
    """Text before the caption that is read but not learned, such as `{language}: `."""
    only: dict[str, str | list[str]] = {}
    """Only captions with these fields: `{language: en}`, `{language: [en, de]}`."""
    captions: Literal["draw", "all"] = "draw"
    """`draw`: one of a picture's captions a visit; `all`: every caption is a sample of its own."""

    @field_validator("caption", "prompt")
    @classmethod
    def _is_template(cls, template: str) -> str:
        for _, field, _, _ in string.Formatter().parse(template):
            if field == "":
                raise ValueError("a field in braces needs a name: {text}; literal braces are doubled: {{ }}")
        return template

    def build(self, root: str) -> "Captions":
        return Captions(self, root)


class Captions:
    """See `CaptionsConfig`."""

    def __init__(self, config: CaptionsConfig, root: str) -> None:
        self._config = config
        self._root = root
        self.name = config.name or _folder_name(config.path.replace("{root}", root))

    def shards(self) -> list[Path]:
        return expand(self._config.path, self._root)

    def samples(self, group: Group) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        image = next((ext for ext in IMAGE_EXTENSIONS if ext in group.members), None)
        if image is None:
            raise DataError(f"{where}: no picture among {sorted(group.members)}; expected jpg, png or webp")
        meta = _meta(group, where)
        captions = [one for one in _captions(group, meta, where) if self._wanted(one)]
        if not captions:
            raise DataError(f"{where}: none of its captions has {self._config.only}")
        options = tuple(self._texts(caption, meta, where) for caption in captions)
        picture = Media("image", group.read(image), image)
        if self._config.captions == "all" and len(options) > 1:
            return [Sample(f"{id}#{k}", (picture, *option), meta) for k, option in enumerate(options)]
        return [Sample(id, (picture, Choice(options)), meta)]

    def _wanted(self, caption: dict[str, Any]) -> bool:
        return all(
            caption.get(field) in (value if isinstance(value, list) else [value])
            for field, value in self._config.only.items()
        )

    def _texts(self, caption: dict[str, Any], meta: dict[str, Any], where: str) -> tuple[Text, ...]:
        fields = {key: value for key, value in {**meta, **caption}.items() if value is not None}
        fields = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in fields.items()}
        try:
            prompt, text = self._config.prompt.format(**fields), self._config.caption.format(**fields)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: the caption or prompt template of its data source fails ({type(error).__name__}: {error}); "
                f"this caption has the fields {sorted(fields)}"
            ) from None
        if not text.strip():
            raise DataError(f"{where}: the caption is empty once the template {self._config.caption!r} is filled in")
        if found := re.search("[\0\ud800-\udfff]", prompt + text):
            raise DataError(
                f"{where}: the caption holds U+{ord(found[0]):04X}, which is no text (is it UTF-16?); re-encode it"
            )
        return (Text(prompt, loss=False), Text(text)) if prompt else (Text(text),)


def sample_id(source: str, group: Group) -> str:
    """How a sample is called from here on, and what it is called when it cannot be used."""
    return f"{source}/{group.shard.stem}/{group.key}"


def _read_text(group: Group, ext: str, where: str) -> str:
    if group.members[ext].size > MAX_TEXT_BYTES:
        raise DataError(f"{where}: its .{ext} has {group.members[ext].size} bytes, over {MAX_TEXT_BYTES}")
    try:
        return group.read(ext).decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .{ext} is not UTF-8 (byte {error.start}); re-encode it") from None


def _meta(group: Group, where: str) -> dict[str, Any]:
    if "json" not in group.members:
        return {}
    try:
        meta = json.loads(_read_text(group, "json", where))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its JSON cannot be read ({error})") from None
    if not isinstance(meta, dict):
        raise DataError(f"{where}: its JSON is a {type(meta).__name__}, expected an object")
    return meta


def _captions(group: Group, meta: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The captions of a picture as objects with at least a `text` that says something."""
    found = meta.get("captions") or meta.get("caption")
    if not found and "txt" in group.members:
        found = _read_text(group, "txt", where)
    if not found:
        raise DataError(f"{where}: no caption; expected a .txt, or `caption` or `captions` in the .json")
    captions = []
    for number, one in enumerate(found if isinstance(found, list) else [found]):
        caption = one if isinstance(one, dict) else {"text": one}
        text = caption.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: caption {number} is empty or not text; expected words, found {str(one)[:40]!r}")
        captions.append({**caption, "text": text.strip()})
    return captions


def _folder_name(path: str) -> str:
    """The innermost folder of a path that is spelt out, or else the file's own name."""
    if path.startswith("builtin:"):
        return path.removeprefix("builtin:").split("/")[0]
    plain = [folder.name for folder in PurePosixPath(path).parents if not re.search(r"[*?\[{]", folder.name)]
    return next(filter(None, plain), PurePosixPath(path).name.split(".")[0])


SOURCES = Kinds("data source", {"captions": "mm.data.sources:CaptionsConfig"})
SourceConfig = Annotated[Any, SOURCES]


def scan(source: Source, shard_groups: Iterator[Group]) -> Iterator[tuple[Group, list[Sample] | DataError]]:
    """Each group with its samples, or with the reason why it has none."""
    for group in shard_groups:
        try:
            yield group, source.samples(group)
        except DataError as error:
            yield group, error
