"""Runs at equal cost: test loss by step, tokens and training time, and the cost of reaching a target loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_lion.compare.axis_ticks import short, ticks
from megatron_lion.compare.held_out import reason, withheld
from megatron_lion.compare.labels import by_model, loss_unit, seed_groups, setting_names
from megatron_lion.compare.optimism import count_of
from megatron_lion.compare.seeds import listed, stopped_at
from megatron_lion.compare.table import Cell, Table
from megatron_lion.intervals import LEVEL, Interval, mean_interval
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.series import Series

MOST_AMOUNTS = 6
ROUNDING = 1e-9
ROOM = 0.9
"""Share of a run's steps within which its smoothed test loss reaches the default target."""
MOST_LOG = 700.0
"""Largest logarithm whose exponential is a finite float; two seeds far apart have an interval beyond it."""
_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A quantity that training spends.

    Attributes:
        name: part of the slugs of its tables.
        title: name in the title of its table.
        unit: unit, written after an amount.
        spent: amount that a run spent up to each of some steps, or None if the run did not record it.
    """

    name: str
    title: str
    unit: str
    spent: Callable[[RunRecord, Sequence[int]], Sequence[float] | None]


def tokens_at(run: RunRecord, steps: Sequence[int]) -> Sequence[float] | None:
    """Training tokens up to each step, or None if the run does not record its tokens per step."""
    per_step = run.tokens_per_step
    return list(map(per_step.__mul__, steps)) if per_step else None


BUDGETS = (
    Budget(name="step", title="optimizer step", unit="steps", spent=lambda run, steps: steps),
    Budget(name="tokens", title="training tokens", unit="tokens", spent=tokens_at),
    Budget(name="time", title="training time", unit="training seconds", spent=lambda run, steps: run.seconds_at(steps)),
)


@dataclass(frozen=True)
class Measured:
    """The test losses of a run (nats per token) and the amount spent at each."""

    costs: Sequence[float]
    losses: Sequence[float]

    def between(self, since: float, amount: float) -> float | None:
        """The last loss measured in (since, amount], or None."""
        found = [
            loss for cost, loss in zip(self.costs, self.losses, strict=True) if since < cost <= amount * (1 + ROUNDING)
        ]
        return found[-1] if found else None

    def reaches(self, amount: float) -> bool:
        """Whether the run was measured at an amount or after it."""
        return self.costs[-1] * (1 + ROUNDING) >= amount


def measured(run: RunRecord, budget: Budget) -> Measured | None:
    """A run's test losses over a budget, or None if the run lacks the losses or their cost."""
    series = run.series("test/loss")
    costs = budget.spent(run, series.steps) if series else None
    return Measured(costs, series.values) if costs else None


