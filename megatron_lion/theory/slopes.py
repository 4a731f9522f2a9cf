"""The slope of the running mean of a norm over log K, with an interval for one run and for several.

A mean that falls like K^{−p} has the slope −p on logarithmic axes. Running means of neighbouring K share most of their
values, so their scatter around a line says nothing about the error of the slope. The interval of one run therefore starts
from the scatter of the probes' values, with the correlation of neighbouring probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_lion.intervals import LEVEL, Interval, around, mean_interval
from megatron_lion.theory.rates import Weighting, spread_over_steps
from megatron_lion.theory.symbols import Array

WINDOW = 10
"""The slope is that over the K from the last K divided by this number on."""
LEAST_PROBES = 7
"""Fewest probes with an interval: the trend has three parameters, and the scatter and its correlation need the rest."""


def log_slope(K: ArrayLike, means: ArrayLike) -> float:
    """Slope of log(means) over log(K) by least squares; NaN for fewer than two K or a mean that is not positive.

    Example:
        >>> round(log_slope([1, 16, 81], [2.0, 1.0, 2 / 3]), 6)
        -0.25
    """
    K, means = np.asarray(K, dtype=np.float64), np.asarray(means, dtype=np.float64)
    if len(K) < 2 or not np.all(means > 0):
        return math.nan
    return float(_weights(K, np.ones(len(K), dtype=np.bool_)) @ np.log(means))


def running_means(steps: ArrayLike, values: ArrayLike, weighting: Weighting = "linear") -> tuple[Array, Array]:
    """K and the mean of the values up to K at each probe; arguments as `spread_over_steps`.

    Example:
        >>> K, means = running_means([0, 2], [4.0, 2.0])
        >>> K.tolist(), means.tolist()
        ([1.0, 3.0], [4.0, 3.0])
    """
    dense = spread_over_steps(steps, values, weighting)
    at = np.asarray(steps, dtype=np.float64) + 1 if weighting != "probes" else np.arange(1.0, len(dense) + 1)
    return at, np.cumsum(dense)[at.astype(np.int64) - 1] / at


def slope_interval(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    weighting: Weighting = "linear",
    confidence: float = LEVEL,
    first_K: float | None = None,
    of_mean: bool = True,
) -> Interval:
    """Slope of the log running mean of one run, with an interval for the scatter of its values.

    The log of the values is a quadratic in log K plus errors e with autocorrelation ρ from one probe to the next. The
    slope changes by Σ h_i e_i, where h_i is its derivative by the log of a value, so its variance is hᵀ Cov(e) h. ρ and the
    variance come from the residuals, corrected for the trend that was fitted. Student's quantile has the degrees of freedom
    that correlated residuals leave (Satterthwaite).

    Args:
        steps: optimizer steps done at each probe.
        values: the norm at each probe.
        weighting: as `spread_over_steps`.
        confidence: nominal coverage; docs/theory.md has the measured one.
        first_K: first K of the slope; by default the last K divided by `WINDOW`.
        of_mean: False for the slope of the values themselves, which does not depend on what is assumed between probes.

    Returns:
        The slope. The ends are None for fewer than `LEAST_PROBES` probes, or if a value is 0. The estimate is NaN if the
        window has fewer than three probes.

    Raises:
        ValueError: as `spread_over_steps`.

    Example:
        >>> steps = [0, 10, 20, 40, 60, 80, 100]
        >>> found = slope_interval(steps, [(step + 1) ** -0.25 for step in steps])
        >>> round(found.estimate, 3), found.high - found.low < 1e-9
        (-0.269, True)
    """
    K, means = running_means(steps, values, weighting)
    values = np.asarray(values, dtype=np.float64)
    means = means if of_mean else values
    chosen = K[-1] / WINDOW <= K if first_K is None else first_K <= K
    if chosen.sum() < 3 or not np.all(means[chosen] > 0):
        return Interval(estimate=math.nan, low=None, high=None, confidence=confidence, count=len(K))
    weights = _weights(K, chosen)
    slope = float(weights[chosen] @ np.log(means[chosen]))
    if len(K) < LEAST_PROBES or not np.all(values > 0):
        return Interval(estimate=slope, low=None, high=None, confidence=confidence, count=len(K))
    if of_mean:
        by_sum = np.divide(weights, means * K, out=np.zeros_like(means), where=chosen)
        weights = _pull(by_sum, K, weighting) * values
    variance, freedom = _variance(weights, np.log(values), np.log(K))
    return around(slope, math.sqrt(variance), freedom, confidence=confidence)


def slope_over_runs(
    runs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    weighting: Weighting = "linear",
    confidence: float = LEVEL,
    of_mean: bool = True,
) -> Interval:
    """Mean slope of several runs with Student's t interval over them; for one run, `slope_interval`.

    Raises:
        ValueError: as `slope_interval`, or no runs.
    """
    found = [
        slope_interval(steps, values, weighting=weighting, confidence=confidence, of_mean=of_mean)
        for steps, values in runs
    ]
    if len(found) == 1:
        return found[0]
    return mean_interval([interval.estimate for interval in found], confidence)


def _weights(K: Array, chosen: NDArray[np.bool_]) -> Array:
    """Weights of log(means) in the slope of a least-squares line over log(K) at the chosen K; 0 at the others."""
    x = np.log(K[chosen])
    x -= x.mean()
    weights = np.zeros(len(K))
    weights[chosen] = x / (x @ x)
    return weights


def _pull(by_sum: Array, K: Array, weighting: Weighting) -> Array:
    """Derivative of the slope by each value, from its derivative by each sum of the values up to K_j.

    A value is in the sums from its own K on. Between two probes n steps apart, the earlier value counts (n−1)/2 times and
    the later one (n+1)/2 times ('linear'), n−1 times and once ('hold'), or never and once ('probes').
    """
    distance = np.diff(K)
    earlier = {"linear": (distance - 1) / 2, "hold": distance - 1, "probes": 0 * distance}[weighting]
    later = distance - earlier
    after = np.cumsum(by_sum[::-1])[::-1]
    pull = np.concatenate([[K[0] * after[0]], later * after[1:]])
    pull[:-1] += earlier * after[1:]
    return np.asarray(pull)


def _variance(pull: Array, logs: Array, log_K: Array) -> tuple[float, float]:
    """Variance of Σ pull_i e_i and its degrees of freedom, from the residuals of `logs` around a quadratic in log K."""
    count = len(logs)
    trend = np.vander((log_K - log_K.mean()) / log_K.std(), 3)
    keep = np.eye(count) - trend @ np.linalg.pinv(trend)  # residuals = keep @ logs
    rest = keep @ logs
    square = float(rest @ rest)
    if square <= 1e-24 * count:  # the values are the trend itself, up to rounding
        return 0.0, 1.0
    # A fitted trend makes the correlation of residuals too small; the first-order bias is added back.
    seen = float(rest[1:] @ rest[:-1]) / square
    correlation = min(0.9, max(0.0, seen + (1 + 3 * seen + 2) / count))
    errors = correlation ** np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    mixed = keep @ errors
    trace = float(np.trace(mixed))
    freedom = max(1.0, trace**2 / float(np.trace(mixed @ mixed)))
    return square / trace * float(pull @ errors @ pull), freedom
