"""Unbiased estimates of the noise in an averaged gradient, with standard errors, and bounds on the noise-free norm ratio.

f is the mean loss over the data set (the split, cut into samples), and a probe averages n of its N batches without
repeats. For batch gradients g_i with mean ∇f and E‖g_i − ∇f‖² = σ², the mean ḡ of n of them has
E‖ḡ‖² = ‖∇f‖² + σ² (1/n − 1/N). The norm of the mean alone determines neither term. Its ratio ‖·‖₁/‖·‖₂ tends to
0.798 √d if noise dominates, for any ∇f. The scatter of the batches about their mean gives σ².

Source: McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), appendix A.1; the
finite-population factor: Cochran, "Sampling Techniques", chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_lion.gradient.batch_sums import BatchGroups, Prefix, Sums
from megatron_lion.gradient.norms import GradientNorms
from megatron_lion.intervals import jackknife_error, t_quantile

FEWEST_GROUPS = 4
"""Fewest groups from which a standard error is computed."""
ROUNDING = 1e-6
"""σ²/‖ḡ‖² below which the scatter of batches is rounding of their fp32 sums and counts as 0."""


@dataclass(frozen=True)
class NoiseEstimate:
    """Signal and noise in the mean of `num_batches` global batches.

    A standard error is None below `FEWEST_GROUPS` groups, and if an estimate is not finite without one of them. It
    includes the error of the sketch and has `num_groups` − 1 degrees of freedom: use Student's quantile, not 2, if there
    are few groups.

    Attributes:
        noise_variance, noise_variance_standard_error: σ² of one global batch, E‖g − ∇f‖₂²; the batches' mean count is
            the size of the batch if counts differ.
        signal_l2_squared, signal_standard_error: ‖∇f‖₂² without the noise; unbiased, hence sometimes negative if noise
            dominates.
        noise_share, noise_share_standard_error: the noise's part of ‖ḡ‖₂², σ² (1/n − 1/N)/‖ḡ‖₂²: 0 for a gradient
            without noise, about 1 for pure noise.
        grad_l2_corrected: √signal_l2_squared, or 0 if that is negative.
        noise_scale_samples, noise_scale_standard_error: σ²/‖∇f‖² times the batch size, McCandlish's B_simple; None if
            the signal is not positive.
        is_resolved: whether the signal's 95 % interval is above 0; None if its standard error is not known.
        norm_ratio_low, norm_ratio_high: bounds on r = ‖∇f‖₁/‖∇f‖₂ of the noise-free gradient; None if the signal is not
            resolved. See `ratio_bounds`.
        norm_ratio_low_standard_error, norm_ratio_high_standard_error: of each bound.
        norm_ratio_noise, norm_ratio_noise_standard_error: r of the noise itself, E‖ξ‖₁/√E‖ξ‖₂² of the mean over all batches;
            0.798 √d if the noise is normal and equally large in all coordinates. None if there is no noise.
        num_groups: disjoint groups of batches that the standard errors rest on.
        sketch_error: relative standard deviation that the sketch adds to a squared norm; 0 if it is exact.
    """

    noise_variance: float
    signal_l2_squared: float
    noise_share: float
    grad_l2_corrected: float
    noise_scale_samples: float | None
    num_groups: int
    sketch_error: float
    noise_variance_standard_error: float | None = None
    signal_standard_error: float | None = None
    noise_share_standard_error: float | None = None
    noise_scale_standard_error: float | None = None
    is_resolved: bool | None = None
    norm_ratio_low: float | None = None
    norm_ratio_low_standard_error: float | None = None
    norm_ratio_high: float | None = None
    norm_ratio_high_standard_error: float | None = None
    norm_ratio_noise: float | None = None
    norm_ratio_noise_standard_error: float | None = None


@dataclass(frozen=True)
class Rung:
    """The mean gradient over the first `num_batches` batches.

    Attributes:
        num_batches: number of batches k.
        grad_l1, grad_l2, norm_ratio, norm_ratio_over_sqrt_d: over all coordinates, exact.
        norm_ratio_standard_error: how much r(k) would scatter if other batches were drawn; None below `FEWEST_GROUPS`
            groups, and if the gradient of a group is zero or not finite. From the spread between disjoint groups of k
            batches if there are enough of them, otherwise from leaving out groups of the k batches.
        num_groups: number of groups that the standard error rests on.
    """

    num_batches: int
    grad_l1: float
    grad_l2: float
    norm_ratio: float
    norm_ratio_over_sqrt_d: float
    norm_ratio_standard_error: float | None
    num_groups: int


def rungs_of(num_batches: int) -> list[int]:
    """Returns the numbers of batches at which the running sum is read.

    Example:
        >>> rungs_of(10), rungs_of(1)
        ([1, 2, 4, 8, 10], [1])
    """
    powers = [1 << level for level in range(num_batches.bit_length())]
    return [*(k for k in powers if k < num_batches), num_batches]


def estimate_noise(
    groups: BatchGroups, norms: GradientNorms, *, batch_samples: int, population: float | None = None
) -> NoiseEstimate | None:
    """Estimates signal and noise from all batches of a probe.

    Returns None for a probe of one batch, a gradient of zero or a gradient that is not finite.

    Args:
        groups: from `GroupedBatches.finish`.
        norms: norms of the mean gradient, over all coordinates.
        batch_samples: number of samples of a global batch.
        population: number N of batches in the data set, not necessarily an integer; None for an unlimited one.
    """
    whole = groups.prefixes[max(groups.prefixes)]
    n = whole.num_batches
    exact = norms.grad_l2**2
    if n < 2 or not all(0 < value < math.inf for value in (exact, norms.grad_l1, whole.squares)):
        return None
    # The sketch gives σ², because the difference of an exact and a sketched norm would have the sketch's error of the
    # whole norm, which may be many times σ². Elsewhere its squared norms are scaled to the exact one.
    to_exact = exact / whole.squares

    def left_over(part: Sums) -> float:
        return variance_of(part) * _tau(part.num_batches, population) ** 2

    def share(part: Sums) -> float:
        return _divide(left_over(part), part.squares * to_exact)

    def signal(part: Sums) -> float:
        return part.squares * to_exact - left_over(part)

    def scale(part: Sums) -> float:
        return _divide(variance_of(part), signal(part)) * batch_samples

    variance, noise_share, clean = variance_of(whole), share(whole), signal(whole)
    noise_r, noise_r_error = noise_ratio(groups, norms, variance)
    found = NoiseEstimate(
        noise_variance=variance,
        signal_l2_squared=clean,
        noise_share=noise_share,
        grad_l2_corrected=math.sqrt(max(0.0, clean)),
        noise_scale_samples=scale(whole) if clean > 0 else None,
        num_groups=len(whole.without),
        sketch_error=groups.sketch_error,
        norm_ratio_noise=noise_r,
        norm_ratio_noise_standard_error=noise_r_error,
    )
    if len(whole.without) < FEWEST_GROUPS:
        return found
    errors = _Errors(whole, groups.sketch_error, population)
    signal_error = errors.of(signal, noise_share * exact)  # ‖ḡ‖² is exact: the sketch's error is that of σ²/n
    found = replace(
        found,
        noise_variance_standard_error=errors.of(variance_of, variance),
        signal_standard_error=signal_error,
        noise_share_standard_error=errors.of(share, noise_share),
        noise_scale_standard_error=errors.of(scale, scale(whole) / (1 - noise_share)) if clean > 0 else None,
        is_resolved=None if signal_error is None else clean > t_quantile(len(whole.without) - 1) * signal_error,
    )
    if not found.is_resolved or whole.l1 <= 0:  # a model's only gradient may be beside the sampled coordinates
        return found
    folded = _Errors(groups.folds, groups.sketch_error, population)
    low, low_error, high, high_error = ratio_bounds(errors, folded, norms, signal, population)
    if low_error is not None:
        low_error = math.hypot(low_error, groups.sample_error * low)
    return replace(
        found,
        norm_ratio_low=low,
        norm_ratio_low_standard_error=low_error,
        norm_ratio_high=high,
        norm_ratio_high_standard_error=high_error,
    )


def variance_of(part: Sums) -> float:
    """Returns the unbiased σ² of one batch: (Σ ‖g_i‖²/c_i − ‖Σ g_i‖²/Σ c_i)/(k − 1), over the mean count.

    It is exact for gradient sums g_i over c_i terms of equal variance, so batches may count differently. With equal
    counts it is the sample variance of the batches' mean gradients, summed over coordinates.
    """
    of_mean = part.count * part.squares
    scatter = part.scatter - of_mean
    if abs(scatter) <= ROUNDING * of_mean:
        return 0.0
    return scatter / (part.num_batches - 1) * part.num_batches / part.count


def noise_ratio(groups: BatchGroups, norms: GradientNorms, variance: float) -> tuple[float | None, float | None]:
    """Returns r of the noise and its standard error.

    The numerator is the mean of ‖·‖₁ over the contrasts of the groups, the denominator √σ².

    Args:
        groups: from `GroupedBatches.finish`.
        norms: norms of the mean gradient, over the same coordinates.
        variance: σ² of one batch.
    """
    whole = groups.prefixes[max(groups.prefixes)]
    l1s, squares = groups.contrasts_J2.T.tolist()
    if variance <= 0 or whole.l1 <= 0:
        return None, None
    of_term = variance * whole.count / whole.num_batches
    to_exact = norms.grad_l1 / whole.l1  # ‖·‖₁ is from a sample of the coordinates
    value = math.fsum(l1s) / len(l1s) * to_exact / math.sqrt(of_term)
    if not math.isfinite(value):
        return None, None

    def relative(chosen: list[int]) -> float:
        mean = math.fsum(squares[j] for j in chosen) / len(chosen)
        return _divide(math.fsum(l1s[j] for j in chosen) / len(chosen), math.sqrt(mean))

    error, every = None, list(range(len(l1s)))
    if len(every) >= FEWEST_GROUPS - 1:  # G groups have G − 1 contrasts
        left_out = [relative([j for j in every if j != out]) for out in every]
        error = _divide(jackknife_error(relative(every), left_out, [1] * len(every)), relative(every)) * value
        error = error if math.isfinite(error) else None
    return max(1.0, min(value, math.sqrt(norms.num_parameters))), error


def ratio_bounds(
    errors: _Errors,
    folded: _Errors,
    norms: GradientNorms,
    signal: Callable[[Sums], float],
    population: float | None,
) -> tuple[float, float | None, float, float | None]:
    """Returns bounds on the noise-free r = ‖∇f‖₁/‖∇f‖₂: (low, its standard error, high, its standard error).

    Both bounds on ‖∇f‖₁ hold in expectation for noise of any distribution. Above, ‖∇f‖₁ = ‖E ḡ‖₁ ≤ E‖ḡ‖₁. Below, the mean
    ḡ_j of one group is independent of the signs s_j of the sum of the other groups, so E⟨s_j, ḡ_j⟩ = ⟨E s_j, ∇f⟩ ≤
    ‖∇f‖₁. A finite population of N batches is drawn without repeats, so ḡ_j is unbiased for the batches that the n_A
    others ("A") leave, and ⟨s_j, ∇f⟩ is estimated by ((N − n_A) ⟨s_j, ḡ_j⟩ + n_A ‖ḡ_A‖₁)/N. The lower bound is the mean of
    these over the groups.

    For Gaussian noise and many groups, the lower bound is h(τ) − τ h'(τ) with h(τ) = E‖∇f + τ ξ‖₁ and τ² = 1/n − 1/N. It is
    near the truth if the coordinates of ∇f are either zero or far above their noise, the upper bound if few are zero.

    Args:
        errors: standard errors over the groups of all batches; l1 > 0.
        folded: the same over the folds.
        norms: norms of the mean gradient, over all coordinates.
        signal: ‖∇f‖₂² without the noise, from sums; > 0 for all batches.
        population: as `estimate_noise`.
    """
    whole, folds = errors.whole, folded.whole
    root, most = math.sqrt(signal(whole)), math.sqrt(norms.num_parameters)
    to_exact = norms.grad_l1 / whole.l1  # ‖·‖₁ of `whole` is from a sample of the coordinates
    share = 1 - signal(whole) / norms.grad_l2**2

    def high_ratio(part: Sums) -> float:
        return _divide(part.l1 * to_exact, math.sqrt(max(signal(part), 0.0)))

    high, high_error = norms.grad_l1 / root, errors.of(high_ratio, 0.5 * norms.grad_l1 / root * share)
    if _tau(whole.num_batches, population) == 0:  # ḡ is ∇f
        return high, high_error, high, high_error

    def low_ratio(part: Sums) -> float:
        return _divide(part.aligned * to_exact, math.sqrt(max(signal(part), 0.0)))

    low = _aligned_l1(folds, population) * to_exact / root
    low_error = folded.of(low_ratio, 0.5 * low * share)
    high = max(1.0, min(high, most))
    return max(1.0, min(low, high)), low_error, high, high_error


def l1_bounds(
    groups: BatchGroups, norms: GradientNorms, population: float | None = None
) -> tuple[float, float | None, float, float | None]:
    """Returns bounds on ‖∇f‖₁ of the noise-free vector: (low, its standard error, high, its standard error).

    `ratio_bounds` derives them. An error is None below `FEWEST_GROUPS` groups.

    Args:
        groups: sums over at least two groups, from `GroupedBatches.finish`.
        norms: norms of the mean over all batches, over all coordinates.
        population: as `estimate_noise`.
    """
    whole = groups.prefixes[max(groups.prefixes)]
    errors, folded = (_Errors(part, groups.sketch_error, population) for part in (whole, groups.folds))
    to_exact = norms.grad_l1 / whole.l1 if whole.l1 > 0 else 1.0
    high, has_errors = norms.grad_l1, len(whole.without) >= FEWEST_GROUPS
    high_error = errors.of(lambda part: part.l1 * to_exact, 0.0) if has_errors else None
    if _tau(whole.num_batches, population) == 0:
        return high, high_error, high, high_error
    low = max(0.0, min(_aligned_l1(groups.folds, population) * to_exact, high))
    low_error = folded.of(lambda part: part.aligned * to_exact, 0.0) if has_errors else None
    if low_error is not None:
        low_error = math.hypot(low_error, groups.sample_error * low)
    return low, low_error, high, high_error


def _aligned_l1(folds: Prefix, population: float | None) -> float:
    """The lower bound on ‖∇f‖₁ of the sampled coordinates."""
    below = 0.0
    for aligned, part in zip(folds.aligned_by_group, folds.without, strict=True):
        known = min(1.0, part.num_batches * _inverse(population))
        below += (folds.count - part.count) * ((1 - known) * aligned + known * part.l1)
    return below / folds.count


def make_rung(num_batches: int, norms: GradientNorms, groups: BatchGroups, population: float | None = None) -> Rung:
    """Combines the exact norms of the first `num_batches` batches with the scatter of r between groups.

    Args:
        num_batches: k.
        norms: norms of the mean over them.
        groups: from `GroupedBatches.finish`.
        population: as `estimate_noise`.
    """
    level = num_batches.bit_length() - 1
    ratios = groups.ratios.get(level, []) if num_batches == 1 << level else []
    error, count = None, max(1, len(ratios))
    if len(ratios) >= FEWEST_GROUPS:
        mean = math.fsum(ratios) / count
        spread = math.sqrt(math.fsum((ratio - mean) ** 2 for ratio in ratios) / (count - 1))
        error = _divide(spread, mean)
    elif (prefix := groups.prefixes.get(num_batches)) is not None and len(prefix.without) >= FEWEST_GROUPS:
        count = len(prefix.without)
        spread = jackknife_error(_ratio(prefix), list(map(_ratio, prefix.without)), prefix.group_sizes)
        error = _divide(spread, _ratio(prefix))
    if error is not None:  # relative so far, so that the sketch's own r cancels
        error *= norms.norm_ratio * math.sqrt(unseen(num_batches, population))
        error = error if math.isfinite(error) else None
    return Rung(num_batches, norms.grad_l1, norms.grad_l2, norms.norm_ratio, norms.norm_ratio_over_sqrt_d, error, count)


def unseen(num_batches: int, population: float | None) -> float:
    """Finite-population factor 1 − n/N of the variance of a mean; 1 for an unlimited population."""
    return max(0.0, 1 - num_batches * _inverse(population))


def as_dict(item: NoiseEstimate | Rung) -> dict[str, Any]:
    """Returns the fields by name, ready for JSON."""
    return asdict(item)


class _Errors:
    """Standard errors by the jackknife over the groups of a prefix, at least two."""

    def __init__(self, whole: Prefix, sketch_error: float, population: float | None) -> None:
        self.whole, self.sketch_error = whole, sketch_error
        self.unseen = unseen(whole.num_batches, population)

    def of(self, functional: Callable[[Sums], float], sketched: float) -> float | None:
        """Returns the standard error of a functional of the sums, or None if it is not finite.

        Args:
            functional: the estimate, from the sums over some batches.
            sketched: derivative of the estimate by ln σ², which the sketch determines up to `sketch_error`.
        """
        left_out = [functional(part) for part in self.whole.without]
        error = jackknife_error(functional(self.whole), left_out, self.whole.group_sizes)
        error = math.hypot(error * math.sqrt(self.unseen), self.sketch_error * sketched)
        return error if math.isfinite(error) else None


def _ratio(part: Sums) -> float:
    return _divide(part.l1, math.sqrt(part.squares))


def _divide(a: float, b: float) -> float:
    """The quotient; NaN if the divisor is 0 or NaN."""
    return a / b if b else math.nan


def _tau(num_batches: int, population: float | None) -> float:
    return math.sqrt(max(0.0, 1 / num_batches - _inverse(population)))


def _inverse(population: float | None) -> float:
    return 0.0 if population is None else 1 / population
