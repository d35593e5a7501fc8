"""Sound: its header without decoding, and its samples with.

`probe_audio` tells the length that a clip is planned with; `decode_audio` gives exactly that many samples, mono, at the
rate of the model, in one pass that holds one block of the source at a time; `cut_audio` reads a recording of any length
in the same way, measures it and writes its parts anew. libsndfile decodes, soxr resamples: against FFmpeg's resampler
at its defaults it is faster and keeps what lies above the new Nyquist frequency 140 dB down rather than 44
(docs/benchmarks.md, "Decoding").
"""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mm.errors import DataError

AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "mp3")
Span = tuple[float, float]
"""Start and end of the part that is meant, in seconds."""

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
_RATES = range(1_000, 1_000_000)  # Hz
_BLOCK = 1 << 18  # values, all channels, decoded at once
_UNKNOWN = 1 << 62  # libsndfile's length of a FLAC stream that does not state its own
_FULL_SCALE = 0.999  # what is as loud counts as clipped
_LOUDEST = 1000.0  # sound is between -1 and 1, give or take; numbers beyond this are of another kind


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What can be known of a clip without decoding it. `frames`: samples per channel at `sampling_rate` Hz."""

    frames: int
    sampling_rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.sampling_rate


def planned_samples(header: AudioHeader, sampling_rate: int, span: Span | None = None, where: str = "the clip") -> int:
    """Samples of the clip, or of a span of it, at `sampling_rate`: what a plan counts, and `decode_audio` is asked for.

    Raises `DataError` where the span lies outside the clip, and where there is not one sample.
    """
    first, last = _range(header, span)
    if first >= last:
        raise DataError(f"{where}: no sound in the span {span}, for the clip has {header.seconds:g} s")
    samples = _rescaled(last - first, header.sampling_rate, sampling_rate)
    if not samples:
        raise DataError(f"{where}: {last - first} samples at {header.sampling_rate} Hz are none at {sampling_rate} Hz")
    return samples


def _range(header: AudioHeader, span: Span | None) -> tuple[int, int]:
    """The frames of a span, half-open."""
    if span is None:
        return 0, header.frames
    first, last = (min(header.frames, max(0, round(second * header.sampling_rate))) for second in span)
    return first, max(first, last)


def _rescaled(frames: int, source: int, target: int) -> int:
    """As many samples at the rate `target` as so many frames at `source` last, rounded."""
    return (2 * frames * target + source) // (2 * source)


def probe_audio(file: bytes | BinaryIO, where: str, max_seconds: float) -> AudioHeader:
    """Length, rate and channels from the header. `where` names the sample in errors; raises `DataError`.

    The length of an mp3 without a Xing or VBRI header is a guess from its first bit rate; `decode_audio` refuses it
    where it proves wrong.
    """
    with _open(io.BytesIO(file) if isinstance(file, bytes) else file, where) as clip:
        header = _header(clip, where)
    if header.seconds > max_seconds:
        raise DataError(
            f"{where}: {header.seconds:.0f} s of sound are more than data.max_seconds = {max_seconds:g}; "
            "leave it out or raise the limit"
        )
    return header


def decode_audio(data: bytes, sampling_rate: int, samples: int, where: str, span: Span | None = None) -> np.ndarray:
    """Encoded bytes to float32 [samples] at `sampling_rate` Hz, the mean of the channels.

    `samples` is `planned_samples` of the header and the same `span`. A clip that proves shorter or longer by up to 1 %
    is filled with zeros or cut. Raises `DataError` beyond that, for damaged clips, and for values that are no sound.
    """
    wave = np.zeros(samples, dtype=np.float32)
    found, slack = 0, _slack(samples)
    file = io.BytesIO(data)
    with _open(file, where) as clip:
        header = _header(clip, where)
        try:
            for piece in _resampled(_mono(clip, *_range(header, span)), header.sampling_rate, sampling_rate, where):
                wave[found : found + len(piece)] = piece[: max(0, samples - found)]
                found += len(piece)
                if found > samples + slack:
                    break
        except DataError:
            raise
        except Exception as error:
            raise _damaged(where, error) from None
        if span is None:
            _check_end(clip, file, header, where)
    if abs(found - samples) > slack:
        more = "more than" if found > samples else f"{found:,} instead of"
        raise DataError(f"{where}: the clip has {more} the {samples:,} samples that its header promised")
    _peak(wave, where)
    return wave


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a recording, decoded and measured.

    level: of the mean of the channels in dB, the RMS about its own mean against full scale (a sine as loud as may be
        has -3). clipped: the share of its samples at full scale. flac: the part written anew, if it was to be.
    """

    seconds: float
    level: float
    clipped: float
    flac: bytes | None


