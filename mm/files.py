"""Files that are there whole or not at all, whatever kills the process or the machine."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path: Path, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it has been written to the end and has reached the disk.

    Until then it is in `folder`, or beside its place; what a killed process leaves of it stays there
    (`clear_partials`).
    """
    partial = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a failed write does not know of which file
        raise
    finally:
        partial.unlink(missing_ok=True)


def clear_partials(*paths: Path) -> None:
    """Remove what killed processes left of files that `atomic` was to make together: of all of them, where nobody has
    written to any for an hour."""
    partials = [one for path in paths for one in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 32}")]
    with contextlib.suppress(FileNotFoundError):  # another one clears them
        if all(time.time() - partial.stat().st_mtime > 3600 for partial in partials):
            for partial in partials:
                partial.unlink()
