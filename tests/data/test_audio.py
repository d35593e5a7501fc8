"""Sound: tones of known pitch come back from every format, at the planned length, whatever the rate."""

import builtins
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mm.data.audio import AudioHeader, decode_audio, planned_samples, probe_audio
from mm.errors import DataError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

FORMATS = {
    "flac": ("FLAC", "PCM_16", 44100),
    "wav": ("WAV", "PCM_16", 44100),
    "wav float": ("WAV", "FLOAT", 48000),
    "wav 24 bits": ("WAV", "PCM_24", 22050),
    "vorbis": ("OGG", "VORBIS", 44100),
    "opus": ("OGG", "OPUS", 48000),
    "mp3": ("MP3", "MPEG_LAYER_III", 44100),
}
LOSSY = ("vorbis", "opus", "mp3")


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.4) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def encoded(name: str, wave: np.ndarray, rate: int | None = None) -> bytes:
    """`wave` is [n] or [n, channels]."""
    format, subtype, usual = FORMATS[name]
    file = io.BytesIO()
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(file, "w", rate or usual, channels, subtype, format=format) as out:
        for start in range(0, len(wave), 8192):  # libsndfile's Vorbis encoder overflows its stack on long blocks
            out.write(wave[start : start + 8192])
    return file.getvalue()


def level(ratio: float) -> float:
    return 20 * np.log10(max(ratio, 1e-12))


