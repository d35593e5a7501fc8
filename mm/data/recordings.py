"""Recordings without text: folders of files at every depth, tars and tables; whole or in clips, with labels or without.

A recording is decoded once while it is scanned, which finds what is damaged, silent or clipped before any training
does. Whatever is cut or resampled is written anew on the way, as FLAC, for a pack would otherwise hold a whole file for
each of its clips; everything else stays as it came, where it lies.
"""

import csv
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NoReturn

from pydantic import Field, model_validator

from mm.data.audio import AUDIO_EXTENSIONS, cut_audio, probe_audio
from mm.data.limits import Limits
from mm.data.remote import is_remote
from mm.data.sample import Media, Sample, Special
from mm.data.shards import EXTENSIONS, Extent, Folder, Group, Placed, Shard, counted_out, escaped, in_root, unescaped
from mm.data.sources import Fields, FilesConfig, FilesSource, is_wanted, sample_id, shortened
from mm.errors import DataError
from mm.settings import Count, Number

OTHER_SOUND = ("aac", "aif", "aiff", "ape", "m4a", "opus", "wma", "wv")
"""Recordings too, in forms that are not read; other files in a folder of music are none."""
PATTERN = re.compile(r"[*?\[{]")
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class RecordingsConfig(FilesConfig):
    """Recordings as they are, for models that learn from sound alone; with `labels`, for classifiers.

    A recording is whole, or cut into clips of `seconds`. It is decoded when it is packed, and left out where it is
    short, silent or clipped; what is cut or resampled is kept as FLAC of 16 bits, mono.
    """

    kind: str = "recordings"
    path: str
    """A folder of .flac, .wav, .ogg and .mp3, at every depth below it; a pattern of such files (`music/**/*.flac`); or
    shards as all sources have them, by their endings (`music-*.tar`)."""
    seconds: Number | None = Field(default=None, gt=0)
    """Cut into clips of so many seconds, one behind the other. Null: recordings stay whole."""
    min_seconds: Number = Field(default=1.0, ge=0)
    """Shorter recordings, and what is shorter behind the last whole clip, are left out, and counted as `filtered`."""
    sampling_rate: Count | None = Field(default=None, ge=1000, lt=1_000_000)
    """Recordings of another rate are kept at this one, in Hz: the model's saves disk and time. Null: at their own."""
    silence: Number | None = Field(default=-70.0, lt=0)
    """Clips below this level are left out, and counted as `filtered`: in dB of full scale, the RMS over the clip. Null:
    silence is kept."""
    max_clipped: Number = Field(default=0.1, gt=0, le=1)
    """Clips with a larger share of their samples at full scale are left out, and counted as `filtered`. 1: kept. With
    this and `silence: null`, what is neither cut nor resampled is not decoded when it is packed."""
    labels: str | list[str] = []
    """Fields whose values are labels, each a token that the model has and is to predict: `genre`, `[genre, mood]`. A
    list, or a text with `;`, is several labels, null or an empty text none. The fields are those of the JSON beside a
    recording (`KEY.json`), of the columns of a table, or of `table`."""
    table: str = ""
    """A .csv or .tsv whose column `file` names the recordings that are meant, as seen from the folder in `path`, or as
    members of tars; its other columns are fields. Recordings that it does not name are left out, and counted as
    `filtered`."""
    only: dict[str, str | list[str]] = {}
    """Only recordings with these fields: `{split: train}`."""

    @model_validator(mode="after")
    def _leaves_clips(self) -> "RecordingsConfig":
        if self.seconds is not None and self.min_seconds > self.seconds:
            raise ValueError(f"min_seconds = {self.min_seconds:g} is over seconds = {self.seconds:g}: no clip is left")
        return self

    def build(self, root: str) -> "Recordings":
        return Recordings(self, root)


