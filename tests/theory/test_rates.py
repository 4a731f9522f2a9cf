"""Rate constants: comparison with brute force, sparse probes, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from scipy import stats

from megatron_lion.theory.rates import (
    c_lion,
    c_sgd,
    rate_constant,
    rates_over_seeds,
    spread_over_steps,
)

few = examples(30)


def brute_force(steps, values, weighting):
    """The definition, one K at a time; the value at each k is looked up or interpolated in a loop."""
    last = int(steps[-1]) + 1 if weighting != "probes" else len(values)
    best, total = 0.0, 0.0
    for k in range(1, last + 1):
        if weighting == "probes":
            value = values[k - 1]
        else:
            before = [i for i, s in enumerate(steps) if s + 1 <= k]
            after = [i for i, s in enumerate(steps) if s + 1 >= k]
            if not before:
                value = values[0]
            elif weighting == "hold" or before[-1] == after[0]:
                value = values[before[-1]]
            else:
                a, b = before[-1], after[0]
                part = (k - steps[a] - 1) / (steps[b] - steps[a])
                value = values[a] + part * (values[b] - values[a])
        total += value
        best = max(best, k**0.25 * total / k)
    return best


@few
@given(
    steps=st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True).map(sorted),
    weighting=st.sampled_from(["linear", "hold", "probes"]),
    seed=st.integers(0, 99),
)
def test_constant_is_the_definitions(steps, weighting, seed):
    values = np.random.default_rng(seed).uniform(0.1, 5.0, len(steps))
    constant = rate_constant(steps, values, weighting=weighting)
    assert constant.value == pytest.approx(brute_force(steps, values, weighting))
    mean = spread_over_steps(steps, values, weighting)[: constant.at].mean()
    assert constant.at**0.25 * mean == pytest.approx(constant.value)


def test_norms_that_fall_with_the_rate_have_a_flat_constant():
    k = np.arange(1, 10_001)
    values = 0.75 * 2.5 * k**-0.25  # the mean of this is 2.5 K^(−¼), up to the ends
    constant = c_sgd(k - 1, values)
    assert constant.value == pytest.approx(2.5, rel=0.01)
    assert constant.last == pytest.approx(2.5, rel=0.01)
    assert c_lion(k - 1, 10 * values, d=100).value == pytest.approx(constant.value)


def test_constant_norm_grows_with_k_and_falling_norm_peaks_early():
    assert rate_constant([0, 999], [2.0, 2.0]).at == 1000
    falling = rate_constant(range(1000), 1 / np.arange(1, 1001))
    assert falling.at < 10
    assert falling.last < falling.value / 5


@pytest.mark.parametrize(
    ("steps", "values", "weighting", "message"),
    [
        ([0, 1], [1.0], "linear", r"shapes \(2,\) and \(1,\)"),
        ([2, 1], [1.0, 1.0], "linear", "expected ascending"),
        ([0, 1], [1.0, float("nan")], "linear", "values = nan"),
        ([0, 1], [1.0, 1.0], "trapezium", "expected one of linear, hold, probes"),
    ],
)
def test_bad_records_are_refused(steps, values, weighting, message):
    with pytest.raises(ValueError, match=message):
        spread_over_steps(steps, values, weighting)


def test_seeds_average_before_the_maximum_and_after():
    steps = np.arange(0, 500, 50)
    generator = np.random.default_rng(1)
    runs = [(steps, 4 * (steps + 1.0) ** -0.25 * generator.uniform(0.8, 1.2)) for _ in range(6)]
    rates = rates_over_seeds(runs, scale=0.5)
    average = np.mean([values for _, values in runs], axis=0)
    assert rates.of_mean == rate_constant(steps, average, scale=0.5)
    assert [r.value for r in rates.per_run] == [rate_constant(s, v, scale=0.5).value for s, v in runs]
    for interval in (rates.of_mean_interval, rates.per_run_interval):
        assert interval.low < interval.estimate < interval.high
        assert (interval.count, interval.confidence) == (6, 0.95)
    assert rates.of_mean_interval.estimate == rates.of_mean.value
    assert rates.per_run_interval.estimate == pytest.approx(np.mean([r.value for r in rates.per_run]))
    assert rates_over_seeds(runs, scale=0.5) == rates


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_of_the_mean_curve_is_the_jackknife_over_runs(count):
    steps = np.arange(0, 100, 10)
    generator = np.random.default_rng(count)
    curves = 3 * (steps + 1.0) ** -0.25 * np.exp(0.2 * generator.normal(size=(count, len(steps))))
    found = rates_over_seeds([(steps, curve) for curve in curves], confidence=0.9).of_mean_interval
    without = [rate_constant(steps, np.delete(curves, run, axis=0).mean(axis=0)).value for run in range(count)]
    error = math.sqrt((count - 1) / count * sum((value - np.mean(without)) ** 2 for value in without))
    half = stats.t.ppf(0.95, count - 1) * error
    assert found.estimate == rate_constant(steps, curves.mean(axis=0)).value
    assert (found.high - found.estimate, found.estimate - found.low) == pytest.approx((half, half))
    # At the rate of one K the constant is linear in the curves, so that the jackknife is Student's interval.
    flat = rates_over_seeds([([0, 9], [c[0], c[0]]) for c in curves], confidence=0.9)
    assert flat.of_mean_interval.low == pytest.approx(flat.per_run_interval.low)


def test_one_run_has_no_interval_and_runs_share_their_steps():
    single = rates_over_seeds([([0, 10], [1.0, 2.0])])
    for interval in (single.of_mean_interval, single.per_run_interval):
        assert (interval.low, interval.high, interval.count) == (None, None, 1)
    shared = rates_over_seeds([([0, 10, 20], [1.0, 2.0, 3.0]), ([0, 20], [1.0, 3.0])])
    assert shared.of_mean == rate_constant([0, 20], [1.0, 3.0])
    with pytest.raises(ValueError, match="no probe step in common"):
        rates_over_seeds([([0], [1.0]), ([1], [1.0])])
    with pytest.raises(ValueError, match="runs is empty"):
        rates_over_seeds([])
    with pytest.raises(ValueError, match=r"confidence = 1\.5"):
        rates_over_seeds([([0], [1.0])], confidence=1.5)
