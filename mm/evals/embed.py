"""What a frozen encoder makes of recordings, on disk: all of its layers, a vector a frame or a recording.

    FOLDER/embed.json                  what it is of, and counts
    FOLDER/index.jsonl                 a clip a line: id, file, start and seconds in it, part, first row, rows
    FOLDER/bad.jsonl                   what could not be read, and why
    FOLDER/features-000000.safetensors `features` [rows, layers, width]; a new file every `PART_BYTES`

Clips go through the encoder in the order of their files, as many as `batch_seconds` hold, side by side and without
padding. After each batch its rows are on the disk and then a line of a journal. So a call that was stopped goes on
behind the last line, cuts the same batches, and ends with the same files.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mm import hub
from mm.config import load_config
from mm.data.audio import decode_audio, planned_samples, probe_audio
from mm.data.limits import Limits
from mm.data.recordings import Recordings, RecordingsConfig
from mm.data.remote import is_remote
from mm.data.sample import Media
from mm.data.shards import Group
from mm.data.sources import sample_id
from mm.errors import ConfigError, DataError
from mm.files import fsync
from mm.models.audio import AudioEncoder
from mm.models.prompts import Precision
from mm.models.spectra import CQT, log_mel
from mm.models.system import weights_digest
from mm.train.distributed import resolve_device

Level = Literal["clip", "frame"]
Progress = Callable[[int], None]
VERSION = 1
PART_BYTES = 1 << 30
HEADER = 256  # bytes kept at the front of a part, for what is known when it is full
AHEAD = 4  # clips that are decoded while others are encoded
FLOOR = 1e-4  # of a CQT's magnitudes, where a tone of full scale has 4 to 128
LIMITS = Limits(seconds=math.inf)  # cut into windows, recordings may be of any length


class Embedder(Protocol):
    """What turns clips into vectors. `shortest`: samples that a clip has to have; `layers`: their names."""

    sampling_rate: int
    shortest: int
    layers: list[str]

    def frames(self, clips: list[Tensor]) -> list[list[Tensor]]:
        """Of every layer, for every clip (float32 [T], on any device), [frames, D] in float32."""
        ...

    def pool(self, frames: Tensor) -> Tensor:
        """[frames, D] of a clip to its vector [W]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, in plain values."""
        ...


class Encoder:
    """An audio encoder's hidden states: number 0 is what enters the first layer, number i what layer i gives."""

    def __init__(self, name: str, encoder: AudioEncoder, layers: str = "all", precision: Precision = "fp32") -> None:
        self.sampling_rate, self.shortest = encoder.config.sampling_rate, encoder.config.window
        self._encoder: Any = encoder
        self._name, self._precision = name, precision
        self._numbers = _numbers(layers, encoder.layers)
        self.layers = [str(number) for number in self._numbers]

    @torch.no_grad()
    def frames(self, clips: list[Tensor]) -> list[list[Tensor]]:
        device = next(self._encoder.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            encoded = self._encoder([clip.to(device) for clip in clips], states=True)
        return [[*encoded.states[number].float().split(encoded.lengths)] for number in self._numbers]

    def pool(self, frames: Tensor) -> Tensor:
        return frames.mean(0)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self._name,
            "weights": weights_digest(self._encoder),
            "encoder": self._encoder.config.model_dump(mode="json"),
            "layers": self.layers,
            "precision": self._precision,
        }


