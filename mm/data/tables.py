"""Tables as shards: jsonl and json (plain, gz, zst), parquet, Arrow files of Hugging Face data sets, token ids.

A row is a group: plain columns become its `fields`, binary columns and `{bytes, path}` structs (pictures, sound) its
members. Rows are read a few at a time, so memory does not grow with the file.
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import tokenize
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.limits import Limits
from mm.data.shards import AGAIN, ALWAYS_ALLOWED, CHUNK, MAX_GROWTH, Extent, Group, Shard, stem
from mm.errors import DataError

ROWS = 64  # read at once
BETWEEN = re.compile(r"\s*,?\s*")  # rows of a JSON array
BROKEN = (OSError, pa.ArrowException, ValueError, LookupError, TypeError, OverflowError)  # what Arrow says of damage
SIGNATURES = (
    (rb"\xff\xd8\xff", "jpg"), (rb"\x89PNG", "png"), (rb"RIFF....WEBP", "webp"), (rb"RIFF....WAVE", "wav"),
    (rb"fLaC", "flac"), (rb"OggS", "ogg"), (rb"ID3|\xff[\xe2-\xfb]", "mp3"), (rb"....ftyp", "mp4"),
    (rb"\x1aE\xdf\xa3", "webm"),
)  # fmt: skip


def open_table(path: str, limits: Limits) -> Shard:
    """Raises `DataError` where nothing of it can be read."""
    if path.endswith((".parquet", ".arrow")):
        return Table(path)
    return JsonArray(path, limits) if re.search(r"\.json(\.gz|\.zst)?$", path) else JsonLines(path, limits)


def _line(error: Exception) -> str:
    """What an error says first, since Arrow's say much."""
    return str(error).partition("\n")[0][:300] or type(error).__name__


class JsonLines:
    """One JSON object a line; a row's member `json` is the line as it stands."""

    def __init__(self, path: str, limits: Limits) -> None:
        self.path = path
        self.name = stem(path)
        self._most = limits.json_bytes
        self._read, self._growth = 0, max(ALWAYS_ALLOWED, MAX_GROWTH * os.path.getsize(path))
        self._through = 0  # lines or rows
        self._file: Any
        if path.endswith(".zst"):
            self._file = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))
        else:
            self._file = gzip.open(path) if path.endswith(".gz") else open(path, "rb")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def groups(self) -> Iterator[Group | DataError]:
        try:
            yield from self._rows()
        except EOFError:
            yield DataError(f"{self.path}: truncated: the compressed stream ends early; {AGAIN}")
        except DataError as error:
            yield error
        except (OSError, zlib.error, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # not the file's fault
            yield self._damaged(_line(error))

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path}: damaged after line {self._through} ({how}); {AGAIN}")

    def _rows(self) -> Iterator[Group | DataError]:
        while line := self._counted(self._file.readline(self._most + 1)):
            self._through += 1
            if len(line) > self._most:
                while line and not line.endswith(b"\n"):
                    line = self._counted(self._file.readline(1 << 20))
                yield DataError(f"{self.path}: line {self._through} has over data.max_json_bytes = {self._most} bytes")
            elif line.strip():
                yield Group(self, str(self._through - 1), {"json": line})

    def _counted(self, data: bytes) -> bytes:
        """What was read, if the stream has not grown too much."""
        self._read += len(data)
        if self._read > self._growth:
            raise DataError(f"{self.path}: its stream grows past {self._growth:,} bytes; refused as a bomb")
        return data


class Lost(DataError):
    """All that follows in a file is lost, however much it is: no share of bad samples measures that."""


class JsonArray(JsonLines):
    """Objects in one JSON array, however long, or one behind the other; parsed as they are read, a row at a time.

    Behind damage it cannot be read on, and then it raises `Lost`.
    """

    def _damaged(self, how: str) -> DataError:
        return Lost(f"{self.path}: damaged after {self._through} rows ({how}); {AGAIN}")

    def _rows(self) -> Iterator[Group | DataError]:
        for row in self._values():
            self._through += 1
            if isinstance(row, dict):
                yield Group(self, str(self._through - 1), {}, row)
            else:
                yield DataError(f"{self.path}: row {self._through} is a {type(row).__name__}, expected an object")

    def _values(self) -> Iterator[Any]:
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        scan = json.JSONDecoder().raw_decode
        text, at, chunk = "", 0, CHUNK
        in_array: bool | None = None
        ended = False
        while True:
            at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if at < len(text) and in_array is None:
                in_array = text[at] == "["
                at += in_array
                continue
            if in_array and text[at : at + 1] == "]":
                at, in_array = at + 1, None  # another may begin behind it
                continue
            if at < len(text):
                try:
                    value, at = scan(text, at)
                except (ValueError, RecursionError) as error:
                    if ended or isinstance(error, RecursionError):
                        raise self._damaged(getattr(error, "msg", _line(error))) from None
                else:
                    yield value
                    chunk = CHUNK
                    continue
            elif ended:
                if in_array:
                    raise self._damaged("truncated: its array does not end")
                return
            # More of the row: twice as much every time, since it is parsed from its start again.
            if len(text) - at > self._most:
                raise Lost(f"{self.path}: row {self._through + 1} has over data.max_json_bytes = {self._most} bytes")
            data = self._counted(self._file.read(chunk))
            chunk, ended = 2 * chunk, not data
            try:
                text, at = text[at:] + decode(data, final=ended), 0
            except UnicodeDecodeError:
                raise self._damaged("not UTF-8") from None


