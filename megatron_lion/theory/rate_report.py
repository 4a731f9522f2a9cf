"""The text of `megatron-lion theory`: rate constants, estimates and Corollary 3's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from numpy.typing import ArrayLike

from megatron_lion.compare.table import markdown_grid
from megatron_lion.errors import ConfigError
from megatron_lion.intervals import LEVEL, Interval
from megatron_lion.runs.record import RunRecord
from megatron_lion.theory.advice import Advice, advice_table, advise, implied_smoothness
from megatron_lion.theory.estimate import (
    GapEstimate,
    SmoothnessEstimate,
    VarianceEstimate,
    estimate_gap,
    estimate_smoothness,
    estimate_variance,
)
from megatron_lion.theory.probe_noise import ProbeNoise, l2_norms, read_probe_noise
from megatron_lion.theory.rates import SeedRates, Weighting, rates_over_seeds
from megatron_lion.theory.run_bounds import L_FACTORS


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
    l1 = [run.need("probe/grad_l1").arrays() for run in runs]
    l2 = [l2_norms(run) for run in runs]
    try:
        rows: list[tuple[str, SeedRates]] = [
            ("c_LION (‖∇f‖₁/√d)", _rates(l1, scale, weighting, confidence)),
            ("c_SGD (‖∇f‖₂)", _rates([(steps, norms) for steps, norms, _ in l2], 1.0, weighting, confidence)),
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    columns = [
        "constant", f"of the mean over {len(runs)} run{'s' if len(runs) > 1 else ''}", "at K", "at the last K",
        f"jackknife {confidence:.0%}", "mean of the runs' constants, t interval",
    ]  # fmt: skip
    cells = [
        [
            label, f"{rates.of_mean.value:.4g}", f"{rates.of_mean.at} of {rates.of_mean.steps}", f"{rates.of_mean.last:.4g}",
            _ends(rates.of_mean_interval), f"{rates.per_run_interval.estimate:.4g}, {_ends(rates.per_run_interval)}",
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
    notes += [_l2_note(sum(found for *_, found in l2), sum(len(steps) for steps, *_ in l2)), _l1_note(runs)]
    return markdown_grid(columns, cells) + "\n\n" + " ".join(notes)


def _rates(
    norms: Sequence[tuple[ArrayLike, ArrayLike]], scale: float, weighting: Weighting, confidence: float
) -> SeedRates:
    return rates_over_seeds(norms, scale=scale, weighting=weighting, confidence=confidence)


def _l2_note(corrected: int, probes: int) -> str:
    """Which norm c_SGD uses."""
    if corrected == probes:
        return "c_SGD uses ‖∇f‖₂ without the noise of the probes (probe/grad_l2_corrected)."
    if corrected == 0:
        return (
            "c_SGD uses the norm of the probes' mean gradient (probe/grad_l2), because the records have no "
            "probe/grad_l2_corrected; the noise that remains in it makes c_SGD too large."
        )
    return (
        f"c_SGD uses probe/grad_l2_corrected at {corrected} of {probes} probes and probe/grad_l2, which noise makes too "
        "large, at the others."
    )


def _l1_note(runs: Sequence[RunRecord]) -> str:
    """Which norm c_LION uses, and the noise in it."""
    shares = [share for run in runs for share in run.series("probe/noise_share").values]
    return (
        "c_LION uses the norm of the probes' mean gradient (probe/grad_l1): ‖∇f‖₁ has no unbiased estimate, and the noise "
        "makes c_LION too large. "
        + (
            f"Share of noise in the squared norm ‖ḡ‖₂²: median {median(shares):.2g}, largest {max(shares):.2g}."
            if shares
            else "The records have no noise share."
        )
    )


def _ends(interval: Interval) -> str:
    return "–" if interval.low is None else f"[{interval.low:.4g}, {interval.high:.4g}]"


@dataclass(frozen=True)
class _Range:
    """The values of one argument of `advise` whose effect on the advised settings is reported."""

    symbol: str
    argument: str
    values: tuple[float, ...]


def advice_section(
    run: RunRecord,
    K: int | None,
    *,
    smoothness: float | None = None,
    noise_variance: float | None = None,
    gap: float | None = None,
    confidence: float = LEVEL,
) -> str:
    """Markdown with estimates of L, σ² and Δ from one run, and Corollary 3's choice for K steps.

    Args:
        run: records of the run.
        K: steps of the planned run; by default those of the run's schedule.
        smoothness: L, instead of the lower bound and its multiples.
        noise_variance: σ², instead of the estimate.
        gap: Δ, instead of both bounds.
        confidence: nominal coverage of the interval of σ², of the bounds on Δ, and of the bound on L.

    Raises:
        ConfigError: neither `K` nor config.yaml gives the number of steps.
    """
    K = K or run.scheduled_steps
    if K is None:
        raise ConfigError(f"{run.folder}: config.yaml does not set train.steps; give --steps K")
    noise = read_probe_noise(run)
    training = estimate_variance(run) if noise is None else None
    ends, bound = estimate_gap(run, confidence), estimate_smoothness(run, noise or training, confidence)
    lines, missing, ranges = [f"- K = {K}, d = {run.dimension:,}"], [], []

    if noise_variance is not None:
        lines.append(f"- σ² = {noise_variance:.4g} (given)")
    elif noise is not None:
        noise_variance = noise.largest if noise.largest > 0 else None
        lines += [_noise_line(noise, confidence), *_conditions(run, frozen=True)]
        if (interval := noise.interval(confidence)) and interval.low is not None and interval.high is not None:
            ranges.append(_Range("σ²", "noise_variance", (interval.low, interval.high)))
    elif training is not None:
        noise_variance = training.largest if training.trusted.any() else None
        lines += [_training_line(run, training), *(_conditions(run, frozen=False) if training.trusted.any() else [])]
    if noise_variance is None:
        needs = (
            " (needs frozen probes of ≥ 2 batches with probe.ladder true)" if noise is None and training is None else ""
        )
        missing.append(f"σ²{needs}: give --noise-variance")

    gaps = [("Δ given", gap)] if gap is not None else []
    if gap is None and ends is not None:
        lines.append(_gap_line(ends))
        gaps = [
            (label, value)
            for label, value in (("Δ with f* = smallest loss", ends.low), ("Δ with f* = 0", ends.high))
            if value > 0
        ]
        if bounds := tuple(end for end in (ends.low_bound, ends.high_bound) if end is not None):
            ranges.append(_Range("Δ", "gap", bounds))
    if not gaps:
        missing.append("Δ (needs two probes with a loss): give --gap")

    scenarios: list[tuple[str, float]] = [("L given", smoothness)] if smoothness is not None else []
    if smoothness is None and bound is not None:
        lines.append(_smoothness_line(bound))
        scenarios = [(f"L × {factor}", factor * bound.low) for factor in L_FACTORS]
        if bound.bound:
            ranges.append(_Range("L", "L", (bound.bound, bound.low)))
    if not scenarios:
        missing.insert(
            0,
            "L (needs a LION run with two probes whose norms differ, or `megatron-lion probe RUN --smoothness N`): give --smoothness",
        )

    if missing or noise_variance is None:
        return "\n".join([*lines, *(f"- not estimated: {text}" for text in missing)])
    rows = [
        (f"{l_label}, {gap_label}", advise(K, L=L, noise_variance=noise_variance, gap=value, d=run.dimension))
        for l_label, L in scenarios
        for gap_label, value in gaps
    ]
    return "\n\n".join(
        ["\n".join(lines), advice_table(rows), *_effect(rows[0][1], ranges, confidence), *_used(run, K, rows)]
    )


def _noise_line(noise: ProbeNoise, confidence: float) -> str:
    interval = noise.interval(confidence)
    text = (
        f"- σ² = {noise.largest:.4g}: the largest of {len(noise.values)} estimates of frozen probes (step {noise.largest_step}; "
        f"median {noise.median:.4g})"
    )
    if interval is None:
        return f"{text}; no interval, because {noise.why_no_interval}"
    return (
        f"{text}; {confidence:.0%} interval of the largest σ² at the probes {_ends(interval)}, corrected for choosing the "
        "largest; the supremum over all θ may be larger"
    )


def _training_line(run: RunRecord, training: VarianceEstimate) -> str:
    if not training.trusted.any():
        return "- σ²: ‖∇f‖² changed more between the probes than the noise explains; no estimate is trusted"
    moving = any(run.series("probe/is_moving").values)
    reason = "the probes are moving windows" if moving else "the records have no probe/noise_variance"
    return (
        f"- σ² = {training.largest:.4g}: the largest of {int(training.trusted.sum())} trusted estimates (median "
        f"{training.median:.4g}) of {len(training.values)}, from training batches and norms interpolated between probes, "
        f"because {reason}; no interval, because the error of the interpolation is not known"
    )


def _conditions(run: RunRecord, *, frozen: bool) -> list[str]:
    """How the noise in σ² differs from that of LION's g; `frozen` if σ² is from frozen probes."""
    settings, lines = run.settings, []
    rates = {name: settings.get(f"model.{name}_dropout") for name in ("hidden", "attention")}
    used = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if isinstance(rate, int | float) and rate > 0)
    in_probes = settings.get("probe.dropout") is True or (not frozen and any(run.series("probe/is_moving").values))
    if used and in_probes:
        lines.append(f"- Training and probes used dropout ({used}): its noise is in this σ²")
    elif used and frozen:
        lines.append(
            f"- Training used dropout ({used}), the probes did not: g also has the noise of dropout, which is not in this "
            "σ²; probe.dropout true includes it"
        )
    elif used:
        lines.append(
            f"- Training used dropout ({used}), the probes did not: this σ² has the noise of dropout, and a bias, because "
            "the mean of g is not the probes' ∇f"
        )
    if settings.get("probe.data") == "test":
        lines.append("- The probes used the test split: the norms and losses are those of its samples")
    return lines


