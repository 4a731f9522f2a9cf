"""The exponent b of r ∝ d^b by least squares, with an interval for scatter, lack of fit and the noise that r contains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lion.intervals import LEVEL, t_quantile

THEORY = 0.5
"""Exponent of r = Θ(√d)."""
TOLERANCE = 0.1
"""The interval of b must lie within ½ ± this for the verdict "holds"; our choice, the paper states none."""
FEWEST_SIZES = 4
"""Fewest models of different d for a verdict; three leave one degree of freedom, with t = 12.7."""

HOLDS, FAILS, UNRESOLVED = "holds", "does not hold here", "not resolved"


@dataclass(frozen=True, kw_only=True)
class SizeMean:
    """The norm ratio at one size of model; natural logarithms, averaged over the seeds.

    Attributes:
        d: number of coordinates.
        measured: mean of log r of the averaged gradient, which contains noise.
        low, high: means of the logarithms of the bounds on r without noise; None if a seed's bounds are not known.
    """

    d: int
    measured: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """An ordinary least-squares line through (log d, y).

    Attributes:
        slope, intercept: of the line.
        standard_error: of the slope, from the scatter about the line; None for two points.
        freedom: degrees of freedom, the number of points − 2.
        low, high: the slope's t interval; None for two points.
    """

    slope: float
    intercept: float
    standard_error: float | None
    freedom: int
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """The exponent of r without noise.

    Attributes:
        set_low, set_high: exponents that the bounds on r leave, without any error; None if bounds are missing.
        standard_error: of the scatter; see `exponent_between_bounds`.
        low, high: ends of the interval; None if bounds are missing, or for two sizes.
        verdict: `HOLDS`, `FAILS` or `UNRESOLVED`.
        reason: why it is not resolved; "" otherwise.
    """

    set_low: float | None
    set_high: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str


def slope_weights(sizes: Sequence[int]) -> list[float]:
    """Returns the c_i of the least-squares slope Σ c_i y_i over x_i = log d_i: (x_i − x̄)/Σ (x_j − x̄)².

    Raises:
        ValueError: fewer than two different sizes.

    Example:
        >>> [round(weight * math.log(10), 3) for weight in slope_weights([10, 100, 1000])]
        [-0.5, 0.0, 0.5]
    """
    x = [math.log(size) for size in sizes]
    center = math.fsum(x) / len(x) if x else 0.0
    total = math.fsum((value - center) ** 2 for value in x)
    if not total > 0:
        raise ValueError(f"sizes = {list(sizes)}: expected at least two different ones")
    return [(value - center) / total for value in x]


def fit_line(sizes: Sequence[int], values: Sequence[float]) -> Line:
    """Fits y = a + b log d.

    Args:
        sizes: d of each point.
        values: y of each point.

    Raises:
        ValueError: fewer than two different sizes.

    Example:
        >>> line = fit_line([10, 100, 1000], [math.log(2 * d**0.5) for d in (10, 100, 1000)])
        >>> round(line.slope, 9), round(math.exp(line.intercept), 9)
        (0.5, 2.0)
    """
    weights = slope_weights(sizes)
    x = [math.log(size) for size in sizes]
    slope = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
    intercept = (math.fsum(values) - slope * math.fsum(x)) / len(x)
    freedom = len(x) - 2
    if freedom < 1:
        return Line(slope=slope, intercept=intercept, standard_error=None, freedom=freedom, low=None, high=None)
    scatter = math.fsum((value - intercept - slope * place) ** 2 for place, value in zip(x, values, strict=True))
    error = math.sqrt(scatter / freedom * math.fsum(weight * weight for weight in weights))
    half = t_quantile(freedom) * error
    return Line(
        slope=slope, intercept=intercept, standard_error=error, freedom=freedom, low=slope - half, high=slope + half
    )


def exponent_between_bounds(points: Sequence[SizeMean]) -> Exponent:
    """The interval of b if each r is known only up to the bounds that noise leaves, and the verdict on b = ½.

    The model is log r_i = a + b log d_i + e_i for the noise-free r of size i, averaged over its seeds. The e_i are
    independent and of one variance. They contain the scatter between seeds and the lack of fit. Two uncertainties add:

    1. The bounds. The least-squares slope is linear in the log r_i, Σ c_i log r_i, with c_i < 0 below the mean of log d
       and c_i > 0 above it. The r_i are anywhere between their bounds, so the slope is largest if each r_i is at its upper
       bound where c_i > 0 and at its lower bound where c_i < 0, and smallest in the opposite case. These are the ends of
       the identified set. More seeds do not shrink it, only less noise does.
    2. The scatter. s.e. = s √(Σ c_i²) with the residual deviation s of a line, and Student's t with (sizes − 2) degrees of
       freedom, from the means of the sizes alone: seeds of one size share its lack of fit, and are not independent. The
       noise-free r_i are not observed. s is the largest of those of the lower bounds, the upper bounds and the measured r,
       which contain the sampling errors of the probes too.

    The interval is [set_low − t s.e., set_high + t s.e.]. Without noise it is the usual t interval. It contains b in at
    least 95 % of draws for any place of the r_i between their bounds, also if that place drifts with d
    (tests/scaling/test_exponent.py; docs/scaling.md has the simulated coverage).

    Source: the identified set of a linear functional of interval data: Manski, "Partial Identification of Probability
    Distributions" (2003), chapter 1.

    Args:
        points: one for each size, in any order.

    Raises:
        ValueError: fewer than two different sizes.
    """
    sizes = [point.d for point in points]
    weights = slope_weights(sizes)
    bounds = [(point.low, point.high) for point in points if point.low is not None and point.high is not None]
    if len(bounds) < len(points):
        missing = len(points) - len(bounds)
        reason = f"{missing} of {len(points)} sizes without bounds on r without noise"
        return Exponent(
            set_low=None, set_high=None, standard_error=None, low=None, high=None, verdict=UNRESOLVED, reason=reason
        )
    ends = [
        math.fsum(
            weight * (high if (weight > 0) == upward else low)
            for weight, (low, high) in zip(weights, bounds, strict=True)
        )
        for upward in (False, True)
    ]
    measured = [point.measured for point in points]
    series = (measured, [low for low, _ in bounds], [high for _, high in bounds])
    errors = [error for values in series if (error := fit_line(sizes, values).standard_error) is not None]
    if not errors:
        reason = f"2 sizes; a verdict needs at least {FEWEST_SIZES}"
        return Exponent(
            set_low=ends[0], set_high=ends[1], standard_error=None, low=None, high=None, verdict=UNRESOLVED,
            reason=reason,
        )  # fmt: skip
    half = t_quantile(len(points) - 2) * max(errors)
    low, high = ends[0] - half, ends[1] + half
    verdict, reason = judge(low, high, len(set(sizes)))
    return Exponent(
        set_low=ends[0],
        set_high=ends[1],
        standard_error=max(errors),
        low=low,
        high=high,
        verdict=verdict,
        reason=reason,
    )


def judge(low: float, high: float, sizes: int) -> tuple[str, str]:
    """Returns the verdict on b = ½ from its interval, and the reason if it is not resolved.

    "holds" if the interval is inside ½ ± `TOLERANCE`, "does not hold here" if it excludes ½. An interval that does both is
    near enough to ½, and "holds".

    Args:
        low, high: ends of the interval.
        sizes: number of models of different d.

    Example:
        >>> judge(0.45, 0.55, 7)[0], judge(0.2, 0.3, 7)[0], judge(0.3, 0.55, 7)[0], judge(0.2, 0.3, 3)[0]
        ('holds', 'does not hold here', 'not resolved', 'not resolved')
    """
    if sizes < FEWEST_SIZES:
        return UNRESOLVED, f"{sizes} sizes; a verdict needs at least {FEWEST_SIZES}"
    if low >= THEORY - TOLERANCE and high <= THEORY + TOLERANCE:
        return HOLDS, ""
    if not low <= THEORY <= high:
        return FAILS, ""
    return UNRESOLVED, f"the {LEVEL:.0%} interval contains ½ and is not inside ½ ± {TOLERANCE:g}"