class Table:
    """A parquet file, or an Arrow file or stream as Hugging Face's `datasets` writes them.

    A damaged row group does not cost the ones behind it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = stem(path)
        self._growth = max(ALWAYS_ALLOWED, MAX_GROWTH * os.path.getsize(path))
        self._files = contextlib.ExitStack()
        try:
            if path.endswith(".parquet"):
                self._table: Any = self._files.enter_context(pq.ParquetFile(path))
            else:
                file = self._files.enter_context(pa.memory_map(path))
                try:
                    self._table = pa.ipc.open_stream(file)
                except pa.ArrowInvalid:
                    self._table = pa.ipc.open_file(file)
        except BROKEN as error:
            self._files.close()
            raise self._damaged("not a readable table", error) from None

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def groups(self) -> Iterator[Group | DataError]:
        for start, batches in self._parts():
            number = start
            try:
                for batch in batches:
                    batch.validate(full=True)  # before anything follows an offset in it
                    for at in range(0, batch.num_rows, ROWS):
                        for row in batch.slice(at, ROWS).to_pylist():
                            yield self._group(number, row)
                            number += 1
            except DataError as error:
                yield error
            except BROKEN as error:
                yield self._damaged(f"damaged after {number} rows", error)

    def _parts(self) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
        """Parts that can be read without each other, with the number of their first row."""
        if isinstance(self._table, pq.ParquetFile):
            start = 0
            for number in range(self._table.num_row_groups):
                yield start, self._row_group(number)
                start += self._table.metadata.row_group(number).num_rows
        elif isinstance(self._table, pa.ipc.RecordBatchFileReader):
            yield 0, map(self._table.get_batch, range(self._table.num_record_batches))
        else:
            yield 0, iter(self._table)

    def _row_group(self, number: int) -> Iterator[pa.RecordBatch]:
        # Not by its columns' sizes: of damaged ones Arrow throws what nobody catches, and the process ends.
        size, limit = self._table.metadata.row_group(number).total_byte_size, self._growth
        if not 0 <= size <= limit:
            raise DataError(f"{self.path}: row group {number} grows past {limit:,} bytes; refused as a bomb")
        yield from self._table.iter_batches(ROWS, row_groups=[number])

    def _damaged(self, what: str, error: Exception) -> DataError:
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # not the file's fault
        return DataError(f"{self.path}: {what} ({_line(error)}); {AGAIN}")

    def _group(self, number: int, row: dict[str, Any]) -> Group:
        members: dict[str, Extent | bytes] = {}
        fields: dict[str, Any] = {}

        def take(name: str, value: Any) -> Any:
            """The value as a plain one: media become members, and their place is taken by the member's name."""
            if isinstance(value, dict):
                if value.keys() != {"bytes", "path"}:
                    return {key: take(f"{name}.{key}", one) for key, one in value.items()}
                value = value["bytes"]
            if isinstance(value, list):
                return [take(f"{name}.{i}", one) for i, one in enumerate(value)]
            if not isinstance(value, bytes):
                return value
            if (ext := sniff(value)) is None:
                return None
            members[f"{name}.{ext}"] = value
            return f"{name}.{ext}"

        for name, value in row.items():
            fields[name] = take(name, value)
        return Group(self, str(number), members, fields)


def sniff(data: bytes) -> str | None:
    """The file extension of encoded media by its first bytes."""
    return next((ext for pattern, ext in SIGNATURES if re.match(pattern, data[:16], re.DOTALL)), None)


class TokenFile:
    """Token ids in a row, documents ending in `eos`: `.npy`, or raw numbers of `dtype` (`.bin`)."""

    CHUNK = 1 << 24

    def __init__(self, path: str, eos: int, dtype: str) -> None:
        self.path = path
        self.name = stem(path)
        self._eos = eos
        try:
            if path.endswith(".npy"):
                self._ids: np.ndarray = np.lib.format.open_memmap(path, mode="r")
            else:
                self._ids = np.memmap(path, dtype=dtype, mode="r")
        except (ValueError, OverflowError, SyntaxError, tokenize.TokenError) as error:
            raise DataError(f"{path}: not a file of token ids ({_line(error)}); {AGAIN}") from None
        if self._ids.ndim != 1 or not np.issubdtype(self._ids.dtype, np.integer):
            raise DataError(f"{path}: expected one row of whole numbers, found {self._ids.dtype} {self._ids.shape}")

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(self, *_: object) -> None:
        del self._ids

    def groups(self) -> Iterator[Group | DataError]:
        number = start = 0
        for begin in range(0, len(self._ids), self.CHUNK):
            for end in begin + np.flatnonzero(self._ids[begin : begin + self.CHUNK] == self._eos):
                if end > start:
                    yield Group(self, str(number), {}, {"input_ids": self._ids[start:end]})
                    number += 1
                start = int(end) + 1
        if start < len(self._ids):
            yield Group(self, str(number), {}, {"input_ids": self._ids[start:]})