class Spectrum:
    """A spectrum in the place of an encoder, which a trained one should surpass: one layer; a clip's vector is the mean
    and the standard deviation of every bin over time.

    `log-mel`: see `mm.models.spectra.log_mel`; `cqt`: the logarithm of the magnitudes that MERT learns to predict.
    """

    sampling_rate = 24_000
    shortest = 320  # a hop

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in ("log-mel", "cqt"):
            raise ConfigError(f"builtin:{name}: no such features; expected builtin:log-mel or builtin:cqt")
        self.layers, self._name, self._device = [name], name, device
        self._cqt = CQT(self.sampling_rate) if name == "cqt" else None

    def frames(self, clips: list[Tensor]) -> list[list[Tensor]]:
        clips = [clip.to(self._device) for clip in clips]
        if self._cqt is None:
            return [[log_mel(clip, self.sampling_rate) for clip in clips]]
        return [[torch.log(magnitudes + FLOOR) for magnitudes in self._cqt(clips)]]

    def pool(self, frames: Tensor) -> Tensor:
        return torch.cat([frames.mean(0), frames.std(0, correction=0)])

    def describe(self) -> dict[str, Any]:
        return {"model": f"builtin:{self._name}", "layers": self.layers}


def _numbers(layers: str, count: int) -> list[int]:
    """Of hidden states, where there are `count` layers."""
    if layers == "all":
        return list(range(count + 1))
    if layers == "last":
        return [count]
    if layers.isdigit() and int(layers) <= count:
        return [int(layers)]
    raise ConfigError(f"layers {layers!r}: expected all, last or a number from 0 to {count}")


def open_embedder(path: str, layers: str = "all", device: str = "auto", precision: Precision = "fp32") -> Embedder:
    """A model's encoder, or a baseline of it.

    Args:
        path: whatever `hub.load` takes, if there is an audio encoder in it; `untrained:PATH`, the model of a config
            file or of a run's folder, with the random weights that training it from scratch begins with;
            `builtin:log-mel` or `builtin:cqt`.
        layers: `all`, `last` or the number of one.

    Raises:
        ConfigError: there is no such encoder or layer.
    """
    kind, _, rest = path.partition(":")
    if kind == "builtin":
        if layers not in ("all", "last") or precision != "fp32":
            raise ConfigError(f"{path}: has one layer, in float32; leave out --layers and --precision")
        return Spectrum(rest, resolve_device(device))
    if kind == "untrained":
        config = load_config(Path(rest) / "config.yaml" if Path(rest).is_dir() else Path(rest))
        torch.manual_seed(config.seed)
        system = config.model.build(weights=False).to(resolve_device(device)).eval()
    else:
        system, _, _ = hub.load(path, device)
    encoders = [module for module in system.modules() if isinstance(module, AudioEncoder)]
    if len(encoders) != 1:
        raise ConfigError(f"{path}: {len(encoders)} audio encoders in it; expected one, as in a mert or tagger run")
    return Encoder(path, encoders[0], layers, precision)


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording, still encoded, with what is known of it (`fields`: the JSON beside it). `file`: where it lies."""

    id: str
    file: str
    media: Media
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad:
    """A recording, clip or shard that cannot be read, and why."""

    id: str
    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording, or a window of it: mono samples, float32 [T]."""

    id: str
    file: str
    start: float
    seconds: float
    wave: np.ndarray


@dataclass(frozen=True, slots=True)
class Window:
    """A clip that is still encoded: `samples` of the recording at the encoder's rate, from `span` if there is one."""

    recording: Recording
    read: Callable[[], bytes]
    span: tuple[float, float] | None
    seconds: float
    samples: int


def source_of(audio: str, table: Path | None = None) -> Recordings:
    """The recordings that `audio` names, as the data source `recordings` reads them, or the shards of a folder.

    Args:
        audio: a folder, files or shards (see `RecordingsConfig.path`); of a folder without recordings its tars.
        table: a table whose lines name those that are meant.

    Raises:
        DataError: `audio` names nothing, or nothing on this machine.
    """
    if is_remote(audio):
        raise DataError(f"{audio}: recordings are read from this machine; copy them here first")

    def of(path: str) -> Recordings:
        # Whole, and as they are: what is left out or cut is decided here.
        return RecordingsConfig(path=path, table=str(table or ""), min_seconds=0, silence=None, max_clipped=1).build("")

    try:
        source = of(audio)
        source.shards()
    except DataError:
        folder = Path(audio).expanduser()
        if not (folder.is_dir() and any(folder.glob("*.tar"))):
            raise
        source = of(f"{audio}/*.tar")
    return source