def cut_audio(
    file: BinaryIO, where: str, seconds: float | None = None, sampling_rate: int | None = None, write: bool = True
) -> Iterator[Piece]:
    """A recording from front to back, in parts of `seconds` and what is left of them; None: all of it is one.

    With `write` each part is written anew as FLAC of 16 bits, mono, at `sampling_rate` Hz (None: the recording's own):
    what `decode_audio` gives for its span. In memory are one block of the source and one written part.

    Raises `DataError` behind the parts that ended before the place where the recording is damaged, ends over 1 % of its
    length early, or holds values that are no sound.
    """
    with _open(file, where) as clip:
        header = _header(clip, where)
        rate = sampling_rate or header.sampling_rate
        length = header.frames if seconds is None else max(1, round(seconds * header.sampling_rate))
        found, is_last = 0, False
        while not is_last:
            wanted = min(length, header.frames - found)
            heard = _Heard(_blocks(clip, wanted), where)
            try:
                flac = _written(heard, wanted, header.sampling_rate, rate, where) if write else None
                for _ in heard:  # all of it, unless it was written
                    pass
            except DataError:
                raise
            except Exception as error:
                raise _damaged(where, error) from None
            found += heard.frames
            is_last = found == header.frames or heard.frames < wanted
            if not found or (is_last and header.frames - found > _slack(header.frames)):
                raise DataError(
                    f"{where}: the clip ends after {found / header.sampling_rate:.1f} s of the {header.seconds:.1f} s "
                    "that its header promised"
                )
            if is_last:
                _check_end(clip, file, header, where)
            if heard.frames:
                yield Piece(heard.frames / header.sampling_rate, heard.level, heard.clipped / heard.frames, flac)


class _Heard:
    """Blocks of float32 [n], measured as they pass. Raises `DataError` for values that are no sound."""

    def __init__(self, blocks: Iterator[np.ndarray], where: str) -> None:
        self._blocks, self._where = blocks, where
        self.frames = self.clipped = 0
        self._sum = self._squares = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._blocks:
            if _peak(block, self._where) >= _FULL_SCALE:
                self.clipped += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE))
            wide = block.astype(np.float64)
            self.frames += len(block)
            self._sum += float(wide.sum())
            self._squares += float(wide @ wide)
            yield block

    @property
    def level(self) -> float:
        mean = self._sum / self.frames
        return 10 * math.log10(max(self._squares / self.frames - mean * mean, 1e-20))


def _written(heard: _Heard, most: int, source: int, target: int, where: str) -> bytes:
    """Up to `most` frames as a FLAC file, exactly as long at the new rate as they are at their own."""
    out, done = io.BytesIO(), 0
    room = _rescaled(most, source, target)
    with _soundfile(where).SoundFile(out, "w", target, 1, "PCM_16", format="FLAC") as flac:
        for piece in _resampled(heard, source, target, where):
            piece = piece[: room - done]
            flac.write(piece)
            done += len(piece)
        flac.write(np.zeros(max(0, _rescaled(heard.frames, source, target) - done), dtype=np.float32))
    return out.getvalue()


