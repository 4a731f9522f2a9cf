"""Estimates of L, σ² and Δ from the records of a run, with the assumptions of each.

Norms along one path determine none of the three: Assumptions 1 and 3 concern all θ, f* is unknown, and probes
average a finite number of batches. Each number is therefore labelled as a lower bound, an upper bound or an
estimate. `megatron_lion.theory.advice` shows how Corollary 3's choice changes if L exceeds its lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_lion.runs.record import RunRecord
from megatron_lion.theory.symbols import Array


@dataclass(frozen=True)
class VarianceEstimate:
    """σ² of Assumption 3 at each probe with training steps nearby; arrays of shape (probes,).

    Attributes:
        steps: steps of the probes used.
        values: estimates of E‖g − ∇f‖₂² at each probe.
        std: standard error of each, from the scatter of the single batches only.
        drift: change of ‖∇f‖₂² within the window of each probe, by interpolation between probes.
        signal_l2_squared: ‖∇f‖₂² at each probe: the probe's squared norm, minus its remaining noise if trusted.
    """

    steps: Array
    values: Array
    std: Array
    drift: Array
    signal_l2_squared: Array

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Mask of the estimates that exceed both the drift and two standard errors; the others are mostly error."""
        return np.asarray((self.values > self.drift) & (self.values > 2 * self.std))

    @property
    def largest(self) -> float:
        """The largest trusted value, used for the supremum of Assumption 3; NaN if no value is trusted."""
        return float(self.values[self.trusted].max()) if self.trusted.any() else math.nan

    @property
    def median(self) -> float:
        """Median of the trusted values; NaN if no value is trusted."""
        return float(np.median(self.values[self.trusted])) if self.trusted.any() else math.nan


@dataclass(frozen=True)
class GapEstimate:
    """Δ = f(θ¹) − f*.

    Attributes:
        first_loss: loss of the first probe (nats per token), used as f(θ¹).
        first_step: step of the first probe; if it is not 0, the loss had already fallen.
        low: lower bound: `first_loss` minus the smallest probed loss, up to the error of two probes.
        high: upper bound: `first_loss`, since a cross-entropy is never negative.
    """

    first_loss: float
    first_step: int
    low: float
    high: float


@dataclass(frozen=True)
class SmoothnessEstimate:
    """A lower bound on L, up to the error of the probes.

    Attributes:
        low: max over pairs of probes of |‖∇f(θ_a)‖₂ − ‖∇f(θ_b)‖₂| over an upper bound on ‖θ_a − θ_b‖₂.
        pair: steps of the two probes.
    """

    low: float
    pair: tuple[int, int]


def estimate_variance(run: RunRecord, *, window: int | None = None, at_least: int = 3) -> VarianceEstimate | None:
    """Estimates σ² from the norms of single global batches and the norm of the probe's mean over B batches.

    E‖g‖² = ‖∇f‖² + σ² and E‖ḡ‖² = ‖∇f‖² + σ²/B give the unbiased pair

        σ²    = (mean ‖g‖² − ‖ḡ‖²) / (1 − 1/B)
        ‖∇f‖² = ‖ḡ‖² − σ²/B

    where ‖ḡ‖² is interpolated between probes, since ‖∇f‖ changes along the run. This assumes that the probe's batches
    are as large as the run's global batches, that ‖∇f‖² is about linear between probes, and that the batches are
    independent. Training gradients include the noise of dropout, as LION's g does.

    Args:
        run: records with 'optim/grad_l2' (before clipping), 'probe/grad_l2' and 'probe/num_batches'.
        window: largest distance in steps between a probe and its training records; by default half the smallest
            distance between probes, at most 50.
        at_least: number of training records that a probe needs within the window.

    Returns:
        Estimates, or None if the run has too few records.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", appendix A.1, with batches of 1
    and B.
    """
    if not {"optim/grad_l2", "probe/grad_l2", "probe/num_batches"} <= run.metrics.keys():
        return None
    train_steps, train_l2 = run.need("optim/grad_l2").arrays()
    probe_steps, probe_l2 = run.need("probe/grad_l2").arrays()
    counts_read = run.need("probe/num_batches")
    batches = dict(zip(counts_read.steps, counts_read.values, strict=True))
    if window is None:
        distance = float(np.diff(probe_steps).min()) if len(probe_steps) > 1 else 100.0
        window = max(1, min(50, int(distance / 2)))
    # The record of training step t has the gradient at the θ that a probe at step t - 1 measures.
    points = train_steps - 1
    between = (points >= probe_steps[0]) & (points <= probe_steps[-1]) if len(probe_steps) > 1 else points >= 0
    rows = []
    for step, mean_l2 in zip(probe_steps.tolist(), probe_l2.tolist(), strict=True):
        count = batches.get(step, 0)
        near = (np.abs(points - step) <= window) & between
        if count < 2 or near.sum() < at_least:
            continue
        # Squares are interpolated: the formula is linear in ‖ḡ‖², not in ‖ḡ‖.
        path = np.interp(points[near], probe_steps, probe_l2**2)
        excess = (train_l2[near] ** 2 - path) / (1 - 1 / count)
        error = float(excess.std(ddof=1)) / math.sqrt(len(excess))
        rows.append((step, float(excess.mean()), error, float(np.abs(path - mean_l2**2).max()), mean_l2**2, count))
    if not rows:
        return None
    steps, values, std, drift, mean_squared, counts = np.array(rows).T
    estimate = VarianceEstimate(steps, values, std, drift, mean_squared)
    left_over = np.where(estimate.trusted, values / counts, 0.0)
    return replace(estimate, signal_l2_squared=np.maximum(mean_squared - left_over, 0.0))


