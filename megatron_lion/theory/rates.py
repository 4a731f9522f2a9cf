"""The tightest constants with which the K^{−¼} rate holds along a run, with intervals over several seeds.

c_LION = max_K K^¼ d^{−½} (1/K) Σ_{k≤K} ‖∇f(θ^k)‖₁   so that   mean ‖∇f‖₁ ≤ c_LION √d K^{−¼} for every K
c_SGD  = max_K K^¼ (1/K) Σ_{k≤K} ‖∇f(θ^k)‖₂          so that   mean ‖∇f‖₂ ≤ c_SGD K^{−¼} for every K

Full gradients are measured at some steps only. A probe written at `step` measures θ^{step+1}. Between probes the
norm is assumed linear in k ('linear') or equal to the last probe's ('hold'); before the first probe it is assumed
equal to the first probe's. 'probes' ignores steps: K counts the probes, like epochs. The maximum is over every
integer K up to the last probe. The constants depend on the unit of K, so only constants of the same unit compare.

Source: journal edition of "Convergence Rate Analysis of LION", Appendix A.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.intervals import LEVEL, Interval, around, jackknife_error, mean_interval
from megatron_lion.theory.symbols import Array, require_positive

type Weighting = Literal["linear", "hold", "probes"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting.__value__)


@dataclass(frozen=True)
class RateConstant:
    """max_K K^¼ scale mean_{k≤K} of a norm.

    Attributes:
        value: the constant, in the unit of a gradient.
        at: the K of the maximum.
        last: K^¼ scale mean at the last K; if it is far below `value`, the norm falls faster than K^{−¼}.
        steps: K of the last probe, or the number of probes.
    """

    value: float
    at: int
    last: float
    steps: int


@dataclass(frozen=True)
class SeedRates:
    """A rate constant over runs that differ in their seed.

    Attributes:
        of_mean: constant of the norms averaged over the runs, which estimate the expectation in the theorems.
        of_mean_interval: delete-one-run jackknife for `of_mean`, with Student's quantile of n − 1 for n runs.
        per_run: constant of each run.
        per_run_interval: Student's t interval for the mean of `per_run`.
    """

    of_mean: RateConstant
    of_mean_interval: Interval
    per_run: tuple[RateConstant, ...]
    per_run_interval: Interval


def spread_over_steps(steps: ArrayLike, values: ArrayLike, weighting: Weighting = "linear") -> Array:
    """One value for each k = 1, 2, … up to the last probe, from values at sparse probes.

    Args:
        steps: optimizer steps done at each probe, ascending, ≥ 0, shape (probes,); a probe at step s measures θ^{s+1}.
        values: the norm at each probe, shape (probes,).
        weighting: 'linear', 'hold' or 'probes'.

    Returns:
        Values at k = 1 … K, shape (K,).

    Raises:
        ValueError: shapes differ, steps do not ascend, values are not finite, or an unknown weighting.

    Example:
        >>> spread_over_steps([0, 2], [4.0, 2.0]).tolist()
        [4.0, 3.0, 2.0]
        >>> spread_over_steps([1, 3], [4.0, 2.0], "hold").tolist()
        [4.0, 4.0, 4.0, 2.0]
    """
    steps, values = np.asarray(steps, dtype=np.float64), require_positive("values", values, zero=True)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
    if steps.ndim != 1 or steps.shape != values.shape or len(steps) == 0:
        raise ValueError(f"steps and values have shapes {steps.shape} and {values.shape}: expected the same (n,)")
    if steps[0] < 0 or np.any(np.diff(steps) <= 0):
        raise ValueError("steps: expected ascending numbers >= 0")
    if weighting == "probes":
        return values
    k = np.arange(1, int(steps[-1]) + 2)
    if weighting == "linear":
        return np.interp(k, steps + 1, values)
    return np.asarray(values[np.maximum(np.searchsorted(steps + 1, k, side="right") - 1, 0)])


def rate_constant(
    steps: ArrayLike, values: ArrayLike, *, scale: float = 1.0, weighting: Weighting = "linear"
) -> RateConstant:
    """The smallest c with scale × mean_{k≤K} ‖∇f(θ^k)‖ ≤ c K^{−¼} for every K up to the last probe.

    Args:
        steps: optimizer steps done at each probe.
        values: ‖∇f‖₁ or ‖∇f‖₂ at each probe.
        scale: d^{−½} for ‖∇f‖₁ (`c_lion`), 1 for ‖∇f‖₂ (`c_sgd`).
        weighting: how the norm is assumed between probes: 'linear', 'hold' or 'probes'.

    Raises:
        ValueError: as `spread_over_steps`, or `scale` is not positive.

    Example:
        >>> rate_constant([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0]).value == 4**0.25
        True
    """
    require_positive("scale", scale)
    curve = scale * _curve(steps, values, weighting)
    best = int(curve.argmax())
    return RateConstant(float(curve[best]), best + 1, float(curve[-1]), len(curve))


def _curve(steps: ArrayLike, values: ArrayLike, weighting: Weighting) -> Array:
    """K^¼ mean_{k≤K} of a norm at K = 1, 2, … up to the last probe."""
    dense = spread_over_steps(steps, values, weighting)
    return np.asarray(np.arange(1, len(dense) + 1) ** -0.75 * np.cumsum(dense))


def c_lion(steps: ArrayLike, grad_l1: ArrayLike, d: int, weighting: Weighting = "linear") -> RateConstant:
    """c_LION = max_K K^¼ d^{−½} mean_{k≤K} ‖∇f(θ^k)‖₁; arguments as `rate_constant`, d counts every parameter."""
    return rate_constant(steps, grad_l1, scale=float(require_positive("d", d)) ** -0.5, weighting=weighting)


def c_sgd(steps: ArrayLike, grad_l2: ArrayLike, weighting: Weighting = "linear") -> RateConstant:
    """c_SGD = max_K K^¼ mean_{k≤K} ‖∇f(θ^k)‖₂; arguments as `rate_constant`."""
    return rate_constant(steps, grad_l2, weighting=weighting)


def rates_over_seeds(
    runs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    scale: float = 1.0,
    weighting: Weighting = "linear",
    confidence: float = LEVEL,
) -> SeedRates:
    """Rate constant over seeds, in both senses of 'averaged over runs': of the mean norm, and mean of the constants.

    Args:
        runs: (steps, norms) of each run; steps that some run lacks are ignored.
        scale: as `rate_constant`.
        weighting: as `rate_constant`.
        confidence: nominal coverage of both intervals, in (0, 1).

    Raises:
        ValueError: no runs, no common step, or a number outside its range.
    """
    common, values = common_norms(runs, confidence)
    per_run = tuple(rate_constant(common, row, scale=scale, weighting=weighting) for row in values)
    of_mean = rate_constant(common, values.mean(axis=0), scale=scale, weighting=weighting)
    interval = Interval(estimate=of_mean.value, low=None, high=None, confidence=confidence, count=1)
    if (count := len(runs)) > 1:
        left_out = [
            rate_constant(common, np.delete(values, row, axis=0).mean(axis=0), scale=scale, weighting=weighting).value
            for row in range(count)
        ]
        error = jackknife_error(of_mean.value, left_out, [1] * count)
        interval = around(of_mean.value, error, count - 1, confidence=confidence)
    return SeedRates(of_mean, interval, per_run, mean_interval([rate.value for rate in per_run], confidence))


def late_growth(
    runs: Sequence[tuple[ArrayLike, ArrayLike]], *, weighting: Weighting = "linear", confidence: float = LEVEL
) -> Interval:
    """ln(C(K)/C(K/2)) at the last K, with C(K) = K^¼ mean_{k≤K} of the norms averaged over runs, and its interval.

    Below 0, C at half of the steps exceeds C at the last step, so the maximum of C is not at the last K. A norm ∝ k^{−p} gives
    about (¼ − p) ln 2 for p < 1. The maximum itself is no such test: with noisy norms, it is often before the last K
    although C grows.

    The interval is the delete-one-run jackknife with Student's quantile. Its ends are None for one run, for probes at one
    step, or if a norm is 0 up to K/2.

    Args: as `rates_over_seeds`.

    Raises:
        ValueError: as `rates_over_seeds`.

    Example:
        >>> found = late_growth([([0, 99], [1.0, 1.0]), ([0, 99], [1.1, 1.1])])
        >>> round(found.estimate, 4), round(found.low, 4)  # ¼ ln 2: a constant norm
        (0.1733, 0.1733)
    """
    common, values = common_norms(runs, confidence)
    means = [
        values.mean(axis=0),
        *(np.delete(values, row, axis=0).mean(axis=0) for row in range(len(runs)) if len(runs) > 1),
    ]
    curves = [_curve(common, mean, weighting) for mean in means]
    half = (len(curves[0]) + 1) // 2 - 1
    if len(common) < 2 or len(runs) < 2 or min(curve[half] for curve in curves) <= 0:
        return Interval(estimate=math.nan, low=None, high=None, confidence=confidence, count=len(runs))
    growth, *left_out = (float(np.log(curve[-1] / curve[half])) for curve in curves)
    error = jackknife_error(growth, left_out, [1] * len(runs))
    return around(growth, error, len(runs) - 1, confidence=confidence)


def common_norms(runs: Sequence[tuple[ArrayLike, ArrayLike]], confidence: float = LEVEL) -> tuple[list[float], Array]:
    """The probe steps that all runs have, and the norms there, shape (runs, steps).

    Raises:
        ValueError: no runs, no common step, or `confidence` outside (0, 1).
    """
    if not runs:
        raise ValueError("runs is empty: expected at least one run")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence:g}: expected a number in (0, 1)")
    common = sorted(set.intersection(*(set(np.asarray(steps, dtype=np.float64).tolist()) for steps, _ in runs)))
    if not common:
        raise ValueError("the runs have no probe step in common: expected runs probed at the same steps")
    values = [
        np.asarray(norms, dtype=np.float64)[np.isin(np.asarray(steps, dtype=np.float64), common)]
        for steps, norms in runs
    ]
    return common, np.stack(values)
