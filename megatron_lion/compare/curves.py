"""What a comparison draws: panels of curves with reference lines, the same for PNG figures and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lion.compare.runs import RunRecord, evaluation_key, main_evaluation_key

NOISE_RATIO = math.sqrt(2 / math.pi)
"""r/√d of a gradient that is pure Gaussian noise: E|z| / sqrt(E z²) = 0.798 for each coordinate."""

# Okabe and Ito's palette: distinct for every common kind of colour vision, on white and (lightened) on black.
OPTIMIZER_COLOURS = {"lion": "#0072B2", "sgd": "#D55E00", "adamw": "#009E73"}
SPARE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6C757D")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line.

    Attributes:
        label: written beside its end.
        x, y: its points.
        colour: as #rrggbb.
        dash: on and off lengths; () is solid.
        markers: whether the points are marked (few measurements).
        faint: values drawn thinly behind, such as single batches behind their mean.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: tuple[float, ...] = ()
    markers: bool = False
    faint: Sequence[float] = ()


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
        slug: name of its file.
        title: what is drawn.
        x_label, y_label: axes with units.
        curves: what is compared.
        references: lines that are always shown.
        from_zero: whether the vertical axis starts at zero.
    """

    slug: str
    title: str
    y_label: str
    curves: list[Curve]
    x_label: str = "optimizer step"
    references: list[Reference] = field(default_factory=list)
    from_zero: bool = False

    def y_limits(self) -> tuple[float, float]:
        """Limits that hold all curves and references."""
        values = [v for curve in self.curves for v in curve.y] + [r.y for r in self.references]
        low, high = min(values), max(values)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return (0.0, high * 1.08) if self.from_zero else (low - pad, high + pad)

    def x_limits(self) -> tuple[float, float]:
        """From zero to the last point."""
        return 0.0, max((x for curve in self.curves for x in curve.x), default=1.0) or 1.0


def styles(runs: list[RunRecord]) -> dict[int, tuple[str, tuple[float, ...]]]:
    """Colour and dash of each run (by its place in the list): colour says optimizer, dash tells its runs apart."""
    spare = iter(SPARE_COLOURS * len(runs))
    colours = {o: OPTIMIZER_COLOURS.get(o) or next(spare) for o in dict.fromkeys(run.optimizer for run in runs)}
    chosen, used = {}, dict.fromkeys(colours, 0)
    for place, run in enumerate(runs):
        chosen[place] = (colours[run.optimizer], DASHES[used[run.optimizer] % len(DASHES)])
        used[run.optimizer] += 1
    return chosen


def panels(runs: list[RunRecord]) -> list[Panel]:
    """The panels of the paper's Figures 2 and 3 for the runs of one model, and perplexity; empty ones left out.

    Training loss, test loss, norm ratio against √d and 0.798 √d, zero-shot log perplexity, KKT residual.
    """
    look = styles(runs)

    def curves(key: str, *, window: int = 1, markers: bool = False) -> list[Curve]:
        found = []
        for place, run in enumerate(runs):
            series = run.series(key)
            if series:
                mean = series.smoothed(window)
                found.append(Curve(
                    label=run.label, x=mean.steps, y=mean.values, colour=look[place][0],
                    dash=look[place][1], markers=markers and len(mean.steps) <= 25,
                    faint=series.values if window > 1 else (),
                ))  # fmt: skip
        return found

    longest = max((len(run.series("train/loss").steps) for run in runs), default=0)
    window = max(1, longest // 50)
    smoothing = f", mean of {window} logged values" if window > 1 else ""
    made = [
        Panel(
            slug="training-loss", title="Training loss", y_label=f"nats per token{smoothing}",
            curves=curves("train/loss", window=window),
        ),
        Panel(slug="test-loss", title="Test loss", y_label="nats per token", curves=curves("test/loss", markers=True)),
        Panel(
            slug="norm-ratio", title="Norm ratio of the full gradient", y_label="r = ‖∇f‖₁ / ‖∇f‖₂",
            curves=curves("probe/norm_ratio", markers=True), references=_ratio_references(runs), from_zero=True,
        ),
        *_perplexity_panels(runs, look),
        Panel(
            slug="kkt-residual", title="KKT residual", y_label="λ⟨∇f, θ⟩ + ‖∇f‖₁",
            curves=curves("probe/kkt_residual", markers=True), from_zero=True,
        ),
    ]  # fmt: skip
    return [panel for panel in made if panel.curves]


def _ratio_references(runs: list[RunRecord]) -> list[Reference]:
    """√d and what pure noise gives, for each d among the runs."""
    lines = []
    for d in sorted(
        {run.num_parameters for run in runs if run.num_parameters is not None and run.series("probe/norm_ratio")}
    ):
        root = math.sqrt(d)
        lines += [
            Reference(y=root, label=f"√d = {root:,.0f}"),
            Reference(y=NOISE_RATIO * root, label="0.798 √d: pure noise", dotted=True),
        ]
    return lines


def _perplexity_panels(runs: list[RunRecord], look: dict[int, tuple[str, tuple[float, ...]]]) -> list[Panel]:
    """Zero-shot log perplexity by step, by the convention that most of the runs share."""
    key = main_evaluation_key(runs)
    if key is None:
        return []
    curves = []
    for place, run in enumerate(runs):
        points = [(int(r["step"]), float(r["log_token_ppl"])) for r in run.evaluations if evaluation_key(r) == key]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(
                Curve(label=run.label, x=steps, y=values, colour=look[place][0], dash=look[place][1], markers=True)
            )
    return [
        Panel(slug="perplexity", title="Zero-shot log perplexity", y_label="ln perplexity per token", curves=curves)
    ]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart so that neighbours keep `gap`, as little as needed, within [low, high].

    >>> [round(p, 2) for p in spread([1.0, 1.1, 5.0], gap=1.0, low=0.0, high=10.0)]
    [0.55, 1.55, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[tuple[list[int], float]] = [([i], min(max(positions[i], low), high)) for i in order]
    place = 0
    while place + 1 < len(clusters):
        (left, left_centre), (right, right_centre) = clusters[place : place + 2]
        if right_centre - left_centre >= gap * (len(left) + len(right)) / 2 - 1e-12:
            place += 1
            continue
        members = [*left, *right]
        half = gap * (len(members) - 1) / 2
        centre = sum(positions[i] for i in members) / len(members)
        clusters[place : place + 2] = [(members, min(max(centre, low + half), max(high - half, low + half)))]
        place = max(place - 1, 0)  # a cluster that grew may now touch the one before it
    placed = [0.0] * len(positions)
    for members, centre in clusters:
        for rank, i in enumerate(members):
            placed[i] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed
