"""Panels of curves and reference lines, from which both the PNG figures and the HTML report are drawn."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import truediv
from statistics import fmean

from megatron_lion.compare.axis_ticks import spread
from megatron_lion.compare.budgets import tokens_at
from megatron_lion.compare.held_out import differences, reason
from megatron_lion.compare.labels import loss_unit, seed_groups, setting_names
from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.intervals import t_quantile
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord
from megatron_lion.runs.series import Series
from megatron_lion.style import OPTIMIZER_COLOURS, SPARE_COLOURS

NOISE_RATIO = math.sqrt(2 / math.pi)
"""r/√d of a gradient that is pure Gaussian noise: E|z| / √(E z²) = 0.798 for a standard normal z."""

OTHER_SAMPLES = "; on different samples"
"""Added to the name of an axis whose curves are not comparable."""
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
AXES = ("step", "tokens", "time")
"""The possible horizontal axes."""
MAX_NAMED = 12
"""Largest number of named curves of a model; there is no room for more names beside a chart."""
MIN_RATES = 3
"""Fewest learning rates for which the tuning curve is drawn."""
LOG_RANGE = 30
"""A positive quantity whose values span more than this factor is drawn on a logarithmic axis."""


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
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: tuple[float, ...] = ()
    markers: bool = False
    behind: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    bars: Sequence[float | None] = ()

    @property
    def intervals(self) -> list[tuple[float, float, float]]:
        """The known bars, as (x, low, high)."""
        if not self.bars:
            return []
        points = zip(self.x, self.y, self.bars, strict=True)
        return [(x, y - bar, y + bar) for x, y, bar in points if bar is not None]

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

    def along(self, value: float) -> float:
        """A value in the units of the horizontal axis: the value or its decimal logarithm."""
        return math.log10(value) if self.log_x else value

    def height(self, value: float) -> float:
        """A value in the units of the vertical axis: the value or its decimal logarithm."""
        return math.log10(value) if self.log_y else value

    def y_limits(self) -> tuple[float, float]:
        """Limits that include all curves, bars and references, in the units of the axis."""
        ends = [end for curve in self.curves for _, *both in curve.intervals for end in both]
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


@dataclass(frozen=True, kw_only=True)
class Line:
    """The runs that one curve represents: the seeds of a setting."""

    label: str
    runs: tuple[RunRecord, ...]
    colour: str
    dash: tuple[float, ...]


def lines_of(runs: list[RunRecord]) -> list[Line]:
    """One line for each setting of one model's runs: colour by optimizer, dash by setting.

    If there are more than `MAX_NAMED` settings, only those with the lowest validation loss of each optimizer are named.
    """
    spare = iter(SPARE_COLOURS * len(runs))
    colours = {o: OPTIMIZER_COLOURS.get(o) or next(spare) for o in dict.fromkeys(run.optimizer for run in runs)}
    groups = seed_groups(runs)
    names = setting_names(groups)
    used = dict.fromkeys(colours, 0)
    named = set(_ranked(groups)[:MAX_NAMED])
    lines = []
    for key, group in groups.items():
        optimizer = group[0].optimizer
        label = group[0].label if len(group) == 1 else f"{names[key]}, n={len(group)}"
        dash = DASHES[used[optimizer] % len(DASHES)]
        used[optimizer] += 1
        lines.append(Line(label=label if key in named else "", runs=tuple(group), colour=colours[optimizer], dash=dash))
    return lines


def _ranked(groups: dict[tuple[str, ...], list[RunRecord]]) -> list[tuple[str, ...]]:
    """The best setting of each optimizer by validation loss, then the second best of each, and so on."""

    def loss(key: tuple[str, ...]) -> float:
        return min(run.valid_loss if run.valid_loss is not None else math.inf for run in groups[key])

    places: dict[tuple[str, ...], int] = {}
    seen: Counter[str] = Counter()
    for key in sorted(groups, key=loss):
        optimizer = groups[key][0].optimizer
        places[key] = seen[optimizer]
        seen[optimizer] += 1
    return sorted(groups, key=lambda key: (places[key], loss(key)))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A horizontal axis: its name, and the positions of a run's steps on it (None if the run did not record them)."""

    label: str
    place: Callable[[RunRecord, Sequence[int]], Sequence[float] | None]


