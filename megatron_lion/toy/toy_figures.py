"""Figures of the toy problem: both sides of the inequality, the corollary at its own settings, and paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lion.style import (
    BLUE,
    CONTOUR_GREY,
    DARK_ORANGE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    new_figure,
    save_figure,
    style_axes,
)
from megatron_lion.theory.symbols import Array
from megatron_lion.toy.experiment import Experiment, ToyResult, ToySettings, draw_noise, draw_starts
from megatron_lion.toy.problem import loss, simulate_adamw, simulate_lion, simulate_sgd
from megatron_lion.toy.toy_checks import REFERENCE, REFERENCE_STEPS, TheoremPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: dict[Experiment, str] = {
    "constrained": "Constrained: start on the border of the box",
    "unconstrained": "Unconstrained: start anywhere",
}
LEFT_LABELS: dict[Experiment, str] = {
    "constrained": r"left: $\frac{1}{k}\sum \lambda\langle\nabla f,\theta\rangle + \|\nabla f\|_1$",
    "unconstrained": r"left: $\frac{1}{2k}\sum \|\nabla f\|_1$",
}


def _figure(width: float, height: float, columns: int, *, grid: bool = True) -> tuple[Figure, list[Axes]]:
    figure, row = new_figure(width, height, columns, dpi=96)
    for axes in row:
        style_axes(axes, grid="both" if grid else None)
    return figure, row


def plot_inequality(results: Sequence[ToyResult], path: Path, *, with_reference: bool) -> None:
    """Draws both sides against k, one panel per experiment, with K_min marked.

    Args:
        results: the experiments.
        path: PNG to write.
        with_reference: also show the reference values.
    """
    figure, axes = _figure(max(7.0, 5.2 * len(results)), 4.5, len(results))
    for ax, result in zip(axes, results, strict=True):
        _inequality_panel(ax, result, with_reference)
    save_figure(figure, path)


def _inequality_panel(ax: Axes, result: ToyResult, with_reference: bool) -> None:
    k = np.arange(1, len(result.left) + 1)
    left = result.by_start(result.left)
    ax.fill_between(k, left.min(axis=1), left.max(axis=1), color=BLUE, alpha=0.16, linewidth=0)
    ax.plot(k, left.mean(axis=1), color=BLUE, label=LEFT_LABELS[result.experiment], linewidth=1.8)
    right = result.corollary.mean(axis=1)
    low, mean, high = (float(x) for x in (result.k_min.min(), result.k_min.mean(), result.k_min.max()))
    corollary = "Corollary 3" if result.experiment == "constrained" else "Corollary 5"
    formula = r"$15\sqrt{d}\,(\sigma^2L\Delta)^{1/4}k^{-1/4}$"
    ax.plot(k[k < mean], right[k < mean], color=VERMILION, linestyle=(0, (1, 1.5)), linewidth=1.6)
    ax.plot(k[k >= mean], right[k >= mean], color=VERMILION, label=f"{corollary}: {formula}", linewidth=1.8)
    own = result.own_bound.mean(axis=1)
    ax.plot(k, own, color=GREY, linestyle="--", linewidth=1.2, label="bound for the settings of the run")
    if low < k[-1]:
        ax.axvspan(low, min(high, k[-1]), color=ORANGE, alpha=0.15, linewidth=0)
    if mean < k[-1]:
        ax.axvline(mean, color=ORANGE, linewidth=1.3)
    ax.set_yscale("log")
    top = 400.0
    ax.set_ylim(0.7 * float(left.min()), top)
    # The label is to the left of a line that is in the right half or beyond the last step.
    ax.text(
        min(mean, k[-1]),
        top * 0.93,
        rf" $K_{{min}}$ = {mean:.0f} ({low:.0f}–{high:.0f}) ",
        fontsize=8,
        va="top",
        ha="left" if mean < k[-1] / 2 else "right",
        color=DARK_ORANGE,
    )
    if with_reference:
        shown = [index for index, at in enumerate(REFERENCE_STEPS) if at <= k[-1]]
        steps = [REFERENCE_STEPS[index] for index in shown]
        for side, colour in (("left", BLUE), ("right", VERMILION)):
            values = [REFERENCE[result.experiment][side][index] for index in shown]
            label = "reference values" if side == "left" else None
            ax.plot(steps, values, "o", color=colour, markerfacecolor="white", markersize=5, label=label, zorder=5)
    ax.set_xlim(0, k[-1])
    ax.set_xlabel("step k", fontsize=9)
    ax.set_title(TITLES[result.experiment], fontsize=10, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def plot_theorem(points: Mapping[Experiment, Sequence[TheoremPoint]], path: Path) -> None:
    """Draws both sides of the corollaries if each K has its own runs with the corollary's β₁ = β₂ and η.

    Args:
        points: points of each experiment, from `theorem_points`.
        path: PNG to write.
    """
    figure, (ax,) = _figure(5.6, 4.0, 1)
    for (experiment, series), colour, marker in zip(points.items(), (BLUE, GREEN), "os", strict=False):
        K = [p.K for p in series]
        left = np.array([p.left for p in series])
        ax.errorbar(
            K,
            left,
            yerr=[p.left_std for p in series],
            color=colour,
            marker=marker,
            markersize=4.5,
            capsize=2,
            linewidth=1.6,
            label=f"left, {experiment}",
        )
        ax.plot(
            K,
            [p.right for p in series],
            color=colour,
            linestyle="--",
            linewidth=1.3,
            label=f"right, {experiment}",
        )
        guide = left[0] * (np.asarray(K) / K[0]) ** -0.25
        label = r"slope $K^{-1/4}$" if experiment == "unconstrained" else None
        ax.plot(K, guide, color=GREY, linestyle=":", linewidth=1.2, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({p.K for series in points.values() for p in series})
    ax.set_xticks(ticks, [str(K) for K in ticks])
    ax.set_xlabel(r"K (each point: its own runs, $\beta_1=\beta_2$ and $\eta$ of Corollary 3)", fontsize=9)
    ax.set_title("Both sides at the corollary's own settings", fontsize=10, loc="left")
    ax.legend(fontsize=7.5, frameon=False, loc="center right")
    save_figure(figure, path)


def optimizer_paths(theta: Array, noise: Array, settings: ToySettings) -> dict[str, Array]:
    """Paths of LION, SGD and AdamW with the same η, λ and noise, each (steps + 1, runs, 2)."""
    lr, weight_decay = settings.lr, settings.weight_decay
    lion = simulate_lion(
        theta,
        noise,
        lr=lr,
        betas=settings.betas,
        weight_decay=weight_decay,
        init_exp_avg=settings.init_exp_avg,
    )
    return {
        "LION": lion,
        "SGD": simulate_sgd(theta, noise, lr=lr, weight_decay=weight_decay),
        "AdamW": simulate_adamw(theta, noise, lr=lr, weight_decay=weight_decay),
    }


def plot_paths(settings: ToySettings, path: Path) -> None:
    """Draws contours of f and the paths of LION, SGD and AdamW from one start of each experiment.

    Args:
        settings: η, λ, β and seed of the toy; all three optimizers use the same η, λ and noise.
        path: PNG to write.
    """
    experiments: list[Experiment] = ["constrained", "unconstrained"] if settings.weight_decay else ["unconstrained"]
    theta = np.concatenate([draw_starts(e, settings)[:1] for e in experiments])
    noise = np.concatenate([draw_noise(e, settings)[:, :1] for e in experiments], axis=1)
    paths = optimizer_paths(theta, noise, settings)
    reach = 1.06 * max(float(np.abs(theta).max()), min(settings.box, 10.0))
    figure, axes = _figure(10.6, 5.0, 2, grid=False)
    for ax, half_width, width in zip(axes, (reach, min(3.4, reach)), (1.5, 0.7), strict=True):
        _contours(ax, half_width)
        for (name, line), colour in zip(paths.items(), (BLUE, VERMILION, GREEN), strict=True):
            for run in range(len(theta)):
                xy = line[:, run]
                ax.plot(*xy.T, color=colour, linewidth=width, alpha=0.9, label=None if run else name)
                ax.plot(*xy[-1], "o", color=colour, markersize=6, markeredgecolor="white", zorder=6)
        ax.plot(*theta.T, "k^", markersize=6, linestyle="none", label="start", zorder=6)
        ax.plot([0, 0, 2.1253, -2.1253], [2.1253, -2.1253, 0, 0], "k*", markersize=9, label="minimum", zorder=5)
        ax.set_xlim(-half_width, half_width)
        ax.set_ylim(-half_width, half_width)
        ax.set_aspect("equal")
        ax.set_xlabel(r"$\theta_1$", fontsize=9)
        ax.set_ylabel(r"$\theta_2$", fontsize=9)
    if np.isfinite(settings.box):
        b = settings.box
        box = ([-b, b, b, -b, -b], [-b, -b, b, b, -b])
        axes[0].plot(*box, color="black", linewidth=1, linestyle="--", label=r"box $\|\theta\|_\infty\leq 1/\lambda$")
    axes[0].legend(fontsize=8, loc="lower left", framealpha=0.9)
    decay = f", λ = {settings.weight_decay:g}" if settings.weight_decay else ""
    axes[0].set_title(f"Paths of {settings.steps} steps, η = {settings.lr:g}{decay} for all", fontsize=10, loc="left")
    axes[1].set_title("The middle; a disc marks the last step", fontsize=10, loc="left")
    save_figure(figure, path)


def _contours(ax: Axes, half_width: float) -> None:
    axis = np.linspace(-half_width, half_width, 241)
    values: Any = loss(np.stack(np.meshgrid(axis, axis), axis=-1))
    levels = np.linspace(values.min(), values.max(), 15)
    ax.contourf(axis, axis, values, levels=levels, cmap="Greys", alpha=0.45)
    ax.contour(axis, axis, values, levels=levels, colors=CONTOUR_GREY, linewidths=0.4)
