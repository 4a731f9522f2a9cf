"""PNG figures of a comparison: one for each panel, and one with the three panels of the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lion.compare.axis_ticks import short
from megatron_lion.compare.chart import Curve, Panel
from megatron_lion.compare.labels import by_model
from megatron_lion.compare.panels import panels
from megatron_lion.runs.record import RunRecord
from megatron_lion.style import new_figure, reference_line, save_figure, style_axes

OVERVIEW = ("training-loss", "test-loss", "norm-ratio")
FAINT = {"linewidth": 0.9, "alpha": 0.4}
LABEL_WIDTH = 40
"""Characters of a line of the vertical axis' name; a longer line would be cut at the edges of the figure."""


def write_figures(
    runs: list[RunRecord], folder: Path, axis: str = "step", tried: Sequence[RunRecord] = ()
) -> list[Path]:
    """Draws the panels of every model; Figures 2 and 3 of the paper are `<model>-overview.png`.

    Args:
        runs: from `read_runs`.
        folder: an existing folder.
        axis: "step", "tokens" or "time".
        tried: the runs that these were chosen from.

    Returns:
        The files written.

    Raises:
        StorageError: the file system refused.
    """
    written = []
    for model, group in by_model(runs).items():
        drawn = panels(group, axis, tried)
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model)
        overview = [panel for panel in drawn if panel.slug in OVERVIEW]
        if len(overview) > 1:
            written.append(_write(overview, model, folder / f"{name}-overview.png"))
        written += [_write([panel], model, folder / f"{name}-{panel.slug}.png") for panel in drawn]
    return written


def _write(drawn: list[Panel], model: str, path: Path) -> Path:
    figure, row = new_figure(5.2 * len(drawn), 3.8, len(drawn), dpi=160)
    for axes, panel in zip(row, drawn, strict=True):
        _draw(axes, panel)
    figure.suptitle(model, fontsize=11, fontweight="bold", x=0.01, ha="left")
    written = save_figure(figure, path)
    figure.clear()  # a figure refers to itself, so that it would keep its copies of the curves while the next one is drawn
    return written


def _draw(axes: Any, panel: Panel) -> None:
    """Draws one panel: curves labelled at their ends, references labelled on their lines, no box, faint grid."""
    low, high = panel.y_limits()
    left, right = panel.x_limits()
    for line in panel.references:
        reference_line(axes, line.y, line.label, (0, (1, 2) if line.dotted else (6, 2)))
    for curve in panel.curves:
        if curve.bounds:
            low_y, high_y = ([math.nan if ends is None else ends[end] for ends in curve.band] for end in (0, 1))
            axes.fill_between(curve.x, low_y, high_y, color=curve.colour, alpha=0.12, linewidth=0)
        for x, y in curve.behind:
            axes.plot(x, y, color=curve.colour, alpha=0.2, linewidth=0.7)
        axes.plot(
            curve.x, curve.y, color=curve.colour, linestyle=_style(curve), clip_on=False, markersize=3.5,
            marker="o" if curve.markers and curve.label and not curve.bars else None,
            **({"linewidth": 1.8} if curve.label else FAINT),
        )  # fmt: skip
        if curve.label:
            _mark_bars(axes, curve, floor=0.0 if panel.from_zero else -math.inf)
    if panel.log_y:
        axes.set_yscale("log")
        low, high = 10**low, 10**high
    if panel.log_x:
        axes.set_xscale("log")
        left, right = 10**left, 10**right
    axes.set_ylim(low, high)
    axes.set_xlim(left, right)
    _name_curves(axes, panel)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel("\n".join(panel.y_lines(LABEL_WIDTH)), fontsize=9)
    style_axes(axes, grid="y")
    if not panel.log_x:
        axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if 1000 <= right < 1e6 else short(value))
    if high >= 1000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _mark_bars(axes: Any, curve: Curve, floor: float) -> None:
    """Draws the known bars, and the marks of a curve that has bars: open ones if the bar is not known."""
    for x, low, high in curve.intervals:
        axes.plot(
            (x, x), (max(low, floor), high), color=curve.colour, linewidth=1.2, marker="_", markersize=5,
            solid_capstyle="butt", clip_on=False,
        )  # fmt: skip
    if curve.markers and curve.bars:
        for x, y, unknown in zip(curve.x, curve.y, curve.open_marks, strict=True):
            face = "white" if unknown else curve.colour
            axes.plot(
                x,
                y,
                marker="o",
                color=curve.colour,
                markerfacecolor=face,
                markersize=4 if unknown else 3.5,
                clip_on=False,
            )


def _name_curves(axes: Any, panel: Panel) -> None:
    """Writes the names beside the right edge, at the height of their curve's end, without overlap."""
    low, high = panel.y_limits()
    dashed = any(curve.dash for curve in panel.named)
    for curve, place in zip(panel.named, panel.label_places(0.06 * (high - low)), strict=True):
        y = (place - low) / (high - low)  # as a share of the axes, like x
        if dashed:  # with a sample of the line: curves of one optimizer share its colour
            axes.plot(
                (1.02, 1.09), (y, y), transform=axes.transAxes, clip_on=False, color=curve.colour, linewidth=1.8,
                linestyle=_style(curve),
            )  # fmt: skip
        axes.annotate(
            curve.label, (1.1 if dashed else 1.0, y), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            color=curve.colour, fontsize=9, va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _style(curve: Curve) -> Any:
    return (0, curve.dash) if curve.dash else "-"


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
