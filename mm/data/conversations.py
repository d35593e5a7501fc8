"""Conversations about pictures, in the forms that instruction data sets have: LLaVA's JSON, and chat messages.

A row says who says what, `<image>` marking where pictures stand, and names its pictures in that order. They are files
in a folder, members of tars, columns of a table, or base64. Files and members of plain tars stay where they are until
packs are written; nothing is copied before that.
"""

import json
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mm.data.limits import Limits
from mm.data.media import IMAGE_EXTENSIONS
from mm.data.remote import is_remote
from mm.data.sample import Media, Part, Role, Sample, Text, Turn
from mm.data.shards import Group, Placed, Shard, expand, place_members
from mm.data.sources import (
    Fields,
    FilesConfig,
    FilesSource,
    check_length,
    check_text,
    decoded_picture,
    is_wanted,
    sample_id,
    shortened,
)
from mm.errors import DataError

IMAGE = "<image>"
ROLES: dict[Any, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"
}  # fmt: skip


class ConversationsConfig(FilesConfig):
    """Conversations, as rows of JSON (one array, or a line each), of tables, or as `KEY.json` in tars.

    `{"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": …}]}`
    as LLaVA has it, or `messages` of `{"role": …, "content": …}`, whose content may be a list of texts and images. A
    row `{"path": "1.json"}` stands for the row in that file (the index of MAmmoTH-VL).
    """

    kind: str = "conversations"
    images: str = ""
    """The folder that names of pictures are seen from, or plain tars whose members they are (`{root}/coco-*.tar`); by
    default the folder of the shard."""
    rows: str = ""
    """The folder that the `path`s of an index are seen from; by default that of the shard."""
    only: dict[str, str | list[str]] = {}
    """Only rows with these fields: `{source: [ai2d, chartqa]}`."""

    def build(self, root: str) -> "Conversations":
        return Conversations(self, root)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a picture stands: the next one of the row, or its own."""

    own: Any = None


class Conversations(FilesSource):
    """See `ConversationsConfig`."""

    def __init__(self, config: ConversationsConfig, root: str) -> None:
        super().__init__(config, root)
        self._only = config.only
        images, rows = (os.path.expanduser(one.replace("{root}", root)) for one in (config.images, config.rows))
        self._tars = expand(config.images, root) if images and not os.path.isdir(images) else []
        self._images, self._rows = images, rows
        self.elsewhere = tuple(os.path.abspath(one) for one in (images, rows) if one)

    def open(self, path: str, limits: Limits) -> Shard:
        _ = self._members  # damage of the tars is not a sample's
        return super().open(path, limits)

    @cached_property
    def _members(self) -> dict[str, Placed]:
        """The members of the tars with pictures."""
        found: dict[str, Placed] = {}
        for path in self._tars:
            members = place_members(path)
            if twice := found.keys() & members.keys():
                name = min(twice)
                raise DataError(
                    f"{path}: {name} is in {found[name].path}, too; expected names that tell pictures apart"
                )
            found |= members
        return found

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        fields = self._fields(group, where, limits)
        if isinstance(path := fields.get("path"), str) and not {"conversations", "messages"} & fields.keys():
            fields = self._renamed(_read_row(self._folder(group, self._rows, where, "rows"), path, where, limits))
        if not is_wanted(fields, self._only):
            return []
        try:
            parts = self._parts(group, fields, where)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: its JSON is not laid out as a conversation ({type(error).__name__}: {shortened(error)})"
            ) from None
        check_length(parts, where, limits)
        return [Sample(id, tuple(parts), {k: v for k, v in fields.items() if isinstance(v, str | int | float)})]

    def _parts(self, group: Group, fields: Fields, where: str) -> list[Part]:
        turns = [(role, _pieces(content)) for role, content in _turns(fields, where)]
        slots = sum(piece == _Slot() for _, pieces in turns for piece in pieces)
        own = any(isinstance(piece, _Slot) for _, pieces in turns for piece in pieces) and not slots
        pictures = [] if own else self._listed(group, fields)  # turns that bring their pictures name no others
        if slots != len(pictures):
            raise DataError(
                f"{where}: {slots} {IMAGE} in its turns for {len(pictures)} pictures; expected one for each picture"
            )
        following = iter(pictures)
        parts: list[Part] = []
        for number, (role, pieces) in enumerate(turns):
            if not any(pieces):
                raise DataError(f"{where}: turn {number}, the {role}'s, is empty")
            parts.append(Turn(role))
            for piece in pieces:
                if isinstance(piece, _Slot):
                    entry = next(following) if piece.own is None else piece.own
                    parts.append(self._picture(group, entry, where))
                elif piece:
                    parts.append(check_text(Text(piece, role == "assistant"), where))
        return parts

    def _listed(self, group: Group, fields: Fields) -> list[Any]:
        """What a row says of its pictures; where it says nothing, the pictures that stand beside it in the shard."""
        found = fields.get("images") or fields.get("image")
        if found:
            return found if isinstance(found, list) else [found]
        if encoded := fields.get("image_base64"):
            return [{"image_base64": one} for one in (encoded if isinstance(encoded, list) else [encoded])]
        return [name for name in group.members if _ext(name) in IMAGE_EXTENSIONS]

    def _picture(self, group: Group, entry: Any, where: str) -> Media:
        """By base64, or by the name of a member of the group, of a member of the tars, or of a file."""
        if isinstance(entry, dict):
            if "image_base64" in entry:
                return decoded_picture(entry["image_base64"], where)
            entry = entry["url"]  # of chat messages
        if entry.startswith("data:"):
            return decoded_picture(entry.partition(",")[2], where)
        if re.match(r"\w+://", entry):
            raise DataError(f"{where}: {entry[:80]!r} is a URL, and none is fetched; give a file or base64")
        name = entry.removeprefix("./")
        member = group.members.get(name) or group.members.get(name.lower())  # in tars they are lower case
        data = self._members.get(name) if member is None else member
        if data is None:
            if self._tars:
                raise DataError(f"{where}: its picture {name[:80]!r} is not in {self._images}")
            folder = self._folder(group, self._images, where, "images")
            data = _file(folder, name, where)
        if _ext(name) not in IMAGE_EXTENSIONS:
            raise DataError(f"{where}: {name[:80]!r} is no picture; expected {', '.join(IMAGE_EXTENSIONS)}")
        return Media("image", data, _ext(name))

    def _folder(self, group: Group, given: str, where: str, key: str) -> Path:
        if not given and is_remote(self._path):
            raise DataError(f"{where}: it names a file, and its shard lies in no folder; say where with `{key}`")
        return Path(given or os.path.dirname(group.shard.path)).absolute()


def _turns(fields: Fields, where: str) -> list[tuple[Role, Any]]:
    """Who says what: perhaps the system, then user and assistant in turn."""
    found = fields.get("conversations") or fields.get("messages")
    if not isinstance(found, list) or not found:
        raise DataError(
            f"{where}: neither `conversations` nor `messages` in its row; found {shortened(sorted(fields))}"
        )
    turns: list[tuple[Role, Any]] = []
    for number, turn in enumerate(found):
        name = turn.get("from") or turn.get("role")
        content = turn["value"] if turn.get("value") is not None else turn["content"]
        if name not in ROLES:
            raise DataError(f"{where}: turn {number} is from {shortened(name)!r}; expected {', '.join(ROLES)}")
        turns.append((ROLES[name], content))
    if turns[0][0] == "system" and not _pieces(turns[0][1]):
        turns = turns[1:]
    first = int(turns[0][0] == "system") if turns else 0
    for number, (role, _) in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if number == 0 and role == "assistant":
            raise DataError(f"{where}: its first turn is the assistant's; expected a question before every answer")
        if role != expected:
            raise DataError(f"{where}: turn {first + number} is the {role}'s; expected the {expected}'s, in turn")
    if len(turns) == first or (len(turns) - first) % 2:
        raise DataError(f"{where}: its last turn is no answer; expected one to every question")
    return turns


def _pieces(content: Any) -> list[str | _Slot]:
    """The text of a turn, in which pictures have their slots; white space at both ends is stripped."""
    pieces: list[str | _Slot] = []
    for entry in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if entry["type"] == "text":
            first, *others = entry["text"].split(IMAGE)
            pieces += [first, *(one for text in others for one in (_Slot(), text))]
        elif entry["type"] in ("image", "image_url"):
            pieces.append(_Slot(entry.get("image") or entry.get("image_url")))
        else:
            raise ValueError(f"content of type {entry['type']!r}; expected text, image or image_url")
    pieces = [piece for piece in pieces if piece != ""]
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return [piece for piece in pieces if piece != ""]


def _ext(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _file(folder: Path, name: str, where: str) -> Placed:
    """A plain file under a folder. What the folder's owner has linked into it is taken as part of it."""
    if name.startswith("/") or ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise DataError(f"{where}: {name[:80]!r} points outside {folder}; refused")
    try:
        about = os.stat(folder / name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: {str(folder / name)[:200]}: {reason}") from None
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"{where}: {str(folder / name)[:200]} is not a file")
    return Placed(str(folder / name), 0, about.st_size, about.st_mtime_ns)


def _read_row(folder: Path, name: str, where: str, limits: Limits) -> Fields:
    """The row in a file of its own."""
    file = _file(folder, name, where)
    if file.size > limits.json_bytes:
        raise DataError(f"{where}: {file.path} has {file.size} bytes, over data.max_json_bytes")
    try:
        fields = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {file.path} cannot be read ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {file.path} holds a {type(fields).__name__}, expected an object")
    return fields
