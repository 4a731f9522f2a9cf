"""The panels of a comparison: which curves and reference lines are drawn in which axes."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import truediv
from statistics import fmean

from megatron_lion.compare.budgets import tokens_at
from megatron_lion.compare.chart import Curve, Panel
from megatron_lion.compare.held_out import differences, reason
from megatron_lion.compare.labels import loss_unit, seed_groups, setting_names
from megatron_lion.compare.ratio_curves import RATIO_BAND, ratio_bars, ratio_name, ratio_references
from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord
from megatron_lion.runs.series import Series
from megatron_lion.style import OPTIMIZER_COLOURS, SPARE_COLOURS

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
    band: Sequence[Callable[[RunRecord], Mapping[int, float]]] = (),
) -> Curve | None:  # fmt: skip
    """The mean over a line's runs at the steps that all of them have, or None if there are none.

    `bars` gives half the interval of each value. The bar of a mean over seeds is the mean of their bars: seeds may be
    probed with the same batches, so their errors can be equal and do not average out. `band` gives lower and upper bounds,
    whose means bound the mean.
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
        band=_mean_band([_mean_bars([end(run) for run, _ in found], common) for end in band]) if band else (),
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


def _mean_band(ends: Sequence[Sequence[float | None]]) -> list[tuple[float, float] | None]:
    low, high = ends
    return [None if a is None or b is None else (a, b) for a, b in zip(low, high, strict=True)]


def panels(runs: list[RunRecord], axis: str = "step", tried: Sequence[RunRecord] = ()) -> list[Panel]:
    """The panels of the paper's Figures 2 and 3 and some more, for the runs of one model; empty panels are omitted.

    Training loss, test loss, norm ratio with its bounds without noise beside √d and the r of the noise, zero-shot log
    perplexity, KKT residual, and the validation loss over the learning rates tried.

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
        band: Sequence[Callable[[RunRecord], Mapping[int, float]]] = (),
    ) -> list[Curve]:  # fmt: skip
        made = (_curve(line, series, scale, window=window, markers=markers, bars=bars, band=band) for line in lines)
        return [curve for curve in made if curve is not None]

    longest = max((len(run.series("train/loss").steps) for run in runs), default=0)
    window = max(1, longest // 50)
    smoothing = f", mean of {window} logged values" if window > 1 else ""
    training = curves(lambda run: run.series("train/loss"), window=window, markers=False)
    residual = curves(lambda run: run.series("probe/kkt_residual"))
    ratios = curves(lambda run: run.series("probe/norm_ratio"), bars=ratio_bars, band=RATIO_BAND)
    noises = [
        replace(curve, label="", dash=(1, 3), markers=False, behind=())
        for curve in curves(lambda run: run.series("probe/norm_ratio_noise"))
    ]
    key = main_evaluation_key(runs)
    tuned = [run for run in tried or runs if run.model == runs[0].model]
    tested = [line.runs for line in lines if any(run.series("test/loss") for run in line.runs)]
    made = [
        Panel(slug="training-loss", title="Training loss", y_label=f"{unit}{smoothing}", curves=training,
              x_label=scale.label),
        Panel(slug="test-loss", title="Test loss", y_label=unit + OTHER_SAMPLES * bool(reason(tested)), x_label=scale.label,
              curves=curves(lambda run: run.series("test/loss"))),
        Panel(
            slug="norm-ratio", title="Norm ratio of the full gradient", y_label=ratio_name(ratios, noises), x_label=scale.label,
            curves=[*ratios, *noises] if ratios else [], references=ratio_references(runs, with_noise=len(noises) < len(lines)),
            from_zero=True,
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


def _perplexities(run: RunRecord, key: tuple[object, ...] | None) -> Series:
    """Log perplexity by step under one convention."""
    points = {int(r["step"]): float(r["log_token_ppl"]) for r in run.evaluations if key and evaluation_key(r) == key}
    return Series(tuple(points), tuple(points.values()))
