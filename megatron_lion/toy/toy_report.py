"""Tables of the toy problem: CSV with every curve, Markdown with the numbers and reference values."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_lion.compare.table import markdown_grid
from megatron_lion.toy.experiment import Experiment, ToyResult, ToySettings
from megatron_lion.toy.toy_checks import (
    CONVENTIONS,
    REFERENCE,
    REFERENCE_STEPS,
    ReferenceMatch,
    TheoremPoint,
    match_reference,
)

NOT_STATED = """\
The paper states f, L, f*, the noise N(0, 1), λ = 0.1, η = 0.01, K = 2000, 5 starts × 5 repeats and where the
starts are drawn from. It does not state β₁, β₂, m⁰, the drawn starts or the noise. The right side at step k is
that of Corollary 3 with K = k; the runs' η and β are not those that the corollary requires at any k."""


def curves_csv(results: Sequence[ToyResult], every: int = 10) -> str:
    """CSV with every `every`-th step of both sides, averaged over the runs; the last step is always included.

    Columns: experiment, k, left (of the experiment's theorem), left_std (over starts), kkt_residual,
    half_grad_l1, right_corollary, right_own_settings, valid (1 if k ≥ K_min of every start).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "experiment",
            "k",
            "left",
            "left_std",
            "kkt_residual",
            "half_grad_l1",
            "right_corollary",
            "right_own_settings",
            "valid",
        ]
    )
    for result in results:
        steps = len(result.left)
        per_start = result.by_start(result.left)
        spread = per_start.std(axis=1, ddof=1) if per_start.shape[1] > 1 else np.zeros(steps)
        for k in sorted({1, *range(every, steps + 1, every), steps}):
            numbers = [
                result.left[k - 1].mean(),
                spread[k - 1],
                result.kkt[k - 1].mean(),
                result.half_l1[k - 1].mean(),
                result.corollary[k - 1].mean(),
                result.own_bound[k - 1].mean(),
            ]
            valid = int(k >= result.k_min.max())
            writer.writerow([result.experiment, k, *(f"{number:.6g}" for number in numbers), valid])
    return buffer.getvalue()


def has_reference(settings: ToySettings) -> bool:
    """Whether the reference values were made with these η, λ and noise."""
    return (settings.lr, settings.weight_decay, settings.noise_std) == (0.01, 0.1, 1.0)


def comparison_table(results: Sequence[ToyResult], matches: Mapping[Experiment, ReferenceMatch]) -> str:
    """Markdown table of both sides at the reference's steps, the reference, the deviation, and the matched left side.

    The last two columns are the left side for starts that have the reference's right side (`match_reference`), and
    the deviation of the reference from it in standard deviations.
    """
    rows = []
    for result in results:
        reference, match = REFERENCE[result.experiment], matches[result.experiment]
        for index, k in enumerate(REFERENCE_STEPS):
            if k > len(result.left):
                continue
            left, right = result.left[k - 1].mean(), result.corollary[k - 1].mean()
            rows.append([
                result.experiment, f"{k}",
                f"{left:.3g}", f"{reference['left'][index]:g}", f"{left / reference['left'][index] - 1:+.1%}",
                f"{right:.3g}", f"{reference['right'][index]:g}", f"{right / reference['right'][index] - 1:+.1%}",
                f"{match.left[index]:.3g} ± {match.std[index]:.2g}", f"{match.z[index]:+.1f}",
            ])  # fmt: skip
    sides = [name for side in ("left", "right") for name in (side, "reference", "deviation")]
    return markdown_grid(["experiment", "k", *sides, "left, matched starts", "z"], rows)


def sides_table(results: Sequence[ToyResult]) -> str:
    """Markdown table of both sides at a few steps, for settings that have no reference."""
    rows = []
    for result in results:
        steps = len(result.left)
        for k in sorted({max(1, steps // 20), max(1, steps // 4), max(1, steps // 2), steps}):
            numbers = (result.left[k - 1].mean(), result.corollary[k - 1].mean(), result.own_bound[k - 1].mean())
            rows.append([result.experiment, f"{k}", *(f"{number:.3g}" for number in numbers)])
    return markdown_grid(["experiment", "k", "left", "right, corollary", "right, settings of the run"], rows)


def facts_table(results: Sequence[ToyResult]) -> str:
    """Markdown table of Δ, K_min, the step from which left ≤ right, and the conditions that the runs meet."""
    columns = [
        "experiment", "mean Δ", "K_min: mean (range over starts)", "left ≤ right from k", "largest ‖θ‖∞",
        "runs with λ ≤ 1/(2C)",
    ]  # fmt: skip
    rows = []
    for result in results:
        k_min, crossing = result.k_min, result.first_crossing()
        rows.append([
            result.experiment, f"{result.gap.mean():.1f}", f"{k_min.mean():.0f} ({k_min.min():.0f}–{k_min.max():.0f})",
            "never" if crossing is None else f"{crossing}", f"{result.max_abs.max():.4g}", f"{result.theorem4_applies:.0%}",
        ])  # fmt: skip
    return markdown_grid(columns, rows)


def theorem_table(points: Mapping[Experiment, Sequence[TheoremPoint]]) -> str:
    """Markdown table of both sides at the corollary's own settings, each K with its own runs."""
    rows = [
        [
            experiment, f"{p.K}", f"{p.beta[0]:.3f}–{p.beta[1]:.3f}", f"{p.lr[0]:.4f}–{p.lr[1]:.4f}",
            f"{p.left:.3g} ± {p.left_std:.2g}", f"{p.right:.3g}", f"{p.left / p.right:.3f}",
        ]
        for experiment, series in points.items()
        for p in series
    ]  # fmt: skip
    return markdown_grid(["experiment", "K", "β₁ = β₂", "η", "left", "right", "left/right"], rows)