def estimate_gap(run: RunRecord) -> GapEstimate | None:
    """Lower and upper bound on Δ from the probes' losses, or None if no probe has a loss."""
    if "probe/loss" not in run.metrics:
        return None
    steps, losses = run.need("probe/loss").arrays()
    first = float(losses[0])
    return GapEstimate(first, int(steps[0]), first - float(losses.min()), first)


def estimate_smoothness(run: RunRecord, noise: VarianceEstimate | None = None) -> SmoothnessEstimate | None:
    """A lower bound on L from the change of the gradient norm and an upper bound on LION's path length.

    |‖∇f(θ_a)‖₂ − ‖∇f(θ_b)‖₂| ≤ ‖∇f(θ_a) − ∇f(θ_b)‖₂ ≤ L ‖θ_a − θ_b‖₂ and
    ‖θ_a − θ_b‖₂ ≤ Σ_{a<t≤b} η_t √d (1 + λ max‖θ‖∞), where inside the box λ‖θ‖∞ ≤ 1.

    The path zigzags, and gradients turn without changing length, so the true L is usually far larger. For SGD and
    AdamW the records give no such bound on the path.

    Args:
        run: a LION run with 'optim/lr' and 'probe/grad_l2'. max‖θ‖∞ is that of 'probe/theta_linf'; without it, or
            without λ in config.yaml, λ‖θ‖∞ = 1 is assumed.
        noise: noise estimate that is subtracted from the squared norms; without it they are too large for a small ∇f.

    Returns:
        The bound, or None for another optimizer or too few probes.
    """
    if run.optimizer != "lion" or not {"optim/lr", "probe/grad_l2"} <= run.metrics.keys():
        return None
    steps, norms = run.need("probe/grad_l2").arrays()
    if noise is not None:
        kept = np.isin(steps, noise.steps)
        steps, norms = steps[kept], np.sqrt(noise.signal_l2_squared)
    if len(steps) < 2:
        return None
    lr_steps, lr = run.need("optim/lr").arrays()
    # Learning rates are interpolated between logged steps; travelled[t] is the sum of the rates of steps 1 … t.
    travelled = np.concatenate([[0.0], np.cumsum(np.interp(np.arange(1, int(steps[-1]) + 1), lr_steps, lr))])
    weight_decay, reach = run.settings.get("optimizer.weight_decay"), 1.0
    if isinstance(weight_decay, int | float) and "probe/theta_linf" in run.metrics:
        reach = float(weight_decay) * max(run.need("probe/theta_linf").values)
    way = (1 + reach) * math.sqrt(run.dimension) * travelled[steps.astype(int)]
    distance = np.abs(way[:, None] - way[None, :])
    change = np.abs(norms[:, None] - norms[None, :])
    ratio = np.divide(change, distance, out=np.zeros_like(change), where=distance > 0)
    first, second = sorted(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    low = float(ratio.max())
    return SmoothnessEstimate(low, (int(steps[first]), int(steps[second]))) if low > 0 else None