def recordings(source: Recordings) -> Iterator[Recording | Bad]:
    """All that it has, in order. What is read of a shard can be read until the next one is asked for."""
    for path in source.shards():
        try:
            with source.open(path, LIMITS) as shard:
                shard.name = source.shard_name(path)  # as in packed sets
                for group in shard.groups():
                    yield from _samples(group, source, path)
        except DataError as error:
            yield Bad("", path, str(error))


def _samples(group: Group | DataError, source: Recordings, path: str) -> Iterator[Recording | Bad]:
    if isinstance(group, DataError):
        yield Bad("", path, str(group))
        return
    try:
        for sample in source.samples(group, LIMITS):
            (media,) = (part for part in sample.parts if isinstance(part, Media))
            yield Recording(sample.id, getattr(media.data, "path", path), media, sample.meta)
    except DataError as error:
        yield Bad(sample_id(source.name, group), path, str(error))


def clips_of(source: Recordings, embedder: Embedder, seconds: float | None, done: int = 0) -> Iterator[Clip | Bad]:
    """Recordings, whole or in windows of `seconds`, but for the first `done` clips and bad ones.

    A few are decoded ahead, in threads, in their order.
    """
    windows = (one for recording in recordings(source) for one in _windows(recording, embedder, seconds))
    ahead: deque[Future[Clip | Bad]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for window in islice(windows, done, None):
            # Read now: a shard is closed when the next is opened.
            ahead.append(pool.submit(_decoded, _loaded(window), embedder.sampling_rate))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _windows(one: Recording | Bad, embedder: Embedder, seconds: float | None) -> Iterator[Window | Bad]:
    """The clips of a recording, of which only the header is read."""
    if isinstance(one, Bad):
        yield one
        return
    where, rate = _where(one), embedder.sampling_rate
    try:
        with one.media.open() as file:
            header = probe_audio(file, where, math.inf)
        if not seconds and header.seconds > Limits().seconds:
            raise DataError(f"{where}: {header.seconds:.0f} s at once; embed it in windows, such as --seconds 30")
    except (DataError, OSError) as error:
        yield Bad(one.id, one.file, _reason(error))
        return
    whole, read, found = header.seconds, cache(one.media.read), False
    cuts = math.ceil(whole / seconds) if seconds else 1
    for cut in range(cuts):
        span = (cut * seconds, min(whole, (cut + 1) * seconds)) if seconds and cuts > 1 else None
        length = span[1] - span[0] if span else whole
        if length * min(rate, header.sampling_rate) < 2:
            continue  # a rest of nothing, by rounding
        samples = planned_samples(header, rate, span, where)
        if samples >= embedder.shortest:
            found = True
            yield Window(one, read, span, length, samples)
    if not found:
        reason = f"{where}: {whole:g} s are too short; the encoder needs {embedder.shortest} samples at {rate} Hz"
        yield Bad(one.id, one.file, reason)


def _loaded(window: Window | Bad) -> tuple[Window, bytes] | Bad:
    if isinstance(window, Bad):
        return window
    try:
        return window, window.read()
    except (DataError, OSError) as error:
        return Bad(window.recording.id, window.recording.file, _reason(error))


def _decoded(loaded: tuple[Window, bytes] | Bad, rate: int) -> Clip | Bad:
    if isinstance(loaded, Bad):
        return loaded
    window, data = loaded
    one, span = window.recording, window.span
    try:
        wave = decode_audio(data, rate, window.samples, _where(one), span)
    except DataError as error:
        return Bad(one.id, one.file, str(error))
    return Clip(one.id, one.file, span[0] if span else 0.0, window.seconds, wave)


def _where(one: Recording) -> str:
    return one.file if one.file.endswith(one.id.rpartition("/")[2]) else f"{one.id} in {one.file}"


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def batches_of(clips: Iterator[Clip | Bad], seconds: float) -> Iterator[list[Clip | Bad]]:
    """As many in a row as have at most so many seconds together; a longer one is alone."""
    batch: list[Clip | Bad] = []
    total = 0.0
    for clip in clips:
        length = clip.seconds if isinstance(clip, Clip) else 0.0
        if batch and total + length > seconds:
            yield batch
            batch, total = [], 0.0
        batch.append(clip)
        total += length
    if batch:
        yield batch


def encode(embedder: Embedder, waves: list[np.ndarray], level: Level) -> tuple[Tensor, list[int]]:
    """float32 [rows, layers, width] of clips one after the other, in host memory, and how many rows each has."""
    layers = embedder.frames([torch.from_numpy(wave) for wave in waves])
    if level == "frame":
        return torch.stack([torch.cat(layer) for layer in layers], 1).cpu(), [len(one) for one in layers[0]]
    pooled = [torch.stack([embedder.pool(one) for one in layer]) for layer in layers]
    return torch.stack(pooled, 1).cpu(), [1] * len(waves)


@dataclass(frozen=True)
class Embeddings:
    """A folder that `embed` wrote."""

    folder: Path
    about: dict[str, Any]
    clips: list[dict[str, Any]]
    bad: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> "Embeddings":
        """Raises `DataError` where there is none."""
        try:
            about = json.loads((folder / "embed.json").read_bytes())
            clips, bad = (
                [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]
                for name in ("index", "bad")
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a whole folder of `mm embed` ({error}); make it again") from None
        return cls(folder, about, clips, bad)

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, number: int) -> Tensor:
        """[rows, layers, width] of a clip, in the order of the index."""
        clip = self.clips[number]
        with safe_open(self.folder / part_name(clip["part"]), "pt") as file:
            rows: Tensor = file.get_slice("features")[clip["row"] : clip["row"] + clip["rows"]]
        return rows

    def parts(self) -> Iterator[Tensor]:
        """All rows, [rows, layers, width] a file."""
        for part in sorted({clip["part"] for clip in self.clips}):
            with safe_open(self.folder / part_name(part), "pt") as file:
                yield file.get_tensor("features")


def part_name(part: int) -> str:
    return f"features-{part:06d}.safetensors"


def embed(
    embedder: Embedder,
    source: Recordings,
    out: Path,
    level: Level = "clip",
    seconds: float | None = None,
    batch_seconds: float = 60.0,
    progress: Progress = lambda clips: None,
) -> Embeddings:
    """Embed recordings into the folder `out`, which appears when it is whole.

    Args:
        source: see `source_of`.
        level: `frame`, a row a frame; `clip`, their mean over time (of a `Spectrum` also their deviation).
        seconds: cut longer recordings into windows of so many, without overlap; a rest that is too short for the
            encoder is left out. A window's rows are those of a recording that ends where it does.
        batch_seconds: what goes through the encoder at once.

    Raises:
        ConfigError: `out` is there.
        DataError: nothing of the source can be read.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    about = describe(embedder, source, level, seconds, batch_seconds)
    partial = out.with_name(f".{out.name}.partial-{digest(about)}")
    partial.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if about.get("precision") == "bf16" else torch.float32
    with Parts(partial, dtype) as parts:
        done = parts.clips + len(parts.bad)
        for batch in batches_of(clips_of(source, embedder, seconds, done), batch_seconds):
            clips = [one for one in batch if isinstance(one, Clip)]
            features, rows = encode(embedder, [clip.wave for clip in clips], level) if clips else (None, [])
            parts.append(features, clips, rows, [one for one in batch if isinstance(one, Bad)])
            progress(parts.clips)
        if not parts.clips:
            first = parts.bad[0]["reason"] if parts.bad else "there is none"
            raise DataError(f"{source.name}: no recording can be read: {first}")
        parts.finish({**about, "width": parts.shape[1], "clips": parts.clips, "bad": len(parts.bad)})
    partial.rename(out)
    fsync(out.parent)
    return Embeddings.open(out)


def describe(
    embedder: Embedder, source: Recordings, level: Level, seconds: float | None, batch_seconds: float
) -> dict[str, Any]:
    """All that decides what `embed` writes, in plain values."""
    files: list[str] = []
    for path in source.shards():
        files += sorted(one.path for one in os.scandir(path) if one.is_file()) if os.path.isdir(path) else [path]
    states = [(path, os.stat(path)) for path in files]
    held = digest([source.elsewhere, [(path, state.st_size, state.st_mtime_ns) for path, state in states]])
    cut = {"level": level, "seconds": seconds, "batch_seconds": batch_seconds}
    return {"version": VERSION, **embedder.describe(), **cut, "source": source.name, "files": held}


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Parts:
    """Files of rows that grow by a batch at a time, and the journal beside them. Opens where a killed process left off.

    A part is a safetensors file from its first byte: its header is padded with spaces, as the format allows, and is
    written when the number of rows is known.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self.index: list[dict[str, Any]] = []
        self.bad: list[dict[str, Any]] = []
        self.shape: tuple[int, int] = (0, 0)
        self._rows = [0]  # of each part
        self._journal: BinaryIO = open(folder / "journal.jsonl", "a+b")
        self._journal.seek(0)
        whole = 0
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            self._take(json.loads(line))
            whole += len(line)
        self._journal.truncate(whole)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    @property
    def clips(self) -> int:
        return len(self.index)

    def append(self, features: Tensor | None, clips: Sequence[Clip], rows: Sequence[int], bad: Sequence[Bad]) -> None:
        """Rows [sum of rows, layers, width] of clips, one after the other."""
        at, entry = self._rows[-1], []
        part = len(self._rows) - 1
        for clip, count in zip(clips, rows, strict=True):
            place = {"part": part, "row": at, "rows": count}
            entry.append({"id": clip.id, "file": clip.file, "start": clip.start, "seconds": clip.seconds, **place})
            at += count
        shape = self.shape if features is None else tuple(features.shape[1:])
        if features is not None:
            self._write(part, features.to(self._dtype))
        refused = [{"id": one.id, "file": one.file, "reason": one.reason} for one in bad]
        line = {"clips": entry, "bad": refused, "shape": shape, "rows": at}
        self._journal.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._journal.flush()
        self._take(line)

    def finish(self, about: dict[str, Any]) -> None:
        """Headers, index, and what it is all of."""
        self._journal.close()
        for part, rows in enumerate(self._rows):
            if rows:
                with open(self._folder / part_name(part), "r+b") as file:
                    file.truncate(HEADER + rows * self._row_bytes)
                    file.write(self._header(rows))
                fsync(self._folder / part_name(part))
        texts = {
            "index.jsonl": "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in self.index),
            "bad.jsonl": "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in self.bad),
            "embed.json": json.dumps(about, indent=2, ensure_ascii=False),
        }
        for name, text in texts.items():
            (self._folder / name).write_text(text, encoding="utf-8")
            fsync(self._folder / name)
        (self._folder / "journal.jsonl").unlink()

    def _take(self, line: dict[str, Any]) -> None:
        """A line of the journal: all that is known is in there."""
        self.index += line["clips"]
        self.bad += line["bad"]
        self.shape = (line["shape"][0], line["shape"][1])
        self._rows[-1] = line["rows"]
        if line["rows"] * self._row_bytes >= PART_BYTES:
            self._rows.append(0)

    @property
    def _row_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def _write(self, part: int, features: Tensor) -> None:
        """Behind the rows that the journal knows of; what a killed process left there goes."""
        rows = features.contiguous().view(torch.uint8).numpy()
        with open(self._folder / part_name(part), "ab") as file:
            file.truncate(HEADER + self._rows[-1] * self._row_bytes)
            file.seek(0, os.SEEK_END)
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _header(self, rows: int) -> bytes:
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[self._dtype]
        size = rows * self._row_bytes
        tensor = {"dtype": dtype, "shape": [rows, *self.shape], "data_offsets": [0, size]}
        text = json.dumps({"features": tensor}).encode()
        return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)