def conventions_table(experiments: Sequence[Experiment]) -> str:
    """Markdown table of the reference's deviation under each of `CONVENTIONS`, for starts with its right side."""
    rows = []
    for experiment in experiments:
        for betas, init in CONVENTIONS:
            z = match_reference(experiment, betas, init).z
            start = "0" if init == "zeros" else "g¹"
            rows.append([experiment, f"{betas}", start, *(f"{value:+.2f}" for value in z)])
    return markdown_grid(["experiment", "β", "m⁰", "z at k = 100", "500", "1000", "2000"], rows)


def markdown(
    results: Sequence[ToyResult],
    points: Mapping[Experiment, Sequence[TheoremPoint]],
    *,
    with_conventions: bool = False,
) -> str:
    """The text of toy.md."""
    settings = results[0].settings
    experiments = [result.experiment for result in results]
    parts = [
        "# Two-dimensional toy problem",
        f"η = {settings.lr:g}, λ = {settings.weight_decay:g}, β = {settings.betas}, m⁰ = "
        f"{'0' if settings.init_exp_avg == 'zeros' else 'g¹'}, noise N(0, {settings.noise_std**2:g}) per coordinate "
        f"(σ² = {settings.sigma**2:g}), L = 7, d = 2, K = {settings.steps}, {settings.starts} starts × "
        f"{settings.repeats} repeats, seed {settings.seed}.",
        "## Both sides of the inequality",
    ]
    if has_reference(settings):
        matches = {e: match_reference(e, settings.betas, settings.init_exp_avg) for e in experiments}
        parts += [comparison_table(results, matches), NOT_STATED]
    else:
        parts += [
            sides_table(results),
            "Reference values exist for η = 0.01, λ = 0.1 and unit noise only, so none are shown.",
        ]
    parts += ["## Conditions", facts_table(results)]
    if any(points.values()):
        parts += ["## At the corollary's own settings", theorem_table(points)]
    if with_conventions:
        parts += ["## Which β and m⁰ fit the reference", conventions_table(experiments)]
    return "\n\n".join(parts) + "\n"
