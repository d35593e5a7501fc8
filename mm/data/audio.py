"""Sound: its header without decoding, and its samples with.

`probe_audio` tells the length that a clip is planned with; `decode_audio` gives exactly that many samples, mono, at the
rate of the model, in one pass that holds one block of the source at a time. libsndfile decodes, soxr resamples: against
FFmpeg's resampler at its defaults it is faster and keeps what lies above the new Nyquist frequency 140 dB down rather
than 44 (docs/benchmarks.md, "Decoding").
"""

import io
from collections.abc import Iterator
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

    Raises `DataError` where the span lies outside the clip.
    """
    first, last = _range(header, span)
    if first >= last:
        raise DataError(f"{where}: no sound in the span {span}, for the clip has {header.seconds:g} s")
    return (2 * (last - first) * sampling_rate + header.sampling_rate) // (2 * header.sampling_rate)


def _range(header: AudioHeader, span: Span | None) -> tuple[int, int]:
    """The frames of a span, half-open."""
    if span is None:
        return 0, header.frames
    first, last = (min(header.frames, max(0, round(second * header.sampling_rate))) for second in span)
    return first, max(first, last)


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
    is filled with zeros or cut. Raises `DataError` beyond that, and for damaged clips.
    """
    wave = np.zeros(samples, dtype=np.float32)
    found, slack = 0, max(2, samples // 100)
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
            raise DataError(f"{where}: the clip is damaged ({_line(error)})") from None
        if span is None and clip.format == "MP3" and _unread(data, file.tell()):
            raise DataError(
                f"{where}: the mp3 goes on after the {header.seconds:.1f} s that it seems to have; re-encode it"
            )
    if abs(found - samples) > slack:
        more = "more than" if found > samples else f"{found:,} instead of"
        raise DataError(f"{where}: the clip has {more} the {samples:,} samples that its header promised")
    if not np.isfinite(wave).all():
        raise DataError(f"{where}: the clip holds values that are no numbers")
    return wave


def _soundfile(where: str) -> Any:
    try:
        import soundfile  # type: ignore[import-untyped]
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise DataError(f'{where}: sound needs soundfile ({_line(error)}); pip install "mm-pretrain[audio]"') from None
    return soundfile


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
    block = max(1, _BLOCK // clip.channels)
    skip = first
    if first and clip.format != "MP3":  # seeking in mp3 lands near the place, not on it
        clip.seek(first)
        skip = 0
    while skip > 0:
        read = len(clip.read(min(block, skip), dtype="float32"))
        if read == 0:
            return
        skip -= read
    left = last - first
    while left > 0:
        frames = clip.read(min(block, left), dtype="float32", always_2d=True)
        if len(frames) == 0:
            return
        left -= len(frames)
        mono = frames[:, 0].copy()
        for channel in range(1, clip.channels):  # several times as fast as `mean` over a short last axis
            mono += frames[:, channel]
        mono /= clip.channels
        yield mono


def _resampled(blocks: Iterator[np.ndarray], source: int, target: int, where: str) -> Iterator[np.ndarray]:
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


def _unread(mp3: bytes, at: int) -> bool:
    """Whether sound, not a tag, follows byte `at`: a length that was guessed from the first bit rate was too short."""
    rest = mp3[max(0, at - 8192) :]
    return len(mp3) - at > 4096 + len(mp3) // 100 and not any(tag in rest for tag in (b"APETAGEX", b"LYRICSBEGIN"))
