"""Recordings on a page: drawn as a wave over a spectrogram, and with a player where the page has room for their sound.

A drawing costs one short transform a column, however long the recording is, and is one colour in degrees of
transparency, so that it reads on light pages and on dark ones. No model is asked: the spectrogram is numpy's.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mm.data.audio import decode_audio, probe_audio
from mm.data.packed import PackedMedia
from mm.errors import DataError
from mm.page import MINUS, count, data_uri

MIME = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg"}
WHOLE = 300_000
"""Bytes up to which a recording is played from its own."""
EXCERPT = 8
"""Seconds that are played of larger ones."""
COLUMNS = 720
"""Of a drawing as wide as a row."""
WAVE, BANDS = 20, 44
"""Heights of a drawing's parts in pixels."""
WINDOW = 1024  # samples
RANGE = 70.0  # dB from the loudest to the faintest that is drawn
QUIET = -20.0  # dB, of the loudest in a recording that is drawn as if it were silent; a full-scale tone has 48
COLOUR = (63, 143, 118)
DEGREES = 32


@dataclass(frozen=True, slots=True)
class Sound:
    """A recording as the page shows it. Addresses hold their data; `player` is None where there is no room for it."""

    drawing: str
    player: str | None
    words: str


def listen(media: PackedMedia, sampling_rate: int, share: float, room: int) -> Sound | None:
    """What the model hears of a recording, at its rate. None for one that cannot be read.

    Args:
        share: of a row's width, that the drawing is made for.
        room: bytes that the player's address may take.
    """
    span = tuple(media.plan["span"]) if "span" in media.plan else None
    try:
        header = probe_audio(media.data, "", float("inf"))
        wave = decode_audio(media.data, sampling_rate, media.plan["samples"], "", span)
    except DataError:
        return None
    seconds = f"{len(wave) / sampling_rate:.2f} s"
    if span:
        seconds += f", from {span[0]:.2f} s on, of {header.seconds:.2f} s"
    channels = "mono" if header.channels == 1 else f"{header.channels} channels"
    peak = 20 * np.log10(max(float(np.abs(wave).max(initial=0)), 1e-5))
    ext = media.ext.lower()
    note: list[str] = []
    if span is None and ext in MIME and len(media.data) <= WHOLE:
        player: str | None = data_uri(media.data, MIME[ext])
    else:
        player = data_uri(_flac(wave[: EXCERPT * sampling_rate], sampling_rate), MIME["flac"])
        part = f"its first {EXCERPT} s " if len(wave) > EXCERPT * sampling_rate else ""
        note = [f"played: {part}as the model hears it"]
    if player is not None and len(player) > room:
        player, note = None, ["no player: this page holds enough sound"]
    rate = f"{count(header.sampling_rate)} Hz {channels}"
    if header.sampling_rate != sampling_rate:
        rate += f", heard at {count(sampling_rate)} Hz"
    words = [seconds, rate, f"peak {peak:.0f} dB".replace("-", MINUS), ext, f"{count(media.length)} frames", *note]
    return Sound(drawing(wave, sampling_rate, max(8, round(share * COLUMNS))), player, "; ".join(words))


def drawing(wave: np.ndarray, sampling_rate: int, columns: int) -> str:
    """A PNG as an address: the wave, as high as its own peak, over the spectrogram."""
    starts = np.arange(columns) * len(wave) // columns
    peaks = np.maximum.reduceat(np.abs(wave), starts)
    heights = peaks / max(float(peaks.max()), 1e-4) * (WAVE - 1) / 2
    loud = np.abs(np.arange(WAVE) - (WAVE - 1) / 2)[:, None] <= heights + 0.5
    space = np.zeros((2, columns))
    levels = np.concatenate([loud, space, spectrogram(wave, sampling_rate, columns)])
    steps = (np.round(levels * (DEGREES - 1)) / (DEGREES - 1) * 255).astype(np.uint8)
    image = Image.frombytes("P", (columns, len(levels)), steps.tobytes())
    image.putpalette(COLOUR * 256)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=bytes(range(256)))
    return data_uri(out.getvalue(), "image/png")


def spectrogram(wave: np.ndarray, sampling_rate: int, columns: int) -> np.ndarray:
    """float64 [BANDS, columns] from 0 to 1, highest band first: decibels of the mean power in bands of equal width in
    mel (O'Shaughnessy, 1987), `RANGE` of them below the loudest. A column is one Hann window about its middle."""
    middles = ((np.arange(columns) + 0.5) * len(wave) / columns).astype(int)
    padded = np.pad(wave, WINDOW // 2)
    frames = padded[middles[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    top = 2595 * np.log10(1 + sampling_rate / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, BANDS + 1) / 2595) - 1)
    edges = np.floor(hertz / sampling_rate * WINDOW).astype(int)
    # Where a band is narrower than a bin, `reduceat` gives it the bin that it lies in.
    means = np.add.reduceat(power, edges[:-1], axis=1) / np.maximum(np.diff(edges), 1)
    decibels = 10 * np.log10(means + 1e-12)
    return np.clip(1 + (decibels - max(float(decibels.max()), QUIET)) / RANGE, 0, 1).T[::-1]


def _flac(wave: np.ndarray, sampling_rate: int) -> bytes:
    import soundfile  # type: ignore[import-untyped]

    out: Any = io.BytesIO()
    soundfile.write(out, np.clip(wave, -1, 1), sampling_rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()