class Recordings(FilesSource):
    """See `RecordingsConfig`."""

    def __init__(self, config: RecordingsConfig, root: str) -> None:
        super().__init__(config, root)
        self._config = config
        self._labels = [config.labels] if isinstance(config.labels, str) else config.labels
        path = in_root(config.path, root)
        self._in_shards = bool(EXTENSIONS.search(path)) or is_remote(path) or path.startswith("builtin:")
        endings = tuple(f".{ext}" for ext in AUDIO_EXTENSIONS)
        names_files = path.lower().endswith(endings) and not os.path.isdir(path)
        self._folders, self._names = os.path.split(path) if names_files else (path, "")
        self._top = self._folders.rstrip("/")
        while PATTERN.search(self._top):
            self._top = os.path.dirname(self._top)
        self._top = os.path.abspath(self._top)
        if not (config.name or self._in_shards):
            self.name = os.path.basename(self._top)
        self._table = in_root(config.table, root)
        if self._table:
            try:
                self.elsewhere = (hashlib.blake2b(Path(self._table).read_bytes(), digest_size=8).hexdigest(),)
            except OSError as error:
                raise DataError(f"{self._table}: {error.strerror}; it is the `table` of source {self.name}") from None

    def shards(self) -> list[str]:
        """Every folder that holds recordings is a shard."""
        if self._table:
            _ = self._rows  # what is wrong with it is not a shard's
        if self._in_shards:
            return super().shards()
        found = set[str]()
        folders = os.path.join(self._folders or ".", "") if self._names else self._folders  # with a slash: no files
        for top in (top for one in counted_out(folders) for top in _folders(one)):
            for folder, below, names in os.walk(top, onerror=_raise):
                below[:] = [] if self._names else [name for name in below if not name.startswith(".")]
                if any(_is_meant(name, self._names) for name in names):
                    found.add(os.path.abspath(folder))
        if not found:
            depth = "in its folders" if self._names else "there, at any depth"
            raise DataError(f"{self._path}: no {', '.join(AUDIO_EXTENSIONS)} {depth} (looked from {os.getcwd()})")
        for folder in found:
            if NO_TEXT.search(folder):
                raise DataError(f"{folder!a}: the folder's name is not plain UTF-8 text; rename it")
        return sorted(found)

    def shard_name(self, path: str) -> str:
        """A folder is called by the way to it from the one in `path`, which is `.`."""
        return super().shard_name(path) if self._in_shards else os.path.relpath(path, self._top)

    def open(self, path: str, limits: Limits) -> Shard:
        return super().open(path, limits) if self._in_shards else _Recordings(path, self._names)

    def samples(self, group: Group, limits: Limits) -> Iterator[Sample]:
        id = sample_id(self.name, group)
        where = f"{id} in {group.shard.path}"
        media = self._media(group, "audio", where)
        fields = self._fields(group, where, limits)
        if self._table:
            name = media.data.path if isinstance(media.data, Placed) else f"{unescaped(group.key)}.{media.ext}"
            if name not in self._rows:
                return
            fields = {**fields, **self._rows[name]}
        if not is_wanted(fields, self._config.only):
            return
        labels = self._labelled(fields, where)
        for one, clip in self._clips(media, id, where, limits):
            yield Sample(one, () if clip is None else (clip, *labels), fields)

    def _clips(self, media: Media, id: str, where: str, limits: Limits) -> Iterator[tuple[str, Media | None]]:
        """The clips of a recording by their ids; None for one that is left out.

        Raises `DataError` for a damaged recording, behind the clips that ended before the damage.
        """
        config = self._config
        if media.size > limits.media_bytes:
            raise DataError(f"{where}: its audio has {media.size:,} bytes, over data.max_media_bytes")
        with media.open() as file:
            header = probe_audio(file, where, limits.seconds)
        is_cut = config.seconds is not None and header.seconds > config.seconds
        is_new = is_cut or config.sampling_rate not in (None, header.sampling_rate)
        first = id if config.seconds is None else f"{id}#0"
        if not is_cut and header.seconds < config.min_seconds:
            yield first, None
            return
        if not is_new and config.silence is None and config.max_clipped == 1:
            yield first, media
            return
        quiet = -float("inf") if config.silence is None else config.silence
        with media.open() as file:
            for number, piece in enumerate(cut_audio(file, where, config.seconds, config.sampling_rate, is_new)):
                is_sound = piece.level >= quiet and piece.clipped <= config.max_clipped
                clip = media if piece.flac is None else Media("audio", piece.flac, "flac")
                is_kept = is_sound and piece.seconds >= config.min_seconds
                yield f"{id}#{number}" if number else first, clip if is_kept else None

    def _labelled(self, fields: Fields, where: str) -> list[Special]:
        """The labels of a recording, each once, to be predicted."""
        found: list[str] = []
        for name in self._labels:
            if name not in fields:
                raise DataError(f"{where}: no field {name!r} for its labels; there are {shortened(sorted(fields))}")
            value = fields[name]
            values = value if isinstance(value, list) else [] if value is None else str(value).split(";")
            found += [label for one in values if (label := str(one).strip())]
        return [Special(label, loss=True) for label in dict.fromkeys(found)]

    @cached_property
    def _rows(self) -> dict[str, Fields]:
        """The lines of the table by the file that they are of: its absolute path, or its name in a tar."""
        rows: dict[str, Fields] = {}
        try:
            with open(self._table, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if self._table.endswith(".tsv") else ",")
                for row in reader:
                    if more := row.pop(None, None):  # values without a heading are more of the last column
                        last = list(row)[-1]
                        row[last] = ";".join([row[last], *more])
                    fields: Fields = self._renamed(row)
                    name = fields.get("file")
                    if not name:
                        raise DataError(
                            f"{self._table}: no `file` in line {reader.line_num}, but {shortened(sorted(fields))}; "
                            "say which it is with `columns: {file: NAME}`"
                        )
                    if self._in_shards:
                        path = PurePosixPath(name)
                        key = str(path.with_suffix(path.suffix.lower()))
                    else:
                        key = os.path.abspath(os.path.join(self._top, name))
                    if key in rows:
                        raise DataError(f"{self._table}: two lines for {name}; expected one with all of it")
                    rows[key] = fields
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self._table}: not a table that can be read ({error})") from None
        return rows


