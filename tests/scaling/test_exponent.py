"""The exponent's identified set, its interval's coverage, and the verdict."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import exponent_intervals as simulation

from megatron_lion.scaling.exponent import SizeMean, exponent_between_bounds, fit_line, judge

SIZES = [120_512, 205_056, 339_328, 656_448, 1_071_872, 2_197_632, 3_716_608]


def points(logs: list[float], below: float | None = 0.0, above: float = 0.0) -> list[SizeMean]:
    return [
        SizeMean(d=d, measured=y, low=None if below is None else y - below, high=None if below is None else y + above)
        for d, y in zip(SIZES, logs, strict=False)
    ]


def powers(b: float, count: int = 7) -> list[float]:
    return [math.log(0.3) + b * math.log(d) for d in SIZES[:count]]


def test_the_set_of_exponents_is_that_of_all_corners() -> None:
    """The oracle fits a line to every choice of ends with numpy."""
    dice = np.random.default_rng(1)
    logs = [y + dice.normal(0, 0.1) for y in powers(0.4)]
    made = [
        SizeMean(d=d, measured=y, low=y - dice.uniform(0, 0.3), high=y + dice.uniform(0, 0.1))
        for d, y in zip(SIZES, logs, strict=True)
    ]
    ends = [(mean.low, mean.high) for mean in made]
    slopes = [np.polyfit(np.log(SIZES), corner, 1)[0] for corner in itertools.product(*ends)]
    found = exponent_between_bounds(made)
    assert (found.set_low, found.set_high) == pytest.approx((min(slopes), max(slopes)))


def test_without_noise_the_interval_is_that_of_a_least_squares_line() -> None:
    """scipy's regression is the oracle."""
    from scipy.stats import linregress, t

    dice = np.random.default_rng(2)
    logs = [y + dice.normal(0, 0.1) for y in powers(0.5)]
    line = linregress(np.log(SIZES), logs)
    half = t.ppf(0.975, 5) * line.stderr
    found = exponent_between_bounds(points(logs))
    assert (found.set_low, found.set_high) == pytest.approx((line.slope, line.slope))
    assert (found.low, found.high) == pytest.approx((line.slope - half, line.slope + half))
    assert fit_line(SIZES, logs).intercept == pytest.approx(line.intercept)


def draw(dice: np.random.Generator, b: float, width: float, drift: str) -> list[SizeMean]:
    """A family of three seeds: scatter of sizes and seeds, and bounds of a width whose place around r drifts with d."""
    found = []
    for place, d in enumerate(SIZES):
        below = {"none": dice.uniform(), "up": place / 6, "down": 1 - place / 6}[drift]
        truth = math.log(0.3) + b * math.log(d) + dice.normal(0, 0.06)
        seeds = truth + dice.normal(0, 0.05, 3)
        low = seeds - below * width + dice.normal(0, 0.02, 3)
        high = seeds + (1 - below) * width + dice.normal(0, 0.02, 3)
        measured = high - 0.02 * width
        found.append(SizeMean(d=d, measured=measured.mean(), low=low.mean(), high=high.mean()))
    return found


@pytest.mark.parametrize("b", [0.5, 0.3, 0.0])
@pytest.mark.parametrize(("width", "drift"), [(0.0, "none"), (0.3, "none"), (0.3, "up"), (0.3, "down")])
def test_the_interval_contains_the_exponent_in_its_share_of_draws(b: float, width: float, drift: str) -> None:
    dice = np.random.default_rng(int(100 * b) + 7)
    draws = 1000
    inside = 0
    for _ in range(draws):
        found = exponent_between_bounds(draw(dice, b, width, drift))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= b <= found.high
    # Nominal 95 %; three standard deviations of 1000 draws are 2.1 %.
    assert inside / draws >= 0.93


def test_a_line_through_the_measured_ratios_alone_misses_a_drift_of_the_noise() -> None:
    """The reason for the set: noise that grows with d changes the slope of the measured r, and no seed shows it."""
    dice = np.random.default_rng(3)
    inside = 0
    for _ in range(300):
        means = draw(dice, 0.3, 0.6, "down")
        line = fit_line([mean.d for mean in means], [mean.measured for mean in means])
        assert line.low is not None
        assert line.high is not None
        inside += line.low <= 0.3 <= line.high
    assert inside / 300 < 0.5


@pytest.mark.parametrize(
    ("b", "below", "count", "verdict"),
    [
        (0.5, 0.0, 7, "holds"),
        (0.3, 0.0, 7, "does not hold here"),
        (0.0, 0.05, 7, "does not hold here"),
        (0.5, 0.4, 7, "not resolved"),  # the bounds leave more than ½ ± 0.1
        (0.5, None, 7, "not resolved"),  # no bounds: noise alone would have the exponent ½
        (0.5, 0.0, 4, "holds"),
        (0.5, 0.0, 3, "not resolved"),
        (0.0, 0.0, 2, "not resolved"),
    ],
)
def test_the_verdict(b: float, below: float | None, count: int, verdict: str) -> None:
    found = exponent_between_bounds(points(powers(b, count), below))
    assert found.verdict == verdict
    assert bool(found.reason) == (verdict == "not resolved")


def test_one_size_without_bounds_withholds_the_verdict() -> None:
    made = points(powers(0.5))
    made[3] = SizeMean(d=made[3].d, measured=made[3].measured)
    found = exponent_between_bounds(made)
    assert (found.verdict, found.reason) == ("not resolved", "1 of 7 sizes without bounds on r without noise")
    assert found.low is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.41, 0.59, "holds"),
        (0.51, 0.58, "holds"),
        (0.39, 0.55, "not resolved"),
        (0.45, 0.61, "not resolved"),
        (0.51, 0.61, "does not hold here"),
        (0.2, 0.49, "does not hold here"),
    ],
)
def test_the_tolerance_and_the_theory_decide(low: float, high: float, verdict: str) -> None:
    assert judge(low, high, 7)[0] == verdict
    assert judge(low, high, 3)[0] == "not resolved"


def test_equal_sizes_have_no_slope() -> None:
    with pytest.raises(ValueError, match="at least two different"):
        fit_line([10, 10], [1.0, 2.0])


def test_the_stored_simulation_covers_and_never_confirms_a_small_exponent() -> None:
    path = Path(simulation.__file__).parent / "results" / "exponent_intervals.json"
    rows = json.loads(path.read_text())["rows"]
    assert {(row["sizes"], row["b"]) for row in rows} == {(m, b) for m in (4, 7) for b in (0.5, 0.4, 0.3, 0.0)}
    assert min(row["coverage"] for row in rows) >= 0.93
    assert max(row["holds"] for row in rows if row["b"] <= 0.3) == 0
    assert max(row["does not hold here"] for row in rows if row["b"] == 0.5) <= 0.05
    exact = next(row for row in rows if row["width"] == 0)
    again = simulation.shares(np.random.default_rng(1), 0.5, 0.0, "random", 7, 300)
    assert again["coverage"] == pytest.approx(exact["coverage"], abs=0.05)
    assert again["length"] == pytest.approx(exact["length"], rel=0.1)
