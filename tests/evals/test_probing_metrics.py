"""Metrics equal scikit-learn's where it is installed, and closed forms and brute force where it is not."""

from itertools import product

import numpy as np
import pytest

from mm.evals.probing_metrics import (
    KEYS,
    accuracy,
    average_precision,
    bootstrap,
    key_score,
    macro_f1,
    parse_key,
    r2,
    roc_auc,
    tempo_accuracy,
)

RNG = np.random.default_rng(0)


def key(name: str) -> int:
    number = parse_key(name)
    assert number is not None
    return number


def test_keys_by_every_spelling() -> None:
    assert [parse_key(name) for name in KEYS] == list(range(24))
    assert key("d♭ minor") == key("C# minor") == key("c♯ min") == key("D-  minor") == key("Db:min")
    assert key("Cb major") == key("B major") and key("B# major") == key("C major")
    for text in ("", "C", "H major", "major", "C dorian", "d-minor", "C major 7", None, 3):
        assert parse_key(text) is None


@pytest.mark.parametrize(
    ("estimate", "score"),
    [
        ("C major", 1.0),
        ("G major", 0.5),
        ("F major", 0.0),
        ("A minor", 0.3),
        ("C minor", 0.2),
        ("E minor", 0.0),
        ("F# major", 0.0),
    ],
)
def test_key_score_of_c_major_by_hand(estimate: str, score: float) -> None:
    assert key_score(np.array([key("C major")]), np.array([key(estimate)])) == score


@pytest.mark.parametrize(
    ("estimate", "score"),
    [("A minor", 1.0), ("E minor", 0.5), ("D minor", 0.0), ("C major", 0.3), ("A major", 0.2), ("F# major", 0.0)],
)
def test_key_score_of_a_minor_by_hand(estimate: str, score: float) -> None:
    assert key_score(np.array([key("A minor")]), np.array([key(estimate)])) == score


def test_key_score_is_the_same_in_all_keys_and_a_mean() -> None:
    all = np.arange(24)
    for up in range(12):
        shifted = (all + up) % 12 + all // 12 * 12
        for other in range(24):
            guess = np.full(24, other)
            assert key_score(shifted, (guess + up) % 12 + guess // 12 * 12) == pytest.approx(key_score(all, guess))
    assert key_score(np.array([0, 0]), np.array([0, 7])) == 0.75


def test_tempo_within_four_per_cent() -> None:
    assert tempo_accuracy(np.array([100.0, 100, 100, 100]), np.array([104.0, 96, 104.1, 95.9])) == 0.5


def test_auc_is_the_share_of_pairs_in_order() -> None:
    truth = RNG.random((40, 3)) < 0.4
    scores = RNG.integers(0, 6, (40, 3)).astype(float)  # with ties
    areas = [
        np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(given[true], given[~true])])
        for true, given in zip(truth.T, scores.T, strict=True)
    ]
    assert roc_auc(truth, scores) == pytest.approx(np.mean(areas), abs=1e-12)
    nobody = np.concatenate([truth, np.zeros((40, 1), dtype=bool)], 1)
    assert roc_auc(nobody, np.concatenate([scores, scores[:, :1]], 1)) == pytest.approx(np.mean(areas))
    assert np.isnan(roc_auc(np.ones((4, 1), dtype=bool), np.zeros((4, 1))))


def test_average_precision_by_every_threshold() -> None:
    truth = RNG.random((30, 2)) < 0.4
    scores = RNG.integers(0, 8, (30, 2)).astype(float)
    expected = []
    for true, given in zip(truth.T, scores.T, strict=True):
        area, before = 0.0, 0.0
        for threshold in sorted(set(given), reverse=True):
            taken = given >= threshold
            recall = (true & taken).sum() / true.sum()
            area += (recall - before) * (true & taken).sum() / taken.sum()
            before = recall
        expected.append(area)
    assert average_precision(truth, scores) == pytest.approx(np.mean(expected), abs=1e-12)
    assert average_precision(np.array([[True], [False]]), np.array([[1.0], [0.0]])) == 1.0


def test_closed_forms() -> None:
    assert accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    # Classes 0, 1, 2: F1 of 1, 2/3 (one of two right, none missed) and 2/3.
    assert macro_f1(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    truth = np.array([1.0, 2.0, 3.0])
    assert r2(truth, truth) == 1.0 and r2(truth, np.full(3, 2.0)) == 0.0 and np.isnan(r2(np.ones(3), truth))


def test_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for classes in (2, 5):
        truth, predicted = RNG.integers(0, classes, (2, 200))
        assert accuracy(truth, predicted) == pytest.approx(sklearn.accuracy_score(truth, predicted))
        assert macro_f1(truth, predicted) == pytest.approx(sklearn.f1_score(truth, predicted, average="macro"))
    tags, scores = RNG.random((200, 7)) < 0.3, RNG.integers(0, 30, (200, 7)).astype(float)
    assert roc_auc(tags, scores) == pytest.approx(sklearn.roc_auc_score(tags, scores, average="macro"))
    assert average_precision(tags, scores) == pytest.approx(sklearn.average_precision_score(tags, scores))
    numbers, guesses = RNG.normal(size=(2, 100))
    assert r2(numbers, guesses) == pytest.approx(sklearn.r2_score(numbers, guesses))


def test_intervals_are_over_groups() -> None:
    truth = np.zeros(400, dtype=np.int64)
    right_by_piece = RNG.random(20) < 0.6
    predicted = np.where(np.repeat(right_by_piece, 20), 0, 1)  # recordings of a piece are all right or all wrong
    pieces = [str(number) for number in np.repeat(np.arange(20), 20)]
    by_piece = bootstrap(accuracy, truth, [predicted], pieces)
    recordings = [str(number) for number in range(400)]
    by_recording = bootstrap(accuracy, truth, [predicted], recordings)
    assert by_piece.value == by_recording.value == right_by_piece.mean()
    assert by_piece.low is not None and by_piece.high is not None
    assert by_recording.low is not None and by_recording.high is not None
    share = right_by_piece.mean()
    deviation = np.sqrt(share * (1 - share) / 20)  # of a mean of 20 coins
    assert by_piece.high - by_piece.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert by_recording.high - by_recording.low == pytest.approx(2 * 1.96 * deviation / np.sqrt(20), rel=0.15)
    assert bootstrap(accuracy, truth, [predicted], pieces) == by_piece
    assert bootstrap(accuracy, truth, [predicted], recordings, seed=1) != by_recording
    assert bootstrap(accuracy, truth, [predicted], ["one"] * 400).low is None


def test_differences_are_drawn_in_pairs() -> None:
    truth = RNG.integers(0, 2, 100)
    one = np.where(RNG.random(100) < 0.7, truth, 1 - truth)
    groups = [str(number // 2) for number in range(100)]
    same = bootstrap(accuracy, truth, [one, one], groups, against=[one])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = bootstrap(accuracy, truth, [one], groups, against=[1 - truth])
    assert worse.value == accuracy(truth, one) and worse.low is not None and worse.low > 0.5
