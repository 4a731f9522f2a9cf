"""A run's measured mean KKT residual and the bound at its own settings, both with the learning rates as weights.

Measured are the rates, the residual R and σ² at the probes, ‖∇f(θ¹)‖₂ and max‖θ‖∞. Assumed are L and Δ, and what R, σ² and
‖θ‖∞ are between the probes. The records give only a lower bound on L, so a curve for it is an estimate, not a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lion.intervals import LEVEL
from megatron_lion.runs.record import RunRecord
from megatron_lion.theory.estimate import estimate_gap, estimate_smoothness
from megatron_lion.theory.probe_noise import l2_norms, read_probe_noise
from megatron_lion.theory.rates import Weighting, spread_over_steps
from megatron_lion.theory.schedule_bound import schedule_bound
from megatron_lion.theory.symbols import Array, Terms

L_FACTORS = (1, 10, 100)
"""Multiples of the lower bound on L that are evaluated if L is not given."""


@dataclass(frozen=True)
class BoundCurve:
    """The bound for one value of L.

    Attributes:
        label: 'L given', or the multiple of the lower bound on L.
        smoothness: L.
        terms: summands of the bound at K = 1, 2, …, arrays of shape (K,).
    """

    label: str
    smoothness: float
    terms: Terms


@dataclass(frozen=True)
class RunBound:
    """Both sides at K = 1, 2, … up to the last probe's step.

    Attributes:
        measured: Σ η_k R(θ^k)/Σ η_k; NaN as long as every η is 0.
        key: the metric that R was read from: 'probe/kkt_residual', or 'probe/grad_l1' without weight decay.
        curves: the bounds, ascending in L; empty for the reason `missing`.
        facts: one line of text for each number used: what it is, and whether it was measured or assumed.
        missing: why there is no bound; empty if there is one.
    """

    measured: Array
    key: str
    curves: tuple[BoundCurve, ...]
    facts: tuple[str, ...]
    missing: str


def run_bound(
    run: RunRecord,
    *,
    smoothness: float | None = None,
    noise_variance: float | None = None,
    gap: float | None = None,
    weighting: Weighting = "linear",
    confidence: float = LEVEL,
) -> RunBound | None:
    """Both sides of the schedule bound for a LION run; None for another optimizer or without two probes and rates.

    Args:
        run: records with 'optim/lr' and probes.
        smoothness: L; by default multiples of the run's lower bound.
        noise_variance: σ² of every step; by default the probes' estimates, linear between probes.
        gap: Δ; by default the first probe's loss (f* = 0).
        weighting: R between probes, 'linear' or 'hold'; 'probes' is read as 'linear', because the bound counts steps.
        confidence: of the lower bound on L.
    """
    key = "probe/kkt_residual" if run.series("probe/kkt_residual") else "probe/grad_l1"
    if run.optimizer != "lion" or not run.series("optim/lr") or len(run.series(key).steps) < 2:
        return None
    if max(run.series("optim/lr").values) <= 0:
        return None
    steps, residual = run.need(key).arrays()
    lr_steps, logged = run.need("optim/lr").arrays()
    k = np.arange(1, int(steps[-1]) + 1)
    lr = np.maximum(np.interp(k, lr_steps, logged), 0.0)
    dense = spread_over_steps(steps, residual, "hold" if weighting == "hold" else "linear")[: len(k)]
    total = np.cumsum(lr)
    measured = np.divide(np.cumsum(lr * dense), total, out=np.full(len(k), math.nan), where=total > 0)
    facts = [f"R: measured at {len(steps)} probes ({key}); ‖ḡ‖₁ in it is too large by its noise"]
    if key == "probe/grad_l1" and run.settings.get("optimizer.weight_decay"):
        facts[0] += ". The records have no R for this weight decay, so ‖∇f‖₁ replaces it"
    facts += _gaps(run, steps, lr_steps)
    problem: dict[str, Any] = {"d": run.dimension, **_start(run, facts), **_reach(run, facts), **_betas(run, facts)}
    missing = []
    noise = read_probe_noise(run)
    if noise_variance is not None:
        problem["sigma"] = math.sqrt(noise_variance)
        facts.append(f"σ² = {noise_variance:.4g}: given")
    elif noise is not None:
        variance = np.interp(k, noise.steps + 1, np.maximum(noise.values, 0.0))
        problem["sigma"] = np.sqrt(variance)
        facts.append(
            f"σ²: measured at {len(noise.values)} probes ({noise.values.min():.4g} to {noise.largest:.4g}), linear between them"
            + ("; a negative estimate counts as 0" if noise.values.min() < 0 else "")
        )
    else:
        missing.append("σ²: give --noise-variance")
    ends = estimate_gap(run, confidence)
    if gap is None and steps[0] > 0:
        missing.append(f"Δ, because the first probe is at step {int(steps[0]):,}: give --gap")
    elif gap is None and ends is not None and ends.high > 0:
        gap = ends.high
        facts.append(f"Δ = {gap:.4g}: assumed, the loss at step {ends.first_step} with f* = 0")
    elif gap is not None:
        facts.append(f"Δ = {gap:.4g}: given")
    else:
        missing.append("Δ: give --gap")
    found = estimate_smoothness(run, noise, confidence) if smoothness is None else None
    levels = [] if smoothness is None else [("L given", smoothness)]
    if found is not None:
        levels = [(f"L × {factor}", factor * found.low) for factor in L_FACTORS]
        source = "the change of the gradient" if found.is_measured else "the norms"
        facts.append(
            f"L: assumed to be 1, 10 or 100 times the lower bound {found.low:.4g}, from {source} at steps {found.pair[0]} and "
            f"{found.pair[1]}"
        )
    elif smoothness is not None:
        facts.append(f"L = {smoothness:.4g}: given")
    else:
        missing.append("L: give --smoothness")
    facts += _deviations(run)
    curves = () if missing else tuple(
        BoundCurve(label, level, schedule_bound(lr, L=level, gap=gap or 0.0, **problem)) for label, level in levels
    )  # fmt: skip
    return RunBound(measured, key, curves, tuple(facts), "; ".join(missing))


def _start(run: RunRecord, facts: list[str]) -> dict[str, float | None]:
    """‖∇f(θ¹)‖₂ for a momentum that starts at 0."""
    if run.settings.get("optimizer.init_exp_avg") == "first_gradient":
        facts.append("m⁰ = g¹")
        return {"first_grad_l2": None}
    steps, norms, _ = l2_norms(run)
    corrected = run.series("probe/grad_l2_corrected")
    kind = "without the noise of the probe" if steps[0] in corrected.steps else "with the noise of the probe"
    where = "" if steps[0] == 0 else f", assumed equal to that of the first probe at step {int(steps[0])}"
    facts.append(f"m⁰ = 0; ‖∇f(θ¹)‖₂ = {norms[0]:.4g}, measured, {kind}{where}")
    return {"first_grad_l2": float(norms[0])}


def _gaps(run: RunRecord, steps: Array, lr_steps: Array) -> list[str]:
    """What is assumed of R and η where the records have none."""
    found, last = [], int(steps[-1])
    if steps[0] > 0:
        found.append(f"R before step {int(steps[0])}: assumed equal to that of the first probe")
    if last < run.last_step:
        found.append(f"R is known up to step {last:,} of {run.last_step:,}; both sides end there")
    probes = len(run.series("probe/num_batches").steps)
    if probes > len(steps):
        found.append(f"{probes - len(steps)} of {probes} probes have no finite R; linear between the others")
    if any(run.series("probe/is_moving").values):
        found.append(
            "the probes are moving windows: R is of the mean gradient of several steps, each at its own parameters"
        )
    if lr_steps[-1] < last:
        found.append(f"η after step {int(lr_steps[-1])}: assumed equal to that of this step, the last one logged")
    return found


def _reach(run: RunRecord, facts: list[str]) -> dict[str, float]:
    """ρ ≥ λ‖θ^k‖∞; 1 without a measurement, which holds in the box."""
    decay, sizes = run.settings.get("optimizer.weight_decay"), run.series("probe/theta_linf")
    if not isinstance(decay, int | float) or not sizes:
        facts.append("λ‖θ‖∞ ≤ 1: assumed (the box)")
        return {"reach": 1.0}
    if decay == 0:
        facts.append("λ = 0: there is no box, and a step moves θ by at most η√d")
        return {"reach": 0.0}
    reach = float(decay) * max(sizes.values)
    facts.append(f"λ‖θ‖∞ ≤ {reach:.3g}: the largest of the probes, assumed to hold between them")
    return {"reach": reach}


def _betas(run: RunRecord, facts: list[str]) -> dict[str, float]:
    betas = run.settings.get("optimizer.betas") or (0.9, 0.95)
    facts.append(f"β = ({betas[0]:g}, {betas[1]:g}), d = {run.dimension:,}")
    return {"beta1": float(betas[0]), "beta2": float(betas[1])}


def _deviations(run: RunRecord) -> list[str]:
    """How the run differs from Algorithm 1, and its noise from that of the probes."""
    found = []
    clip, norms = run.settings.get("optimizer.clip_grad"), run.series("optim/grad_l2")
    share = (
        float(np.mean(np.asarray(norms.values) > clip)) if isinstance(clip, int | float) and clip > 0 and norms else 0.0
    )
    if share:
        found.append(
            f"g was clipped to norm {clip:g} in {share:.0%} of the logged steps, which Algorithm 1 does not do"
        )
    rates = [run.settings.get(f"model.{name}_dropout") for name in ("hidden", "attention")]
    if run.settings.get("probe.dropout") is not True and any(
        isinstance(rate, int | float) and rate > 0 for rate in rates
    ):
        found.append("training used dropout, the probes did not: its noise is not in the measured σ²")
    return found
