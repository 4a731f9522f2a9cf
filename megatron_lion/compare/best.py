"""The best setting of each optimizer by validation loss, with the reservations that apply to the choice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_lion.compare.held_out import differences
from megatron_lion.compare.labels import differing_settings, seed_groups, show
from megatron_lion.compare.optimism import UPPER, Optimism, count_of, pooled_deviation
from megatron_lion.compare.table import Cell, Table, one_line
from megatron_lion.errors import CheckpointError
from megatron_lion.plain_text import is_file_name, plain
from megatron_lion.runs.paths import has_begun
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord

SWEEP_FILE = "sweep.json"
NOT_COMPARABLE = "no setting is chosen"
"""The beginning of the note on settings that were validated on different samples."""
EDGE_SECTIONS = ("optimizer.", "schedule.")
"""Settings whose best value should be inside the grid. Others are exempt: more steps or layers are usually better."""


MOST_SHIFT = 0.2
"""Largest tolerated effect of diverged settings on a gap, in its standard errors; makes a 5 % test false in at most 5.5 %."""


@dataclass(frozen=True, kw_only=True)
class Confirms:
    """What a confirmation run is for.

    Attributes:
        setting: folder of a run of the grid with the setting that it retrains.
        seeds: the seeds of the confirmation, none of which the grid has.
    """

    setting: Path
    seeds: tuple[int, ...]


Confirmations = Mapping[Path, Confirms]
"""The confirmation runs of sweeps by folder, also those that have not begun."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best setting of one optimizer.

    Attributes:
        model, optimizer: names of both.
        runs: the runs with this setting, one per seed; empty if no run can be chosen. Without confirmation runs.
        valid_loss: mean at the end over the seeds that all settings share, or over all seeds (nats per token).
        settings: the values in which it differs from the other settings tried.
        tried: number of settings.
        notes: reservations, one sentence each.
        optimism: the expected optimism of the losses of `runs`.
        confirmation: its confirmation runs, if all of them are finished; else empty.
        unconfirmed: the reason why confirmation runs that exist are not used, or None.
    """

    model: str
    optimizer: str
    runs: tuple[RunRecord, ...]
    valid_loss: float | None
    settings: dict[str, Any]
    tried: int
    notes: tuple[str, ...]
    optimism: Optimism
    confirmation: tuple[RunRecord, ...] = ()
    unconfirmed: str | None = None

    @property
    def name(self) -> str:
        return OPTIMIZER_NAMES.get(self.optimizer, self.optimizer)

    @property
    def compared(self) -> tuple[RunRecord, ...]:
        """The runs that represent it in a comparison: its confirmation runs, or those it was chosen by."""
        return self.confirmation or self.runs

    @property
    def factor(self) -> float:
        """The expected optimism of the runs in `compared`, in standard deviations of one run."""
        return 0.0 if self.confirmation else self.optimism.factor


def choose_best(runs: Sequence[RunRecord], confirmations: Confirmations | None = None) -> list[Choice]:
    """Picks the setting with the lowest validation loss at the end for each model and optimizer.

    The test loss is not used, nor are confirmation runs. Runs that differ only in their seed are one setting. A setting
    with an unfinished or diverged seed is not chosen, and none is if the validation samples differ by more than the seed.

    Args:
        runs: the runs, in any order.
        confirmations: the confirmation runs among them; by default none.

    Returns:
        One choice for each model and optimizer, in the order of the runs.
    """
    confirmations = confirmations or {}
    families: dict[tuple[str, str], tuple[list[RunRecord], list[RunRecord]]] = {}
    for run in runs:
        family = families.setdefault((run.model, run.optimizer), ([], []))
        family[run.folder in confirmations].append(run)
    return [
        _confirmed(_choose(*key, grid, fresh), grid, fresh, confirmations)
        for key, (grid, fresh) in families.items()
        if grid
    ]


def _choose(model: str, optimizer: str, family: list[RunRecord], fresh: list[RunRecord]) -> Choice:
    settings = [tuple(group) for group in seed_groups(family).values()]
    whole = [group for group in settings if all(run.valid_loss is not None for run in group)]
    varied = [key for key in differing_settings(family) if key != "seed"]
    notes = [_left_out(group, varied) for group in settings if group not in whole]
    # The seed changes the loss, so settings are compared over the seeds that all of them have.
    common = set.intersection(*({run.seed for run in group} for group in whole)) if whole else set()

    def loss(group: tuple[RunRecord, ...]) -> float:
        return fmean(run.valid_loss or 0.0 for run in group if not common or run.seed in common)

    different = differences(run for group in whole for run in group)
    best = () if different else min(whole, key=loss, default=())
    if different:
        notes.append(
            f"{NOT_COMPARABLE}, because their validation losses are of different samples ({'; '.join(different)})"
        )
    elif not best:
        notes.append("no run has a validation loss at its end")
    elif len(settings) > 1:
        if not common:
            notes.append("its settings share no seed: each is judged by the mean over its own seeds")
        notes += _edges(
            best[0], [group for group in settings if group in whole or any(run.diverged for run in group)], varied
        )
    return Choice(
        model=model, optimizer=optimizer, runs=best, valid_loss=loss(best) if best else None, tried=len(settings),
        settings={key: best[0].settings.get(key) for key in varied} if best else {}, notes=tuple(notes),
        optimism=_optimism(whole, best, sum(not common or run.seed in common for run in best), fresh),
    )  # fmt: skip


def _optimism(
    whole: list[tuple[RunRecord, ...]], best: tuple[RunRecord, ...], seeds: int, fresh: list[RunRecord]
) -> Optimism:
    """The optimism of a choice among the settings of `whole`, by `seeds` seeds each."""
    groups = seed_groups([*(run for group in whole for run in group), *fresh])
    losses = [[final[1] for run in group if (final := run.final("test/loss"))] for group in groups.values()]
    return Optimism(
        tries=len(whole), seeds=seeds, reported=len(best), deviation=pooled_deviation(losses),
        measured_by=sum(len(values) > 1 for values in losses),
    )  # fmt: skip


def _confirmed(choice: Choice, grid: list[RunRecord], fresh: list[RunRecord], confirmations: Confirmations) -> Choice:
    """Adds the confirmation runs of the chosen setting if they are complete, or the reason why they are not used."""
    chosen = {run.folder for run in choice.runs}
    planned = {folder: confirms for folder, confirms in confirmations.items() if confirms.setting in chosen}
    if not planned:
        other = "its confirmation runs have another setting, because the choice has changed since; repeat `sweep … --confirm`"
        return replace(choice, unconfirmed=other) if fresh and choice.runs else choice
    seeds = next(iter(planned.values())).seeds
    used = sorted({run.seed for run in grid if run.seed in seeds} - {None}, key=str)
    own = {run.seed: run for run in fresh if run.folder in planned and run.seed in seeds}
    finished = [run for run in own.values() if run.valid_loss is not None]
    diverged = [run for run in own.values() if run.diverged]
    reason = None
    if used:
        shown = ", ".join(map(str, used))
        reason = (
            f"the grid has run its confirmation's seed {shown} since, so it is not fresh; repeat `sweep … --confirm`"
        )
    elif diverged:
        reason = f"{len(diverged)} of its {len(seeds)} confirmation runs diverged: the choice is not stable over seeds"
    elif len(finished) < len(seeds):
        reason = f"{len(finished)} of its {len(seeds)} confirmation runs are finished; repeat `sweep … --confirm`"
    if reason:
        return replace(choice, unconfirmed=reason)
    return replace(choice, confirmation=tuple(own[seed] for seed in seeds))


def _left_out(group: tuple[RunRecord, ...], varied: list[str]) -> str:
    """The note that says why a setting cannot be chosen."""
    run = next(run for run in group if run.valid_loss is None)
    if run.diverged:
        why = f"diverged at step {run.last_step:,}"
    elif not run.finished:
        why = f"not finished, step {run.last_step:,} of {run.planned_steps or 0:,}"
    else:
        why = "no finite validation loss at its end"
    name = describe({key: run.settings.get(key) for key in varied}) or plain(run.folder.name)
    seed = f", seed {run.seed}" if len(group) > 1 else ""
    return f"{name}{seed} left out: {why}"


def describe(settings: dict[str, Any]) -> str:
    """Settings in a few words, such as `lr=0.001 weight_decay=0.1`."""
    return " ".join(f"{key.rpartition('.')[2]}={show(value)}" for key, value in settings.items())


def _edges(best: RunRecord, tried: list[tuple[RunRecord, ...]], varied: list[str]) -> list[str]:
    """One note for each setting whose best value is the largest or smallest tried."""
    notes = []
    for key in varied:
        value = _number(best.settings.get(key))
        values = sorted({v for group in tried if (v := _number(group[0].settings.get(key))) is not None})
        if value is None or not key.startswith(EDGE_SECTIONS) or len(values) < 2:
            continue
        at_top, at_bottom = value == values[-1], value == values[0] and value > 0  # zero has no neighbour below
        if not at_top and not at_bottom:
            continue
        # The next point of a geometric grid.
        neighbour = values[-2] if at_top else values[1]
        beyond = value * value / neighbour if neighbour else 2 * value
        notes.append(
            f"its best {key} {show(value)} is the {'largest' if at_top else 'smallest'} tried, so a better value may be "
            f"outside: widen the grid, for example to {float(f'{beyond:.2g}'):g}"
        )
    return notes


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def selection_notes(choices: Sequence[Choice]) -> list[str]:
    """For each choice: the seeds that confirm it, or the number of tries and the expected optimism of its losses."""
    several = len({choice.model for choice in choices}) > 1
    notes = []
    for choice in choices:
        name = f"{choice.model}, {choice.name}" if several else choice.name
        if choice.confirmation:
            notes.append(
                f"{name}: confirmed on {_seeds(choice.confirmation)}, which took no part in the choice: validation loss "
                f"{_mean_valid(choice.confirmation):.4f}; comparisons use these runs only"
            )
        elif choice.runs:
            notes.append(f"{name}: {choice.optimism.sentence()}")
            if choice.unconfirmed:
                notes.append(f"{name}: not confirmed: {choice.unconfirmed}")
    if any(choice.factor for choice in choices):
        notes.append(UPPER)
    return [*notes, *unequal(choices).values()]


def unequal(choices: Sequence[Choice]) -> dict[str, str]:
    """For each model whose choices differ in their expected optimism: why their losses do not show which one is better.

    Selection lowers equally optimistic losses by the same amount, so their difference remains meaningful. See
    `_equal_chances` for settings that diverged.
    """
    found: dict[str, str] = {}
    for model in dict.fromkeys(choice.model for choice in choices):
        family = [choice for choice in choices if choice.model == model and choice.runs]
        if not all(_equal_chances(a, b) for a, b in combinations(family, 2)):
            tries = ", ".join(f"{choice.name} {_tries(choice)}" for choice in family)
            found[model] = (
                f"{model}: no verdict between the best settings, because selection favours them unequally ({tries}): confirm the "
                "choices with `megatron-lion sweep … --confirm 5`, or give each optimizer as many settings and seeds"
            )
    return found


def _equal_chances(a: Choice, b: Choice) -> bool:
    """Whether selection favours two choices equally, or by less than `MOST_SHIFT` because settings of equal grids diverged."""
    shift = abs(a.factor - b.factor)
    if shift < 1e-6:
        return True
    if a.confirmation or b.confirmation or a.tried != b.tried or a.optimism.seeds != b.optimism.seeds:
        return False
    return shift <= MOST_SHIFT * math.sqrt(1 / a.optimism.reported + 1 / b.optimism.reported)


def without_verdicts(table: Table, choices: Sequence[Choice]) -> Table:
    """The table of seeds, with one reservation for the verdicts on models whose optimizers had unequal chances."""
    reasons = unequal(choices)
    models, (model, measure) = set(map(one_line, reasons)), map(table.columns.index, ("model", "measure"))
    verdicts = tuple({f"{row[model]}, {row[measure]}: " for row in table.rows if row[model] in models})
    kept = [note for note in table.notes if not note.startswith(verdicts)]
    return replace(table, notes=[*reasons.values(), *kept])


def _tries(choice: Choice) -> str:
    if choice.confirmation:
        return "confirmed"
    return f"best of {choice.optimism.tries} by {count_of(choice.optimism.seeds, 'seed')}"


def _seeds(runs: Sequence[RunRecord]) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {', '.join(str(run.seed) for run in runs)}"


def _mean_valid(runs: Sequence[RunRecord]) -> float:
    return fmean(run.valid_loss or 0.0 for run in runs)


def best_table(choices: Sequence[Choice]) -> Table:
    """The choices as a table, with their notes below it."""
    confirmed = any(choice.confirmation for choice in choices)
    rows: list[list[Cell]] = []
    for c in choices:
        if c.runs:
            row: list[Cell] = [
                c.model,
                c.name,
                describe(c.settings) or "only setting",
                c.tried,
                len(c.runs),
                c.valid_loss,
            ]
            fresh: list[Cell] = (
                [_seeds(c.confirmation), _mean_valid(c.confirmation)] if c.confirmation else [None, None]
            )
            rows.append([*row, *(fresh if confirmed else [])])
    several = len({choice.model for choice in choices}) > 1
    notes = ["chosen by the validation loss at the end of training, never by the test loss"]
    notes += [f"{f'{c.model}, ' if several else ''}{c.name}: {note}" for c in choices for note in c.notes]
    for model in dict.fromkeys(choice.model for choice in choices):
        if found := differences(run for choice in choices if choice.model == model for run in choice.runs):
            notes.append(f"{model}: the validation losses are of different samples ({'; '.join(found)})")
    columns = ["model", "optimizer", "setting", "settings tried", "seeds", "valid loss"]
    return Table(
        slug="best",
        title="The best setting of each optimizer by validation loss",
        columns=[*columns, *(["confirmation", "its valid loss"] if confirmed else [])],
        rows=rows,
        formats={"valid loss": ".4f", "its valid loss": ".4f"},
        notes=[*notes, *selection_notes(choices)],
    )


def run_folders(folders: Sequence[str | Path]) -> list[Path]:
    """Replaces each sweep folder by the folders of its runs that have begun; returns other folders as given.

    Raises:
        CheckpointError: sweep.json is damaged, or none of the sweep's runs has begun.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        path = folder / SWEEP_FILE
        if not path.is_file():
            found.append(folder)
            continue
        try:
            names = [str(entry["name"]) for entry in json.loads(path.read_text(encoding="utf-8"))["runs"]]
            for name in names:
                if not is_file_name(name):
                    raise ValueError(f"{name!r} is no folder in it")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); give its run folders one by one") from error
        begun = [folder / name for name in names if has_begun(folder / name)]
        if not begun:
            raise CheckpointError(f"{folder}: none of the sweep's {len(names)} runs has begun")
        found += begun
    return found
