"""Colours, axes, reference lines and file output shared by all figures.

The optimizers' colours are Okabe and Ito's palette: distinct for every common kind of colour vision, on white and
(lightened) on black. matplotlib is imported by the functions that draw, so that the colours are available without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
OPTIMIZER_COLOURS = {"lion": BLUE, "sgd": VERMILION, "adamw": GREEN}
ORANGE = "#E69F00"
# Colours of everything but the three optimizers.
SPARE_COLOURS = ("#CC79A7", ORANGE, "#56B4E9", "#7F5539", "#6C757D")
# Text that belongs to something orange: ORANGE itself is too light to read on white.
DARK_ORANGE = "#8A5A00"
# Reference lines and their labels.
GREY = "#5F6368"
CONTOUR_GREY = "#8C8C8C"
GRID_GREY, SPINE_GREY, TICK_GREY = "#E3E5E8", "#9AA0A6", "#3C4043"


def new_figure(
    width: float, height: float, columns: int, *, dpi: int, rows: int = 1, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Creates a figure with rows of axes, listed row by row, on matplotlib's Agg canvas, which needs no display.

    It uses no pyplot, whose global state would keep every figure alive.

    Args:
        width: width in inches.
        height: height in inches.
        columns: number of axes in a row.
        dpi: pixels per inch in the file.
        rows: number of rows.
        width_ratios: relative widths of the columns; equal by default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios).ravel())


def style_axes(
    axes: Axes, *, grid: Literal["x", "y", "both"] | None = "both", box: bool = False, tick_size: float = 8
) -> None:
    """Draws a faint grid below the data, and grey spines and ticks.

    Args:
        axes: axes of one panel.
        grid: axes whose ticks have grid lines; None for no grid.
        box: whether the spines at the top and on the right are kept.
        tick_size: size of the tick labels in points.
    """
    if grid:
        axes.grid(axis=grid, color=GRID_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(box)
    axes.spines[:].set_color(SPINE_GREY)
    axes.tick_params(which="both", colors=TICK_GREY)
    axes.tick_params(labelsize=tick_size)


def reference_line(axes: Axes, y: float, label: str, linestyle: Any) -> None:
    """Draws a grey horizontal line with its label above it at the left edge."""
    axes.axhline(y, color=GREY, linewidth=1.0, linestyle=linestyle)
    axes.annotate(
        label, (0.0, y), xycoords=axes.get_yaxis_transform(), xytext=(4, 3), textcoords="offset points",
        color=GREY, fontsize=8,
    )  # fmt: skip


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG atomically; equal figures give equal files, since no version or date is stored.

    Raises:
        StorageError: the file system refused.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figure.dpi, facecolor="white", metadata={"Software": None})
    write_whole(path, content.getvalue())
    return path
