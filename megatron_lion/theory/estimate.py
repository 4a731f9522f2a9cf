"""Estimates of L, σ² and Δ from the records of a run, with the assumptions of each.

Norms along one path determine none of the three: Assumptions 1 and 3 concern all θ, f* is unknown, and probes
average a finite number of batches. Each number is therefore labelled as a lower bound, an upper bound or an
estimate. `megatron_lion.theory.advice` shows how Corollary 3's choice changes if L exceeds its lower bound.

σ² comes from the probes themselves if they are frozen (`megatron_lion.theory.probe_noise`). `estimate_variance` is the
fallback for records without that estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_lion.intervals import LEVEL, t_quantile
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.smoothness_files import read_all_smoothness
from megatron_lion.theory.probe_noise import ProbeNoise
from megatron_lion.theory.symbols import Array


@dataclass(frozen=True)
class VarianceEstimate:
    """σ² at each probe with training steps nearby, from training norms and interpolated probes; arrays of shape (probes,).

    No interval follows from `std`: the error of the interpolation is not in it and is usually larger.

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
        first_loss: loss of the first probe that has one (nats per token), used as f(θ¹).
        first_step: step of that probe.
        low: `first_loss` minus the smallest probed loss; the smallest of several noisy losses makes it too large.
        high: `first_loss`, since a cross-entropy is never negative; an upper value only if `not_start` is empty.
        low_bound, high_bound: ends that hold together with `confidence`, given the standard errors of the probes' losses;
            None if a probe has no standard error. `high_bound` is also None if `not_start` is not empty; `low_bound` then
            assumes that f(θ¹) was not below `first_loss`.
        confidence: nominal coverage of the two bounds, in (0, 1).
        not_start: why `first_loss` does not measure f(θ¹); empty if it does.
    """

    first_loss: float
    first_step: int
    low: float
    high: float
    low_bound: float | None
    high_bound: float | None
    confidence: float
    not_start: str = ""


@dataclass(frozen=True)
class SmoothnessEstimate:
    """Lower bounds on L.

    Attributes:
        low: the larger of two estimates: ‖∇f(θ_a) − ∇f(θ_b)‖₂/‖θ_a − θ_b‖₂, if it was measured (`measured_smoothness`), and
            the max over pairs of probes of |‖∇f(θ_a)‖₂ − ‖∇f(θ_b)‖₂| over an upper bound on ‖θ_a − θ_b‖₂. It is the
            largest of several noisy ratios, hence not a bound if the noise is large.
        pair: steps of the two points of `low`.
        bound: lower bound that holds with at least `confidence`, given the noise of the norms; 0 if the norms do not
            differ by more than their noise, None if the records have no noise estimate.
        confidence: nominal coverage of `bound`, in (0, 1).
        is_measured: whether `low` is the change of the gradient itself, not of its norm.
    """

    low: float
    pair: tuple[int, int]
    bound: float | None
    confidence: float
    is_measured: bool = False


def estimate_variance(run: RunRecord, *, window: int | None = None, at_least: int = 3) -> VarianceEstimate | None:
    """Estimates σ² from the norms of training batches and the norm of the probe's mean over B batches; a fallback.

    E‖g‖² = ‖∇f‖² + σ² and E‖ḡ‖² = ‖∇f‖² + σ²/B give the unbiased pair

        σ²    = (mean ‖g‖² − ‖ḡ‖²) / (1 − 1/B)
        ‖∇f‖² = ‖ḡ‖² − σ²/B

    where ‖ḡ‖² is interpolated between probes, since ‖∇f‖ changes along the run. This assumes that the probe's batches
    are as large as the run's global batches, that ‖∇f‖² is about linear between probes, and that the batches are
    independent. A convex ‖∇f‖² lies below its interpolation, which makes σ² too low. With dropout in training only, E g is
    not the probe's ∇f either.

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


