"""σ² of Assumption 3, and ‖∇f‖₂ without its noise, from the estimates that frozen probes write to metrics.jsonl.

A frozen probe computes the gradients of B global batches at one θ. Their scatter gives an unbiased estimate of σ², with
a standard error, and ‖ḡ‖² minus the noise of the mean is unbiased for ‖∇f‖². Nothing is interpolated, and no training
record is used. Probes in moving mode, of one batch, or with probe.ladder false have no such estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lion.intervals import LEVEL, Interval, t_quantile
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.series import Series
from megatron_lion.theory.symbols import Array


@dataclass(frozen=True)
class ProbeNoise:
    """The noise estimates of the probes of a run; arrays of shape (probes,).

    Attributes:
        steps: steps of the probes with an estimate.
        values: unbiased estimates of σ² = E‖g − ∇f‖₂² of one global batch at the θ of each probe.
        standard_errors: standard error of each value; NaN if the record has none (fewer than 4 batches, older runs).
        freedom: degrees of freedom of each standard error, its groups − 1; NaN without a standard error.
        batches: number of batches B of each probe.
        mean_variance: noise variance of the mean of B batches: σ²/B, or less if B is a large part of the data set.
        mean_l2: norm ‖ḡ‖₂ of the mean gradient of each probe, with its noise.
        signal_l2_squared: estimate of ‖∇f‖₂² at each probe: unbiased, except that negative estimates are 0.
    """

    steps: Array
    values: Array
    standard_errors: Array
    freedom: Array
    batches: Array
    mean_variance: Array
    mean_l2: Array
    signal_l2_squared: Array

    @property
    def largest(self) -> float:
        """The largest value, used for the supremum of Assumption 3; the largest of several noisy values is too high."""
        return float(self.values.max())

    @property
    def largest_step(self) -> int:
        """Step of the largest value."""
        return int(self.steps[self.values.argmax()])

    @property
    def median(self) -> float:
        """Median of the values."""
        return float(np.median(self.values))

    @property
    def why_no_interval(self) -> str:
        """Why `interval` returns None; empty if it returns an interval."""
        if not np.isfinite(self.standard_errors).all():
            return "a probe has no standard error (fewer than 4 batches, or an older record)"
        rounding = np.flatnonzero(self.values <= 0)
        if not len(rounding):
            return ""
        return (
            f"the batches of the probe at step {int(self.steps[rounding[0]])} do not differ by more than rounding, as identical "
            f"batches do (σ² {self.values[rounding[0]]:.3g})"
        )

    def interval(self, confidence: float = LEVEL) -> Interval | None:
        """A confidence interval of the largest σ² at the probed parameters; None for the reason `why_no_interval`.

        With α = 1 − confidence and k probes, the interval is

            low  = max over probes of the lower end at level α/(2k)
            high = max over probes of the upper end at level α/2

        Low is wrong only if one of the k lower ends is (Bonferroni; valid for dependent probes, such as probes of the
        same samples). High is wrong only if the upper end of the one probe with the largest true σ² is, so it needs no
        correction for k. The supremum over all θ may exceed `high`: only `low` bounds it.

        The ends of a probe are value · exp(∓ t · standard error/value), with Student's t. On this scale an estimated
        variance is less skewed, and the lower end stays positive.

        Example:
            >>> groups, B = np.full(2, 20.0), np.full(2, 20.0)
            >>> steps, values, errors = np.array([0.0, 50.0]), np.array([0.5, 0.4]), np.full(2, 0.02)
            >>> found = ProbeNoise(steps, values, errors, groups - 1, B, values / B, B, B**2).interval()
            >>> round(found.low, 3), found.estimate, round(found.high, 3)
            (0.454, 0.5, 0.544)
        """
        if self.why_no_interval:
            return None
        alpha = 1 - confidence
        relative = self.standard_errors / self.values
        low = self.values * np.exp(-_t(self.freedom, 1 - alpha / len(self.values)) * relative)
        high = self.values * np.exp(_t(self.freedom, confidence) * relative)
        count = int(self.freedom.min()) + 1
        return Interval(
            estimate=self.largest, low=float(low.max()), high=float(high.max()), confidence=confidence, count=count
        )

    def norm_ranges(self, confidence: float = LEVEL) -> tuple[Array, Array]:
        """Lower and upper ends of ‖∇f‖₂ at every probe, which hold for all probes at once with at least `confidence`.

        The ends are ‖ḡ‖₂ ∓ t √v, where v is the noise variance of the mean. By the triangle inequality, ‖ḡ‖₂ differs from
        ‖∇f‖₂ by at most the norm of the mean's noise. For normal noise of a given v, this norm exceeds t √v most often if
        all noise has one direction; it is then Student's t. For other noise, the ranges are wider than necessary. The
        level of each probe is corrected for their number (Bonferroni).

        Source: Székely and Bakirov (2003), "Extremal probabilities for Gaussian quadratic forms", Probability Theory and
        Related Fields 126.
        """
        freedom = np.where(np.isfinite(self.freedom), self.freedom, self.batches - 1)
        error = _t(freedom, 1 - (1 - confidence) / len(self.values)) * np.sqrt(self.mean_variance)
        return np.maximum(self.mean_l2 - error, 0.0), self.mean_l2 + error


def read_probe_noise(run: RunRecord) -> ProbeNoise | None:
    """The noise estimates in a run's records, or None if no probe has one (see the module's description)."""
    rows = []
    errors, groups = (
        _by_step(run.series("probe/noise_variance_standard_error")),
        _by_step(run.series("probe/noise_groups")),
    )
    batches, norms = _by_step(run.series("probe/num_batches")), _by_step(run.series("probe/grad_l2"))
    corrected, shares = _by_step(run.series("probe/grad_l2_corrected")), _by_step(run.series("probe/noise_share"))
    variances = run.series("probe/noise_variance")
    for step, variance in zip(variances.steps, variances.values, strict=True):
        count = batches.get(step, 0.0)
        if count < 2 or step not in norms:
            continue
        freedom, error = groups.get(step, 0.0) - 1, errors.get(step, math.nan)
        if not (freedom >= 1 and error >= 0):
            freedom = error = math.nan
        # The share knows how much of the data set the probe averaged; older records always mean σ²/B.
        squared = norms[step] ** 2
        rest = max(0.0, shares[step] * squared if step in shares else variance / count)
        signal = corrected[step] ** 2 if step in corrected else max(0.0, squared - rest)
        rows.append((step, variance, error, freedom, count, rest, norms[step], signal))
    return ProbeNoise(*np.array(rows, dtype=np.float64).T) if rows else None


def l2_norms(run: RunRecord) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Steps and ‖∇f‖₂ at the probes, without the noise if the record has the corrected norm, and how many have it.

    At the other probes, the norm is that of the mean gradient (`probe/grad_l2`), which the noise makes too large.

    Raises:
        CheckpointError: the run has no probes.
    """
    steps, norms = run.need("probe/grad_l2").arrays()
    corrected = _by_step(run.series("probe/grad_l2_corrected"))
    found = [corrected.get(int(step), math.nan) for step in steps]
    has = np.isfinite(found)
    return steps, np.where(has, found, norms), int(has.sum())


def _by_step(series: Series) -> dict[int, float]:
    return dict(zip(series.steps, series.values, strict=True))


def _t(freedom: Iterable[float], confidence: float) -> Array:
    return np.array([t_quantile(float(number), confidence) for number in freedom])
