"""Power laws: known numbers come back, scipy agrees, intervals hold what is true, and too few points are refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import curve_fit

from mm import cli
from mm.errors import DataError
from mm.fit import draw, fit_power, parse_law, points_of

X = np.geomspace(0.15, 1.4, 5)
"""Of the published fit, in billions of parameters: 3.43 + 0.05 / N^1.02 (2509.14786)."""


def test_known_numbers_come_back() -> None:
    fit = fit_power(X, 3.43 + 0.05 / X**1.02)
    assert (fit.E.value, fit.A.value, fit.a.value) == pytest.approx((3.43, 0.05, 1.02), rel=2e-3)
    assert fit.residual < 1e-5
    assert fit.at(10).value == pytest.approx(3.43 + 0.05 / 10**1.02, abs=1e-4)


@pytest.mark.parametrize("scale", [1, 1e9], ids=["near-1", "large"])
def test_scipy_finds_the_same(scale: float) -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 12)
    y = 2 + 3 / x**0.5 + rng.normal(0, 0.01, 12)
    (E, A, a), _ = curve_fit(lambda x, E, A, a: E + A / x**a, x, y, p0=(1.5, 2, 0.4))
    fit = fit_power(x * scale, y)
    assert (fit.E.value, fit.a.value) == pytest.approx((E, a), rel=1e-3)
    assert fit.A.value == pytest.approx(A * scale**a, rel=1e-2)


@pytest.mark.parametrize(("places", "seeds"), [(8, 1), (4, 2), (4, 5)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(places: int, seeds: int) -> None:
    rng, inside = np.random.default_rng(1), np.zeros(2)
    x = np.repeat(np.geomspace(1, 64, places), seeds)
    for _ in range(60):
        fit = fit_power(x, 3 + 1 / x**0.6 + rng.normal(0, 0.01, len(x)), draws=200)
        assert fit.by_seeds == (seeds > 1)
        inside += [fit.E.low <= 3 <= fit.E.high, fit.at(1000).low <= 3 + 1 / 1000**0.6 <= fit.at(1000).high]
    assert (inside >= 54).all(), "of 60, with 57 expected"


@pytest.mark.parametrize(("A", "a", "noise"), [(0.3, 1, 0.02), (0.1, 1.5, 0.005)])
def test_intervals_hold_an_asymptote_that_was_reached(A: float, a: float, noise: float) -> None:
    """The lowest of many losses with noise lies below it."""
    rng, inside = np.random.default_rng(2), 0
    x = np.repeat(np.geomspace(1, 64, 5), 4)
    for _ in range(60):
        fit = fit_power(x, 3.43 + A / x**a + rng.normal(0, noise, len(x)), draws=200)
        inside += fit.E.low <= 3.43 <= fit.E.high
    assert inside >= 53, "of 60, with 57 expected"


def test_a_law_does_not_rise() -> None:
    fit = fit_power([1.0, 2, 4, 8, 16], [2.0, 2.0, 2.0, 2.0, 2.1])
    assert fit.A.value == 0
    assert fit.E.value == pytest.approx(2.02)


@pytest.mark.parametrize(
    ("losses", "settled"),
    [
        ((5.0, 4.0, 3.4, 3.0, 2.9), True),
        ((5.0, 2.0, 2.0, 2.0, 2.1), False),  # all of the fall before the second point
        ((5.0, 4.0, 3.0, 2.0, 1.0), False),  # no end of the fall
        ((2.0, 2.0, 2.0, 2.0, 2.1), False),
    ],
)
def test_what_is_no_law_is_said_to_be_none(
    losses: tuple[float, ...], settled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "sizes.csv"
    table.write_text("N,loss\n" + "".join(f"{2**k},{loss}\n" for k, loss in enumerate(losses)))
    assert cli.main(["fit", str(table), "--law", "E+A/N^a", "--metric", "loss"]) == 0
    assert ("these points show no such law" in capsys.readouterr().out) == (not settled)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least, found 3: 1, 2, 4"):
        fit_power([1, 2, 4, 4], [3, 2, 1.5, 1.6])
    with pytest.raises(DataError, match="finite"):
        fit_power([1, 2, 4, 8], [3, 2, float("nan"), 1])


def test_laws_are_parsed() -> None:
    assert parse_law("E + A/N^a") == "N"
    assert parse_law("E+A/K^a") == "K"
    with pytest.raises(DataError, match="expected E\\+A/X\\^a"):
        parse_law("A*N^a")


def test_a_table_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "ensemble.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("K", "loss"), *((k, 3.3 + 0.2 / k) for k in range(1, 6))])
    chart = tmp_path / "fit.png"
    call = ["fit", str(table), "--law", "E+A/K^a", "--metric", "loss", "--at", "100", "--out", str(chart), "--json"]
    assert cli.main(call) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["E"][0] == pytest.approx(3.3, abs=1e-3)
    assert found["at 100"][0] == pytest.approx(3.302, abs=1e-3)
    assert chart.stat().st_size > 10_000


def test_a_chart_of_points_with_seeds(tmp_path: Path) -> None:
    points = [(f"run-{n}-{s}", n, 2 + 1 / n + 0.01 * s) for n in (1, 2, 4, 8) for s in (0, 1)]
    fit = fit_power([x for _, x, _ in points], [loss for _, _, loss in points])
    draw(tmp_path / "fit.png", points, fit, "N", "test_loss")
    assert (tmp_path / "fit.png").exists()


@pytest.mark.parametrize("line", ["3", "x,2", "3,"], ids=["too-short", "no-number", "empty"])
def test_a_line_of_a_table_without_numbers_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text(f"K,loss\n1,2\n{line}\n")
    with pytest.raises(DataError, match=r"k\.csv:3: expected numbers in columns K and loss"):
        points_of([tmp_path / "k.csv"], "K", "loss")
    with pytest.raises(DataError, match=r"k\.csv:2: expected numbers in columns K and nats"):
        points_of([tmp_path / "k.csv"], "K", "nats")
