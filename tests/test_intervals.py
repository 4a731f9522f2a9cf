"""Intervals: comparison with scipy.stats and hand values, and properties that hold for all values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from scipy import stats

from megatron_lion.intervals import Interval, around, gap_interval, jackknife_error, mean_interval, t_quantile

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=10)
scattered = values.filter(lambda side: max(side) - min(side) > 1e-9)
confidences = st.sampled_from([0.5, 0.9, 0.95, 0.995])


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def sample(seed: int, count: int, scale: float = 1.0) -> list[float]:
    return (scale * np.random.default_rng(seed).normal(size=count)).tolist()


def limited_welch(a: list[float], b: list[float], confidence: float) -> tuple[float, float, float]:
    """Low, high and p from scipy's Welch test with the degrees of freedom limited, written out from the variances."""
    found = stats.ttest_ind(a, b, equal_var=False)
    m, n = len(a), len(b)
    freedom = min(found.df, (1 / m + 1 / n) ** 2 / (1 / m**2 / (m - 1) + 1 / n**2 / (n - 1)))
    gap = float(np.mean(a) - np.mean(b))
    half = stats.t.ppf((1 + confidence) / 2, freedom) * abs(gap / found.statistic)
    return gap - half, gap + half, 2 * stats.t.sf(abs(found.statistic), freedom)


def test_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 99: 1.9842}
    for freedom, expected in table.items():
        assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)
    assert t_quantile(4, 0.9) == pytest.approx(2.1318, abs=5e-5)
    assert t_quantile(1.43) == pytest.approx(stats.t.ppf(0.975, 1.43))
    for freedom, confidence in ((0, 0.95), (3, 1.0), (3, 0.0), (math.nan, 0.95)):
        with pytest.raises(ValueError, match="expected a confidence"):
            t_quantile(freedom, confidence)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_the_interval_of_a_mean_is_scipys(count: int, confidence: float) -> None:
    side = sample(count, count)
    expected = stats.ttest_1samp(side, 0.0).confidence_interval(confidence)
    found = mean_interval(side, confidence)
    assert ends(found) == pytest.approx((expected.low, expected.high))
    assert (found.estimate, found.count, found.confidence) == (pytest.approx(np.mean(side)), count, confidence)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_with_equal_counts_the_interval_of_a_gap_is_scipys_welch(count: int, confidence: float) -> None:
    a, b = sample(1, count, scale=3.0), sample(2, count)
    result = stats.ttest_ind(a, b, equal_var=False)
    expected = result.confidence_interval(confidence)
    found = gap_interval(a, b, confidence)
    assert ends(found) == pytest.approx((expected.low, expected.high))
    assert found.p_value == pytest.approx(result.pvalue)


@pytest.mark.parametrize(("m", "n"), [(2, 3), (2, 10), (10, 2), (3, 10), (4, 8), (8, 4)])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_with_unequal_counts_the_degrees_of_freedom_are_limited(m: int, n: int, scale: float) -> None:
    a, b = sample(3, m, scale), sample(4, n)
    low, high, p_value = limited_welch(a, b, 0.95)
    found = gap_interval(a, b)
    assert (*ends(found), found.p_value) == pytest.approx((low, high, p_value))
    assert found.count == min(m, n)
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert high - low >= (welch.high - welch.low) * (1 - 1e-12)


def test_hand_values() -> None:
    assert ends(mean_interval([1.0, 3.0])) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    # Variances 1 and 4 of three values: error sqrt(5/3), degrees of freedom (5/3)² / ((1/9 + 16/9)/2) = 50/17.
    found = gap_interval([0.0, 1.0, 2.0], [8.0, 10.0, 12.0])
    half = float(stats.t.ppf(0.975, 50 / 17)) * math.sqrt(5 / 3)
    assert ends(found) == pytest.approx((-9 - half, -9 + half))
    assert ends(around(1.0, 2.0, 10)) == pytest.approx((1 - 2 * 2.2281, 1 + 2 * 2.2281), abs=2e-4)


