"""What is written of an evaluation: one file a task that says what decides its numbers, and then these.

A folder belongs to the settings that it was begun with: others are refused, since what lies there would be another
run's.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mm.errors import ConfigError
from mm.files import atomic

Result = dict[str, Any]
Progress = Callable[[str, int], None]
"""Told of a task, or of a part of one, how many items are done."""
T = TypeVar("T")


def claim(file: Path, asked: Result, begun: bool) -> None:
    """The file's settings are these from now on; where items are `begun`, they were before. Raises `ConfigError`."""
    if not begun:
        return write(file, asked)
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, FileNotFoundError):
        found = {}
    for key, value in asked.items():
        if found.get(key) != json.loads(json.dumps(value)):
            raise ConfigError(
                f"{file}: holds results with {key} {found.get(key)!r}, not {value!r}; choose another --out or remove "
                "it and its items"
            )


def write(file: Path, content: Result) -> None:
    with atomic(file) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def prepared(out: Path, path: str) -> Path:
    """The folder for results of the files at `path`. Raises `ConfigError` where it would be among them."""
    if (folder := Path(path)).is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out}: lies within {folder}, where results would be read as items; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` at a time, in order; the last may be fewer."""
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
