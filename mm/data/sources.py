"""Sources: shards of one kind in, Samples out.

A source says which shards it has and turns one group of tar members into samples. What is read from the JSON is data:
nothing in it is run, and captions are only ever text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from mm.data.media import IMAGE_EXTENSIONS
from mm.data.sample import Choice, Media, Sample, Text
from mm.data.shards import Group, expand
from mm.errors import DataError
from mm.settings import Kinds, KindSection

MAX_JSON_BYTES = 8_000_000


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
    captions: Literal["draw", "all"] = "draw"
    """`draw`: one of a picture's captions a visit; `all`: every caption is a sample of its own."""

    def build(self, root: str) -> "Captions":
        return Captions(self, root)


class Captions:
    """See `CaptionsConfig`."""

    def __init__(self, config: CaptionsConfig, root: str) -> None:
        self._config = config
        self._root = root
        self.name = config.name or _folder_name(config.path)

    def shards(self) -> list[Path]:
        return expand(self._config.path, self._root)

    def samples(self, group: Group) -> list[Sample]:
        stem = group.shard.path.name.split(".")[0]
        id = f"{self.name}/{stem}/{group.key}"
        image = next((ext for ext in IMAGE_EXTENSIONS if ext in group.members), None)
        if image is None:
            raise DataError(f"{id} in {group.shard.path}: no picture among {sorted(group.members)}; expected jpg, png or webp")
        meta = self._meta(group, id)
        captions = self._captions(group, id, meta)
        picture = Media("image", group.read(image), image)
        options = tuple(self._texts(caption, meta, id) for caption in captions)
        if self._config.captions == "all" and len(options) > 1:
            return [Sample(f"{id}#{k}", (picture, *option), meta) for k, option in enumerate(options)]
        return [Sample(id, (picture, Choice(options)), meta)]

    def _meta(self, group: Group, id: str) -> dict[str, Any]:
        if "json" not in group.members:
            return {}
        if group.members["json"].size > MAX_JSON_BYTES:
            raise DataError(f"{id} in {group.shard.path}: its JSON has {group.members['json'].size} bytes, over {MAX_JSON_BYTES}")
        try:
            meta = json.loads(group.read("json").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{id} in {group.shard.path}: its JSON is not UTF-8 (byte {error.start})") from None
        except ValueError as error:
            raise DataError(f"{id} in {group.shard.path}: its JSON cannot be read ({error})") from None
        if not isinstance(meta, dict):
            raise DataError(f"{id} in {group.shard.path}: its JSON is a {type(meta).__name__}, expected an object")
        return meta

    def _captions(self, group: Group, id: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
        found = meta.get("captions") or meta.get("caption")
        if not found and "txt" in group.members:
            try:
                found = group.read("txt").decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{id} in {group.shard.path}: the caption is not UTF-8 (byte {error.start}); re-encode the .txt"
                ) from None
        listed = found if isinstance(found, list) else [found]
        captions = [{"text": one} if isinstance(one, str) else one for one in listed]
        if not found or not all(isinstance(one, dict) and str(one.get("text", "")).strip() for one in captions):
            raise DataError(
                f"{id} in {group.shard.path}: no caption; expected a .txt, or `caption` or `captions` in the .json"
            )
        return captions

    def _texts(self, caption: dict[str, Any], meta: dict[str, Any], id: str) -> tuple[Text, ...]:
        fields = {**meta, **caption}
        fields = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in fields.items()}
        try:
            prompt, text = self._config.prompt.format(**fields), self._config.caption.format(**fields)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(
                f"{id}: data.sources caption or prompt template fails ({type(error).__name__}: {error}); "
                f"this caption has the fields {sorted(fields)}"
            ) from None
        return (Text(prompt, loss=False), Text(text)) if prompt else (Text(text),)


def _folder_name(path: str) -> str:
    if path.startswith("builtin:"):
        return path.removeprefix("builtin:").split("/")[0]
    return Path(path).parent.name or Path(path).name.split(".")[0]


SOURCES = Kinds("data source", {"captions": "mm.data.sources:CaptionsConfig"})
SourceConfig = Annotated[KindSection, SOURCES]


def scan(source: Source, shard_groups: Iterator[Group]) -> Iterator[tuple[Group, list[Sample] | DataError]]:
    """Each group with its samples, or with the reason why it has none."""
    for group in shard_groups:
        try:
            yield group, source.samples(group)
        except DataError as error:
            yield group, error