def scale_of(axis: str, runs: Sequence[RunRecord]) -> Scale:
    """The scale of an axis of `AXES` for the runs of one model."""
    if axis == "step":
        return Scale(label="optimizer step", place=lambda run, steps: steps)
    if axis == "tokens":
        return Scale(label="training tokens", place=tokens_at)
    longest = max((run.training_seconds(run.last_step) or 0.0 for run in runs), default=0.0)
    unit, name = next(((u, n) for u, n in ((3600.0, "hours"), (60.0, "minutes")) if longest >= 2 * u), (1.0, "seconds"))

    def time(run: RunRecord, steps: Sequence[int]) -> Sequence[float] | None:
        seconds = run.seconds_at(steps)
        return [s / unit for s in seconds] if seconds else None

    return Scale(label=f"training {name}", place=time)


def _curve(
    line: Line, series: Callable[[RunRecord], Series], scale: Scale, *, window: int = 1, markers: bool = False,
    bars: Callable[[RunRecord], Mapping[int, float]] | None = None,
) -> Curve | None:  # fmt: skip
    """The mean over a line's runs at the steps that all of them have, or None if there are none.

    `bars` gives half the interval of each value. The bar of a mean over seeds is the mean of their bars: seeds may be
    probed with the same batches, so their errors can be equal and do not average out.
    """
    found = [(run, values) for run in line.runs if (values := series(run))]
    if not found:
        return None
    common = _common_steps([values.steps for _, values in found])
    columns, places, behind = [], [], []
    for run, values in found:
        places_at = scale.place(run, values.steps)
        if places_at is None:
            return None
        at = places_at if places_at is values.steps else array("d", places_at)
        smooth = values.smoothed(window)
        if window > 1 and len(found) == 1:
            behind.append((at, values.values))
        elif len(found) > 1:
            behind.append((at, smooth.values))
        places.append(_at_steps(values.steps, at, common))
        columns.append(_at_steps(values.steps, smooth.values, common))
    if not common:
        return None
    return Curve(
        label=line.label, x=_means(places), y=_means(columns),
        colour=line.colour, dash=line.dash, markers=markers and len(common) <= 25, behind=behind if line.label else (),
        bars=_mean_bars([bars(run) for run, _ in found], common) if bars else (),
    )  # fmt: skip


def _common_steps(columns: Sequence[Sequence[int]]) -> Sequence[int]:
    """The steps that all columns have, ascending."""
    first, *others = columns
    return first if all(steps == first for steps in others) else sorted(set(first).intersection(*others))


def _at_steps(steps: Sequence[int], values: Sequence[float], wanted: Sequence[int]) -> Sequence[float]:
    """The values at the wanted steps."""
    if steps == wanted:
        return values
    by_step = dict(zip(steps, values, strict=True))
    return [by_step[step] for step in wanted]


def _means(columns: Sequence[Sequence[float]]) -> Sequence[float]:
    """The mean over the columns at each place, in 8 bytes each: a long run has as many places as log lines."""
    if len(columns) == 1:
        return array("d", columns[0])
    return array("d", map(truediv, map(math.fsum, zip(*columns, strict=True)), repeat(len(columns))))


def _mean_bars(found: Sequence[Mapping[int, float]], steps: Sequence[int]) -> list[float | None]:
    """The mean of the runs' bars at each step; None if a run's bar is not known."""
    columns = [[bars.get(step) for bars in found] for step in steps]
    return [None if None in column else fmean(bar for bar in column if bar is not None) for column in columns]


def _ratio_bars(run: RunRecord) -> dict[int, float]:
    """Half the 95 % interval of r over draws of batches, by step, for the probes that stored a standard error."""
    errors, groups = run.series("probe/norm_ratio_standard_error"), run.series("probe/noise_groups")
    counts = dict(zip(groups.steps, groups.values, strict=True))
    return {
        step: t_quantile(counts[step] - 1) * error
        for step, error in zip(errors.steps, errors.values, strict=True)
        if counts.get(step, 0) > 1
    }


def _ratio_name(curves: Sequence[Curve]) -> str:
    """The name of r's axis, with what its bars and open marks are, if there are any."""
    barred = any(curve.intervals for curve in curves)
    unknown = any(any(curve.open_marks) for curve in curves)
    return "r = ‖∇f‖₁ / ‖∇f‖₂" + "; bars: 95 %" * barred + "; open: no error known" * unknown


