"""Unbiased estimates of the noise in an averaged gradient, from norms of small and large batches.

For independent batches, the mean ḡ_k of k of them has E‖ḡ_k‖² = ‖∇f‖² + σ²/k, where σ² = E‖g − ∇f‖² of one batch. Two
sizes give both unknowns. The norm of the mean alone determines neither. Its ratio ‖·‖₁/‖·‖₂ tends to 0.798 √d if noise
dominates, for any ∇f.

Source: McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_lion.gradient.coordinate_sample import Group
from megatron_lion.gradient.norms import GradientNorms

_ENOUGH_PAIRS = 4  # fewest pairs of groups that a standard deviation is computed from; 8 batches have so many


@dataclass(frozen=True)
class NoiseEstimate:
    """Signal and noise in the mean of `num_batches` global batches.

    Attributes:
        noise_variance: σ² of one global batch, E‖g − ∇f‖₂².
        noise_variance_standard_error: from the spread of ‖g‖² between batches.
        signal_l2_squared: ‖∇f‖₂² without the noise; unbiased, hence sometimes negative if noise dominates.
        signal_standard_error: from the spread of ⟨ḡ_a, ḡ_b⟩ between disjoint groups; an overestimate. None below 8
            batches.
        noise_share: σ²/n divided by ‖ḡ‖₂²: 0 for a gradient without noise, about 1 for pure noise.
        grad_l2_corrected: √signal_l2_squared, or 0 if that is negative.
        noise_scale_samples: σ²/‖∇f‖² times the batch size, McCandlish's B_simple; None if the signal is not positive.
        is_resolved: whether the signal is larger than twice its standard error; None if that error is not known.
        sampled_fraction: share of the coordinates that the estimates of single batches use (norms of the whole mean are
            exact).
    """

    noise_variance: float
    noise_variance_standard_error: float
    signal_l2_squared: float
    signal_standard_error: float | None
    noise_share: float
    grad_l2_corrected: float
    noise_scale_samples: float | None
    is_resolved: bool | None
    sampled_fraction: float


@dataclass(frozen=True)
class Rung:
    """The mean gradient over the first `num_batches` batches.

    Attributes:
        num_batches: number of batches k.
        grad_l1, grad_l2, norm_ratio, norm_ratio_over_sqrt_d: over all coordinates, exact.
        num_groups: disjoint groups of k batches in the probe.
        norm_ratio_std: standard deviation of the ratio between these groups, from the sampled coordinates, scaled to
            the exact ratio; None for a single group.
    """

    num_batches: int
    grad_l1: float
    grad_l2: float
    norm_ratio: float
    norm_ratio_over_sqrt_d: float
    num_groups: int
    norm_ratio_std: float | None


def rungs_of(num_batches: int) -> list[int]:
    """Returns the numbers of batches at which the running sum is read.

    Example:
        >>> rungs_of(10), rungs_of(1)
        ([1, 2, 4, 8, 10], [1])
    """
    powers = [1 << level for level in range(num_batches.bit_length())]
    return [*(k for k in powers if k < num_batches), num_batches]


def mccandlish(small_squares: float, small: float, big_squares: float, big: float) -> tuple[float, float]:
    """Returns (‖∇f‖², σ² of a batch of size 1), from ‖ḡ‖² at two batch sizes.

    Example:
        >>> mccandlish(small_squares=5.0, small=1, big_squares=1.4, big=10)  # 1 + 4/1 and 1 + 4/10
        (1.0, 4.0)
    """
    signal = (big * big_squares - small * small_squares) / (big - small)
    variance = (small_squares - big_squares) / (1 / small - 1 / big)
    return signal, variance


def estimate_noise(
    groups: Sequence[Group], whole: Group, norms: GradientNorms, *, batch_samples: int, sampled_fraction: float
) -> NoiseEstimate | None:
    """Estimates signal and noise from all single batches of a probe.

    Returns None for a probe of one batch, a gradient of zero or a gradient that is not finite.

    Args:
        groups, whole: from a `CoordinateSample`.
        norms: norms of the mean gradient, over all coordinates.
        batch_samples: number of samples of a global batch.
        sampled_fraction: share of the coordinates in the sample.
    """
    singles = [group.squares for group in groups if group.level == 0]
    n = len(singles)
    if n < 2 or whole.squares <= 0 or not math.isfinite(norms.grad_l2):
        return None
    to_whole = norms.grad_l2**2 / whole.squares  # 1 if every coordinate is in the sample
    mean_single = math.fsum(singles) / n
    signal, variance = mccandlish(mean_single * to_whole, 1, norms.grad_l2**2, n)
    variance_error = _std(singles) / math.sqrt(n) * n / (n - 1) * to_whole
    dots = _dots_of_best_level(groups)
    signal_error = _std(dots) / math.sqrt(len(dots)) * to_whole if dots else None
    return NoiseEstimate(
        noise_variance=variance,
        noise_variance_standard_error=variance_error,
        signal_l2_squared=signal,
        signal_standard_error=signal_error,
        noise_share=variance / n / norms.grad_l2**2,
        grad_l2_corrected=math.sqrt(max(0.0, signal)),
        noise_scale_samples=variance / signal * batch_samples if signal > 0 else None,
        is_resolved=signal > 2 * signal_error if signal_error is not None else None,
        sampled_fraction=sampled_fraction,
    )


def make_rung(num_batches: int, norms: GradientNorms, groups: Sequence[Group]) -> Rung:
    """Combines the exact norms of the first `num_batches` batches with the spread between groups of that size."""
    level = num_batches.bit_length() - 1
    ratios = [group.l1 / math.sqrt(group.squares) for group in groups if group.level == level and group.squares > 0]
    is_power = num_batches == 1 << level
    count = len(ratios) if is_power else 1
    std = _std(ratios) / (math.fsum(ratios) / count) * norms.norm_ratio if is_power and count > 1 else None
    return Rung(
        num_batches, norms.grad_l1, norms.grad_l2, norms.norm_ratio, norms.norm_ratio_over_sqrt_d, max(1, count), std
    )


def as_dict(item: NoiseEstimate | Rung) -> dict[str, Any]:
    """Returns the fields by name, ready for JSON."""
    return asdict(item)


def _dots_of_best_level(groups: Sequence[Group]) -> list[float]:
    """Inner products of disjoint halves at the highest level that has enough; larger groups are less noisy."""
    for level in range(max((group.level for group in groups), default=0), 0, -1):
        dots = [group.dot for group in groups if group.level == level and group.dot is not None]
        if len(dots) >= _ENOUGH_PAIRS:
            return dots
    return []


def _std(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
