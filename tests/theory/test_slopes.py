"""Slopes over log K: by brute force, on the toy, and how often the interval holds."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_lion.theory.rates import WEIGHTINGS, spread_over_steps
from megatron_lion.theory.slopes import log_slope, running_means, slope_interval, slope_over_runs
from megatron_lion.toy.experiment import ToySettings, run_toy
from megatron_lion.toy.toy_checks import theorem_points

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from slope_coverage import synthetic, toy

STEPS = np.array([2.0, 5, 30, 80, 81, 140, 200, 260])
VALUES = np.array([9.0, 8, 3, 1.2, 1.3, 1.9, 2.2, 2])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_slope_is_scipys_line_through_the_running_means(weighting):
    dense = spread_over_steps(STEPS, VALUES, weighting)
    K = np.arange(1, len(dense) + 1)
    at = STEPS.astype(int) + 1 if weighting != "probes" else K
    means = np.array([dense[:k].mean() for k in at])
    assert np.allclose(running_means(STEPS, VALUES, weighting), (at, means))
    for first in (1, 3, at[-1] / 10):
        chosen = at >= first
        expected = stats.linregress(np.log(at[chosen]), np.log(means[chosen])).slope
        found = slope_interval(STEPS, VALUES, weighting=weighting, first_K=None if first == at[-1] / 10 else first)
        assert found.estimate == pytest.approx(expected)
    chosen = at >= at[-1] / 10
    plain = stats.linregress(np.log(at[chosen]), np.log(VALUES[chosen])).slope
    assert slope_interval(STEPS, VALUES, weighting=weighting, of_mean=False).estimate == pytest.approx(plain)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("of_mean", [True, False])
def test_the_half_width_is_that_of_the_derivative_and_the_stated_covariance(weighting, of_mean):
    def slope(logs):
        return slope_interval(STEPS, np.exp(logs), weighting=weighting, of_mean=of_mean).estimate

    logs, small = np.log(VALUES), 1e-5
    pull = np.array([(slope(logs + small * row) - slope(logs - small * row)) / (2 * small) for row in np.eye(8)])
    x = np.log(STEPS + 1) if weighting != "probes" else np.log(np.arange(1, 9))
    trend = np.stack([x**0, x, x**2], axis=1)
    keep = np.eye(8) - trend @ np.linalg.inv(trend.T @ trend) @ trend.T
    rest = keep @ logs
    seen = float((rest[1:] * rest[:-1]).sum() / (rest**2).sum())
    rho = min(0.9, max(0.0, seen + (3 + 3 * seen) / 8))
    errors = np.array([[rho ** abs(i - j) for j in range(8)] for i in range(8)])
    trace = np.trace(keep @ errors)
    freedom = trace**2 / np.trace(keep @ errors @ keep @ errors)
    half = stats.t.ppf(0.95, freedom) * math.sqrt(float(rest @ rest) / trace * float(pull @ errors @ pull))
    found = slope_interval(STEPS, VALUES, weighting=weighting, of_mean=of_mean, confidence=0.9)
    assert (found.high - found.estimate, found.estimate - found.low) == pytest.approx((half, half), rel=1e-5)


def test_several_runs_have_students_interval():
    runs = [(STEPS, VALUES * factor) for factor in (1.0, np.linspace(1, 1.3, 8), np.linspace(1, 0.8, 8))]
    found = slope_over_runs(runs)
    slopes = [slope_interval(*run).estimate for run in runs]
    low, high = stats.t.interval(0.95, 2, np.mean(slopes), stats.sem(slopes))
    assert (found.estimate, found.low, found.high) == pytest.approx((np.mean(slopes), low, high))
    assert slope_over_runs(runs[:1]) == slope_interval(*runs[0])


def test_the_toy_has_a_quarter_at_the_corollarys_settings_and_about_one_at_fixed_ones():
    settings = ToySettings()
    for experiment in ("constrained", "unconstrained"):
        points = theorem_points(experiment, settings)
        assert log_slope([p.K for p in points], [p.left for p in points]) == pytest.approx(-0.25, abs=0.02)
        left = run_toy(experiment, settings).left.mean(axis=1)
        assert log_slope(np.arange(1000, 2001), left[999:]) == pytest.approx(-0.95, abs=0.05)


def coverage(case):
    """Share of the runs whose 95 % interval holds the slope of the expected norms."""
    truth = slope_interval(case.steps, case.expected).estimate
    found = [slope_interval(case.steps, row) for row in case.values]
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


@pytest.mark.parametrize(
    ("probes", "correlation", "least"), [(9, 0.0, 0.93), (20, 0.0, 0.93), (20, 0.5, 0.9), (51, 0.5, 0.9)]
)
def test_the_interval_of_one_run_holds(probes, correlation, least):
    for shape in ("K^(−1/4)", "plateau"):
        assert coverage(synthetic(shape, probes, correlation, 300, 1)) > least


def test_the_interval_holds_on_the_toy():
    assert coverage(toy(100, 50, 3)) > 0.93


def test_what_gives_no_interval():
    assert slope_interval(STEPS[:6], VALUES[:6]).low is None
    assert slope_interval(STEPS, [*VALUES[:-1], 0.0]).low is None
    assert slope_interval(STEPS, [*VALUES[:-1], 0.0]).estimate < 0
    assert math.isnan(slope_interval([0, 1000], [2.0, 1.0]).estimate)
    assert math.isnan(slope_interval(STEPS, 0 * VALUES).estimate)
    assert math.isnan(log_slope([1], [1.0]))
    assert math.isnan(log_slope([1, 2], [1.0, 0.0]))
