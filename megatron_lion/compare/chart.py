"""Curves, reference lines and panels of axes, from which both the PNG figures and the HTML report are drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lion.compare.axis_ticks import spread


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line.

    Attributes:
        label: name beside the line's end; "" for an unnamed line, which is drawn thinly.
        x, y: coordinates of its points.
        colour: #rrggbb.
        dash: on and off lengths; () for a solid line.
        markers: whether the points are marked (few measurements).
        behind: lines drawn faintly behind it, as (x, y): unsmoothed values or single seeds.
        bars: half the 95 % interval of each y, None if it is not known; () for a quantity that is drawn without bars.
        band: lower and upper bound that are shaded at each x, None if they are not known; () for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: tuple[float, ...] = ()
    markers: bool = False
    behind: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    bars: Sequence[float | None] = ()
    band: Sequence[tuple[float, float] | None] = ()

    @property
    def intervals(self) -> list[tuple[float, float, float]]:
        """The known bars, as (x, low, high)."""
        if not self.bars:
            return []
        points = zip(self.x, self.y, self.bars, strict=True)
        return [(x, y - bar, y + bar) for x, y, bar in points if bar is not None]

    @property
    def bounds(self) -> list[tuple[float, float, float]]:
        """The known bounds, as (x, low, high)."""
        return [(x, *ends) for x, ends in zip(self.x, self.band, strict=False) if ends is not None]

    @property
    def open_marks(self) -> list[bool]:
        """For each point, whether its mark is open: its bar belongs here and is not known."""
        return [bar is None for bar in self.bars] or [False] * len(self.y)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A horizontal line to read curves against."""

    y: float
    label: str
    dotted: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    Attributes:
        slug: name of the PNG file.
        title: title above the axes.
        x_label, y_label: names of the axes with units.
        curves: the curves compared.
        references: horizontal lines, always inside the limits.
        from_zero: whether a linear vertical axis starts at zero.
        log_x, log_y: whether an axis is logarithmic.
    """

    slug: str
    title: str
    y_label: str
    curves: list[Curve]
    x_label: str = "optimizer step"
    references: list[Reference] = field(default_factory=list)
    from_zero: bool = False
    log_x: bool = False
    log_y: bool = False

    @property
    def named(self) -> list[Curve]:
        """The curves that have a name."""
        return [curve for curve in self.curves if curve.label]

    def y_lines(self, width: int) -> list[str]:
        """The name of the vertical axis in lines of at most `width` characters, divided between words."""
        return textwrap.wrap(self.y_label, width, break_long_words=False, break_on_hyphens=False)

    def along(self, value: float) -> float:
        """A value in the units of the horizontal axis: the value or its decimal logarithm."""
        return math.log10(value) if self.log_x else value

    def height(self, value: float) -> float:
        """A value in the units of the vertical axis: the value or its decimal logarithm."""
        return math.log10(value) if self.log_y else value

    def y_limits(self) -> tuple[float, float]:
        """Limits that include all curves, bars, bounds and references, in the units of the axis."""
        ends = [end for curve in self.curves for _, *both in (*curve.intervals, *curve.bounds) for end in both]
        drawn = [end(curve.y) for curve in self.curves for end in (min, max)]
        values = [self.height(v) for v in (*drawn, *ends, *(line.y for line in self.references))]
        low, high = min(values), max(values)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return (0.0, high * 1.08) if self.from_zero and not self.log_y else (low - pad, high + pad)

    def x_limits(self) -> tuple[float, float]:
        """From zero, or the first point of a logarithmic axis, to the last point, in the units of the axis."""
        values = [self.along(end(curve.x)) for curve in self.curves for end in (min, max)]
        return (min(values) - 0.05, max(values) + 0.05) if self.log_x else (0.0, max(values) or 1.0)

    def label_places(self, gap: float) -> list[float]:
        """Vertical positions of the names of `named`, at least `gap` apart, in the units of the axis."""
        low, high = self.y_limits()
        return spread([self.height(curve.y[-1]) for curve in self.named], gap, low, high)
