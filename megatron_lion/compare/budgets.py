"""Runs at equal cost: test loss by step, tokens and training time, and the cost of reaching a target loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_lion.compare.axis_ticks import short, ticks
from megatron_lion.compare.labels import by_model, loss_unit
from megatron_lion.compare.table import Cell, Table
from megatron_lion.runs.record import RunRecord

MOST_AMOUNTS = 6
ROUNDING = 1e-9
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
    return [run.tokens_per_step * step for step in steps] if run.tokens_per_step else None


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
            found = {run.label: losses for run in group if (losses := measured(run, budget))}
            if found:
                slug = f"loss-by-{budget.name}" + (f"-{number + 1}" if number else "")
                title = f"{f'{model}: test' if len(groups) > 1 else 'Test'} loss by {budget.title} ({loss_unit(group)})"
                table = _loss_table(slug, title, budget, model, found)
                tables += [table] if table else []
    return tables


def _loss_table(slug: str, title: str, budget: Budget, model: str, found: dict[str, Measured]) -> Table | None:
    """Returns the table, or None if no amount has a measurement."""
    size, unit, amounts = _columns(budget, list(found.values()))
    steps = list(pairwise([0.0, *amounts]))
    cells = {
        label: [losses.between(since, amount) if losses.reaches(amount) else None for since, amount in steps]
        for label, losses in found.items()
    }
    kept = [place for place in range(len(amounts)) if any(row[place] is not None for row in cells.values())]
    columns = ["model", "optimizer", *(f"{short(round(amounts[place] / size, 9))}{unit}" for place in kept)]
    table = Table(
        slug=slug,
        title=title,
        columns=columns,
        rows=[[model, label, *(row[place] for place in kept)] for label, row in cells.items()],
        formats=dict.fromkeys(columns[2:], ".4f"),
        notes=["the last measurement after the previous column; a dash if there is none or the run had ended"],
        best=columns[2:],
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
    """Test loss at the largest number of steps, tokens and training seconds that every run of a model reached."""
    rows: list[list[Cell]] = []
    notes = []
    for model, group in by_model(list(runs)).items():
        group = [run for run in group if run.series("test/loss")]
        if len(group) < 2:
            continue
        columns: list[list[Cell]] = []
        limits = []
        for budget in BUDGETS:
            found = [measured(run, budget) for run in group]
            known = [losses for losses in found if losses]
            if len(known) < len(found):  # no comparison at equal cost if one run's cost is unknown
                columns.append([None] * len(group))
                continue
            most = min(losses.costs[-1] for losses in known)
            columns.append([losses.between(most / 2, most) for losses in known])
            limits.append(f"{most:,.0f} {budget.unit}")
        rows += [[model, run.label, *cells] for run, *cells in zip(group, *columns, strict=True)]
        notes.append(f"{model}: {', '.join(limits)}; the last measurement in its second half")
    heads = ["model", "optimizer", "at equal steps", "at equal tokens", "at equal seconds"]
    return Table(
        slug="equal-budget",
        title=f"Test loss at an equal budget ({loss_unit(runs)})",
        columns=heads,
        rows=rows,
        formats=dict.fromkeys(heads[2:], ".4f"),
        notes=notes,
        best=heads[2:],
    )


def target_table(runs: Sequence[RunRecord], target_loss: float | None = None) -> Table:
    """Steps, tokens and training time until the test loss was first measured at or below a target.

    Args:
        runs: from `read_runs`.
        target_loss: nats per token; by default, for each model, the highest of its runs' best test losses, so that
            every run reaches it.
    """
    rows: list[list[Cell]] = []
    for model, group in by_model(list(runs)).items():
        reached = [best[1] for run in group if (best := run.series("test/loss").best())]
        if not reached or (len(reached) < 2 and target_loss is None):
            continue
        target = max(reached) if target_loss is None else target_loss
        for run in group:
            step = run.series("test/loss").first_at_most(target)
            seconds = run.training_seconds(step) if step is not None else None
            tokens = run.tokens_per_step * step if step is not None and run.tokens_per_step else None
            rows.append([model, run.label, float(target), step, tokens, seconds / 60 if seconds is not None else None])
    return Table(
        slug="to-target",
        title="To a target test loss",
        columns=["model", "optimizer", "target (nats)", "steps", "tokens", "training minutes"],
        rows=rows,
        formats={"target (nats)": ".4f", "training minutes": ",.1f"},
        notes=["the first measurement at or below the target; a dash if it was not reached"],
        best=["steps", "tokens", "training minutes"],
    )