def noise_beside(wave: np.ndarray, hertz: float, rate: int) -> tuple[float, float]:
    """Amplitude of the tone, and the rest against it in dB; the ends are left out."""
    n = len(wave)
    middle = np.arange(n // 8, n - n // 8)
    angle = 2 * np.pi * hertz * middle / rate
    basis = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    found, *_ = np.linalg.lstsq(basis, wave[middle].astype(float), rcond=None)
    amplitude = float(np.hypot(*found))
    rest = float(np.std(wave[middle] - basis @ found))
    return amplitude, level(rest / (amplitude / np.sqrt(2)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_tone_comes_back_from_every_format(name: str) -> None:
    rate = FORMATS[name][2]
    data = encoded(name, np.stack([tone(440, 1.5, rate)] * 2, axis=1))
    header = probe_audio(data, "s", 60)
    assert header == AudioHeader(round(1.5 * rate), rate, 2) and header.seconds == 1.5
    for target in (24000, rate):
        samples = planned_samples(header, target)
        assert samples == 1.5 * target
        wave = decode_audio(data, target, samples, "s")
        assert wave.dtype == np.float32 and wave.shape == (samples,)
        amplitude, rest = noise_beside(wave, 440, target)
        assert abs(amplitude - 0.4) < (0.02 if name in LOSSY else 1e-3)
        assert rest < (-30 if name in LOSSY else -75)
        if name not in LOSSY and target == rate:
            np.testing.assert_allclose(wave, tone(440, 1.5, rate), atol=2**-14)


def test_channels_are_averaged() -> None:
    left, right = tone(300, 0.5, 44100), tone(700, 0.5, 44100, 0.2)
    data = encoded("wav float", np.stack([left, right, 0 * left], axis=1), 44100)
    wave = decode_audio(data, 44100, planned_samples(probe_audio(data, "s", 9), 44100), "s")
    np.testing.assert_allclose(wave, (left + right) / 3, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(44100, 24000), (48000, 16000), (16000, 24000), (8000, 44100)])
def test_resampling_keeps_what_fits_and_drops_what_does_not(source: int, target: int) -> None:
    nyquist = min(source, target) / 2
    for share in (0.05, 0.5, 0.9):
        data = encoded("wav float", tone(share * nyquist, 1, source), source)
        amplitude, rest = noise_beside(decode_audio(data, target, target, "s"), share * nyquist, target)
        assert abs(level(amplitude / 0.4)) < 0.05 and rest < -100
    if source > target:
        data = encoded("wav float", tone(1.1 * nyquist, 1, source), source)
        wave = decode_audio(data, target, target, "s")
        assert level(float(np.std(wave[target // 8 : -target // 8])) / (0.4 / np.sqrt(2))) < -100


def test_a_click_stays_where_it_is() -> None:
    wave = np.zeros(44100)
    wave[30000] = 0.9
    data = encoded("flac", wave)
    assert np.argmax(np.abs(decode_audio(data, 44100, 44100, "s"))) == 30000
    assert np.argmax(np.abs(decode_audio(data, 24000, 24000, "s"))) == round(30000 * 24000 / 44100)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_lengths_are_as_planned(rate: int) -> None:
    rng = np.random.default_rng(rate)
    for frames in (1, 2, 7, *rng.integers(8, 2 * rate, 12).tolist()):
        data = encoded("wav", np.full(frames, 0.5), rate)
        header = probe_audio(data, "s", 60)
        assert header.frames == frames
        for target in (16000, 24000):
            if 2 * frames * target < rate:
                with pytest.raises(DataError, match=rf"^s: {frames} samples at {rate} Hz are none at {target} Hz"):
                    planned_samples(header, target, where="s")
                continue
            samples = planned_samples(header, target)
            assert abs(samples - frames * target / rate) <= 0.5
            assert len(decode_audio(data, target, samples, "s")) == samples


def test_a_hundredth_more_or_less_is_made_to_fit_and_more_is_refused() -> None:
    data = encoded("wav float", np.full(10_000, 0.5), 16000)
    longer = decode_audio(data, 16000, 10_100, "s")
    assert (longer[:10_000] == 0.5).all() and (longer[10_000:] == 0).all()
    assert (decode_audio(data, 16000, 9_910, "s") == 0.5).all()
    with pytest.raises(DataError, match=r"^s/0/k: the clip has 10,000 instead of the 10,120 samples .* promised$"):
        decode_audio(data, 16000, 10_120, "s/0/k")
    with pytest.raises(DataError, match=r"^s/0/k: the clip has more than the 9,890 samples"):
        decode_audio(data, 16000, 9_890, "s/0/k")


@pytest.mark.parametrize("name", FORMATS)
def test_a_span_is_that_part_of_the_whole(name: str) -> None:
    rate = FORMATS[name][2]
    sweep = 0.4 * np.sin(2 * np.pi * 3000 * (np.arange(3 * rate) / rate) ** 2 / 6)
    data = encoded(name, sweep)
    header = probe_audio(data, "s", 60)
    whole = decode_audio(data, rate, planned_samples(header, rate), "s")
    for span in ((0.0, 0.5), (1.3, 2.1), (2.5, 9.0)):
        samples = planned_samples(header, rate, span)
        first = round(span[0] * rate)
        assert samples == min(round(span[1] * rate), 3 * rate) - first
        np.testing.assert_allclose(
            decode_audio(data, rate, samples, "s", span), whole[first : first + samples], atol=1e-5
        )
    for span in ((3.5, 4.0), (1.0, 1.0)):
        with pytest.raises(DataError, match=r"^s: no sound in the span"):
            planned_samples(header, 24000, span, "s")


@pytest.mark.parametrize("name", FORMATS)
def test_the_size_of_the_blocks_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = FORMATS[name][2]
    data = encoded(name, np.stack([tone(440, 1, rate), tone(1000, 1, rate)], axis=1))
    samples = planned_samples(probe_audio(data, "s", 60), 24000)
    whole = decode_audio(data, 24000, samples, "s")
    monkeypatch.setattr("mm.data.audio._BLOCK", 5000)
    np.testing.assert_allclose(decode_audio(data, 24000, samples, "s"), whole, atol=1e-6)


class Counting(io.BytesIO):
    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.bytes_read += count
        return count


@pytest.mark.parametrize("name", FORMATS)
def test_probing_reads_the_header_alone(name: str) -> None:
    rate = FORMATS[name][2]
    wave = np.random.default_rng(0).normal(0, 0.2, (rate * 20, 2)).clip(-0.9, 0.9)
    data = encoded(name, wave)
    file = Counting(data)
    assert probe_audio(file, "s", 60).frames == len(wave)
    assert file.bytes_read < 100_000 < len(data) // 3


def test_an_mp3_whose_length_was_guessed_wrong_is_refused() -> None:
    """Its bit rate varies and the header that says so is gone: libsndfile then stops where the first rate would end."""
    wave = np.concatenate([np.zeros(44100), np.random.default_rng(0).normal(0, 0.2, 10 * 44100).clip(-0.9, 0.9)])
    data = encoded("mp3", wave)
    second = data.index(data[:2], 200)  # the first frame is the header
    bare = data[second:]
    header = probe_audio(bare, "s", 60)
    assert abs(header.seconds - 11) > 1
    with pytest.raises(DataError, match=r"^s: "):
        decode_audio(bare, 24000, planned_samples(header, 24000), "s")


def test_limits_and_odd_headers() -> None:
    data = encoded("wav", np.zeros(16000), 16000)
    with pytest.raises(DataError, match=r"^s: 1 s of sound are more than data.max_seconds = 0.5"):
        probe_audio(data, "s", 0.5)
    with pytest.raises(DataError, match=r"^s: the clip is empty \(0 bytes\)$"):
        probe_audio(b"", "s", 9)
    with pytest.raises(DataError, match=r"^s: the clip is empty$"):
        probe_audio(encoded("wav", np.zeros(0)), "s", 9)
    with pytest.raises(DataError, match=r"^s: a sampling rate of 10 Hz"):
        probe_audio(data[:24] + (10).to_bytes(4, "little") + data[28:], "s", 9e9)
    flac = bytearray(encoded("flac", np.zeros(44100)))
    flac[21] &= 0xF0  # the number of samples, 36 bits of the stream information, to "unknown"
    flac[22:26] = bytes(4)
    with pytest.raises(DataError, match=r"^s: the clip does not say how long it is"):
        probe_audio(bytes(flac), "s", 9)
    aiff = io.BytesIO()
    soundfile.write(aiff, np.zeros(100), 8000, format="AIFF")
    with pytest.raises(DataError, match=r"^s: the sound is AIFF; expected"):
        probe_audio(aiff.getvalue(), "s", 9)
    infinite = encoded("wav float", np.full(1000, np.nan), 16000)
    with pytest.raises(DataError, match=r"^s: the clip holds values that are no numbers"):
        decode_audio(infinite, 16000, 1000, "s")
    integers = encoded("wav float", np.full(1000, 2000.0), 16000)
    with pytest.raises(DataError, match=r"^s: the clip holds values up to 2000; expected -1 to 1"):
        decode_audio(integers, 16000, 1000, "s")


@pytest.mark.parametrize("name", ["flac", "wav", "vorbis", "opus", "mp3"])
def test_damaged_clips_are_decoded_or_refused_in_one_line(name: str) -> None:
    rate = FORMATS[name][2]
    data = encoded(name, tone(440, 0.4, rate) + np.random.default_rng(1).normal(0, 0.02, round(0.4 * rate)))
    rng = np.random.default_rng(2)
    planned = planned_samples(probe_audio(data, "s", 60), 24000)
    refused = 0
    for i in range(80):
        mutated = bytearray(data)
        reach = min(len(data), 200) if i % 2 else len(data)
        for at in rng.integers(0, reach, rng.integers(1, 8)):
            mutated[at] = rng.integers(0, 256)
        if i % 4 == 0:
            del mutated[int(rng.integers(0, len(data))) :]
        bad = bytes(mutated)
        for samples in (planned, None):
            try:
                if samples is None:
                    samples = planned_samples(probe_audio(bad, "s/0/k", 60), 24000)
                wave = decode_audio(bad, 24000, samples, "s/0/k")
                assert len(wave) == samples and np.isfinite(wave).all()
            except DataError as error:
                refused += 1
                assert str(error).startswith("s/0/k: ") and "\n" not in str(error) and " at 0x" not in str(error)
    assert refused > 20


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_a_missing_library_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("wav", np.zeros(1600), 16000)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ImportError(f"No module named '{name}'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf'^s: sound needs {missing} .*; pip install "mm-pretrain\[audio\]"$'):
        decode_audio(data, 24000, 2400, "s")


def test_importing_loads_no_sound_library() -> None:
    code = "import sys, mm.data.audio; assert not {'soundfile', 'soxr', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
