"""Spectra of recordings in torch: MERT's CQT target, log-mel energies, chroma. Frame t is centred at sample t * hop.

A CQT correlates the recording with windowed exponentials and keeps every hop-th value. In the frequency domain that is
a product with each kernel's spectrum, which is narrow, and keeping every hop-th of N values folds a spectrum of N
points N / hop at a time. So one FFT of a block of N samples, some matrix products and short inverse FFTs give all bins,
where kernels in the time domain have 65,536 taps each.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from mm.errors import ConfigError

REACH = 128  # in 1 / length, how far from its frequency a kernel's spectrum is kept; a Hann window's falls as 1 / d^3
GROUP = 12  # bins that share the widest band among them in one matrix product
AT_ONCE = 8  # blocks; bounds the memory that long recordings take
FLOOR = 1e-10  # of energies, where a sine of amplitude 1 has 1/4


@dataclass(frozen=True, slots=True)
class _Band:
    """Kernels of K bins on R rows of a spectrum seen as [hop, block].

    bins: int64 [K]; rows: int64 [R]; response: float32 [block, K, R], real about the middle of the kernels.
    turn: complex64 [R, block], half a sample of delay: the middle of a kernel of odd length lies between two samples.
    """

    bins: Tensor
    rows: Tensor
    response: Tensor
    turn: Tensor | None


class CQT:
    """Magnitudes of a constant-Q transform as nnAudio's CQT1992v2 defines them, with zeros beyond either end.

    Bin k has frequency f_k = fmin * 2^(k / bins_per_octave), length L_k = ceil(Q * sampling_rate / f_k) with
    Q = 1 / (2^(1 / bins_per_octave) - 1), and as kernel a periodic Hann window of sum 1 times an exponential; its
    middle is at the frame's sample, or half a sample before it where L_k is odd. Magnitudes are multiplied by
    sqrt(L_k): a sine of amplitude a at f_k gives a / 2 * sqrt(L_k). Defaults are MERT's target (mert_model.py of
    yizhilll/MERT).

    Raises:
        ConfigError: the highest bin lies above half of the sampling rate.
    """

    def __init__(
        self,
        sampling_rate: int = 24_000,
        hop: int = 320,
        fmin: float = 32.7,
        bins: int = 336,
        bins_per_octave: int = 48,
    ) -> None:
        self.sampling_rate, self.hop, self.bins = sampling_rate, hop, bins
        self.frequencies = fmin * 2.0 ** (np.arange(bins) / bins_per_octave)
        if self.frequencies[-1] > sampling_rate / 2:
            raise ConfigError(
                f"cqt: {bins} bins, {bins_per_octave} an octave from {fmin} Hz, reach {self.frequencies[-1]:.0f} Hz, "
                f"and a sampling rate of {sampling_rate} Hz ends at {sampling_rate // 2} Hz; use fewer bins"
            )
        quality = 1 / (2 ** (1 / bins_per_octave) - 1)
        self.lengths = np.ceil(quality * sampling_rate / self.frequencies).astype(np.int64)
        # All in frames: what a block is too short for at either of its ends, its length, and what remains.
        self._margin = math.ceil(int(self.lengths[0] + 1) // 2 / hop)
        self._block = _smooth(7 * self._margin)
        self._step = self._block - 2 * self._margin
        self._bands: dict[torch.device, list[_Band]] = {}

    @torch.no_grad()
    def __call__(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips [T_i] of any lengths to magnitudes, float32 [T_i // hop + 1, bins] each, on their device.

        What is taken of one clip does not depend on the others. Products are in float32, whatever autocast says.
        """
        if not clips:
            return []
        with torch.autocast(clips[0].device.type, enabled=False):
            blocks = [self._blocks(clip.float()) for clip in clips]
            frames = torch.cat([self._transform(some) for some in torch.cat(blocks).split(AT_ONCE)])
        each = frames.split([len(some) for some in blocks])
        return [some.flatten(0, 1)[: len(clip) // self.hop + 1] for some, clip in zip(each, clips, strict=True)]

    def _blocks(self, clip: Tensor) -> Tensor:
        """Overlapping pieces [blocks, block * hop] of a clip, each good for `_step` frames of its own."""
        count = -(-(len(clip) // self.hop + 1) // self._step)
        before = self._margin * self.hop
        samples = ((count - 1) * self._step + self._block) * self.hop
        padded = F.pad(clip, (before, samples - before - len(clip)))
        return padded.unfold(0, self._block * self.hop, self._step * self.hop)

    def _transform(self, blocks: Tensor) -> Tensor:
        """[B, block * hop] to magnitudes [B, step, bins]."""
        spectrum = torch.fft.fft(blocks).unflatten(1, (self.hop, self._block))
        out = blocks.new_empty(len(blocks), self.bins, self._step)
        for band in self._on(blocks.device):
            part = spectrum[:, band.rows]
            if band.turn is not None:
                part = part * band.turn
            folded = band.response @ rearrange(torch.view_as_real(part), "b r m c -> m r (b c)").contiguous()
            folded = torch.view_as_complex(rearrange(folded, "m k (b c) -> b k m c", c=2).contiguous())
            frames = torch.fft.ifft(folded)[..., self._margin : self._margin + self._step]
            out[:, band.bins] = frames.abs()
        return out.transpose(1, 2).contiguous()

    def _on(self, device: torch.device) -> list[_Band]:
        """The kernels, made when they are first needed on a device."""
        if device not in self._bands:
            bins = [np.flatnonzero(self.lengths % 2 == parity) for parity in (0, 1)]
            groups = [some[at : at + GROUP] for some in bins for at in range(0, len(some), GROUP)]
            with no_dispatch():  # kept, so they are numbers even where all else is on fake tensors (`mm estimate`)
                self._bands[device] = [self._band(group, device) for group in groups]
        return self._bands[device]

    def _band(self, bins: np.ndarray, device: torch.device) -> _Band:
        """In numpy, which a default device of torch does not reach."""
        spacing = self.sampling_rate / self.hop  # Hz from row to row
        reach = REACH * self.sampling_rate / self.lengths[bins]
        first = math.floor((self.frequencies[bins] - reach).min() / spacing)
        last = math.floor((self.frequencies[bins] + reach).max() / spacing) + 1
        rows = np.arange(first, min(last, first + self.hop))  # as many as hop are the whole circle
        # Half of the angle from sample to sample at every point: pi * frequency / sampling rate.
        points = np.pi / self.hop * (rows[:, None] + np.arange(self._block) / self._block)
        response = np.empty((self._block, len(bins), len(rows)), dtype=np.float32)
        for at, k in enumerate(bins):
            length = int(self.lengths[k])
            # The window's sum is length / 2; folding divides by hop.
            scale = 2 / (math.sqrt(length) * self.hop)
            half_angles = points - np.pi * self.frequencies[k] / self.sampling_rate
            response[:, at] = (scale * _hann_spectrum(half_angles, length)).T
        turn = torch.from_numpy(np.exp(-1j * points).astype(np.complex64)) if self.lengths[bins[0]] % 2 else None
        return _Band(
            torch.from_numpy(bins).to(device),
            torch.from_numpy(rows % self.hop).to(device),
            torch.from_numpy(response).to(device),
            None if turn is None else turn.to(device),
        )


@torch.no_grad()
def log_mel(clip: Tensor, sampling_rate: int, hop: int = 320, bins: int = 80, window: int = 2048) -> Tensor:
    """Natural log of mel energies, float32 [T // hop + 1, bins], of a clip [T], with zeros beyond either end.

    The power of a periodic Hann window's spectrum (over the square of the window's sum, at least 1e-10) in triangles
    of height 1, evenly spaced on the HTK scale 2595 log10(1 + f / 700) from 0 to half of the sampling rate.

    Raises:
        ConfigError: the window is so short that a triangle holds no line of its spectrum.
    """
    hann = torch.hann_window(window, device=clip.device)
    padded = F.pad(clip.float(), (window // 2, window - window // 2))
    spectrum = torch.stft(padded, window, hop, window=hann, center=False, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1).T / (window / 2) ** 2
    filters = torch.from_numpy(_mel_filters(sampling_rate, window, bins)).to(clip.device)
    with torch.autocast(clip.device.type, enabled=False):
        return (power @ filters).clamp(min=FLOOR).log()


@torch.no_grad()
def chroma(clip: Tensor, sampling_rate: int, hop: int = 320) -> Tensor:
    """What part of a frame's energy belongs to each pitch class from C on, float32 [T // hop + 1, 12], of a clip [T].

    Energies are those of the CQT from C1 (32.7 Hz) on, at most 7 octaves of 48 bins, not scaled by length; the bin
    halfway between two semitones counts half for each. Equal temperament at A4 = 440 Hz. Silence gives zeros.
    """
    transform = _pitches(sampling_rate, hop)
    (magnitudes,) = transform([clip])
    lengths, offsets = torch.from_numpy(transform.lengths), np.arange(transform.bins)[:, None] - 4 * np.arange(12)
    apart = np.abs((offsets + 24) % 48 - 24)  # in quarters of a semitone
    members = torch.from_numpy(np.select([apart < 2, apart == 2], [1.0, 0.5]).astype(np.float32))
    with torch.autocast(clip.device.type, enabled=False):
        energy = magnitudes.square() / lengths.to(clip.device) @ members.to(clip.device)
    return energy / energy.sum(1, keepdim=True).clamp(min=FLOOR)


@functools.cache
def _pitches(sampling_rate: int, hop: int) -> CQT:
    octaves = min(7, int(math.log2(sampling_rate / 2 / 32.7)))
    return CQT(sampling_rate, hop, bins=48 * octaves)


@functools.cache
def _mel_filters(sampling_rate: int, window: int, bins: int) -> np.ndarray:
    """float32 [window // 2 + 1, bins]."""
    mels = np.linspace(0, 2595 * math.log10(1 + sampling_rate / 2 / 700), bins + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    lines = np.arange(window // 2 + 1)[:, None] * sampling_rate / window
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    filters = np.minimum((lines - low) / (middle - low), (high - lines) / (high - middle)).clip(min=0)
    empty = int((filters.sum(0) == 0).sum())
    if empty:
        raise ConfigError(
            f"log-mel: {empty} of {bins} bins lie between the lines of a spectrum of {window} samples at "
            f"{sampling_rate} Hz; use a longer window or fewer bins"
        )
    return filters.astype(np.float32)


def _hann_spectrum(half_angles: np.ndarray, length: int) -> np.ndarray:
    """Fourier sum of a periodic Hann window of `length` samples about its middle, at angles of twice `half_angles`.

    The window is the sum of three exponentials, so its spectrum is that of three geometric series; put together they
    are cos(a) sin(L a) / (2 sin(a) (1 - (sin(a) / sin(pi / L))^2)).
    """
    step = math.sin(math.pi / length)
    apart = np.sin(half_angles) / step
    # Where numerator and denominator are both 0, a point beside it is as good.
    half_angles = half_angles + 1e-7 * step * ((np.abs(apart) < 1e-8) | (np.abs(1 - apart**2) < 1e-8))
    sine = np.sin(half_angles)
    return np.cos(half_angles) * np.sin(length * half_angles) / (2 * sine * (1 - (sine / step) ** 2))


def _smooth(least: int) -> int:
    """The smallest number from `least` on without prime factors above 5: FFTs of it are fast."""
    number = least
    while True:
        rest = number
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return number
        number += 1
