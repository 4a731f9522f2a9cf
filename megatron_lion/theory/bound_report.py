"""The text of `megatron-lion theory` on slopes over log K and on the bound at a run's own settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_lion.compare.table import markdown_grid
from megatron_lion.intervals import Interval
from megatron_lion.runs.record import RunRecord
from megatron_lion.theory.probe_noise import l2_norms
from megatron_lion.theory.rates import Weighting
from megatron_lion.theory.run_bounds import RunBound
from megatron_lion.theory.slopes import LEAST_PROBES, WINDOW, slope_over_runs
from megatron_lion.theory.symbols import Array

Norms = Sequence[tuple[Array, Array]]


def slopes_section(runs: Sequence[RunRecord], weighting: Weighting, confidence: float) -> str:
    """Markdown with the slopes of R, ‖∇f‖₁ and ‖∇f‖₂ over log K, with intervals.

    Raises:
        CheckpointError: a run has no probes.
    """
    l2 = [l2_norms(run) for run in runs]
    corrected = sum(found for *_, found in l2)
    rows: list[tuple[str, Norms]] = [
        ("‖∇f‖₁", [run.need("probe/grad_l1").arrays() for run in runs]),
        (f"‖∇f‖₂{' without noise' if corrected else ''}", [(steps, norms) for steps, norms, _ in l2]),
    ]
    if all(run.series("probe/kkt_residual") for run in runs):
        rows.insert(0, ("R", [run.need("probe/kkt_residual").arrays() for run in runs]))
    cells = [
        [label, *(_shown(slope_over_runs(norms, weighting=weighting, confidence=confidence, of_mean=of_mean))
                  for of_mean in (True, False))]
        for label, norms in rows
    ]  # fmt: skip
    count = len(runs)
    band = "Student's t over the runs" if count > 1 else "from the scatter of the run's probes"
    notes = [
        f"Slope of the logarithm over log K, from the last K/{WINDOW} on, with {confidence:.0%} intervals, {band}.",
        "A decrease like K^(−1/4) has slope −0.25. If a norm falls steeply between the first probes, the running mean depends on "
        "what is assumed between them, and its slope is too steep; the slope of the norm itself is not.",
    ]
    if any("–" in row for row in cells):
        notes.append(f"–: a run has fewer than two probes from the last K/{WINDOW} on, or a norm that is not above 0.")
    if count == 1:
        notes.append(f"An interval needs {LEAST_PROBES} probes and norms above 0.")
    return (
        markdown_grid(["norm", "slope of its running mean", "slope of the norm itself"], cells)
        + "\n\n"
        + " ".join(notes)
    )


def _shown(interval: Interval) -> str:
    if math.isnan(interval.estimate):
        return "–"
    ends = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.estimate:.3f}{ends}"


def bound_section(found: RunBound | None) -> str:
    """Markdown with both sides of the bound at the last K, and what each number rests on."""
    if found is None:
        return "No bound: it needs a LION run with learning rates above 0 (optim/lr) and two probes with a finite R."
    facts = "\n".join(f"- {fact}" for fact in found.facts)
    last, K = float(found.measured[-1]), len(found.measured)
    text = f"Mean of R with the learning rates as weights, at K = {K:,}: {last:.4g} (measured)."
    if found.missing:
        return f"{text}\n\n{facts}\n- no bound without {found.missing}"
    columns = ["L", "bound", "bound / measured", "gap", "start", "drift", "noise", "step"]
    cells = []
    for curve in found.curves:
        terms = curve.terms
        total = float(terms.total[-1])
        parts = (terms.gap, terms.start, terms.drift, terms.noise, terms.step)
        cells.append(
            [f"{curve.smoothness:.3g} ({curve.label})", f"{total:.4g}", f"{total / last:.3g}" if last > 0 else "–",
             *(f"{float(part[-1]):.3g}" for part in parts)]
        )  # fmt: skip
    given = any(curve.label == "L given" for curve in found.curves)
    note = "" if given else " The records bound L from below only, so the right sides are estimates, not bounds."
    return f"{text}{note} The right side and its five summands:\n\n{markdown_grid(columns, cells)}\n\n{facts}"
