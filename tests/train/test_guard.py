"""The guard: spikes are caught, ordinary training is not, and its state survives a checkpoint."""

import json
import math
import random
from collections.abc import Callable

import pytest

from mm.train.config import GuardConfig
from mm.train.guard import Guard

STEPS = 20_000


def feed(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[int]:
    """The steps that are skipped."""
    pairs = zip(losses, norms or [None] * len(losses), strict=True)
    return [step for step, (loss, norm) in enumerate(pairs) if not guard.judge(loss, norm).accept]


def learning(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls from 11 to 2.5 by a power law, with noise of 2%."""
    rng = random.Random(seed)
    return [(2.5 + 8.5 / (1 + step / 50)) * (1 + rng.gauss(0, 0.02)) for step in range(steps)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    guard = Guard(GuardConfig())
    assert not guard.judge(value, 1.0).accept and not guard.judge(1.0, value).accept  # before the window is full too
    verdict = guard.judge(value, None)
    assert verdict.reason == f"the loss is {value}" and verdict.threshold is None
    assert not guard.losses and not guard.norms and guard.skipped == 3


def test_planted_spikes_are_caught_and_nothing_else() -> None:
    losses, norms = learning(2000), [1 + 0.1 * math.sin(step) for step in range(2000)]
    losses[700] *= 3
    losses[701] = math.nan
    norms[1500] = 40.0
    norms[10] = 1e6  # too early to know what is normal
    norms[900] = 0.0  # low
    losses[1200] *= 0.1
    assert feed(Guard(GuardConfig()), losses, norms) == [700, 701, 1500]


def test_threshold_is_mean_plus_sigmas_of_the_last_accepted() -> None:
    rng = random.Random(1)
    guard = Guard(GuardConfig(sigmas=4, window=32))
    values = [rng.gauss(3, 0.5) for _ in range(50)]
    assert not feed(guard, values)
    last = values[-32:]
    mean = sum(last) / 32
    std = math.sqrt(sum((x - mean) ** 2 for x in last) / 32)
    verdict = guard.judge(mean + 4.001 * std, None)
    assert not verdict.accept and verdict.threshold == pytest.approx(mean + 4 * std)
    assert list(guard.losses) == last  # the spike did not enter
    assert guard.judge(mean + 3.999 * std, None).accept


def test_window_is_judged_by_from_half_full_on() -> None:
    for seen, accepted in ((15, True), (16, False)):
        guard = Guard(GuardConfig(window=32))
        feed(guard, [1.0] * seen)
        assert guard.judge(9.0, None).accept is accepted


def test_zero_sigmas_only_refuse_what_is_not_finite() -> None:
    guard = Guard(GuardConfig(sigmas=0))
    assert feed(guard, [1.0] * 200 + [1e30, math.inf]) == [201]


@pytest.mark.parametrize(
    ("name", "draw", "most"),
    [
        ("gaussian, 2%", lambda rng: 2.5 * (1 + rng.gauss(0, 0.02)), 0.0),
        ("lognormal, 0.3", lambda rng: math.exp(rng.gauss(0, 0.3)), 1e-3),
        ("lognormal, 0.5", lambda rng: math.exp(rng.gauss(0, 0.5)), 4e-3),
        ("student t, 3 degrees", lambda rng: 20 + rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 1 / 1.5)), 5e-3),
    ],
)
def test_false_alarms_are_rare(name: str, draw: Callable[[random.Random], float], most: float) -> None:
    """And a few in a row, which would rewind, do not come."""
    rng = random.Random(2)
    guard = Guard(GuardConfig())
    skipped, longest = 0, 0
    for _ in range(STEPS):
        skipped += not guard.judge(3.0, draw(rng)).accept
        longest = max(longest, guard.skipped)
    assert skipped <= most * STEPS and longest < guard.config.rewind_after, f"{name}: {skipped} of {STEPS}"


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("falls steeply", lambda t: 2.5 + 8.5 * math.exp(-t / 30)),
        ("rises slowly", lambda t: 2.0 + t / 2000),
        ("rises by half in 300 steps", lambda t: 2.0 * (1.5 ** min(1.0, max(0, t - 500) / 300))),
        ("flat, exactly", lambda t: 2.0),
        ("negative", lambda t: -3.0 + t / 5000),
        ("zero", lambda t: 0.0),
        ("zero, then something", lambda t: float(t > 300)),
        ("zero now and then", lambda t: float(t % 5 == 0)),
    ],
)
def test_curves_without_spikes_pass(name: str, curve: Callable[[int], float]) -> None:
    """With noise of 0.5%, less than the floor, and of 2%."""
    for noise in (0.0, 0.005, 0.02):
        rng = random.Random(3)
        series = [curve(t) * (1 + rng.gauss(0, noise)) for t in range(2000)]
        assert not feed(Guard(GuardConfig()), series), f"{name}, noise {noise}"


def test_noise_on_a_flat_loss_passes() -> None:
    guard = Guard(GuardConfig())
    feed(guard, [2.5] * 200, [0.8] * 200)
    assert guard.judge(2.5 * 1.05, 0.8 * 1.25).accept
    assert not guard.judge(2.5 * 1.3, None).accept
    assert not guard.judge(2.5, 0.8 * 2).accept


def test_norms_that_shrink_through_warmup_pass() -> None:
    rng = random.Random(4)
    norms = [(0.5 + 30 * math.exp(-t / 40)) * math.exp(rng.gauss(0, 0.2)) for t in range(1000)]
    assert not feed(Guard(GuardConfig()), learning(1000), norms)


def test_norm_is_judged_by_norms_only_where_it_is_known() -> None:
    guard = Guard(GuardConfig(window=32))
    feed(guard, learning(500))
    assert not guard.norms
    assert guard.judge(3.0, 1e6).accept  # the first norm ever
    assert not guard.judge(1e6, None).accept


def test_rewinding() -> None:
    guard = Guard(GuardConfig(rewind_after=3, max_rewinds=2))
    feed(guard, [2.0] * 100)
    saved = json.loads(json.dumps(guard.state_dict()))
    feed(guard, [2.1] * 50)
    for rewinds in range(2):
        feed(guard, [math.nan] * 2)
        assert not guard.should_rewind
        guard.judge(math.nan, None)
        assert guard.should_rewind and not guard.exhausted
        guard.rewind(saved)
        assert list(guard.losses) == [2.0] * 100 and not guard.should_rewind and guard.rewinds == rewinds + 1
    feed(guard, [math.nan] * 3)
    assert guard.exhausted


def test_an_accepted_step_between_ends_the_row() -> None:
    guard = Guard(GuardConfig(rewind_after=2))
    feed(guard, [math.nan, 1.0, math.nan])
    assert guard.skipped == 1 and not guard.should_rewind


def test_reset_forgets_what_was_normal() -> None:
    guard = Guard(GuardConfig())
    feed(guard, [2.0] * 200)
    guard.reset()
    assert not feed(guard, [9.0] * 200)


def test_state_goes_through_json_and_changes_nothing() -> None:
    losses, norms = learning(600), [math.exp(random.Random(s).gauss(0, 0.5)) for s in range(600)]
    losses[450] = 50.0
    whole = Guard(GuardConfig())
    expected = [whole.judge(*pair) for pair in zip(losses, norms, strict=True)]
    first = Guard(GuardConfig())
    feed(first, losses[:300], norms[:300])
    second = Guard(GuardConfig())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.judge(*pair) for pair in zip(losses[300:], norms[300:], strict=True)] == expected[300:]
    assert second.state_dict() == whole.state_dict()
    shorter = Guard(GuardConfig(window=16))
    shorter.load_state_dict(whole.state_dict())
    assert list(shorter.losses) == list(whole.losses)[-16:]


def test_events_are_strict_json() -> None:
    guard = Guard(GuardConfig())
    verdict = guard.judge(math.nan, math.inf)
    line = json.dumps(guard.event(7, verdict, math.nan, math.inf, ["a/b/1"]), allow_nan=False)
    assert json.loads(line) == {
        "step": 7, "reason": "the loss is nan", "loss": "nan", "grad_norm": "inf", "threshold": None, "skipped": 1,
        "rewinds": 0, "ids": ["a/b/1"],
    }  # fmt: skip
