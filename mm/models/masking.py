"""What masked prediction of sound draws: spans of frames, and noises from other clips. By numpy, on the host.

Who draws hands over a generator that is keyed by what is drawn for (`mm.data.sample.keyed_rng`), so that nothing here
depends on what else is in a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def span_mask(frames: int, prob: float, length: int, least: int, rng: np.random.Generator) -> np.ndarray:
    """bool [frames]: which are masked, by fairseq's rule (`compute_mask_indices`, static spans that may overlap).

    prob * frames / length spans, rounded up or down at random, at least `least`, start at different frames. Where they
    do not all have room, they are cut at the end. With 0.8 and spans of 5 some 58 % of the frames of a long clip.
    """
    spans = max(least, int(prob * frames / length + rng.random()))
    room = frames - length
    starts = rng.choice(room if room > spans else spans + 1, spans, replace=False)
    places = (starts[:, None] + np.arange(length)).ravel()
    mask = np.zeros(frames, dtype=bool)
    mask[places[places < frames]] = True
    return mask


def draw_noises(
    samples: int, others: int, number: tuple[int, int], length: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """int64 [noises, 3]: of each its start among the samples of other clips, its place in the clip, and its length.

    Args:
        samples: of the clip; others: of the other clips together.
        number: least and most noises; length: least and most samples of one, where both sides have as many.
    """
    count = int(rng.integers(*number, endpoint=True))
    lengths = np.minimum(rng.integers(*length, size=count, endpoint=True), min(samples, others))
    return np.stack([rng.integers(0, others - lengths + 1), rng.integers(0, samples - lengths + 1), lengths], axis=1)


def mix(clip: Tensor, others: Sequence[Tensor], noises: np.ndarray, gain: float) -> Tensor:
    """The clip [T] with noises from the concatenation of others added, as `draw_noises` placed them."""
    pool, mixed = torch.cat([*others]), clip.clone()
    for start, place, length in noises.tolist():
        mixed[place : place + length] += gain * pool[start : start + length]
    return mixed
