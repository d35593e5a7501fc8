"""Schedules against closed forms and transformers': where phases begin and end, exactly, and that nothing is kept."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from mm.train.schedules import (
    SCHEDULES,
    AnnealConfig,
    ConstantConfig,
    CosineConfig,
    InfiniteConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
    spans,
)

STEPS, WARMUP = 100, 10


def factors(schedule: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """One more than there are steps: the last is where it ends."""
    return [schedule.factor(step, steps) for step in range(steps + 1)]


def theirs(make: Callable[..., Any], **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    (factor,) = make(optimizer, num_warmup_steps=WARMUP, **settings).lr_lambdas
    return [factor(step) for step in range(STEPS + 1)]


PEERS: list[tuple[str, ScheduleConfig, list[float]]] = [
    ("constant", ConstantConfig(warmup=WARMUP), theirs(transformers.get_constant_schedule_with_warmup)),
    (
        "linear",
        LinearConfig(warmup=WARMUP),
        theirs(transformers.get_linear_schedule_with_warmup, num_training_steps=STEPS),
    ),
    (
        "cosine",
        CosineConfig(warmup=WARMUP, final=0.1),
        theirs(transformers.get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=STEPS, min_lr_rate=0.1),
    ),
    *(
        (
            f"wsd-{form}",
            WSDConfig(warmup=WARMUP, decay=30, form=form, final=0.1, start=0.1),
            theirs(
                transformers.get_wsd_schedule,
                num_training_steps=STEPS,
                num_decay_steps=30,
                decay_type=form,
                min_lr_ratio=0.1,
            ),
        )
        for form in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.parametrize(("ours", "peers"), [peer[1:] for peer in PEERS], ids=[peer[0] for peer in PEERS])
def test_transformers_schedules(ours: ScheduleConfig, peers: list[float]) -> None:
    """Theirs take the first step at a rate of 0 and reach the peak at step WARMUP; ours are a step ahead till then."""
    shifted = [peers[step + 1 if step < WARMUP else step] for step in range(STEPS + 1)]
    assert factors(ours) == pytest.approx(shifted, rel=1e-12, abs=1e-15)


DECAYS = [
    CosineConfig(warmup=WARMUP, final=0.1), LinearConfig(warmup=WARMUP, final=0.1),
    *(WSDConfig(warmup=WARMUP, decay=STEPS - WARMUP, form=f, final=0.1) for f in ("linear", "cosine", "1-sqrt")),
]  # fmt: skip


@pytest.mark.parametrize("schedule", DECAYS, ids=lambda s: f"{s.kind}-{getattr(s, 'form', '')}")
def test_decays_fall_all_the_way_to_their_floor(schedule: ScheduleConfig) -> None:
    found = factors(schedule)
    assert found[0] == 1 / WARMUP and found[WARMUP - 1] == found[WARMUP] == 1
    assert all(b > a for a, b in itertools.pairwise(found[:WARMUP]))
    assert all(b < a for a, b in itertools.pairwise(found[WARMUP:]))
    assert found[STEPS] == 0.1 and schedule.factor(STEPS + 50, STEPS) == 0.1


def test_closed_forms() -> None:
    progress = (55 - 10) / 90
    half = 0.5 * (1 + math.cos(math.pi * progress))
    assert CosineConfig(warmup=0.1, final=0.2).factor(55, 100) == pytest.approx(0.2 + 0.8 * half)
    assert LinearConfig(warmup=0.1, final=0.2).factor(55, 100) == pytest.approx(0.2 + 0.8 * (1 - progress))
    assert ConstantConfig(warmup=0.1).factor(55, 100) == 1
    assert CosineConfig(warmup=10).factor(4, 100) == 0.5  # steps, not a share
    assert LinearConfig(warmup=0, final=0.2).factor(0, 100) == 1
    assert [ConstantConfig(warmup=4, start=0.2).factor(step, 9) for step in range(4)] == pytest.approx(
        [0.4, 0.6, 0.8, 1]
    )
    wsd = factors(WSDConfig(warmup=0.1))
    assert set(wsd[9:81]) == {1} and wsd[85] == pytest.approx(1 - math.sqrt(5 / 20)) and wsd[100] == 0


def test_a_warm_up_of_a_share_need_not_be_whole() -> None:
    found = factors(CosineConfig(warmup=0.05), 50)  # 2.5 steps
    assert found[:3] == [0.4, 0.8, 1] and found[3] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5 / 47.5)))
    assert factors(LinearConfig(warmup=0.03), 8)[0] == 1


def test_cycles_are_schedules_one_after_the_other() -> None:
    """Re-warming and re-decaying: repeated cosines."""
    one, three = CosineConfig(warmup=0.1, final=0.1), CosineConfig(warmup=0.1, final=0.1, cycles=3)
    assert factors(three, 300)[:-1] == pytest.approx(factors(one)[:-1] * 3, rel=1e-12)
    steps = CosineConfig(warmup=WARMUP, cycles=3)
    assert steps.factor(100, 300) == 1 / WARMUP
    assert CosineConfig(warmup=2, cycles=3).problems(9) == [], "2 steps of warm-up and one of decay"
    for warmup, steps in ((2, 7), (40, 100), (0.9, 12)):
        assert [key for key, _ in CosineConfig(warmup=warmup, cycles=3).problems(steps)] == ["cycles"]


def infinite(**settings: Any) -> InfiniteConfig:
    return InfiniteConfig.model_validate({"warmup": 10, "cooldown": 20, "constant": 0.4, "final": 0.01, **settings})


def test_infinite_has_no_end_until_told() -> None:
    schedule = infinite()
    found = factors(schedule, 1000)
    assert found[:10] == [(n + 1) / 10 for n in range(10)] and found[10] == 1
    middle = 0.4 + 0.6 / 2 * (1 + math.cos(math.pi * (17 - 10) / 20))
    assert found[17] == pytest.approx(middle) and all(b < a for a, b in itertools.pairwise(found[10:31]))
    assert set(found[30:]) == {0.4}
    assert found[:51] == factors(schedule, 50), "nothing of it depends on how many steps a run has"
    annealed = infinite(anneal={"at": 60, "steps": 40})
    assert factors(annealed)[:61] == found[:61]


def test_annealing_hits_its_end_exactly_and_the_other_readings_do_not() -> None:
    found = factors(infinite(anneal={"at": 60, "steps": 40}), 120)
    expected = [0.4 * (0.01 / 0.4) ** (n / 40) for n in range(41)]
    assert found[60:101] == pytest.approx(expected, rel=1e-12)
    assert found[100] == 0.01 and set(found[100:]) == {0.01}
    assert all(b < a for a, b in itertools.pairwise(found[60:101]))
    start = factors(infinite(anneal={"at": 60, "steps": 40, "exponent": "from_start"}), 120)
    assert start[60:101] == pytest.approx([0.4 * (0.01 / 0.4) ** (n / 100) for n in range(41)], rel=1e-12)
    tau = factors(infinite(anneal={"at": 60, "steps": 40, "exponent": "exponential", "tau": 15}), 120)
    assert tau[60:101] == pytest.approx([0.01 + 0.39 * math.exp(-n / 15) for n in range(41)], rel=1e-12)


def test_cool_downs_meet_both_ends() -> None:
    found = factors(infinite(form="inverse-sqrt", steepness=8))

    def h(x: float) -> float:
        return (1 + 8 * x) ** -0.5 - 1

    expected = [1 + (0.4 - 1) / h(1) * h(n / 20) for n in range(21)]
    assert found[10:31] == pytest.approx(expected, rel=1e-12) and found[10] == 1 and found[30] == 0.4
    straight = factors(infinite(cooldown=0))
    assert straight[:10] == pytest.approx([0.4 * (n + 1) / 10 for n in range(10)]) and set(straight[9:]) == {0.4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup": 0.03}, "an infinite schedule has no length to take a share of"),
        ({"final": 0}, "greater than 0"),
        ({"final": 0.5}, "final 0.5 is above constant, 0.4"),
        ({"anneal": {"at": 25, "steps": 10}}, "anneal.at 25 is before warm-up and cool-down have ended, at 30"),
        ({"anneal": {"at": 60, "steps": 10, "tau": 3}}, "tau: `exponent: exponential` needs it"),
    ],
)
def test_what_an_infinite_schedule_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        infinite(**settings)


def test_all_of_the_steps_is_no_share() -> None:
    """`100%` is 1, which would be a single step."""
    assert WSDConfig.model_validate({"kind": "wsd", "warmup": "99%", "decay": 1}).warmup == 0.99
    for settings in ({"warmup": "100%"}, {"decay": "250%"}):
        with pytest.raises(ValidationError, match=r"\d+% of all steps: give less, or a number of steps"):
            WSDConfig.model_validate(settings)


def test_what_does_not_fit_is_said() -> None:
    assert LinearConfig(warmup=0.9).problems(10) == []
    assert CosineConfig(warmup=11).problems(10) == [
        ("warmup", "11 steps are more than the schedule's 10 (train.max_steps)")
    ]
    assert [key for key, _ in WSDConfig(warmup=40, decay=0.7).problems(100)] == ["decay"]
    exact = WSDConfig(warmup=0.1, decay=0.9)
    assert exact.problems(13) == []
    assert infinite().problems(5) == []
    (problem,) = infinite(anneal={"at": 60, "steps": 50}).problems(100)
    assert problem == ("anneal", "ends at step 110, behind the schedule's 100: set train.max_steps to it")


def test_stages_that_count_on_share_a_schedule() -> None:
    assert spans([False], [9]) == [(0, 9)]
    assert spans([False, True, True, False, True], [3, 4, 5, 6, 7]) == [(0, 12), (3, 12), (7, 12), (0, 13), (6, 13)]


def test_phases_follow_one_another() -> None:
    """Whatever the kind: each begins where the one before ends, in steps and in value."""
    schedules = [
        *DECAYS, ConstantConfig(warmup=5), WSDConfig(warmup=0.05, decay=0.3), infinite(anneal={"at": 60, "steps": 40}),
        infinite(anneal={"at": 30, "steps": 70}),
    ]  # fmt: skip
    for schedule in schedules:
        phases = schedule.phases(STEPS)
        assert phases[0].first == 0 and phases[-1].first + phases[-1].steps == STEPS
        for before, after in itertools.pairwise(phases):
            assert before.first + before.steps == after.first and before.end == after.begin
    assert set(SCHEDULES.names) == {"constant", "linear", "cosine", "wsd", "infinite"}
    assert AnnealConfig(at=5, steps=2).exponent == "exact"