class _Recordings(Folder):
    """The recordings that lie in a folder, a group each, with the JSON beside it: `a.flac`, `a.json`."""

    def __init__(self, path: str, names: str) -> None:
        super().__init__(path, "")
        self._names = names

    def groups(self) -> Iterator[Group | DataError]:
        for name in sorted(os.listdir(self.path)):
            path = os.path.join(self.path, name)
            stem, ext = os.path.splitext(name)
            ext = ext[1:].lower()
            if not _is_meant(name, self._names) or os.path.isdir(path):
                continue
            if NO_TEXT.search(name):
                yield DataError(f"{path!a}: its name is not plain UTF-8 text; rename it")
                continue
            if ext in OTHER_SOUND:
                expected = ", ".join(AUDIO_EXTENSIONS)
                yield DataError(f"{path}: expected {expected}; convert it, or name the others with a pattern")
                continue
            members: dict[str, Extent | Placed | bytes] = {}
            try:
                members[ext] = _placed(path)
                if os.path.isfile(beside := os.path.join(self.path, f"{stem}.json")):
                    members["json"] = _placed(beside)
            except OSError as error:
                yield DataError(f"{path}: {error.strerror}")
                continue
            # What stands behind a # is the number of a clip.
            yield Group(self, escaped(name), members)


def _is_meant(name: str, pattern: str) -> bool:
    """Whether a file is a recording by its name, or one that the pattern means. Hidden files are not."""
    if name.startswith("."):
        return False
    if pattern:
        return name == pattern or fnmatchcase(name, pattern)
    return os.path.splitext(name)[1][1:].lower() in (*AUDIO_EXTENSIONS, *OTHER_SOUND)


def _folders(pattern: str) -> list[str]:
    """The folders that a pattern means; one that is there means itself, whatever its name holds."""
    if os.path.isdir(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if files := [one for one in found if _is_meant(os.path.basename(one), "") and os.path.isfile(one)]:
        raise DataError(f"{pattern}: means files too, {files[0]} for one; name their folder, or files by their ending")
    return [one for one in found if os.path.isdir(one)]


def _placed(path: str) -> Placed:
    about = os.stat(path)
    return Placed(path, 0, about.st_size, about.st_mtime_ns)


def _raise(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: {error.strerror}") from None
