"""The text of `megatron-lion theory`: rate constants, estimates and Corollary 3's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_lion.compare.table import markdown_grid
from megatron_lion.errors import ConfigError
from megatron_lion.runs.record import RunRecord
from megatron_lion.theory.advice import Advice, advice_table, advise, implied_smoothness
from megatron_lion.theory.estimate import estimate_gap, estimate_smoothness, estimate_variance
from megatron_lion.theory.rates import SeedRates, Weighting, rates_over_seeds

L_FACTORS = (1, 10, 100)
"""Multiples of the lower bound on L for which Corollary 3 is evaluated."""


def rates_section(runs: Sequence[RunRecord], weighting: Weighting, confidence: float) -> str:
    """Markdown with c_LION and c_SGD of the runs, with intervals over seeds.

    Raises:
        ConfigError: the runs differ in d, or share no probe step.
        CheckpointError: a run has no probes.
    """
    if len({run.dimension for run in runs}) > 1:
        sizes = ", ".join(f"{run.folder} {run.dimension}" for run in runs)
        raise ConfigError(f"the runs differ in num_parameters ({sizes}); give runs that differ in their seed only")
    scale = 1 / math.sqrt(runs[0].dimension)
    try:
        rows: list[tuple[str, SeedRates]] = [
            ("c_LION (‖∇f‖₁/√d)", _rates(runs, "probe/grad_l1", scale, weighting, confidence)),
            ("c_SGD (‖∇f‖₂)", _rates(runs, "probe/grad_l2", 1.0, weighting, confidence)),
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    columns = [
        "constant", f"of the mean over {len(runs)} run{'s' if len(runs) > 1 else ''}", "at K", "at the last K",
        f"bootstrap {confidence:.0%}", "mean of the runs' constants, t interval",
    ]  # fmt: skip
    cells = [
        [
            label, f"{rates.of_mean.value:.4g}", f"{rates.of_mean.at} of {rates.of_mean.steps}", f"{rates.of_mean.last:.4g}",
            _ends(rates.of_mean_interval), f"{rates.per_run_interval.mean:.4g}, {_ends(rates.per_run_interval)}",
        ]
        for label, rates in rows
    ]  # fmt: skip
    first = min(run.need("probe/grad_l1").steps[0] for run in runs)
    notes = [f"K counts {'probes' if weighting == 'probes' else 'optimizer steps'}, weighting '{weighting}'."]
    if first > 0 and weighting != "probes":
        notes.append(f"Before the first probe (step {first}) the norm is assumed to equal the first probe's.")
    if len(runs) == 1:
        notes.append("One run has no interval: give runs that differ in their seed.")
    if any(rates.of_mean.at == rates.of_mean.steps for _, rates in rows):
        notes.append("A maximum at the last K still grows: more steps would give a larger constant.")
    notes.append("The noise that remains in a probe's mean makes both norms, and hence both constants, too large.")
    return markdown_grid(columns, cells) + "\n\n" + " ".join(notes)


def _rates(runs: Sequence[RunRecord], key: str, scale: float, weighting: Weighting, confidence: float) -> SeedRates:
    return rates_over_seeds(
        [run.need(key).arrays() for run in runs], scale=scale, weighting=weighting, confidence=confidence
    )


def _ends(interval: Any) -> str:
    return "–" if math.isnan(interval.low) else f"[{interval.low:.4g}, {interval.high:.4g}]"


def advice_section(
    run: RunRecord,
    K: int | None,
    *,
    smoothness: float | None = None,
    noise_variance: float | None = None,
    gap: float | None = None,
) -> str:
    """Markdown with estimates of L, σ² and Δ from one run, and Corollary 3's choice for K steps.

    Args:
        run: records of the run.
        K: steps of the planned run; by default those of the run's schedule.
        smoothness: L, instead of the lower bound and its multiples.
        noise_variance: σ², instead of the estimate.
        gap: Δ, instead of both bounds.

    Raises:
        ConfigError: neither `K` nor config.yaml gives the number of steps.
    """
    K = K or run.scheduled_steps
    if K is None:
        raise ConfigError(f"{run.folder}: config.yaml does not set train.steps; give --steps K")
    noise, ends = estimate_variance(run), estimate_gap(run)
    bound = estimate_smoothness(run, noise)
    lines = [f"- K = {K}, d = {run.dimension:,}"]
    if noise_variance is not None:
        lines.append(f"- σ² = {noise_variance:.4g} (given)")
    elif noise is not None and noise.trusted.any():
        noise_variance = noise.largest
        lines.append(
            f"- σ² = {noise.largest:.4g}: the largest of {int(noise.trusted.sum())} trusted estimates (median "
            f"{noise.median:.4g}) of {len(noise.values)}, from single training batches and the probe's mean"
        )
    elif noise is not None:
        lines.append("- σ²: ‖∇f‖² changed more between the probes than the noise explains; no estimate is trusted")
    gaps = [("Δ given", gap)] if gap is not None else []
    if gap is None and ends is not None:
        lines.append(
            f"- Δ between {ends.low:.4g} (f* = smallest loss probed) and {ends.high:.4g} (f* = 0); f(θ¹) is "
            "the probe "
            f"at step {ends.first_step}" + ("" if ends.first_step == 0 else ", where the loss had already fallen")
        )
        gaps = [(label, value) for label, value in (("Δ low", ends.low), ("Δ high", ends.high)) if value > 0]
    scenarios: list[tuple[str, float]] = [("L given", smoothness)] if smoothness is not None else []
    if smoothness is None and bound is not None:
        lines.append(
            f"- L ≥ {bound.low:.4g}, from the probes at steps {bound.pair[0]} and {bound.pair[1]}; a lower bound: the "
            "true L is usually far larger"
        )
        scenarios = [(f"L × {factor}", factor * bound.low) for factor in L_FACTORS]
    missing = [
        text
        for absent, text in (
            (
                not scenarios,
                "L (needs a LION run, and two probes with three logged training norms near each): give --smoothness",
            ),
            (
                noise_variance is None,
                "σ²: give --noise-variance"
                if noise is not None
                else "σ² (needs probes of ≥ 2 batches with three logged optim/grad_l2 near each): give --noise-variance",
            ),
            (not gaps, "Δ (needs two probes with a loss): give --gap"),
        )
        if absent
    ]
    if missing or noise_variance is None:
        return "\n".join([*lines, *(f"- not estimated: {text}" for text in missing)])
    rows = [
        (
            f"{l_label}, {gap_label}",
            advise(K, L=L, noise_variance=noise_variance, gap=value, d=run.dimension),
        )
        for l_label, L in scenarios
        for gap_label, value in gaps
        if value is not None
    ]
    return "\n\n".join(["\n".join(lines), advice_table(rows), *_used(run, K, rows)])


def _used(run: RunRecord, K: int, rows: Sequence[tuple[str, Advice]]) -> list[str]:
    """The run's own β and η, and the L for which the corollary would have chosen them."""
    lr, betas = run.settings.get("optimizer.lr"), run.settings.get("optimizer.betas") or (0.9, 0.95)
    if run.optimizer != "lion" or not lr:
        return []
    advice = rows[-1][1]
    implied = implied_smoothness(
        K,
        beta2=float(betas[1]),
        lr=float(lr),
        noise_variance=advice.noise_variance,
        gap=advice.gap,
        d=advice.d,
    )
    return [
        f"The run used β = ({betas[0]:g}, {betas[1]:g}) and a peak η of {lr:g}. Corollary 3 would choose "
        "that β₂ for "
        f"L = {implied.from_beta2:.3g} and that η for L = {implied.from_lr:.3g} (Δ = {advice.gap:.3g})."
    ]