def loss_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Test loss by steps, tokens and training time: one table of each for every model."""
    tables: list[Table] = []
    groups = by_model(list(runs))
    for budget in BUDGETS:
        for number, (model, group) in enumerate(groups.items()):
            found = [(run, losses) for run in group if (losses := measured(run, budget))]
            if found:
                slug = f"loss-by-{budget.name}" + (f"-{number + 1}" if number else "")
                title = f"{f'{model}: test' if len(groups) > 1 else 'Test'} loss by {budget.title} ({loss_unit(group)})"
                table = _loss_table(slug, title, budget, model, found)
                tables += [table] if table else []
    return tables


def _loss_table(
    slug: str, title: str, budget: Budget, model: str, found: list[tuple[RunRecord, Measured]]
) -> Table | None:
    """Returns the table, or None if no amount has a measurement."""
    size, unit, amounts = _columns(budget, [losses for _, losses in found])
    steps = list(pairwise([0.0, *amounts]))
    cells = [
        [losses.between(since, amount) if losses.reaches(amount) else None for since, amount in steps]
        for _, losses in found
    ]
    kept = [place for place in range(len(amounts)) if any(row[place] is not None for row in cells)]
    columns = ["model", "optimizer", *(f"{short(round(amounts[place] / size, 9))}{unit}" for place in kept)]
    unmarked, notes = withheld([run for run, _ in found], columns[2:])
    table = Table(
        slug=slug,
        title=title,
        columns=columns,
        rows=[[model, run.label, *(row[i] for i in kept)] for (run, _), row in zip(found, cells, strict=True)],
        formats=dict.fromkeys(columns[2:], ".4f"),
        notes=["the last measurement after the previous column; a dash if there is none or the run had ended", *notes],
        best=columns[2:],
        unmarked=unmarked,
    )
    return table if kept else None


def _columns(budget: Budget, runs: list[Measured]) -> tuple[float, str, list[float]]:
    """Size and name of the unit, and the amounts.

    The amounts are those at which every run that reached them was measured, or round ones if those are too few.
    """
    longest = max(losses.costs[-1] for losses in runs)
    if budget.name == "time":
        size, unit = next(((s, f" {u}") for s, u in _UNITS if longest >= 2 * s), (1.0, " s"))
        return size, unit, [amount * size for amount in ticks(0.0, longest / size or 1.0, 5) if amount > 0]
    having = Counter(cost for losses in runs for cost in losses.costs if cost > 0)
    alike = sorted(cost for cost, count in having.items() if count == sum(losses.reaches(cost) for losses in runs))
    if len(alike) > MOST_AMOUNTS / 2 or len(alike) == len(having):
        stride = -(-len(alike) // MOST_AMOUNTS)
        return 1.0, "", alike[::-1][::stride][::-1]  # the last amount is always kept
    return 1.0, "", [amount for amount in ticks(0.0, longest or 1.0, 5) if amount > 0]


def equal_budget_table(runs: Sequence[RunRecord]) -> Table:
    """Test loss at the largest number of steps, tokens and training seconds that every run of a model reached.

    A run that diverged early does not make the budget smaller: it has no value at a budget that it did not reach.
    """
    rows: list[list[Cell]] = []
    notes = []
    for model, group in by_model(list(runs)).items():
        group = [run for run in group if run.series("test/loss")]
        if len(group) < 2:
            continue
        every = all(run.diverged for run in group)
        limiting = [every or not run.diverged for run in group]
        columns: list[list[Cell]] = []
        limits = []
        for budget in BUDGETS:
            found = [measured(run, budget) for run in group]
            known = [losses for losses, counts in zip(found, limiting, strict=True) if losses and counts]
            if len(known) < sum(limiting):  # no comparison at equal cost if one run's cost is unknown
                columns.append([None] * len(group))
                continue
            most = min(losses.costs[-1] for losses in known)
            columns.append([
                losses.between(most / 2, most) if losses and losses.reaches(most) else None for losses in found
            ])  # fmt: skip
            limits.append(f"{most:,.0f} {budget.unit}")
        rows += [[model, run.label, *cells] for run, *cells in zip(group, *columns, strict=True)]
        notes.append(f"{model}: {', '.join(limits)}; the last measurement in its second half")
        if left := [
            f"{run.label} {stopped_at(run)}" for run, counts in zip(group, limiting, strict=True) if not counts
        ]:
            notes[-1] += f"; a run that diverged does not limit the budget: {listed(left)}"
    heads = ["model", "optimizer", "at equal steps", "at equal tokens", "at equal seconds"]
    unmarked, reasons = withheld([run for run in runs if run.series("test/loss")], heads[2:])
    return Table(
        slug="equal-budget",
        title=f"Test loss at an equal budget ({loss_unit(runs)})",
        columns=heads,
        rows=rows,
        formats=dict.fromkeys(heads[2:], ".4f"),
        notes=[*notes, *reasons],
        best=heads[2:],
        unmarked=unmarked,
    )


def falling(losses: Sequence[float]) -> list[float]:
    """The curve that never rises and is closest to the losses in squares: isotonic regression with equal weights.

    A low measurement is averaged with the higher ones after it, so a single one hardly moves the curve. A loss that
    rises for good at the end is flattened to the mean of that end.

    Args:
        losses: in order of the steps, at least one.

    Example:
        >>> falling([5.0, 3.0, 4.0, 2.0])
        [5.0, 3.5, 3.5, 2.0]
    """
    from scipy.optimize import isotonic_regression  # imported here: it takes half a second

    return [float(loss) for loss in isotonic_regression(list(losses), increasing=False).x]


def crossing(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """The step at which the smoothed losses reach a target, linear between measurements; None if they do not.

    Args:
        steps: steps of the measurements, ascending.
        losses: test loss at each (nats per token), not smoothed.
        target: nats per token. If the first smoothed loss is at most the target, the first step is returned.

    Example:
        >>> crossing([0, 10, 20], [6.0, 4.0, 2.0], 3.0), crossing([0, 10], [6.0, 4.0], 3.0)
        (15.0, None)
    """
    smooth = falling(losses)
    place = next((place for place, loss in enumerate(smooth) if loss <= target), None)
    if not place:
        return None if place is None else float(steps[0])
    (low, high), (before, after) = steps[place - 1 : place + 1], smooth[place - 1 : place + 1]
    return low + (high - low) * (before - target) / (before - after)


def default_target(curves: Sequence[Series]) -> float:
    """The test loss that every curve reached within `ROOM` of its steps, rounded up to 0.01 nats.

    The room after it is needed because the end of a smoothed curve may be a single low measurement.
    """
    levels = [_between(curve.steps, falling(curve.values), ROOM * curve.steps[-1]) for curve in curves]
    return math.ceil(max(levels) * 100 - ROUNDING) / 100


def _between(steps: Sequence[int], values: Sequence[float], step: float) -> float:
    """A value at a step, linear between the steps of the measurements."""
    import numpy as np

    return float(np.interp(step, steps, values))


def geometric_mean(values: Sequence[float]) -> Interval:
    """Student's t interval of logarithms, as values again; the plain mean without ends if a value is 0.

    The logarithm of 0 is infinite, and the geometric mean would be 0 whatever the other values are.

    Steps to a target scatter by a factor: benchmarks/results/seed_intervals.md compares the coverage with plain steps.

    >>> found = geometric_mean([100.0, 400.0])
    >>> round(found.estimate), found.low < 100, geometric_mean([0.0, 10.0]).low is None
    (200, True, True)
    """
    if min(values) <= 0:
        mean = math.fsum(values) / len(values)
        return Interval(estimate=mean, low=None, high=None, confidence=LEVEL, count=len(values))
    found = mean_interval([math.log(value) for value in values])
    low, high = (None if end is None else _exp(end) for end in (found.low, found.high))
    return replace(found, estimate=math.exp(found.estimate), low=low, high=high)


def _exp(value: float) -> float:
    return math.exp(value) if value < MOST_LOG else math.inf


def target_table(runs: Sequence[RunRecord], target_loss: float | None = None) -> Table:
    """Steps, tokens and training time until the smoothed test loss reaches a target, by setting, over its seeds.

    Args:
        runs: from `read_runs`.
        target_loss: nats per token; by default, for each model, the `default_target` of its finished runs.
    """
    columns = ["model", "optimizer", "target (nats)", "reached by", "steps", "steps low", "steps high", "tokens",
               "training minutes"]  # fmt: skip
    marked = ["steps", "tokens", "training minutes"]
    rows: list[list[Cell]] = []
    notes: list[str] = []
    unmarked: list[tuple[str, str]] = []
    groups = seed_groups(run for run in runs if run.series("test/loss"))
    names = setting_names(groups)
    for model, family in by_model([run for group in groups.values() for run in group]).items():
        if len(family) < 2 and target_loss is None:
            continue
        target = target_loss
        if target is None:
            used, reservation = _for_the_target(family)
            target = default_target([run.series("test/loss") for run in used])
            notes += [f"{model}: {reservation}"] if reservation else []
        if why := reason([group for group in groups.values() if group[0].model == model]):
            unmarked += [(model, heading) for heading in marked]
            notes.append(f"{model}: no lowest value is marked, because {why}")
        for key, group in groups.items():
            if group[0].model == model:
                cells, found = _to_target(group, target)
                rows.append([model, names[key], float(target), *cells])
                notes += [f"{model}, {names[key]}: {note}" for note in found]
    if target_loss is None:
        notes.append(
            "target: the loss that the smoothed curve of every finished run of the model, if there is one, reached within "
            f"{ROOM:.0%} of its steps, rounded up to 0.01"
        )
    notes += [
        "each run's test loss is smoothed to the closest curve that never rises (isotonic regression, equal weights), and its "
        "step is read linearly between measurements",
        f"several seeds: geometric mean, with the {LEVEL:.0%} Student's t interval of the logarithm of the steps; one seed: the "
        "noise of its steps is not known",
    ]
    return Table(
        slug="to-target",
        title="To a target test loss",
        columns=columns,
        rows=rows,
        formats={"target (nats)": ".4f", "training minutes": ",.1f"}
        | dict.fromkeys(("steps", "steps low", "steps high", "tokens"), ",.0f"),
        notes=notes,
        best=marked,
        unmarked=unmarked,
    )


def _for_the_target(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], str | None]:
    """The runs that the default target is taken from, and a note if these are not all.

    A run that stopped early has a high loss at its end, which the other runs reach at once.
    """
    late = [run for run in runs if not run.finished]
    if not late:
        return list(runs), None
    ends = listed([f"{run.label} {stopped_at(run)}" for run in late])
    if used := [run for run in runs if run.finished]:
        return used, f"the target is taken from finished runs only; {ends}"
    used = [run for run in runs if not run.diverged] or list(runs)
    which = "unfinished runs that did not diverge" if len(used) < len(runs) else "unfinished runs"
    return used, f"no run is finished, so the target is a loss that all {which} reached so far; {ends}"


def _to_target(group: Sequence[RunRecord], target: float) -> tuple[list[Cell], list[str]]:
    """The cells from "reached by" on for the seeds of a setting, and its notes."""
    curves = [run.series("test/loss") for run in group]
    reached = [crossing(curve.steps, curve.values, target) for curve in curves]
    steps = [step for step in reached if step is not None]
    count = f"{len(steps)} of {len(group)}"
    notes = []
    at_once = sum(step == curve.steps[0] for step, curve in zip(reached, curves, strict=True))
    if at_once:
        notes.append(
            f"the first measurement of {count_of(at_once, 'run')} is at or below the target: no training step is needed "
            "to reach it, so give a lower --target-loss"
        )
    if len(steps) < len(group):
        low = sum(step is None and min(curve.values) <= target for step, curve in zip(reached, curves, strict=True))
        if len(group) > 1:
            notes.append(f"reached by {count} seeds, so there is no mean")
        if low:
            notes.append(
                "single measurements, but not the smoothed curve, are at or below the target: chance, or a loss that "
                "rises again"
            )
        return [count, None, None, None, None, None], ["; ".join(notes)] if notes else []
    if len(group) > 1 and min(steps) <= 0:
        notes.append(
            "a seed reached the target at step 0, which has no logarithm: arithmetic means without an interval"
        )
    spent: list[Cell] = []
    for budget in BUDGETS[1:]:
        known = [measured(run, budget) for run in group]
        amounts = [
            _between(losses.steps, found.costs, step)
            for losses, found, step in zip(curves, known, steps, strict=True)
            if found
        ]
        spent.append(geometric_mean(amounts).estimate if len(amounts) == len(group) else None)
    tokens, seconds = spent
    mean = geometric_mean(steps)
    minutes = seconds / 60 if isinstance(seconds, float) else None
    return [count, mean.estimate, mean.low, mean.high, tokens, minutes], notes
