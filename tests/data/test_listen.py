"""What is drawn of a recording is what sounds in it, and what is played is what was packed."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data.audio import decode_audio, planned_samples, probe_audio
from mm.data.listen import BANDS, DEGREES, EXCERPT, MIME, WAVE, drawing, listen, spectrogram
from mm.data.packed import PackedMedia

soundfile = pytest.importorskip("soundfile")
ROOM = 1_000_000


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.float32)


def encoded(wave: np.ndarray, rate: int, ext: str = "flac") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=ext)
    return file.getvalue()


def packed(data: bytes, rate: int, span: tuple[float, float] | None = None, ext: str = "flac") -> PackedMedia:
    """As a set that is packed for `rate` holds it."""
    samples = planned_samples(probe_audio(data, "", 1e9), rate, span)
    plan: dict[str, Any] = {"samples": samples, **({"span": list(span)} if span else {})}
    return PackedMedia("audio", 0, 0, samples // 100, samples // 100, ext, data, plan)


def content(address: str | None, mime: str) -> bytes:
    assert address is not None
    head, _, data = address.partition(",")
    assert head == f"data:{mime};base64"
    return base64.b64decode(data)


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
@pytest.mark.parametrize("hertz", [200, 900, 3000])
def test_a_tone_is_brightest_in_the_band_that_holds_it(rate: int, hertz: float) -> None:
    mel = 2595 * np.log10(1 + np.array([hertz, rate / 2]) / 700)
    band = int(mel[0] / mel[1] * BANDS)
    levels = spectrogram(tone(hertz, 1.0, rate), rate, 30)
    assert levels.shape == (BANDS, 30) and levels.max() == 1
    brightest = BANDS - 1 - levels[:, 2:-2].argmax(0)
    assert np.abs(brightest - band).max() <= 1
    assert levels[0, 2:-2].max() == 0  # nothing up there


def test_columns_are_places_in_time() -> None:
    rate = 8000
    wave = np.concatenate([tone(500, 0.5, rate), np.zeros(rate, np.float32), tone(2000, 0.5, rate)])
    levels = spectrogram(wave, rate, 80)
    assert (levels[:, 25:55] == 0).all()
    low, high = (BANDS - 1 - levels[:, part].mean(1).argmax() for part in (slice(0, 18), slice(62, 80)))
    assert low < high
    assert (spectrogram(np.zeros(5000, np.float32), rate, 10) == 0).all(), "silence is blank"
    assert (spectrogram(np.full(3, 1e-6, np.float32), rate, 10) == 0).all(), "and so is what nobody hears"


def test_the_wave_is_the_envelope() -> None:
    rate, columns = 8000, 100
    quiet, loud = (tone(440, 1.0, rate, amplitude) for amplitude in (0.1, 0.4))
    picture = Image.open(io.BytesIO(content(drawing(np.concatenate([quiet, loud]), rate, columns), "image/png")))
    assert picture.size == (columns, WAVE + 2 + BANDS)
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    heights = (alpha[:WAVE] > 0).sum(0)
    assert (heights[55:] == WAVE).all() and np.abs(heights[:45] - WAVE / 4).max() <= 2
    assert (alpha[WAVE : WAVE + 2] == 0).all() and len(np.unique(alpha)) <= DEGREES


def test_a_small_recording_is_played_from_its_own_bytes() -> None:
    for ext in ("flac", "wav", "ogg", "mp3"):
        data = encoded(tone(440, 1.0, 16000), 16000, ext)
        sound = listen(packed(data, 8000, ext=ext), 8000, 0.5, ROOM)
        assert sound is not None and content(sound.player, MIME[ext]) == data
        assert "16,000 Hz mono, heard at 8,000 Hz" in sound.words and "peak −6 dB" in sound.words
        assert "played" not in sound.words


@pytest.mark.parametrize("span", [None, (2.0, 13.0), (3.0, 4.5)])
def test_spans_and_large_ones_are_played_as_the_model_hears_them(span: tuple[float, float] | None) -> None:
    rate = 24000
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, (15 * rate, 2)).astype(np.float32)
    media = packed(encoded(noise, rate), rate, span)
    sound = listen(media, rate, 1.0, 10 * ROOM)
    assert sound is not None
    played, found = soundfile.read(io.BytesIO(content(sound.player, "audio/flac")), dtype="float32")
    heard = decode_audio(media.data, rate, media.plan["samples"], "", span)[: EXCERPT * rate]
    assert found == rate and played.shape == heard.shape
    np.testing.assert_allclose(played, heard, atol=2**-15)
    seconds = 15.0 if span is None else span[1] - span[0]
    assert f"{seconds:.2f} s" in sound.words and "2 channels" in sound.words
    assert (f"its first {EXCERPT} s" in sound.words) == (seconds > EXCERPT)
    assert span is None or f"from {span[0]:.2f} s on, of 15.00 s" in sound.words


def test_without_room_there_is_no_player_and_it_says_so() -> None:
    data = encoded(tone(440, 1.0, 8000), 8000)
    sound = listen(packed(data, 8000), 8000, 0.5, len(data))  # base64 takes a third more
    assert sound is not None and sound.player is None and "no player" in sound.words


def test_what_cannot_be_read_is_nothing(sound: Callable[..., bytes]) -> None:
    media = packed(sound(), 8000)
    cut = PackedMedia("audio", 0, 0, 80, 80, "flac", media.data[:2000], media.plan)
    assert listen(media, 8000, 0.5, ROOM) is not None and listen(cut, 8000, 0.5, ROOM) is None