def estimate_gap(run: RunRecord, confidence: float = LEVEL) -> GapEstimate | None:
    """Lower and upper bound on Δ from the probes' losses, or None if no probe has a loss.

    For every probe i, f(θ¹) − f(θ_i) ≤ Δ. With α = 1 − confidence and k later probes, `low_bound` is the largest lower end
    of these differences at level α/(2k) each (Bonferroni), and at least 0. `high_bound` is the upper end of f(θ¹) at level
    α/2. The error of a difference is √(e₁² + e_i²); probes of the same samples have a smaller one.

    Only a frozen probe at step 0 measures f(θ¹). A later one, or a window of training steps, measures a loss that has
    already fallen, so its upper end is no bound on Δ.
    """
    if "probe/loss" not in run.metrics:
        return None
    steps, losses = run.need("probe/loss").arrays()
    first, low_bound, high_bound, not_start = float(losses[0]), None, None, _why_not_start(run, int(steps[0]))
    errors, freedom = _at(run, "probe/loss_standard_error", steps), _at(run, "probe/num_batches", steps) - 1
    if np.all(errors >= 0) and np.all(freedom >= 1):  # False for NaN
        later = len(steps) - 1
        ends = [
            first
            - loss
            - t_quantile(min(freedom[0], number), 1 - (1 - confidence) / later) * math.hypot(errors[0], error)
            for loss, error, number in zip(losses[1:], errors[1:], freedom[1:], strict=True)
        ]
        low_bound = float(max(0.0, *ends)) if ends else 0.0
        high_bound = None if not_start else float(first + t_quantile(freedom[0], confidence) * errors[0])
    low = first - float(losses.min())
    return GapEstimate(first, int(steps[0]), low, first, low_bound, high_bound, confidence, not_start)


def _why_not_start(run: RunRecord, step: int) -> str:
    """Returns why the first probe with a loss, at `step`, does not measure f(θ¹), or an empty string."""
    first = min(series.steps[0] for key, series in run.metrics.items() if key.startswith("probe/"))
    if first < step:
        return f"the first probe, at step {first}, has no loss"
    if step > 0:
        return f"the first probe is at step {step}, not 0"
    moving = _at(run, "probe/is_moving", np.array([step]))[0] == 1
    return "the first probe is a window of training steps, not frozen" if moving else ""


def estimate_smoothness(
    run: RunRecord, noise: ProbeNoise | VarianceEstimate | None = None, confidence: float = LEVEL
) -> SmoothnessEstimate | None:
    """A lower bound on L, measured along the run's steps, or from gradient norms and an upper bound on LION's path length.

    |‖∇f(θ_a)‖₂ − ‖∇f(θ_b)‖₂| ≤ ‖∇f(θ_a) − ∇f(θ_b)‖₂ ≤ L ‖θ_a − θ_b‖₂ and
    ‖θ_a − θ_b‖₂ ≤ Σ_{a<t≤b} η_t √d (1 + λ max‖θ‖∞), where inside the box λ‖θ‖∞ ≤ 1.

    The path zigzags, and gradients turn without changing length, so the true L is usually far larger. For SGD and
    AdamW the records give no such bound on the path. With results of `probe --smoothness`, both numbers are the larger ones.

    Args:
        run: a LION run with 'optim/lr' and 'probe/grad_l2'. max‖θ‖∞ is that of 'probe/theta_linf'; without it, or
            without λ in config.yaml, λ‖θ‖∞ = 1 is assumed.
        noise: noise estimate that is subtracted from the squared norms; without it they are too large for a small ∇f.
            `SmoothnessEstimate.bound` needs a `ProbeNoise`: it is the largest ratio of the gap between two ranges of
            `ProbeNoise.norm_ranges`, which hold for all probes at once, so that it holds for the largest ratio, too.
        confidence: coverage of the bound.

    Returns:
        The bounds, or None without a measurement and for another optimizer, fewer than two probes, or equal norms.

    Raises:
        DataError: a result of `probe --smoothness` is damaged.
    """
    measured, from_norms = measured_smoothness(run, confidence), _from_norms(run, noise, confidence)
    if measured is None or from_norms is None:
        return measured or from_norms
    # Both bounds hold together with `confidence`, so the larger one may be taken.
    halved = (1 + confidence) / 2
    ends = [found.bound for found in (measured_smoothness(run, halved), _from_norms(run, noise, halved)) if found]
    larger = max(measured, from_norms, key=lambda found: found.low)
    return replace(larger, bound=max((end for end in ends if end is not None), default=None))


