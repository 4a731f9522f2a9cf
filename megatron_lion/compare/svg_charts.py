"""Line charts as inline SVG: they follow the page's light or dark colours and are readable on a phone."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_lion.compare.axis_ticks import log_ticks, short, ticks
from megatron_lion.compare.chart import Curve, Panel

# A small drawing area, because the SVG is scaled to the page: on a phone the text must not shrink to unreadable.
WIDTH, HEIGHT = 460, 330
LEFT, TOP, BOTTOM = 56, 50, 44
LABEL_HEIGHT = 15
LABEL_ADVANCE = 9.2  # largest average width of a character in pixels, in the widest font that the page names
MAX_LABEL = 20
AXIS_WIDTH = 64  # characters of a line of the vertical axis' name; there is room for two lines
MAX_POINTS = 300
MARKED_SIZE = 3


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plotting area of a panel and the mapping from data to pixels; the limits are in units of the axes."""

    panel: Panel
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    edge: float

    def x(self, value: float) -> float:
        """Horizontal pixel of a value."""
        return LEFT + (self.panel.along(value) - self.x_low) / (self.x_high - self.x_low) * (self.edge - LEFT)

    def y(self, value: float) -> float:
        """Vertical pixel of a value."""
        return self.at(self.panel.height(value))

    def at(self, height: float) -> float:
        """Vertical pixel of a height in units of the axis, clamped to the area: single seeds may exceed the limits."""
        inside = min(max(height, self.y_low), self.y_high)
        return TOP + (self.y_high - inside) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def chart(panel: Panel) -> str:
    """One panel as an `<svg>` element; `html_report.STYLE` styles its classes, and its values are tooltips."""
    names = [_fitted(curve.label) for curve in panel.named]
    dashed = any(curve.dash for curve in panel.named)
    beside = max(map(len, names), default=0) * LABEL_ADVANCE + (42 if dashed else 20)
    (x_low, x_high), (y_low, y_high) = panel.x_limits(), panel.y_limits()
    frame = Frame(panel=panel, x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, edge=WIDTH - beside)
    ends = panel.label_places(LABEL_HEIGHT / (HEIGHT - TOP - BOTTOM) * (y_high - y_low))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">',
        *_axes(panel, frame),
        *(_curve(curve, frame) for curve in panel.curves),
        *(_label(curve, frame.at(end), frame, dashed) for curve, end in zip(panel.named, ends, strict=True)),
        "</svg>",
    ]
    return "\n".join(parts)


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _axes(panel: Panel, frame: Frame) -> list[str]:
    """Title, grid, ticks, axis names and reference lines."""
    lines = panel.y_lines(AXIS_WIDTH)
    parts = [_text("title", 4, 15, panel.title), *(_text("axis", 4, 32 + 14 * n, line) for n, line in enumerate(lines))]
    parts.append(_text("axis", (LEFT + frame.edge) / 2, HEIGHT - 8, panel.x_label, "middle"))
    for value in (log_ticks if panel.log_y else ticks)(frame.y_low, frame.y_high, 5):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.edge:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, y + 4, short(value), "end"))
    below = HEIGHT - BOTTOM + 17
    parts += [
        _text("tick", frame.x(v), below, short(v), "middle")
        for v in (log_ticks if panel.log_x else ticks)(frame.x_low, frame.x_high, 4)
    ]
    for line in panel.references:
        y, kind = frame.y(line.y), "reference dotted" if line.dotted else "reference"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{frame.edge:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT + 4, y - 4, line.label))
    return parts


def _curve(curve: Curve, frame: Frame) -> str:
    """The line, its bars, its marks with tooltips, and the single values behind a mean."""
    dash = f' stroke-dasharray="{" ".join(map(str, curve.dash))}"' if curve.dash else ""
    kind = "curve" if curve.label else "curve nameless"
    parts = [f'<g class="{kind}" style="--c:{curve.colour}">']
    parts += [f'<polygon class="bounds" points="{points}"/>' for points in _bands(curve, frame)]
    parts += [f'<polyline class="faint" points="{_points(x, y, frame)}"/>' for x, y in curve.behind]
    parts.append(f'<polyline{dash} points="{_points(curve.x, curve.y, frame)}"/>')
    if curve.label:
        parts += [
            f'<line class="bar" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
            for x, low, high in curve.intervals
        ]
    if curve.markers and curve.label:
        bars, bands = curve.bars or [None] * len(curve.y), curve.band or [None] * len(curve.y)
        parts += [
            f'<circle{' class="open"' if unknown else ""} cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{MARKED_SIZE}">'
            f"<title>{html.escape(curve.label)}, {html.escape(frame.panel.x_label)} {x:,.6g}: {y:,.5g}"
            f"{f' ± {bar:,.3g} (95 %)' if bar is not None else ''}"
            f"{f'; without noise {ends[0]:,.5g} to {ends[1]:,.5g}' if ends is not None else ''}</title></circle>"
            for x, y, bar, unknown, ends in zip(curve.x, curve.y, bars, curve.open_marks, bands, strict=True)
        ]
    return "".join([*parts, "</g>"])


def _bands(curve: Curve, frame: Frame) -> list[str]:
    """Corner points of the shaded bounds, one polygon for each run of points at which they are known."""
    known = zip(curve.x, curve.band, strict=False)
    runs = [list(run) for is_known, run in groupby(known, key=lambda point: point[1] is not None) if is_known]
    return [
        " ".join(
            [f"{frame.x(x):.1f},{frame.y(ends[0]):.1f}" for x, ends in run if ends]
            + [f"{frame.x(x):.1f},{frame.y(ends[1]):.1f}" for x, ends in reversed(run) if ends]
        )
        for run in runs
        if len(run) > 1
    ]


def _points(x: Sequence[float], y: Sequence[float], frame: Frame) -> str:
    """Corner points of a line, thinned to what is visible; the first and the last are always kept."""
    stride = -(-len(x) // MAX_POINTS)
    kept = list(zip(x[::stride], y[::stride], strict=True))
    last = (x[-1], y[-1])
    if kept[-1] != last:
        kept.append(last)
    right = frame.x_high  # a seed may have more steps than the mean, which ends with the shortest
    return " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in kept if frame.panel.along(a) <= right)


def _label(curve: Curve, y: float, frame: Frame, dashed: bool) -> str:
    """The curve's name at its end, with a sample of its line if the panel has dashed curves."""
    sample, x = "", frame.edge + 8
    if dashed:
        dash = f' stroke-dasharray="{" ".join(map(str, curve.dash))}"' if curve.dash else ""
        sample = f'<line{dash} x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        x += 22
    return f'<g class="curve" style="--c:{curve.colour}">{sample}{_text("label", x, y + 4, _fitted(curve.label))}</g>'


def _fitted(label: str) -> str:
    """A label cut to leave room for the curves; the report's tables show it in full."""
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"
