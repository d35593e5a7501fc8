"""Matching against brute force."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mm.train.evaluate import match


def items(captions: list[int]) -> Any:
    return [SimpleNamespace(caption=np.array([caption])) for caption in captions]


def drawn(scores: np.ndarray, captions: list[int], candidates: int, draws: int) -> tuple[float, float]:
    """The same measure, drawing rivals again and again."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for i, own in enumerate(captions):
        rivals = [j for j, other in enumerate(captions) if other != own]
        others = np.delete(np.exp(scores), i, axis=0)
        for _ in range(draws):
            among = rng.choice(rivals, min(candidates - 1, len(rivals)), replace=False)
            calibrated = scores[i] - np.log(others.mean(axis=0))
            hits += [scores[i, i] > scores[i, among].max(), calibrated[i] > calibrated[among].max()]
    return tuple(hits / draws)


def test_matching_is_the_mean_over_all_draws_of_rivals() -> None:
    rng = np.random.default_rng(1)
    captions = [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    scores = rng.normal(size=(10, 10)) + 1.5 * np.eye(10) + rng.normal(size=10)
    for candidates in (2, 4, 9):
        np.testing.assert_allclose(
            match(scores, items(captions), candidates), drawn(scores, captions, candidates, 4000), atol=0.06
        )


def test_matching_by_chance_and_by_knowledge() -> None:
    rng = np.random.default_rng(2)
    plain, calibrated = match(rng.normal(size=(400, 400)), items(list(range(400))), 32)
    assert plain / 400 == pytest.approx(1 / 32, abs=0.015) and calibrated / 400 == pytest.approx(1 / 32, abs=0.015)
    assert match(np.eye(40), items(list(range(40))), 32) == (40, 40)
    # A caption that is likely under every picture wins by plain likelihood, and its prior takes that away.
    biased = np.eye(40) + 5 * (np.arange(40) == 0)
    assert match(biased, items(list(range(40))), 40) == (1, 40)


def test_equal_scores_are_no_success() -> None:
    assert match(np.zeros((5, 5)), items(list(range(5))), 3) == (0, 0)
