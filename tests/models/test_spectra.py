"""Spectra against their definitions, summed up sample by sample in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mm.errors import ConfigError
from mm.models.spectra import CQT, chroma, log_mel

MERT = CQT()
SMALL = CQT(8000, 100, fmin=110.0, bins=30, bins_per_octave=12)


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def tone(frequency: float, seconds: float, rate: int = 24_000, amplitude: float = 1.0) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency / rate * torch.arange(int(seconds * rate)).double()).float()


def summed(
    clip: Tensor, bins: list[int], frames: list[int], rate: int, hop: int, fmin: float, per_octave: int
) -> np.ndarray:
    """The definition of nnAudio's CQT1992v2: kernels in the middle of a row of zeros that slides over the clip."""
    quality = 1 / (2 ** (1 / per_octave) - 1)
    taps = 2 ** math.ceil(math.log2(math.ceil(quality * rate / fmin)))
    padded = np.pad(clip.double().numpy(), taps // 2)
    found = np.empty((len(frames), len(bins)))
    for column, k in enumerate(bins):
        frequency = fmin * 2 ** (k / per_octave)
        length = math.ceil(quality * rate / frequency)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
        kernel = window * np.exp(2j * np.pi * frequency / rate * (np.arange(length) + math.floor(-length / 2)))
        kernel /= np.abs(kernel).sum()
        start = math.ceil(taps / 2 - length / 2) - length % 2
        for row, frame in enumerate(frames):
            piece = padded[frame * hop + start : frame * hop + start + length]
            found[row, column] = abs(piece @ kernel) * math.sqrt(length)
    return found


def assert_is_the_sum(transform: CQT, clip: Tensor, bins: list[int], fmin: float, per_octave: int) -> None:
    (found,) = transform([clip])
    count = len(clip) // transform.hop + 1
    assert found.shape == (count, transform.bins) and found.dtype == torch.float32
    frames = sorted({*range(0, count, max(1, count // 12)), count - 1, *range(410, min(count, 425), 2)})
    expected = summed(clip, bins, frames, transform.sampling_rate, transform.hop, fmin, per_octave)
    found = found[frames][:, bins].double().numpy()
    assert np.abs(found - expected).max() < 2e-6 * expected.max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.median(expected)))


@pytest.mark.parametrize("samples", [1, 319, 320, 3001, 50_459, 120_000, 122_880, 300_001])
def test_the_cqt_is_its_definition(samples: int) -> None:
    """Shorter than the longest kernel (50,460) and longer, odd, in one block of 418 frames and across three."""
    bins = [0, 1, 2, 47, 96, 151, 200, 257, 288, 320, 334, 335]
    assert {length % 2 for length in MERT.lengths[bins]} == {0, 1}
    assert_is_the_sum(MERT, noise(samples), bins, 32.7, 48)


@pytest.mark.parametrize(
    "rate,hop,fmin,bins,per_octave",
    [(8000, 100, 110.0, 30, 12), (16_000, 320, 32.7, 336, 48), (8000, 7, 500.0, 9, 3), (24_000, 320, 4000.0, 2, 1)],
    ids=["12 an octave", "MERT at 16 kHz", "hop 7", "kernels shorter than hop"],
)
def test_other_sizes(rate: int, hop: int, fmin: float, bins: int, per_octave: int) -> None:
    """Among them bands that reach below 0 Hz and all the way round."""
    some = list(range(0, bins, max(1, bins // 10)))
    assert_is_the_sum(CQT(rate, hop, fmin, bins, per_octave), noise(9001), some, fmin, per_octave)


def test_a_quiet_note_below_a_loud_one_keeps_its_value() -> None:
    """What is cut off of a kernel's spectrum is far below what float32 can tell from a loud note elsewhere."""
    quiet, loud = tone(MERT.frequencies[30], 4, amplitude=1e-3), tone(2000.0, 4)
    (both,), (alone,) = MERT([quiet + loud]), MERT([quiet])
    torch.testing.assert_close(both[150, 29:32], alone[150, 29:32], rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [0, 100, 335])
def test_a_tone_peaks_at_its_bin(k: int) -> None:
    (found,) = MERT([tone(MERT.frequencies[k], 5, amplitude=0.5)])
    middle = found[len(found) // 2]
    assert int(middle.argmax()) == k
    assert float(middle[k]) == pytest.approx(0.25 * math.sqrt(MERT.lengths[k]), rel=1e-5)


def test_a_clip_is_the_same_among_others() -> None:
    clips = [noise(samples, seed) for seed, samples in enumerate((7, 4000, 24_000, 4000, 80_001))]
    for clip, found in zip(clips, SMALL(clips), strict=True):
        torch.testing.assert_close(found, SMALL([clip])[0], rtol=1e-5, atol=1e-6)
    assert SMALL([]) == []


def test_it_takes_no_part_in_what_surrounds_it() -> None:
    clip = noise(4000).requires_grad_()
    (expected,) = SMALL([clip])
    assert not expected.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SMALL([clip])[0], expected)
        assert log_mel(clip, 8000, 100, 20).dtype == chroma(clip, 8000, 100).dtype == torch.float32
    with torch.device("meta"):  # where a model is built before it has weights
        assert torch.equal(CQT(8000, 100, fmin=110.0, bins=30, bins_per_octave=12)([clip])[0], expected)
    fresh = CQT(8000, 100, fmin=110.0, bins=30, bins_per_octave=12)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as `mm estimate` does
        assert fresh([torch.randn(4000)])[0].shape == expected.shape
    assert torch.equal(fresh([clip])[0], expected)


def test_bins_above_half_of_the_rate_are_refused() -> None:
    with pytest.raises(ConfigError, match="fewer bins"):
        CQT(8000, 160)


@pytest.mark.parametrize("samples,window", [(1, 256), (999, 256), (4000, 1001)])
def test_log_mel_is_its_definition(samples: int, window: int) -> None:
    rate, hop, bins = 8000, 100, 20
    clip = 0.1 * noise(samples)
    found = log_mel(clip, rate, hop, bins, window)
    assert found.shape == (samples // hop + 1, bins) and found.dtype == torch.float32
    padded = np.pad(clip.double().numpy(), window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = [700 * (10 ** (top * i / (bins + 1) / 2595) - 1) for i in range(bins + 2)]
    for frame in range(0, len(found), 7):
        start = window + frame * hop - window // 2
        power = np.abs(np.fft.rfft(padded[start : start + window] * hann) / hann.sum()) ** 2
        for k in range(bins):
            heights = np.interp(np.arange(len(power)) * rate / window, edges[k : k + 3], [0, 1, 0])
            expected = math.log(max(float(heights @ power), 1e-10))
            assert float(found[frame, k]) == pytest.approx(expected, abs=2e-4)


def test_a_mel_bin_without_a_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer window or fewer bins"):
        log_mel(noise(1000), 24_000, bins=128, window=512)


def test_chroma_tells_pitch_classes() -> None:
    triad = tone(261.63, 3) + tone(659.26, 3) + tone(98.0, 3)  # C4, E5, G2
    found = chroma(triad, 24_000)
    assert found.shape == (226, 12)
    torch.testing.assert_close(found.sum(1), torch.ones(226))
    assert set(found[100].topk(3).indices.tolist()) == {0, 4, 7} and float(found[100, [0, 4, 7]].sum()) > 0.99
    torch.testing.assert_close(chroma(triad / 8, 24_000), found)
    assert not chroma(torch.zeros(1000), 24_000).any()
    between = chroma(tone(440.0 * 2 ** (1 / 24), 3), 24_000)[100]  # a quarter tone above A4
    torch.testing.assert_close(between[9], between[10], rtol=0.05, atol=0)
    assert int(chroma(tone(440.0, 1, 8000), 8000, 100)[50].argmax()) == 9