def measured_smoothness(run: RunRecord, confidence: float = LEVEL) -> SmoothnessEstimate | None:
    """The largest ‖∇f(θ') − ∇f(θ)‖₂/‖θ' − θ‖₂ of the run's results of `probe --smoothness`; None without a resolved one.

    Used are results of training samples in fp32 with at least four groups of batches. In half precision the change of the
    rounding is in the change of the gradient. `low` is the largest resolved value. `bound` is the largest lower end of all
    m results at level α/m each (Bonferroni), resolved or not: if only the resolved ones were counted, results that passed
    by chance would give too large a bound.

    Raises:
        DataError: a result is damaged.
    """
    found = [
        item
        for item in read_all_smoothness(run.folder)
        if item["data"] != "test" and item["precision"] == "fp32" and item["all"]["is_resolved"] is not None
    ]
    resolved = [item for item in found if item["all"]["is_resolved"] and item["all"]["smoothness_l2"]]
    if not resolved:
        return None
    largest = max(resolved, key=lambda item: float(item["all"]["smoothness_l2"]))
    # t_quantile is two-sided: level 1 − 2α leaves α below. A confidence below ½ asks for no margin.
    level = max(1e-9, 1 - 2 * (1 - confidence) / len(found))
    ends = [0.0]
    for part in (item["all"] for item in found):
        value, error = part["smoothness_l2"], part["smoothness_l2_standard_error"]
        if value is not None and error is not None:
            # The interval is that of the square, whose estimate is unbiased; its error is 2 · value · error.
            ends.append(math.sqrt(max(0.0, value**2 - t_quantile(part["num_groups"] - 1, level) * 2 * value * error)))
    return SmoothnessEstimate(
        float(largest["all"]["smoothness_l2"]), (int(largest["step"]), int(largest["step"] + largest["num_steps"])),
        max(ends), confidence, is_measured=True,
    )  # fmt: skip


def _from_norms(
    run: RunRecord, noise: ProbeNoise | VarianceEstimate | None, confidence: float
) -> SmoothnessEstimate | None:
    if run.optimizer != "lion" or not {"optim/lr", "probe/grad_l2"} <= run.metrics.keys():
        return None
    steps, norms = run.need("probe/grad_l2").arrays()
    if noise is not None:
        steps, norms = noise.steps, np.sqrt(noise.signal_l2_squared)
    if len(steps) < 2:
        return None
    distance = _longest_way(run, steps)
    low, pair = _largest_ratio(np.abs(norms[:, None] - norms[None, :]), distance)
    if low <= 0:
        return None
    bound = None
    if isinstance(noise, ProbeNoise):
        lower, upper = noise.norm_ranges(confidence)
        bound, _ = _largest_ratio(lower[:, None] - upper[None, :], distance)
    return SmoothnessEstimate(low, (int(steps[pair[0]]), int(steps[pair[1]])), bound, confidence)


def _longest_way(run: RunRecord, steps: Array) -> Array:
    """Upper bounds on the distance of θ between every two of `steps` of a LION run, shape (steps, steps)."""
    lr_steps, lr = run.need("optim/lr").arrays()
    # Learning rates are interpolated between logged steps; travelled[t] is the sum of the rates of steps 1 … t.
    travelled = np.concatenate([[0.0], np.cumsum(np.interp(np.arange(1, int(steps[-1]) + 1), lr_steps, lr))])
    weight_decay, reach = run.settings.get("optimizer.weight_decay"), 1.0
    if isinstance(weight_decay, int | float) and "probe/theta_linf" in run.metrics:
        reach = float(weight_decay) * max(run.need("probe/theta_linf").values)
    way = (1 + reach) * math.sqrt(run.dimension) * travelled[steps.astype(int)]
    return np.asarray(np.abs(way[:, None] - way[None, :]))


def _largest_ratio(change: Array, distance: Array) -> tuple[float, tuple[int, int]]:
    """The largest change/distance of a pair of probes, at least 0, and the ascending indices of the pair."""
    ratio = np.divide(change, distance, out=np.zeros_like(change), where=distance > 0)
    first, second = sorted(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    return max(0.0, float(ratio.max())), (first, second)


def _at(run: RunRecord, key: str, steps: Array) -> Array:
    """The values of a metric at `steps`; NaN at a step without one."""
    series = run.series(key)
    values = dict(zip(series.steps, series.values, strict=True))
    return np.array([values.get(int(step), math.nan) for step in steps])
