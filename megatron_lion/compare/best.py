"""The best setting of each optimizer by validation loss, with the reservations that apply to the choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_lion.compare.labels import differing_settings, show
from megatron_lion.compare.seeds import seed_groups
from megatron_lion.compare.table import Cell, Table
from megatron_lion.errors import CheckpointError
from megatron_lion.plain_text import is_file_name, plain
from megatron_lion.runs.paths import has_begun
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord

SWEEP_FILE = "sweep.json"
EDGE_SECTIONS = ("optimizer.", "schedule.")
"""Settings whose best value should be inside the grid. Others are exempt: more steps or layers are usually better."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best setting of one optimizer.

    Attributes:
        model, optimizer: names of both.
        runs: the runs with this setting, one per seed; empty if no run can be chosen.
        valid_loss: mean at the end over the seeds that all settings share, or over all seeds (nats per token).
        settings: the values in which it differs from the other settings tried.
        tried: number of settings.
        notes: reservations, one sentence each.
    """

    model: str
    optimizer: str
    runs: tuple[RunRecord, ...]
    valid_loss: float | None
    settings: dict[str, Any]
    tried: int
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return OPTIMIZER_NAMES.get(self.optimizer, self.optimizer)


def choose_best(runs: Sequence[RunRecord]) -> list[Choice]:
    """Picks the setting with the lowest validation loss at the end for each model and optimizer.

    The test loss is not used. Runs that differ only in their seed are one setting. A setting with an unfinished or
    diverged seed is not chosen.

    Returns:
        One choice for each model and optimizer, in the order of the runs.
    """
    families: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        families.setdefault((run.model, run.optimizer), []).append(run)
    return [_choose(*key, family) for key, family in families.items()]


def _choose(model: str, optimizer: str, family: list[RunRecord]) -> Choice:
    settings = [tuple(group) for group in seed_groups(family).values()]
    whole = [group for group in settings if all(run.valid_loss is not None for run in group)]
    varied = [key for key in differing_settings(family) if key != "seed"]
    notes = [_left_out(group, varied) for group in settings if group not in whole]
    # The seed changes the loss, so settings are compared over the seeds that all of them have.
    common = set.intersection(*({run.seed for run in group} for group in whole)) if whole else set()

    def loss(group: tuple[RunRecord, ...]) -> float:
        return fmean(run.valid_loss or 0.0 for run in group if not common or run.seed in common)

    best = min(whole, key=loss, default=())
    if not best:
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
    )  # fmt: skip


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


def best_table(choices: Sequence[Choice]) -> Table:
    """The choices as a table, with their notes below it."""
    rows: list[list[Cell]] = [
        [c.model, c.name, describe(c.settings) or "only setting", c.tried, len(c.runs), c.valid_loss]
        for c in choices
        if c.runs
    ]
    several = len({choice.model for choice in choices}) > 1
    notes = ["chosen by the validation loss at the end of training, never by the test loss"]
    notes += [f"{f'{c.model}, ' if several else ''}{c.name}: {note}" for c in choices for note in c.notes]
    return Table(
        slug="best",
        title="The best setting of each optimizer by validation loss",
        columns=["model", "optimizer", "setting", "settings tried", "seeds", "valid loss"],
        rows=rows,
        formats={"valid loss": ".4f"},
        notes=notes,
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
