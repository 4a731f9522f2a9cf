"""Figures of `megatron-lion theory`: the bound beside the measured mean of R, and the rate constants' curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lion.runs.record import RunRecord
from megatron_lion.style import (
    BLUE,
    GREY,
    OPTIMIZER_COLOURS,
    SPARE_COLOURS,
    VERMILION,
    new_figure,
    save_figure,
    style_axes,
)
from megatron_lion.theory.probe_noise import l2_norms
from megatron_lion.theory.rates import Weighting, common_norms, rate_constant, spread_over_steps
from megatron_lion.theory.run_bounds import RunBound

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_lion.theory.symbols import Array

POINTS = 400
"""Most points of a drawn curve, at equal distances in log K."""


def plot_bound(found: RunBound, title: str, path: Path) -> Path:
    """Draws the measured mean of R and the bounds against K, both with the learning rates as weights.

    Raises:
        StorageError: the file system refused.
    """
    figure, (axes,) = new_figure(6.0, 4.4, 1, dpi=110)
    at = _spread(len(found.measured))
    axes.plot(at, found.measured[at - 1], color=BLUE, linewidth=1.8, label="measured mean of R, weighted by η")
    for curve, style in zip(found.curves, ("-", "--", ":"), strict=False):
        total = np.asarray(curve.terms.total)[at - 1]
        axes.plot(
            at,
            total,
            color=VERMILION,
            linestyle=style,
            linewidth=1.4,
            label=f"bound if L = {curve.smoothness:.3g} ({curve.label})",
        )
    _logarithmic(axes, "mean up to K")
    axes.set_title(title, fontsize=10, loc="left")
    return save_figure(figure, path)


def plot_rates(runs: Sequence[RunRecord], weighting: Weighting, path: Path) -> Path:
    """Draws the running mean of ‖∇f‖₁/√d with c_LION K^(−1/4), and of ‖∇f‖₂ with c_SGD K^(−1/4), averaged over the runs.

    Args:
        runs: runs that differ in their seed.
        weighting: what is assumed between probes.
        path: PNG to write.

    Raises:
        CheckpointError: a run has no probes.
        StorageError: the file system refused.
        ValueError: the runs share no probe step.

    Source: Figure A3 of the journal edition of "Convergence Rate Analysis of LION".
    """
    scale = 1 / math.sqrt(runs[0].dimension)
    l1 = [run.need("probe/grad_l1").arrays() for run in runs]
    l2 = [l2_norms(run)[:2] for run in runs]
    figure, panels = new_figure(9.6, 4.0, 2, dpi=110)
    for axes, norms, factor, name, label in (
        (panels[0], l1, scale, "c_{LION}", r"$\|\nabla f\|_1/\sqrt{d}$"),
        (panels[1], l2, 1.0, "c_{SGD}", r"$\|\nabla f\|_2$"),
    ):
        steps, values = common_norms(norms)
        colour = OPTIMIZER_COLOURS.get(runs[0].optimizer, SPARE_COLOURS[0])
        for row in values if len(runs) > 1 else ():
            _curve(axes, steps, factor * row, weighting, color=colour, linewidth=0.8, alpha=0.3)
        mean = values.mean(axis=0)
        K = _curve(axes, steps, factor * mean, weighting, color=colour, linewidth=1.8, label=f"running mean of {label}")
        constant = rate_constant(steps, mean, scale=factor, weighting=weighting)
        shown = rf"${name}\,K^{{-1/4}}$, ${name}$ = {constant.value:.3g}"
        axes.plot(K, constant.value * K**-0.25, color=GREY, linestyle="--", linewidth=1.3, label=shown)
        axes.plot(constant.at, constant.value * constant.at**-0.25, "o", color=GREY, markersize=4)
        _logarithmic(axes, "mean up to K")
    panels[0].set_title(runs[0].model, fontsize=10, loc="left")
    if weighting == "probes":
        for axes in panels:
            axes.set_xlabel("K (probes)", fontsize=9)
    return save_figure(figure, path)


def _curve(axes: Axes, steps: Sequence[float], values: Array, weighting: Weighting, **style: Any) -> Array:
    """Draws the running mean; returns the K of its points."""
    dense = spread_over_steps(steps, values, weighting)
    at = _spread(len(dense))
    axes.plot(at, np.cumsum(dense)[at - 1] / at, **style)
    return at.astype(np.float64)


def _spread(count: int) -> Array:
    """At most `POINTS` integers from 1 to `count`, at about equal distances on a logarithmic axis."""
    return np.unique(np.round(np.geomspace(1, count, POINTS)).astype(np.int64))


def _logarithmic(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("K (optimizer steps)", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room above the curves
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    style_axes(axes)
    axes.tick_params(which="both", labelsize=8)
