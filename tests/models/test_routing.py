"""Routing: who may be chosen from, who is chosen, and noise that depends on the row alone."""

import math
from typing import Any

import pytest
import torch
from sparse_loops import batch, choice, share, text_lm
from torch import Tensor

from mm.data.batch import PackedBatch
from mm.models.routing import AuxiliaryRouter, Noise, Router, Routing, Share, taken
from mm.models.sparse import Sparsity
from mm.models.systems.text_lm.model import TextLM

ROWS = ("ttiit|iit", "iiii", "tt|t", "", "tiaattii", "aaa|t")
OWN: dict[str, int] = {"text": 2, "image": 3, "all": 4}
"""Tokens of sound share the third group."""


def routing(packed: PackedBatch, rows: int | None = None, **experts: Any) -> Routing:
    return sparsity(text_lm(experts={**OWN, "routing_rows": rows, **experts})).routing(packed, choose=True)


def sparsity(system: TextLM) -> Sparsity:
    assert system.sparsity is not None
    return system.sparsity


def tokens(rows: tuple[str, ...]) -> list[str | None]:
    """The letter at each flat position."""
    plain = [row.replace("|", "") for row in rows]
    length = max(map(len, plain))
    return [row[at] if at < len(row) else None for row in plain for at in range(length)]


@pytest.mark.parametrize("capacity", [0.25, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("values", [1000, 3, 1], ids=["distinct", "ties", "all equal"])
def test_each_expert_takes_the_best_of_each_pool_and_of_equals_the_first(capacity: float, values: int) -> None:
    sizes = [7, 0, 1, 30, 2, 13]
    scores = torch.randint(values, (sum(sizes), 3)).float()
    pools = [pool for pool, size in enumerate(sizes) for _ in range(size)]
    chosen = Share(torch.arange(len(pools)), sizes).choose(scores, capacity)
    assert chosen.shape == (3, sum(share(size, capacity) for size in sizes))
    expected = choice(scores.tolist(), pools, capacity)
    for expert, numbers in enumerate(chosen.tolist()):
        assert sorted(numbers) == [token for token in range(len(pools)) if expected[token][expert]]


def test_an_expert_takes_its_share_but_one_at_least_and_no_more_than_there_are() -> None:
    assert [taken(size, 0.25) for size in (0, 1, 3, 4, 7, 8, 100)] == [0, 1, 1, 1, 2, 2, 25]
    assert [taken(size, 1.0) for size in (0, 1, 5)] == [0, 1, 5]
    for size in range(1, 50):
        assert abs(taken(size, 0.3) - max(1, 0.3 * size)) <= 0.5


@pytest.mark.parametrize("rows", [None, 1, 2, 3])
def test_shares_are_the_tokens_of_a_group_pool_by_pool_and_never_padding(rows: int | None) -> None:
    found, letters = routing(batch(*ROWS), rows), tokens(ROWS)
    length, together = len(letters) // len(ROWS), rows or len(ROWS)
    for one, own in zip(found.shares, ("t", "i", "a"), strict=True):
        places = [at for at, letter in enumerate(letters) if letter == own]
        assert one.places.tolist() == places
        assert one.sizes == [
            sum(at // length // together == pool for at in places) for pool in range(-(-len(ROWS) // together))
        ]
    assert found.everyone.places.tolist() == [at for at, letter in enumerate(letters) if letter]
    assert sum(found.everyone.sizes) == len(found.everyone.places)


def test_a_batch_of_padding_has_no_shares() -> None:
    found = routing(batch("", "t"), 1)
    found = found.select(torch.tensor([0]))
    assert [len(one.places) for one in found.shares] == [0, 0, 0] and not len(found.everyone.places)


def test_of_some_positions_only_these_are_there() -> None:
    found, letters = routing(batch(*ROWS), 2), tokens(ROWS)
    places = torch.tensor([at for at in range(len(letters)) if at % 3 != 1])
    some = found.select(places)
    for one, own in zip(some.shares, ("t", "i", "a"), strict=True):
        assert [int(places[at]) for at in one.places] == [at for at in places.tolist() if letters[at] == own]
        pools = found.pool[places[one.places]].tolist()
        assert pools == sorted(pools) and one.sizes == [pools.count(pool) for pool in range(3)]
    assert some.origin.tolist() == places.tolist() and some.records is found.records
    again = some.select(torch.arange(1, len(places), 2))
    assert again.origin.tolist() == places[1::2].tolist()


def test_noise_is_the_difference_of_two_gumbel_variables() -> None:
    """Logistic: its variance is pi^2 / 3, and a share of 1 / (1 + exp(-x)) of it lies below x."""
    drawn = Noise(1.0, [1, 2]).draw("0.text", torch.arange(50_000), 50_000, 4)
    assert drawn.dtype == torch.float32 and drawn.shape == (50_000, 4) and bool(drawn.isfinite().all())
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)
    assert float(drawn.var()) == pytest.approx(math.pi**2 / 3, rel=0.02)
    for x in (-4.0, -1.0, 0.5, 3.0):
        assert float((drawn < x).float().mean()) == pytest.approx(1 / (1 + math.exp(-x)), abs=0.005)
    across = torch.corrcoef(drawn.T) - torch.eye(4)
    assert float(across.abs().max()) < 0.03
    half = Noise(0.5, [1, 2]).draw("0.text", torch.arange(50_000), 50_000, 4)
    torch.testing.assert_close(half, drawn / 2)


def test_noise_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    def draw(keys: list[int], places: Tensor | None = None, router: str = "1.image") -> Tensor:
        return Noise(1.0, keys).draw(
            router, torch.arange(8 * len(keys)) if places is None else places, 8 * len(keys), 3
        )

    together = draw([5, 9, 2])
    assert torch.equal(together, torch.cat([draw([5]), draw([9, 2])]))
    places = torch.tensor([1, 7, 8, 20, 23])
    assert torch.equal(draw([5, 9, 2], places), together[places])
    others = (draw([6]), draw([5], router="1.text"), draw([5], router="2.image"))
    for other in others:
        assert not torch.isclose(other, together[:8]).any()


@pytest.mark.parametrize(
    ("noise", "scales"), [({"steps": 4}, [1, 1, 1, 1, 0, 0]), ({"steps": 4, "decay": True}, [1, 0.75, 0.5, 0.25, 0, 0])]
)
def test_noise_lasts_its_steps_and_there_is_none_in_evaluation(noise: dict[str, Any], scales: list[float]) -> None:
    system, packed = text_lm(experts={"text": 2, "all": 2, "noise": noise, "auxiliary": "along"}), batch("tti", "ttt")
    for step, scale in enumerate(scales):
        system.begin_step(step, 100)
        found = sparsity(system).routing(packed, choose=True)
        assert (0 if found.noise is None else found.noise.scale) == scale
        assert found.noise is None or found.noise.keys == packed.draws.tolist()
        assert sparsity(system).routing(packed, choose=False).noise is None


@pytest.mark.parametrize("kind", [Router, AuxiliaryRouter])
def test_routers_compute_in_float32_under_autocast(kind: type[Any]) -> None:
    router, hidden = kind(32, 4), torch.randn(9, 32)
    expected = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found, halved = router(hidden), router(hidden.bfloat16())
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert torch.equal(halved, router(hidden.bfloat16().float())) and halved.dtype == torch.float32
    assert router.double()(hidden.double()).dtype == torch.float64
