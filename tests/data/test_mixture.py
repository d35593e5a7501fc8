"""The mixture: shares to the pack, epochs that close, and a sequence that is a function of (seed, log)."""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mm.data.mixture import ONE, Draw, Mixture, MixtureConfig, SourceInfo, SourceOrder, quantise
from mm.errors import CheckpointError, ConfigError, DataError

LENGTH = 64
NAMES = ["web", "books", "code", "talk", "maps"]


def make_sources(counts: list[list[int]], seed: int = 0, smallest: int = LENGTH // 2) -> list[SourceInfo]:
    """`counts[i][v]` packs of visit v of source i, numbered as `mm pack` does; sizes from `smallest` to LENGTH."""
    tokens = np.random.default_rng(seed).integers(smallest, LENGTH + 1, sum(map(sum, counts)))
    tokens[0] = LENGTH
    start, found = 0, []
    for i, sizes in enumerate(counts):
        visits = []
        for size in sizes:
            visits.append(np.arange(start, start + size))
            start += size
        found.append(SourceInfo(NAMES[i] if i < len(NAMES) else f"source{i}", visits, tokens))
    return found


def draws(mixture: Mixture, count: int = 1 << 30) -> list[Draw]:
    found: list[Draw] = []
    while len(found) < count and (draw := mixture.next()):
        found.append(draw)
    return found


def follow(mixture: Mixture, rows: int) -> list[Draw]:
    """40 steps, fewer if the sequence ends."""
    found: list[Draw] = []
    for step in range(40):
        mixture.start_step(step)
        found += draws(mixture, rows)
        if len(found) < (step + 1) * rows:
            break
    return found


class Moves:
    """A policy that hands out given weights at given steps."""

    def __init__(self, at: Mapping[int, Mapping[str, float]]) -> None:
        self.at = at

    def weights(self, step: int, mixture: Mixture) -> Mapping[str, float] | None:
        return self.at.get(step)


class Hostile:
    """Gives all weight to the sources that are furthest behind."""

    def __init__(self, seed: int, least: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.least = least

    def weights(self, step: int, mixture: Mixture) -> Mapping[str, float] | None:
        lags = {name: row.lag for name, row in mixture.progress().items()}
        edge = max(lags.values()) - self.rng.choice([0.3, 1, 2]) * self.rng.random() * LENGTH
        return {name: 1 if lag >= edge else self.least for name, lag in lags.items()}


class Shares:
    """The accounts as one would keep them by hand, in exact fractions of tokens."""

    def __init__(self, mixture: Mixture, sources: list[SourceInfo]) -> None:
        self.mixture = mixture
        self.sources = sources
        self.tokens = [0] * len(sources)
        self._lags = [0] * len(sources)  # x 2^32
        self._range = (0, 0)

    lags = property(lambda self: [Fraction(lag, ONE) for lag in self._lags])
    lowest = property(lambda self: Fraction(self._range[0], ONE))
    highest = property(lambda self: Fraction(self._range[1], ONE))

    def follow(self, count: int = 1 << 30) -> int:
        for done in range(count):
            weights = self.mixture.weights.values()
            draw = self.mixture.next()
            if draw is None:
                return done
            size = int(self.sources[draw.source].tokens[draw.pack])
            self.tokens[draw.source] += size
            self._lags = [lag + int(weight * ONE) * size for lag, weight in zip(self._lags, weights, strict=True)]
            self._lags[draw.source] -= ONE * size
            self._range = min(self._range[0], *self._lags), max(self._range[1], *self._lags)
        return count


# A source's own order


sizes = st.lists(st.integers(1, 90), min_size=1, max_size=3)


@given(sizes, st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_of_one_visit(counts: list[int], seed: int, block: int, window: int) -> None:
    visits = make_sources([counts])[0].visits
    order = SourceOrder(visits, seed, "web", block, window)
    position = 0
    for epoch in range(2 * len(visits)):
        visit = visits[epoch % len(visits)]
        assert order.start(epoch) == position
        assert [order.locate(position + i) for i in range(len(visit))] == [(epoch, i) for i in range(len(visit))]
        placed = [order.place(position + i) for i in range(len(visit))]
        assert {e for e, _ in placed} == {epoch}
        assert sorted(pack for _, pack in placed) == visit.tolist()
        position += len(visit)


@given(sizes, st.integers(0, 99), st.integers(1, 9), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_any_position_can_be_asked_first(
    counts: list[int], seed: int, block: int, window: int, data: st.DataObject
) -> None:
    visits = make_sources([counts])[0].visits
    order = SourceOrder(visits, seed, "web", block, window)
    forwards = [order[position] for position in range(3 * sum(counts))]
    asked = data.draw(st.lists(st.integers(0, len(forwards) - 1), max_size=20))
    assert [order[position] for position in asked] == [forwards[position] for position in asked]
    position = asked[0] if asked else 0
    assert SourceOrder(visits, seed, "web", block, window)[position] == forwards[position]


@given(st.integers(1, 700), st.integers(0, 99), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_reader_stays_in_few_blocks(packs: int, seed: int, block: int, window: int) -> None:
    order = SourceOrder([np.arange(packs)], seed, "web", block, window)
    last = max(1, packs // block) - 1
    touched = [min(order[position] // block, last) for position in range(packs)]
    for start in range(packs):
        assert len(set(touched[start : start + block])) <= 2 * window


def test_orders_differ_by_seed_name_and_epoch_and_mix_within_a_window() -> None:
    visits = [np.arange(4096)]

    def first(seed: int, name: str, start: int = 0) -> list[int]:
        order = SourceOrder(visits, seed, name)
        return [order[start + i] for i in range(4096)]

    found = [first(0, "web"), first(1, "web"), first(0, "books"), first(0, "web", 4096)]
    assert len({tuple(order) for order in found}) == 4
    blocks = Counter(pack // 256 for pack in found[0][:256])
    assert len(blocks) == 8 and max(blocks.values()) < 70, "a window's blocks are shuffled together"


def test_few_packs_are_wholly_shuffled() -> None:
    """Every pack comes first about equally often."""
    firsts = Counter(SourceOrder([np.arange(8)], seed, "web")[0] for seed in range(4000))
    assert len(firsts) == 8 and max(abs(count - 500) for count in firsts.values()) < 100  # 4.8 sigma


# Natural mixtures


many = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=6)


@given(many, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_natural_epochs_hold_every_pack_once(counts: list[list[int]], seed: int) -> None:
    """Also with visits of unequal pack counts, and of unequal number; and the interleaving is even within the epoch."""
    sources = make_sources(counts)
    mixture = Mixture(sources, MixtureConfig(), seed)
    position = 0
    for epoch in range(4):
        visits = [source.visits[epoch % len(source.visits)] for source in sources]
        total = sum(map(len, visits))
        assert mixture.epoch_packs(epoch) == total
        found = draws(mixture, total)
        assert [draw.position for draw in found] == list(range(position, position + total))
        assert {draw.epoch for draw in found} == {epoch}
        assert sorted(draw.pack for draw in found) == sorted(np.concatenate(visits).tolist())
        assert all(draw.pack in visits[draw.source] for draw in found)
        given = [0] * len(sources)
        for number, draw in enumerate(found, 1):
            given[draw.source] += 1
            for have, visit in zip(given, visits, strict=True):
                assert abs(have - Fraction(len(visit) * number, total)) < 1
        position += total
    assert mixture.total() is None and mixture.packs_left() is None and mixture.log == []
    mixture.start_step(7)
    assert mixture.log == []


def test_one_source_is_its_own_order() -> None:
    sources = make_sources([[40, 31]])
    order = SourceOrder(sources[0].visits, 5, "web")
    for config in (MixtureConfig(), MixtureConfig(temperature=2)):
        found = draws(Mixture(sources, config, 5), 200)
        assert found == [Draw(0, order[i], i, order.locate(i)[0]) for i in range(200)]


@given(
    many,
    st.dictionaries(st.sampled_from(NAMES[:3]), st.sampled_from([0.05, 0.5, 1, 1.5, 2.3, 3])),
    st.sampled_from(["never", "first", "all"]),
)
@settings(max_examples=150, deadline=None)
def test_natural_limits_and_length(counts: list[list[int]], limits: dict[str, float], stop: Any) -> None:
    limits = {name: limit for name, limit in limits.items() if name in NAMES[: len(counts)]}
    sources = make_sources(counts)
    mixture = Mixture(sources, MixtureConfig(max_epochs=limits, stop=stop), 0)
    total = mixture.total()
    if stop == "never" and len(limits) < len(sources):
        assert total is None
        found = draws(mixture, 300)
    else:
        found = draws(mixture)
        assert mixture.next() is None and len(found) == total and mixture.packs_left() == 0
        assert sum(mixture.epoch_packs(epoch) for epoch in range(6)) == total
    for i, source in enumerate(sources):
        given = Counter(draw.epoch for draw in found if draw.source == i)
        limit = Fraction(str(limits.get(source.name, 999)))
        for epoch, packs in given.items():
            share = min(Fraction(1), max(Fraction(0), limit - epoch))
            whole = math.floor(share * len(source.visits[epoch % len(source.visits)]))
            assert packs == whole or (packs < whole and len(found) == 300)
        if stop == "all" or (stop == "first" and not limits):
            assert set(given) <= {0}
    if stop == "first" and limits:
        first = min(math.ceil(limit) for limit in limits.values())
        assert {draw.epoch for draw in found} <= set(range(first)), "ends with the epoch of the first"


# Shares


@given(
    st.integers(2, 40),
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 10]),
    st.sampled_from([1, LENGTH // 2, LENGTH]),
)
@settings(max_examples=80, deadline=None)
def test_shares_hold_to_less_than_a_pack(count: int, seed: int, skew: int, smallest: int) -> None:
    rng = np.random.default_rng(seed)
    sources = make_sources([[int(n)] for n in rng.integers(1, 60, count)], seed, smallest)
    weights = {source.name: float(rng.random() ** skew) + 1e-9 for source in sources}
    if count > 2:
        weights[sources[1].name] = 0
    mixture = Mixture(sources, MixtureConfig(weights=weights), seed)
    shares = Shares(mixture, sources)
    shares.follow(400)
    assert shares.lowest > -LENGTH and shares.highest < LENGTH
    assert sum(shares.lags) == 0
    for i, (name, row) in enumerate(mixture.progress().items()):
        assert row.tokens == shares.tokens[i]
        assert row.lag == pytest.approx(float(shares.lags[i]), abs=1e-6)
        assert mixture.weights[name] == pytest.approx(weights[name] / sum(weights.values()), abs=1e-9)


def test_many_small_sources_share_a_large_one_out() -> None:
    """The largest lag first fails here: among the small sources many fall behind at once."""
    sources = make_sources([[50]] * 30, smallest=LENGTH)
    weights = {source.name: 29.0 if i == 0 else 1.0 for i, source in enumerate(sources)}
    found = draws(Mixture(sources, MixtureConfig(weights=weights), 0), 58 * 5)
    assert [draw.source for draw in found[::2]].count(0) == 145, "every other pack is of the large one"
    for start in range(0, len(found), 58):
        assert Counter(draw.source for draw in found[start : start + 58]) == {0: 29, **dict.fromkeys(range(1, 30), 1)}


@given(st.integers(2, 40), st.integers(0, 2**31), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_bound_over_hostile_changes_of_weights(count: int, seed: int, rows: int) -> None:
    """-L < lag <= L (1 + 1 + 1/2 + ... + 1/(n - 1)) whatever the changes, with all weights above 0."""
    sources = make_sources([[20]] * count, seed, LENGTH if seed % 2 else LENGTH // 2)
    mixture = Mixture(sources, MixtureConfig(), seed, Hostile(seed, 1e-6))
    shares = Shares(mixture, sources)
    for step in range(400 // rows):
        mixture.start_step(step)
        shares.follow(rows)
    assert shares.lowest > -LENGTH
    assert shares.highest <= LENGTH * (1 + sum(Fraction(1, k) for k in range(1, count)))


def test_lags_are_within_a_pack_again_when_weights_rest() -> None:
    for seed in range(10):
        sources = make_sources([[20]] * 30, seed)
        mixture = Mixture(sources, MixtureConfig(), seed, Hostile(seed, 1e-6))
        most = 0.0
        for step in range(300):
            mixture.start_step(step)
            mixture.next()
            most = max(most, *(row.lag for row in mixture.progress().values()))
        assert most > LENGTH, "the hostile changes do hurt"
        mixture._change(300, {name: 1 + i for i, name in enumerate(mixture.names)}, "")
        draws(mixture, 100)
        for _ in range(500):
            mixture.next()
            assert all(abs(row.lag) < LENGTH for row in mixture.progress().values())


def test_a_source_at_weight_0_rests_and_returns_with_its_lag() -> None:
    """On for one step in two at a weight of 1/20, it still gets its share: nothing is forgotten while it is off."""
    sources = make_sources([[30], [30], [30]])
    on, off = {"web": 10, "books": 9, "code": 1}, {"web": 1, "books": 1, "code": 0}
    mixture = Mixture(sources, MixtureConfig(), 0, Moves({step: off if step % 2 else on for step in range(800)}))
    shares = Shares(mixture, sources)
    for step in range(800):
        mixture.start_step(step)
        before = mixture.progress()["code"]
        shares.follow(3)
        if step % 2:
            assert mixture.progress()["code"] == before
    assert abs(shares.lags[2]) < LENGTH
    assert shares.tokens[2] / sum(shares.tokens) == pytest.approx(1 / 40, rel=0.05)


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 5, math.inf])
def test_temperature(temperature: float) -> None:
    sources = make_sources([[400, 390], [100, 110], [7, 7]])
    tokens = [sum(int(source.tokens[visit].sum()) for visit in source.visits) for source in sources]
    scaled = [count ** (1 / temperature) for count in tokens]
    mixture = Mixture(sources, MixtureConfig(temperature=temperature), 0)
    expected = [share / sum(scaled) for share in scaled]
    assert list(mixture.weights.values()) == pytest.approx(expected, abs=1e-9)
    draws(mixture, 3000)
    given = [row.tokens for row in mixture.progress().values()]
    for have, share in zip(given, expected, strict=True):
        assert abs(have - share * sum(given)) < LENGTH


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=40).filter(any))
def test_quantise(weights: list[float]) -> None:
    whole = quantise(weights)
    assert sum(whole) == ONE and quantise(whole) == whole
    assert [bool(weight) for weight in weights] == [bool(share) for share in whole]
    total = sum(map(Fraction, weights))
    for share, weight in zip(whole, weights, strict=True):
        assert abs(share - Fraction(weight) * ONE / total) < len(weights)


# Weights over time


def test_schedule_switches_at_its_step() -> None:
    sources = make_sources([[50], [50]])
    entries = [{"step": step, "weights": weights} for step, weights in ((3, {"web": 0, "books": 1}),)]
    config = MixtureConfig.model_validate({"weights": {"web": 1, "books": 0}, "schedule": entries})
    mixture = Mixture(sources, config, 0)
    found = []
    for step in range(6):
        mixture.start_step(step)
        found += [draw.source for draw in draws(mixture, 4)]
    assert found == [0] * 12 + [1] * 12
    assert mixture.log == [(0, {"web": ONE, "books": 0}), (3, {"web": 0, "books": ONE})]


def test_a_schedule_starts_from_the_shares_of_the_data() -> None:
    config = MixtureConfig.model_validate({"schedule": [{"step": 5, "weights": {"web": 1, "books": 1}}]})
    mixture = Mixture(make_sources([[60], [20]]), config, 0)
    assert mixture.weights["web"] == pytest.approx(0.75, abs=0.03)


@given(st.integers(2, 6), st.integers(0, 2**31), st.integers(1, 7), st.sampled_from(["never", "first", "all"]))
@settings(max_examples=60, deadline=None)
def test_the_log_as_schedule_brings_the_same_sequence(count: int, seed: int, rows: int, stop: Any) -> None:
    rng = np.random.default_rng(seed)
    sources = make_sources([[int(n)] for n in rng.integers(1, 60, count)], seed)
    limits = {source.name: 4 for source in sources}
    policy = Hostile(seed, 0) if seed % 2 else Moves({s: dict.fromkeys(limits, 1) | {"web": s} for s in (0, 4, 7)})
    mixture = Mixture(sources, MixtureConfig(max_epochs=limits, stop=stop), seed, policy)
    expected = follow(mixture, rows)
    schedule: Any = [{"step": step, "weights": weights} for step, weights in json.loads(json.dumps(mixture.log))]
    again = Mixture(sources, MixtureConfig(max_epochs=limits, stop=stop, schedule=schedule), seed)
    assert follow(again, rows) == expected and again.log == mixture.log


# Repeat limits and ends


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from(["never", "first", "all"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_weighted_limits_and_ends(counts: list[int], seed: int, stop: Any, all_limited: bool) -> None:
    rng = np.random.default_rng(seed)
    sources = make_sources([[n, n] for n in counts], seed)
    weights = {source.name: float(rng.random() + 0.01) for source in sources}
    limits = {name: float(rng.choice([0.5, 1, 1.5, 2.3])) for name in weights if all_limited or rng.random() < 0.6}
    mixture = Mixture(sources, MixtureConfig(weights=weights, max_epochs=limits, stop=stop), seed)
    most = [math.floor(Fraction(str(limits.get(s.name, 9999))) * n) for s, n in zip(sources, counts, strict=True)]
    total = mixture.total()
    found = draws(mixture, 2000 if total is None else total + 1)
    given = [sum(draw.source == i for draw in found) for i in range(len(sources))]
    assert all(packs <= limit for packs, limit in zip(given, most, strict=True))
    if total is None:
        assert stop == "never" and len(limits) < len(sources) and len(found) == 2000
        return
    assert len(found) == total and mixture.packs_left() == 0 and mixture.next() is None
    before = [packs - (found[-1:] != [] and found[-1].source == i) for i, packs in enumerate(given)]
    if stop == "never":
        assert given == most
    elif stop == "first":
        ends = [limit if limits else n for limit, n in zip(most, counts, strict=True)]
        assert any(packs >= end for packs, end in zip(given, ends, strict=True))
        assert not found or not any(packs >= end for packs, end in zip(before, ends, strict=True))
    else:
        whole = [min(limit, n) for limit, n in zip(most, counts, strict=True)]
        assert all(packs >= end for packs, end in zip(given, whole, strict=True))
        assert not found or not all(packs >= end for packs, end in zip(before, whole, strict=True))


def test_shares_of_an_epoch_are_exact() -> None:
    """2.3 epochs of 10 packs are 23; in binary 2.3 is a little less."""
    config = MixtureConfig(max_epochs={"web": 2.3, "books": 1.15})
    found = draws(Mixture(make_sources([[10], [20]]), config, 0))
    assert Counter(draw.source for draw in found) == {0: 23, 1: 23}


def test_the_others_go_on_with_their_weights_scaled_up() -> None:
    sources = make_sources([[30], [30], [30]])
    config = MixtureConfig(weights={"web": 5, "books": 3, "code": 2}, max_epochs={"web": 1})
    mixture = Mixture(sources, config, 0)
    shares = Shares(mixture, sources)
    while mixture.progress()["web"].packs < 30:
        shares.follow(1)
    assert mixture.weights == pytest.approx({"web": 0, "books": 0.6, "code": 0.4}, abs=1e-9)
    shares.follow(1000)
    assert mixture.progress()["web"].packs == 30
    assert max(-shares.lowest, shares.highest) < 2 * LENGTH
    assert len(mixture.log) == 1, "exhaustion follows from the sequence"


def test_all_waits_for_sources_of_the_schedule() -> None:
    sources = make_sources([[10], [10]])
    entries = [{"step": 9, "weights": {"web": 0, "books": 1}}]
    config = MixtureConfig.model_validate({"weights": {"web": 1, "books": 0}, "schedule": entries, "stop": "all"})
    mixture = Mixture(sources, config, 0)
    assert mixture.total() is None
    found = []
    for step in range(20):
        mixture.start_step(step)
        found += draws(mixture, 3)
    assert Counter(draw.source for draw in found) == {0: 27, 1: 10}


def test_a_later_weight_goes_on_where_nothing_was_left() -> None:
    entries = [{"step": 1, "weights": {"web": 0, "books": 1}}]
    config = MixtureConfig.model_validate(
        {"weights": {"web": 1, "books": 0}, "schedule": entries, "max_epochs": {"web": 1}}
    )
    mixture = Mixture(make_sources([[10], [10]]), config, 0)
    assert len(draws(mixture)) == 10 and mixture.packs_left() == 0
    mixture.start_step(1)
    assert {draw.source for draw in draws(mixture, 5)} == {1}


# State


def mixtures(seed: int, kind: str, stop: Any = "never") -> Mixture:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    sources = make_sources([[int(n) for n in rng.integers(1, 40, 2)] for _ in range(count)], seed)
    names = [source.name for source in sources]
    options: dict[str, Any] = {"stop": stop}
    policy = None
    if seed % 3:
        options["max_epochs"] = {name: float(rng.choice([0.5, 1, 2.5, 7])) for name in names}
    if kind == "weights":
        options["weights"] = {name: float(rng.random() ** 3) + 0.01 for name in names}
    elif kind == "hostile":
        policy = Hostile(seed, 0)
    return Mixture(sources, MixtureConfig(**options), seed, policy)


@given(
    st.integers(0, 2**31),
    st.sampled_from(["natural", "weights", "hostile"]),
    st.sampled_from(["never", "first", "all"]),
    st.integers(0, 200),
)
@settings(max_examples=200, deadline=None)
def test_saved_anywhere_it_goes_on(seed: int, kind: str, stop: Any, at: int) -> None:
    mixture, resumed = mixtures(seed, kind, stop), mixtures(seed, kind, stop)
    for step in range(at // 5):
        mixture.start_step(step)
        draws(mixture, 5)
    draws(mixture, at % 5)
    saved = mixture.state_dict()
    text = json.dumps(saved)
    resumed.load_state_dict(json.loads(text))
    assert json.dumps(resumed.state_dict()) == text
    assert resumed.weights == mixture.weights and resumed.packs_left() == mixture.packs_left()
    expected = draws(mixture, 150)
    assert json.dumps(saved) == text, "a state is a copy"
    assert draws(resumed, 150) == expected
    assert resumed.state_dict() == mixture.state_dict() and resumed.progress() == mixture.progress()


def test_state_is_small_and_loads_at_once() -> None:
    sources = make_sources([[100_000], [30_000], [5_000]])
    mixture = Mixture(sources, MixtureConfig(weights={"web": 3, "books": 2, "code": 1}), 0)
    early = len(json.dumps(mixture.state_dict()))
    state = mixture.state_dict()
    state["position"] = 3 * 10**12
    for row in state["sources"].values():
        row |= {"packs": 10**12, "tokens": 10**12 * LENGTH}
    start = time.process_time()
    mixture.load_state_dict(state)
    draw = mixture.next()
    assert time.process_time() - start < 0.1
    assert draw and draw.position == 3 * 10**12
    assert len(json.dumps(mixture.state_dict())) < early + 200


def test_the_sequence_does_not_change_between_versions() -> None:
    """A run that is resumed with a newer version goes on with the same packs."""
    mixture = Mixture(make_sources([[9, 8], [4, 5]]), MixtureConfig(weights={"web": 0.7, "books": 0.3}), 1)
    packs = [draw.pack for draw in draws(mixture, 12)]
    assert packs == [6, 17, 8, 3, 0, 18, 2, 7, 19, 5, 1, 4]


def test_a_million_packs_take_seconds() -> None:
    sources = make_sources([[20_000]] * 5)
    mixture = Mixture(sources, MixtureConfig(weights=dict(zip(NAMES, (10, 5, 3, 1, 1), strict=True))), 0)
    start = time.process_time()
    draws(mixture, 100_000)
    assert time.process_time() - start < 3, "0.2 s was measured"


# Errors


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"weights": {"web": 1}, "temperature": 2}, "give weights or a temperature, not both"),
        ({"weights": {"web": 0}}, "at least one above 0"),
        ({"weights": {"web": -1}}, "greater than or equal to 0"),
        ({"weights": {"web": math.inf}}, "finite number"),
        ({"temperature": 0}, "greater than 0"),
        ({"max_epochs": {"web": 0}}, "greater than 0"),
        ({"schedule": [{"step": 0, "weights": {"web": 0}}]}, "at least one weight above 0"),
        ({"schedule": [{"step": 5, "weights": {"web": 1}}] * 2}, "expected rising steps, found 5 after 5"),
        ({"weights": {"web": 1}, "schedule": [{"step": 0, "weights": {"web": 1}}]}, "weights would never hold"),
        ({"wieghts": {}}, "did you mean 'weights'"),
    ],
)
def test_contradictory_configs(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MixtureConfig.model_validate(config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"weights": {"web": 1, "boks": 1}}, r"data.mixture.weights: there is no source 'boks'; did you mean 'books'"),
        ({"weights": {"web": 1}}, r"data.mixture.weights: source 'books' is missing; give its weight, or 0"),
        ({"max_epochs": {"wb": 1}}, r"data.mixture.max_epochs: there is no source 'wb'; did you mean 'web'"),
        ({"schedule": [{"step": 2, "weights": {"web": 1}}]}, r"data.mixture.schedule.0.weights: source 'books' is mis"),
    ],
)
def test_configs_that_do_not_fit_the_sources(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Mixture(make_sources([[3], [3]]), MixtureConfig.model_validate(config), 0)


def test_policies_that_go_wrong() -> None:
    sources = make_sources([[3], [3]])
    for weights in ({"web": 1}, {"web": 1, "books": -1}, {"web": 1, "books": math.nan}, {"web": 0, "books": 0}):
        mixture = Mixture(sources, MixtureConfig(), 0, Moves({4: weights}))
        mixture.start_step(3)
        with pytest.raises(ConfigError, match="the policy's weights at step 4"):
            mixture.start_step(4)
    config = MixtureConfig.model_validate({"schedule": [{"step": 2, "weights": {"web": 1, "books": 1}}]})
    with pytest.raises(ConfigError, match="a schedule or a policy"):
        Mixture(sources, config, 0, Moves({}))


def test_sources_that_cannot_be_mixed() -> None:
    tokens = np.array([3, 0, 3])
    with pytest.raises(DataError, match="source 'web': pack 1 has no tokens"):
        Mixture([SourceInfo("web", [np.arange(3)], tokens)], MixtureConfig(), 0)
    with pytest.raises(DataError, match="source 'web': expected at least one pack in every visit"):
        Mixture([SourceInfo("web", [np.arange(2), np.arange(0)], tokens)], MixtureConfig(), 0)
    with pytest.raises(DataError, match="at least one source"):
        Mixture([], MixtureConfig(), 0)
    twice = SourceInfo("web", [np.array([0, 2])], tokens)
    with pytest.raises(ConfigError, match="two sources are called 'web'"):
        Mixture([twice, twice], MixtureConfig(), 0)


def test_states_of_other_mixtures() -> None:
    natural = Mixture(make_sources([[3], [3]]), MixtureConfig(), 0)
    weighted = Mixture(make_sources([[3], [3]]), MixtureConfig(temperature=1), 0)
    with pytest.raises(CheckpointError, match="saved mixture is natural; this one is weighted"):
        weighted.load_state_dict(natural.state_dict())
    with pytest.raises(CheckpointError, match="saved mixture is weighted; this one is natural"):
        natural.load_state_dict(weighted.state_dict())
    with pytest.raises(CheckpointError, match=r"of web, books; this one is of web$"):
        Mixture(make_sources([[3]]), MixtureConfig(), 0).load_state_dict(natural.state_dict())
    with pytest.raises(ValueError, match="only a natural mixture"):
        weighted.epoch_packs(0)
