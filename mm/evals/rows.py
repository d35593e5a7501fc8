"""Rows of the files that benchmarks are published in: TSV, CSV, JSON, JSON lines, parquet, Arrow.

A `Row` gives its fields by name and its pictures as encoded bytes: out of a binary column, base64, or a file beside the
table. Tables are read a few rows at a time; a picture in a file is not opened before it is looked at.
"""

import base64
import binascii
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mm.data.limits import Limits
from mm.data.media import IMAGE_EXTENSIONS
from mm.data.sample import Media
from mm.data.shards import Extent, Placed, expand
from mm.data.sources import read_json, shortened
from mm.data.tables import open_table, sniff
from mm.errors import DataError

TABLES = (".tsv", ".csv", ".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")
LISTS = ("questions", "data", "annotations")
"""Where the rows are in a JSON file that is an object."""
LONGEST_NAME = 255  # of a file; what is longer is a picture in base64
LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class PictureFile:
    """The bytes of a file, read when asked for."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self) -> bytes:
        return self.path.read_bytes()

    def open(self) -> BinaryIO:
        return open(self.path, "rb")


@dataclass(frozen=True, slots=True)
class Row:
    """One row. A field that is absent, null, empty or NaN (as pandas writes it) counts as missing."""

    file: Path
    number: int
    fields: dict[str, Any]
    images: tuple[Path, ...]
    """Folders in which pictures are looked for."""
    members: Mapping[str, Extent | Placed | bytes] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.file}: row {self.number + 1}"

    def get(self, *names: str) -> Any:
        """The first of these fields that is not missing, or None."""
        for name in names:
            value = self.fields.get(name)
            if value is not None and value == value and value not in ("", "nan"):
                return value
        return None

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            wanted = " or ".join(map(repr, names))
            raise DataError(f"{self.where}: no field {wanted}; there are {shortened(sorted(map(str, self.fields)))}")
        return value

    def text(self, *names: str) -> str:
        return str(self.need(*names))

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts."""
        found = self.need(*names)
        if not isinstance(found, list):
            raise DataError(f"{self.where}: {names[0]!r} is a {type(found).__name__}, expected a list")
        return tuple(map(str, found))

    def options(self) -> tuple[str, ...]:
        """The columns A, B, … up to the first that is missing."""
        found = []
        for letter in "ABCDEFGHI":
            if (option := self.get(letter)) is None:
                break
            found.append(str(option))
        return tuple(found)

    def picture(self, *names: str) -> Media:
        """The picture in the first of these fields that is there."""
        return self.load(self.need(*names))

    def load(self, value: Any) -> Media:
        """A picture by what a field holds: a column's bytes, base64, or a file name (with or without extension)."""
        if isinstance(value, list):
            if len(value) != 1:
                raise DataError(f"{self.where}: {len(value)} pictures in one field; expected one")
            value = value[0]
        if not isinstance(value, str | int):
            raise DataError(
                f"{self.where}: a {type(value).__name__} in the place of a picture; expected one, or its name"
            )
        if value in self.members:
            ext = str(value).rpartition(".")[2]
            if ext not in IMAGE_EXTENSIONS:
                raise DataError(f"{self.where}: {value} is no picture; expected {', '.join(IMAGE_EXTENSIONS)}")
            return Media("image", self.members[str(value)], ext)
        text = str(value)
        if len(text) > LONGEST_NAME:
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise DataError(f"{self.where}: its picture's base64 cannot be read ({error})") from None
            return Media("image", data, self._ext(data, "its picture in base64"))
        path = self._file(text)
        with open(path, "rb") as file:
            return Media("image", PictureFile(path), self._ext(file.read(16), str(path)))

    def _ext(self, data: bytes, what: str) -> str:
        ext = sniff(data)
        if ext not in IMAGE_EXTENSIONS:
            raise DataError(f"{self.where}: {what} is neither jpg, png nor webp; convert it")
        return ext

    def _file(self, name: str) -> Path:
        for folder in self.images:
            for ending in ("", *(f".{ext}" for ext in IMAGE_EXTENSIONS)):
                path = folder / f"{name}{ending}"
                if path.is_file():
                    # By its name: what the folder's owner has linked into it is part of it.
                    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
                        raise DataError(f"{self.where}: the picture {name!r} points outside {folder}; refused")
                    return path
        looked = shortened(", ".join(map(str, self.images)))
        raise DataError(f"{self.where}: there is no picture {name[:80]!r} in {looked}; say where with --images")


def files_of(path: str, patterns: Sequence[str] = ()) -> list[Path]:
    """The tables that a path means: a file, a glob (`data/test-*.parquet`), or a folder's files.

    Of a folder those are taken that the first matching one of `patterns` matches; where none does, every table below.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [Path(file) for file in expand(path)]
    for pattern in (*patterns, "**/*"):
        if found := sorted(file for file in folder.glob(pattern) if file.name.endswith(TABLES)):
            return found
    raise DataError(f"{path}: no table in this folder; expected {', '.join(TABLES)}")


def rows(path: str, images: Path | None = None, patterns: Sequence[str] = (), key: str | None = None) -> Iterator[Row]:
    """The rows of all files that `path` means, in order. Raises `DataError` at the first that cannot be read.

    `key`: of JSON files that are an object, which list (by default the first of `LISTS`).

    Pictures that are named are looked for in `images`, or else beside the file and in the folders beside it.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: no such folder for pictures")
    for file in files_of(path, patterns):
        folders = (images,) if images else (file.parent, *sorted(p for p in file.parent.iterdir() if p.is_dir()))
        yield from _rows(file, folders, key)


def _rows(file: Path, images: tuple[Path, ...], key: str | None) -> Iterator[Row]:
    if file.suffix in (".tsv", ".csv"):
        yield from (Row(file, number, fields, images) for number, fields in enumerate(_cells(file)))
    elif file.name.endswith(".json") and not _is_lines(file):
        for number, fields in enumerate(_objects(file, key)):
            yield Row(file, number, fields, images)
    elif file.name.endswith(TABLES):
        with open_table(str(file), LIMITS) as table:
            for group in table.groups():
                if isinstance(group, DataError):
                    raise group
                number = int(group.key)
                if group.fields is None:
                    yield Row(file, number, read_json(group, f"{file}: line {number + 1}", LIMITS), images)
                else:
                    yield Row(file, number, group.fields, images, group.members)
    else:
        raise DataError(f"{file}: not a table that is known here; expected {', '.join(TABLES)}")


def _cells(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LIMITS.json_bytes)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
        try:
            for number, fields in enumerate(table):
                if None in fields:
                    raise DataError(f"{file}: row {number + 1} has more cells than the header has names")
                yield fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as separated cells in UTF-8 ({error})") from None


def _is_lines(file: Path) -> bool:
    """Whether a `.json` is one object a line, as POPE's are."""
    with open(file, "rb") as lines:
        first, second = lines.readline(LIMITS.json_bytes), lines.readline(2)
    try:
        return isinstance(json.loads(first), dict) and bool(second.strip())
    except ValueError:
        return False


def _objects(file: Path, key: str | None) -> list[dict[str, Any]]:
    """The rows of a JSON file: a list, a list in an object, or an object of objects (MathVista's, by `pid`)."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from None
    if isinstance(found, dict):
        key = key or next((name for name in LISTS if isinstance(found.get(name), list)), None)
        found = found.get(key) if key else [{"pid": k, **v} if isinstance(v, dict) else v for k, v in found.items()]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{file}: expected a list of objects, alone or under one of {', '.join(LISTS)}")
    return found
