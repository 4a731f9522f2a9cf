"""Line charts as inline SVG that follow the page's light or dark colours and stay readable on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lion.compare.curves import Curve, Panel, spread

# Drawn this small so that at a phone's width nothing shrinks below a readable size.
WIDTH, HEIGHT = 460, 330
LEFT, TOP, BOTTOM = 56, 50, 44
LABEL_HEIGHT = 15
LABEL_ADVANCE = 9.2  # pixels a character takes at most on average, in the widest of the fonts the page asks for
MAX_LABEL = 20
MAX_POINTS = 300
MARKED_SIZE = 3


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plotting area and how data units map to it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    edge: float

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.edge - LEFT)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def chart(panel: Panel) -> str:
    """One panel as an `<svg>` element; its classes are styled by `report.STYLE`, its values are tooltips."""
    dashed = any(curve.dash for curve in panel.curves)
    beside = max(len(_fitted(curve.label)) for curve in panel.curves) * LABEL_ADVANCE + (42 if dashed else 20)
    (x_low, x_high), (y_low, y_high) = panel.x_limits(), panel.y_limits()
    frame = Frame(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, edge=WIDTH - beside)
    gap = LABEL_HEIGHT / (HEIGHT - TOP - BOTTOM) * (y_high - y_low)
    ends = spread([curve.y[-1] for curve in panel.curves], gap, y_low, y_high)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">',
        *_axes(panel, frame),
        *(_curve(curve, frame) for curve in panel.curves),
        *(_label(curve, frame.y(end), frame, dashed) for curve, end in zip(panel.curves, ends, strict=True)),
        "</svg>",
    ]
    return "\n".join(parts)


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _axes(panel: Panel, frame: Frame) -> list[str]:
    """Title, grid, ticks, axis names and reference lines."""
    parts = [_text("title", 4, 15, panel.title), _text("axis", 4, 32, panel.y_label)]
    parts.append(_text("axis", (LEFT + frame.edge) / 2, HEIGHT - 8, panel.x_label, "middle"))
    for value in ticks(frame.y_low, frame.y_high, 5):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.edge:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, y + 4, short(value), "end"))
    below = HEIGHT - BOTTOM + 17
    parts += [_text("tick", frame.x(v), below, short(v), "middle") for v in ticks(frame.x_low, frame.x_high, 4)]
    for line in panel.references:
        y, kind = frame.y(line.y), "reference dotted" if line.dotted else "reference"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{frame.edge:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT + 4, y - 4, line.label))
    return parts


def _curve(curve: Curve, frame: Frame) -> str:
    """The line, its marks with tooltips, and the single values behind a mean."""
    dash = f' stroke-dasharray="{" ".join(map(str, curve.dash))}"' if curve.dash else ""
    parts = [f'<g class="curve" style="--c:{curve.colour}">']
    if curve.faint:
        parts.append(f'<polyline class="faint" points="{_points(curve.x, curve.faint, frame)}"/>')
    parts.append(f'<polyline{dash} points="{_points(curve.x, curve.y, frame)}"/>')
    if curve.markers:
        parts += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{MARKED_SIZE}">'
            f"<title>{html.escape(curve.label)}, step {x:,.0f}: {y:,.5g}</title></circle>"
            for x, y in zip(curve.x, curve.y, strict=True)
        ]
    return "".join([*parts, "</g>"])


def _points(x: Sequence[float], y: Sequence[float], frame: Frame) -> str:
    """Corner points of a line, thinned to what can be seen; the first and the last always stay."""
    pairs = list(zip(x, y, strict=True))
    stride = -(-len(pairs) // MAX_POINTS)
    kept = pairs[::stride]
    if kept[-1] != pairs[-1]:
        kept.append(pairs[-1])
    # Single values behind a mean may leave the axes that hold the means.
    bottom, top = frame.y_low, frame.y_high
    return " ".join(f"{frame.x(a):.1f},{frame.y(min(max(b, bottom), top)):.1f}" for a, b in kept)


def _label(curve: Curve, y: float, frame: Frame, dashed: bool) -> str:
    """The curve's name at its end, with a sample of its line where dashes tell curves apart."""
    sample, x = "", frame.edge + 8
    if dashed:
        dash = f' stroke-dasharray="{" ".join(map(str, curve.dash))}"' if curve.dash else ""
        sample = f'<line{dash} x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        x += 22
    return f'<g class="curve" style="--c:{curve.colour}">{sample}{_text("label", x, y + 4, _fitted(curve.label))}</g>'


def _fitted(label: str) -> str:
    """A label short enough to leave room for the curves; the report's tables have the whole of it."""
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between two limits, about `count` of them.

    >>> ticks(0, 1000, 4), ticks(3.9, 11.1, 5)
    ([0.0, 200.0, 400.0, 600.0, 800.0, 1000.0], [4.0, 6.0, 8.0, 10.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's text: thousands as k, millions as M.

    >>> [short(v) for v in (0.0, 0.25, 7.0, 1000.0, 12500.0, 2e6)]
    ['0', '0.25', '7', '1k', '12.5k', '2M']
    """
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"