def _slack(samples: int) -> int:
    """How many samples a clip may have more or fewer than its header says."""
    return max(2, samples // 100)


def _peak(wave: np.ndarray, where: str) -> float:
    """The loudest value. Raises `DataError` where that is no sound's."""
    peak = float(np.abs(wave).max(initial=0))
    if not peak <= _LOUDEST:  # nor where it is no number
        what = f"values up to {peak:g}; expected -1 to 1" if math.isfinite(peak) else "values that are no numbers"
        raise DataError(f"{where}: the clip holds {what}")
    return peak


def _soundfile(where: str) -> Any:
    try:
        import soundfile  # type: ignore[import-untyped]
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise DataError(f'{where}: sound needs soundfile ({_line(error)}); pip install "mm-pretrain[audio]"') from None
    return soundfile


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the clip is damaged ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _open(file: BinaryIO, where: str) -> Any:
    soundfile = _soundfile(where)
    if not file.read(1):
        raise DataError(f"{where}: the clip is empty (0 bytes)")
    file.seek(0)
    try:
        clip = soundfile.SoundFile(file)
        clip.seekable = lambda: False  # else soundfile seeks after every read, and mp3 has a gap there
    except Exception as error:
        # The text of `Error opening <_io.BytesIO object at 0x…>: why` differs from run to run but for its end.
        why = getattr(error, "error_string", "") or type(error).__name__
        raise DataError(f"{where}: not a readable flac, wav, ogg or mp3 clip ({why})") from None
    if clip.format not in _FORMATS:
        clip.close()
        raise DataError(f"{where}: the sound is {clip.format}; expected flac, wav, ogg or mp3")
    return clip


def _header(clip: Any, where: str) -> AudioHeader:
    if not 0 < clip.frames < _UNKNOWN:
        found = "is empty" if clip.frames <= 0 else "does not say how long it is; re-encode it"
        raise DataError(f"{where}: the clip {found}")
    if clip.samplerate not in _RATES:
        raise DataError(f"{where}: a sampling rate of {clip.samplerate} Hz; expected {_RATES.start} to {_RATES.stop}")
    return AudioHeader(clip.frames, clip.samplerate, clip.channels)


def _mono(clip: Any, first: int, last: int) -> Iterator[np.ndarray]:
    """Frames `first` to `last`, in blocks of float32 [n]."""
    skip = first
    if first and clip.format != "MP3":  # seeking in mp3 lands near the place, not on it
        clip.seek(first)
        skip = 0
    block = max(1, _BLOCK // clip.channels)
    while skip > 0:
        read = len(clip.read(min(block, skip), dtype="float32"))
        if read == 0:
            return
        skip -= read
    yield from _blocks(clip, last - first)


def _blocks(clip: Any, frames: int) -> Iterator[np.ndarray]:
    """The next so many frames, the mean of their channels, in blocks of float32 [n]."""
    block = max(1, _BLOCK // clip.channels)
    while frames > 0:
        read = clip.read(min(block, frames), dtype="float32", always_2d=True)
        if len(read) == 0:
            return
        frames -= len(read)
        mono = read[:, 0].copy()
        for channel in range(1, clip.channels):  # several times as fast as `mean` over a short last axis
            mono += read[:, channel]
        mono /= clip.channels
        yield mono


def _resampled(blocks: Iterable[np.ndarray], source: int, target: int, where: str) -> Iterator[np.ndarray]:
    if source == target:
        yield from blocks
        return
    try:
        import soxr  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f'{where}: sound needs soxr ({error}); pip install "mm-pretrain[audio]"') from None
    stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _check_end(clip: Any, file: BinaryIO, header: AudioHeader, where: str) -> None:
    """Raise `DataError` for an mp3 where sound follows what was read: a length guessed from the first bit rate was too
    short."""
    if clip.format != "MP3":
        return
    at = file.tell()
    size = file.seek(0, io.SEEK_END)
    if size - at <= 4096 + size // 100:
        return
    file.seek(max(0, at - 8192))
    rest = file.read()
    if not any(tag in rest for tag in (b"APETAGEX", b"LYRICSBEGIN")):
        raise DataError(
            f"{where}: the mp3 goes on after the {header.seconds:.1f} s that it seems to have; re-encode it"
        )
