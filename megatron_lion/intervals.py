"""Confidence intervals over independent values: Student's t, Welch's t for a gap, and the delete-a-group jackknife."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Coverage of every interval that the product prints, if nothing else is stated."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with a two-sided confidence interval.

    Attributes:
        estimate: the value, such as a mean or the difference of two means.
        low, high: ends of the interval; None if the values do not determine one: fewer than two on a side, or, for a gap,
            equal values on a side.
        confidence: nominal coverage, in (0, 1).
        count: number of independent values; for a gap, of the smaller side.
        p_value: for a gap, two-sided p of equal means; None without an interval.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    count: int
    p_value: float | None = None


def t_quantile(freedom: float, confidence: float = LEVEL) -> float:
    """Returns t such that a share `confidence` of Student's distribution lies between −t and t.

    Args:
        freedom: degrees of freedom, > 0, not necessarily an integer.
        confidence: in (0, 1).

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> round(t_quantile(4), 4)
        2.7764
    """
    from scipy.special import stdtrit  # imported here: most verbs do not need scipy

    if not 0 < confidence < 1 or not freedom > 0:
        raise ValueError(
            f"confidence = {confidence:g}, freedom = {freedom:g}: expected a confidence in (0, 1) and freedom > 0"
        )
    return float(stdtrit(freedom, (1 + confidence) / 2))


def mean_interval(values: Sequence[float], confidence: float = LEVEL) -> Interval:
    """Student's t interval of the mean of independent, roughly normal values.

    Raises:
        ValueError: no values, or `confidence` outside (0, 1).

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> round(found.low, 3), found.estimate, round(found.high, 3)
        (1.037, 3.0, 4.963)
        >>> mean_interval([1.0]).low is None
        True
    """
    count = len(values)
    if count == 0:
        raise ValueError("values is empty: expected at least one value")
    mean = _mean(values)
    if count < 2:
        return Interval(estimate=mean, low=None, high=None, confidence=confidence, count=count)
    return around(mean, _standard_error(values), count - 1, confidence=confidence)


def around(estimate: float, standard_error: float, freedom: float, *, confidence: float = LEVEL) -> Interval:
    """The interval of an estimate whose standard error has a number of degrees of freedom.

    Example:
        >>> found = around(0.0, 1.0, 4)
        >>> round(found.high, 4), found.count
        (2.7764, 5)
    """
    half = t_quantile(freedom, confidence) * standard_error
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, confidence=confidence, count=int(freedom) + 1
    )


def gap_interval(a: Sequence[float], b: Sequence[float], confidence: float = LEVEL) -> Interval:
    """Welch's interval of mean(a) − mean(b) and the p of its test; the two sides may scatter differently.

    The degrees of freedom are Satterthwaite's, but at most those that equal variances would give. With equal counts this
    changes nothing. With 2 values against 10, Welch's own interval covers 90 %, because the 2 are often close by chance
    and the degrees of freedom are then nearly those of the 10; the limit gives 95 % or more.

    Equal values on a side give no interval: a scatter of exactly 0 is no estimate of a variance, and an error of 0 would
    make any gap significant.

    Raises:
        ValueError: no values on a side, or `confidence` outside (0, 1).

    Source: Welch (1947), "The generalization of Student's problem when several different population variances are
    involved". The limit is ours; benchmarks/results/seed_intervals.md has the coverage.

    Example:
        >>> found = gap_interval([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
        >>> round(found.low, 3), round(found.high, 3), round(found.p_value, 5)
        (-1.227, -0.773, 0.00026)
    """
    from scipy.special import stdtr

    if not a or not b:
        raise ValueError("a side has no values: expected at least one on each")
    gap, count = _mean(a) - _mean(b), min(len(a), len(b))
    if count < 2:
        return Interval(estimate=gap, low=None, high=None, confidence=confidence, count=count)
    errors = [_standard_error(side) for side in (a, b)]
    if 0 in errors:
        return Interval(estimate=gap, low=None, high=None, confidence=confidence, count=count)
    error = math.hypot(*errors)
    counts = [len(a), len(b)]
    freedom = min(_satterthwaite(errors, counts), _satterthwaite([count**-0.5 for count in counts], counts))
    half = t_quantile(freedom, confidence) * error
    p_value = float(2 * stdtr(freedom, -abs(gap) / error))
    return Interval(estimate=gap, low=gap - half, high=gap + half, confidence=confidence, count=count, p_value=p_value)


def jackknife_error(estimate: float, left_out: Sequence[float], sizes: Sequence[float]) -> float:
    """Standard error of an estimate from its values without each of several groups of observations.

    Args:
        estimate: the value from all observations.
        left_out: the value without each group.
        sizes: number of observations in each group; they may differ.

    Raises:
        ValueError: fewer than two groups, or different lengths.

    Source: Busing, Meijer and van der Leeden (1999), "Delete-m jackknife for unequal m", Statistics and Computing 9.

    Example:
        >>> values = [1.0, 2.0, 3.0, 4.0]
        >>> without = [(sum(values) - value) / 3 for value in values]
        >>> jackknife_error(2.5, without, [1] * 4) == math.sqrt(5 / 3 / 4)
        True
    """
    count = len(left_out)
    if count < 2 or count != len(sizes):
        raise ValueError(
            f"{count} values without a group for {len(sizes)} groups: expected the same number, at least 2"
        )
    total = math.fsum(sizes)
    center = count * estimate - math.fsum(
        (1 - size / total) * value for size, value in zip(sizes, left_out, strict=True)
    )
    variance = 0.0
    for size, value in zip(sizes, left_out, strict=True):
        weight = total / size
        variance += (weight * estimate - (weight - 1) * value - center) ** 2 / (weight - 1)
    return math.sqrt(variance / count)


def _satterthwaite(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Degrees of freedom of the root of the sum of squared standard errors, each from a number of values."""
    total = math.hypot(*errors)  # its shares, unlike the variances, cannot underflow to 0 / 0
    return 1 / sum((error / total) ** 4 / (count - 1) for error, count in zip(errors, counts, strict=True))


def _mean(values: Sequence[float]) -> float:
    """The mean; exact for equal values, because it sums the differences from the first."""
    return values[0] + math.fsum(value - values[0] for value in values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two values; math.dist neither overflows nor underflows."""
    count = len(values)
    return math.dist(values, [_mean(values)] * count) / math.sqrt((count - 1) * count)
