"""The figure of a measured family: r against d on logarithmic axes, with bounds, fits and √d."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.scaling.family_results import Fit
from megatron_lion.scaling.measure import PARTS
from megatron_lion.style import GREY, OPTIMIZER_COLOURS, new_figure, save_figure, style_axes

DPI = 110
DRAWN = ("all", "without_embeddings")
"""Parts with a column of panels."""
NOISE_RATIO = math.sqrt(2 / math.pi)


def draw_family(fits: Sequence[Fit], path: Path) -> Path:
    """Draws a row of panels for each step: all parameters, and without embeddings.

    Each size is the mean over its seeds. Its bar is the range between the bounds on r without noise, a circle without a
    bar has none. Dash-dotted: the r of the noise alone, or 0.798 √d if a probe does not give it.

    Raises:
        StorageError: the file system refused.
    """
    steps = sorted({fit.step for fit in fits})
    figure, panels = new_figure(11.0, 4.6 * len(steps) + 0.4, len(DRAWN), rows=len(steps), dpi=DPI)
    for number, axes in enumerate(panels):
        step, part = steps[number // len(DRAWN)], DRAWN[number % len(DRAWN)]
        _panel(axes, [fit for fit in fits if (fit.step, fit.part) == (step, part)])
        axes.set_title(f"step {step:,}, {PARTS[part]}", fontsize=10)
        axes.set(xlabel="d", ylabel="r = ‖∇f‖₁ / ‖∇f‖₂")
    return save_figure(figure, path)


def _panel(axes: Any, fits: Sequence[Fit]) -> None:
    style_axes(axes, box=True)
    axes.set(xscale="log", yscale="log")
    sizes = [mean.d for mean in fits[0].sizes]
    lines = ((1.0, "-", "√d"), (NOISE_RATIO, "-.", "0.798 √d: pure noise"))
    for factor, style, text in lines[:1] if all(fit.noise for fit in fits) else lines:
        heights = [factor * math.sqrt(d) for d in sizes]
        axes.plot(sizes, heights, style, color=GREY, linewidth=1.0, label=text)
    for place, fit in enumerate(fits):
        color = OPTIMIZER_COLOURS.get(fit.optimizer, GREY)
        shift = 1.02 ** (place - (len(fits) - 1) / 2)  # bars of several optimizers beside each other
        ratios = [math.exp(mean.measured) for mean in fit.sizes]
        axes.plot([d * shift for d in sizes], ratios, "o", color=color, markersize=4, markerfacecolor="none")
        for mean in fit.sizes:
            if mean.low is not None and mean.high is not None:
                ends = [math.exp(mean.low), math.exp(mean.high)]
                axes.plot([mean.d * shift] * 2, ends, "_-", color=color, linewidth=1.4, markersize=5)
        if fit.noise is not None:
            noise = [math.exp(fit.noise.intercept) * d**fit.noise.slope for d in sizes]
            axes.plot(sizes, noise, "-.", color=color, linewidth=0.8, alpha=0.6)
        line = fit.measured
        axes.plot(sizes, [math.exp(line.intercept) * d**line.slope for d in sizes], ":", color=color, label=_label(fit))
    axes.tick_params(which="minor", labelsize=6)
    # Below the axes: with three optimizers it covers points at any place inside.
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)


def _label(fit: Fit) -> str:
    found, name = fit.exponent, OPTIMIZER_NAMES[fit.optimizer]
    text = f"{name}: b = {fit.measured.slope:.2f} (measured r, dotted)"
    if found.low is not None and found.high is not None:
        text += f", [{found.low:.2f}, {found.high:.2f}] without noise"
    return text if fit.noise is None else f"{text}, {fit.noise.slope:.2f} noise alone (dash-dotted)"
