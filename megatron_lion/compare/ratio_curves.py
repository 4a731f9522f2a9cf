"""What belongs to the curve of the norm ratio: error bars, bounds without noise, reference lines and the axis' name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_lion.compare.chart import Curve, Reference
from megatron_lion.intervals import t_quantile
from megatron_lion.runs.record import RunRecord

NOISE_RATIO = math.sqrt(2 / math.pi)
"""r/√d of a gradient that is pure Gaussian noise: E|z| / √(E z²) = 0.798 for a standard normal z."""


def ratio_bars(run: RunRecord) -> dict[int, float]:
    """Half the 95 % interval of r over draws of batches, by step, for the probes that stored a standard error."""
    errors, groups = run.series("probe/norm_ratio_standard_error"), run.series("probe/noise_groups")
    counts = dict(zip(groups.steps, groups.values, strict=True))
    return {
        step: t_quantile(counts[step] - 1) * error
        for step, error in zip(errors.steps, errors.values, strict=True)
        if counts.get(step, 0) > 1
    }


def _bound(end: str) -> Callable[[RunRecord], dict[int, float]]:
    """Gives a bound on r without noise by step, for the probes that resolve the signal."""

    def by_step(run: RunRecord) -> dict[int, float]:
        series = run.series(f"probe/norm_ratio_{end}")
        return dict(zip(series.steps, series.values, strict=True))

    return by_step


RATIO_BAND = (_bound("low"), _bound("high"))
"""Lower and upper bound on r without noise."""


def ratio_name(curves: Sequence[Curve], noises: Sequence[Curve] = ()) -> str:
    """The name of r's axis, with what its bars, open marks, shades and dotted lines are, if there are any."""
    marks = (
        ("bars: 95 %", any(curve.intervals for curve in curves)),
        ("open: no error known", any(any(curve.open_marks) for curve in curves)),
        ("shaded: without noise", any(curve.bounds for curve in curves)),
        ("dotted: noise alone", bool(noises)),
    )
    return "; ".join(["r = ‖∇f‖₁ / ‖∇f‖₂", *(text for text, is_drawn in marks if is_drawn)])


def ratio_references(runs: list[RunRecord], *, with_noise: bool) -> list[Reference]:
    """√d for each d among the runs, and the norm ratio of even Gaussian noise unless that of the noise was measured.

    Args:
        runs: the runs of one model.
        with_noise: whether a run has no r of its noise.
    """
    lines = []
    for d in sorted(
        {run.num_parameters for run in runs if run.num_parameters is not None and run.series("probe/norm_ratio")}
    ):
        root = math.sqrt(d)
        lines.append(Reference(y=root, label=f"√d = {root:,.0f}"))
        if with_noise:
            lines.append(Reference(y=NOISE_RATIO * root, label="0.798 √d: pure noise", dotted=True))
    return lines