def panels(runs: list[RunRecord], axis: str = "step", tried: Sequence[RunRecord] = ()) -> list[Panel]:
    """The panels of the paper's Figures 2 and 3 and some more, for the runs of one model; empty panels are omitted.

    Training loss, test loss, norm ratio against √d and 0.798 √d, zero-shot log perplexity, KKT residual, and the
    validation loss over the learning rates tried.

    Args:
        runs: the runs of one model.
        axis: "step", "tokens" or "time" (training time, without measurements and pauses).
        tried: the runs that `runs` were chosen from; by default `runs`.

    Source: Dong, Li, Lin, arXiv 2411.07724, Figures 2 and 3.
    """
    scale, lines, unit = scale_of(axis, runs), lines_of(runs), loss_unit(runs)

    def curves(
        series: Callable[[RunRecord], Series], *, window: int = 1, markers: bool = True,
        bars: Callable[[RunRecord], Mapping[int, float]] | None = None,
    ) -> list[Curve]:  # fmt: skip
        made = (_curve(line, series, scale, window=window, markers=markers, bars=bars) for line in lines)
        return [curve for curve in made if curve is not None]

    longest = max((len(run.series("train/loss").steps) for run in runs), default=0)
    window = max(1, longest // 50)
    smoothing = f", mean of {window} logged values" if window > 1 else ""
    training = curves(lambda run: run.series("train/loss"), window=window, markers=False)
    residual = curves(lambda run: run.series("probe/kkt_residual"))
    ratios = curves(lambda run: run.series("probe/norm_ratio"), bars=_ratio_bars)
    key = main_evaluation_key(runs)
    tuned = [run for run in tried or runs if run.model == runs[0].model]
    tested = [line.runs for line in lines if any(run.series("test/loss") for run in line.runs)]
    made = [
        Panel(slug="training-loss", title="Training loss", y_label=f"{unit}{smoothing}", curves=training,
              x_label=scale.label),
        Panel(slug="test-loss", title="Test loss", y_label=unit + OTHER_SAMPLES * bool(reason(tested)), x_label=scale.label,
              curves=curves(lambda run: run.series("test/loss"))),
        Panel(
            slug="norm-ratio", title="Norm ratio of the full gradient", y_label=_ratio_name(ratios), x_label=scale.label,
            curves=ratios, references=_ratio_references(runs), from_zero=True,
        ),
        Panel(slug="perplexity", title="Zero-shot log perplexity", y_label="ln perplexity per token", x_label=scale.label,
              curves=curves(lambda run: _perplexities(run, key))),
        Panel(slug="kkt-residual", title="KKT residual", y_label="λ⟨∇f, θ⟩ + ‖∇f‖₁", x_label=scale.label, curves=residual,
              from_zero=True, log_y=_wants_log(residual)),
        Panel(slug="learning-rate", title="Tuning: validation loss at the end", x_label="learning rate", log_x=True,
              y_label=f"{unit}; the lowest of each rate{OTHER_SAMPLES * bool(differences(tuned))}",
              curves=_rate_curves(tuned, lines)),
    ]  # fmt: skip
    return [panel for panel in made if panel.curves]


def _rate_curves(tried: Sequence[RunRecord], lines: list[Line]) -> list[Curve]:
    """Final validation loss over the learning rate, one curve per optimizer; none unless one has `MIN_RATES` rates."""
    colours = {line.runs[0].optimizer: line.colour for line in lines}
    found: dict[str, dict[float, float]] = {optimizer: {} for optimizer in colours}
    for run in tried:
        rate, loss = run.settings.get("optimizer.lr"), run.valid_loss
        if run.optimizer in found and isinstance(rate, int | float) and rate > 0 and loss is not None:
            known = found[run.optimizer]
            known[float(rate)] = min(loss, known.get(float(rate), math.inf))
    if max(map(len, found.values()), default=0) < MIN_RATES:
        return []
    return [
        Curve(label=OPTIMIZER_NAMES.get(optimizer, optimizer), x=sorted(losses), y=[losses[rate] for rate in sorted(losses)],
              colour=colours[optimizer], markers=True)
        for optimizer, losses in found.items() if losses
    ]  # fmt: skip


def _wants_log(curves: list[Curve]) -> bool:
    ends = [end(curve.y) for curve in curves for end in (min, max)]
    return bool(ends) and min(ends) > 0 and max(ends) > LOG_RANGE * min(ends)


def _ratio_references(runs: list[RunRecord]) -> list[Reference]:
    """√d and the norm ratio of pure noise, for each d among the runs."""
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


def _perplexities(run: RunRecord, key: tuple[object, ...] | None) -> Series:
    """Log perplexity by step under one convention."""
    points = {int(r["step"]): float(r["log_token_ppl"]) for r in run.evaluations if key and evaluation_key(r) == key}
    return Series(tuple(points), tuple(points.values()))