def _gap_line(ends: GapEstimate) -> str:
    if ends.low_bound is None:
        bounds = "no bounds with the errors of the losses, because a probe has no standard error of its loss"
    elif ends.high_bound is None:
        bounds = f"with the errors of the losses, {ends.confidence:.0%} lower bound {ends.low_bound:.4g}"
    else:
        bounds = f"with the errors of the losses, {ends.confidence:.0%} bounds {ends.low_bound:.4g} and {ends.high_bound:.4g}"
    if ends.not_start:
        return (
            f"- Δ at least {ends.low:.4g} (f* = smallest loss probed), or {ends.high:.4g} with f* = 0; {bounds}; no upper bound, "
            f"because {ends.not_start}. The loss at step {ends.first_step} replaces f(θ¹), which is assumed not to be lower"
        )
    return (
        f"- Δ between {ends.low:.4g} (f* = smallest loss probed) and {ends.high:.4g} (f* = 0); {bounds}; f(θ¹) is the probe "
        f"at step {ends.first_step}"
    )


def _smoothness_line(found: SmoothnessEstimate) -> str:
    what = "all results" if found.is_measured else "all norms"
    if found.bound is None:
        bound = "no confidence bound, because the records have no noise estimate of the probes"
    elif found.bound == 0 and found.is_measured:
        bound = f"no {found.confidence:.0%} bound above 0, because no change of the gradient exceeds its noise"
    elif found.bound == 0:
        bound = f"no {found.confidence:.0%} bound above 0, because the norms do not differ by more than their noise"
    else:
        bound = f"with {found.confidence:.0%} confidence L ≥ {found.bound:.4g}, given the noise of {what}"
    if found.is_measured:
        return (
            f"- L estimated from below: {found.low:.4g}, the change of the gradient over the way from step {found.pair[0]} to "
            f"{found.pair[1]} (probe --smoothness); {bound}; the supremum over all θ may be larger"
        )
    return (
        f"- L estimated from below: {found.low:.4g}, from the norms at steps {found.pair[0]} and {found.pair[1]}; {bound}; "
        "the true L is usually far larger"
    )


def _effect(first: Advice, ranges: Sequence[_Range], confidence: float) -> list[str]:
    """One line with the settings that the ends of the intervals give instead of those in the first row."""
    parts = []
    for item in ranges:
        arguments = {"L": first.L, "noise_variance": first.noise_variance, "gap": first.gap}
        values = [value for value in item.values if value > 0]
        if not values:
            continue
        found = [advise(first.K, d=first.d, **{**arguments, item.argument: value}) for value in values]
        span = ("" if len(values) == len(item.values) else "up to ") + " to ".join(f"{value:.3g}" for value in values)
        betas = " to ".join("none" if advice.beta is None else f"{advice.beta:.5g}" for advice in found)
        rates = " to ".join(f"{advice.lr:.3g}" for advice in found)
        parts.append(f"{item.symbol} {span} gives β₁ = β₂ {betas} and η {rates}")
    return [f"The {confidence:.0%} ends, one at a time in the first row: {'; '.join(parts)}."] if parts else []


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