def test_too_few_or_no_values() -> None:
    for found in (mean_interval([2.0]), gap_interval([2.0], [1.0, 1.5]), gap_interval([2.0, 1.0], [1.5])):
        assert (found.low, found.high, found.p_value, found.count) == (None, None, None, 1)
    assert gap_interval([2.0], [1.0, 2.0]).estimate == 0.5
    with pytest.raises(ValueError, match="values is empty"):
        mean_interval([])
    with pytest.raises(ValueError, match="a side has no values"):
        gap_interval([], [1.0])


def test_equal_values_on_a_side_give_a_gap_no_interval() -> None:
    for a, b in (([0.1] * 3, [0.1] * 7), ([1.0] * 2, [2.0] * 2), ([0.0, 0.0], [1.0, 3.0]), ([1.0, 3.0], [0.0, 0.0])):
        found = gap_interval(a, b)
        assert (found.low, found.high, found.p_value, found.count) == (None, None, None, min(len(a), len(b)))
    assert found.estimate == 2.0


def test_equal_and_extreme_values_have_an_interval() -> None:
    assert ends(mean_interval([0.1] * 3)) == (0.1, 0.1)
    for scale in (1e-200, 1e200):  # the square of such a deviation is 0 or infinite
        tiny, plain = (gap_interval([f, 2 * f], [3 * f, 5 * f, 7 * f]) for f in (scale, 1.0))
        assert ends(tiny) == pytest.approx([end * scale for end in ends(plain)], rel=1e-9)
        assert tiny.p_value == pytest.approx(plain.p_value)


@examples(100)
@given(values, confidences, st.floats(-100, 100), st.floats(0.1, 10))
def test_a_mean_moves_and_scales_with_its_values(
    side: list[float], confidence: float, shift: float, scale: float
) -> None:
    found = mean_interval(side, confidence)
    moved = mean_interval([scale * value + shift for value in side], confidence)
    assert ends(moved) == pytest.approx([scale * end + shift for end in ends(found)], abs=1e-6, rel=1e-9)


@examples(100)
@given(scattered, scattered, confidences)
def test_a_gap_turns_its_sign_and_its_interval_agrees_with_its_p(
    a: list[float], b: list[float], confidence: float
) -> None:
    found, turned = gap_interval(a, b, confidence), gap_interval(b, a, confidence)
    low, high = ends(found)
    assert ends(turned) == pytest.approx((-high, -low))
    assert found.p_value is not None
    assert turned.p_value == pytest.approx(found.p_value)
    assert low <= found.estimate <= high
    if abs(found.p_value - (1 - confidence)) > 1e-9:
        assert (found.p_value < 1 - confidence) == (not low <= 0 <= high)


@examples(50)
@given(scattered, scattered)
def test_more_confidence_is_wider(a: list[float], b: list[float]) -> None:
    for found in (lambda c: gap_interval(a, b, c), lambda c: mean_interval(a, c)):
        (low, high), (lower, higher) = ends(found(0.9)), ends(found(0.99))
        assert lower <= low <= high <= higher


@examples(50)
@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 9)), min_size=2, max_size=8))
def test_the_jackknife_of_a_weighted_mean_is_known(groups: list[tuple[float, int]]) -> None:
    sizes = [size for _, size in groups]
    total = sum(sizes)
    estimate = sum(mean * size for mean, size in groups) / total
    left_out = [(estimate * total - mean * size) / (total - size) for mean, size in groups]
    expected = sum((mean - estimate) ** 2 / (total / size - 1) for mean, size in groups) / len(groups)
    assert jackknife_error(estimate, left_out, sizes) == pytest.approx(math.sqrt(expected), abs=1e-9)


def test_the_jackknife_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        jackknife_error(1.0, [1.0], [1])
    with pytest.raises(ValueError, match="expected the same number"):
        jackknife_error(1.0, [1.0, 2.0], [1, 1, 1])
