"""The result of a sweep: a table of its runs, the best of each optimizer, and the command that compares them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lion.compare.best import Choice, Confirmations, Confirms, choose_best, selection_notes
from megatron_lion.compare.labels import show
from megatron_lion.compare.table import Cell, Table, to_csv, to_markdown
from megatron_lion.configfile import load_config
from megatron_lion.errors import CheckpointError
from megatron_lion.files import write_whole
from megatron_lion.runs.paths import has_begun
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord, read_run
from megatron_lion.streams import say
from megatron_lion.sweep.grid import get_setting
from megatron_lion.sweep.plan import short_key
from megatron_lion.sweep.sweep_file import Entry, Sweep, read_sweep


def read_records(sweep: Sweep) -> dict[str, RunRecord]:
    """Records of the runs that have begun, by name."""
    return {
        entry.name: read_run(sweep.folder / entry.name) for entry in sweep.runs if has_begun(sweep.folder / entry.name)
    }


def confirmations_of(sweep: Sweep) -> Confirmations:
    """The sweep's confirmation runs by folder."""
    seeds = tuple(sweep.confirm_seeds)
    return {
        sweep.folder / entry.name: Confirms(setting=sweep.folder / entry.confirms, seeds=seeds)
        for entry in sweep.runs
        if entry.confirms is not None
    }


def confirmations(run_folders: Sequence[Path]) -> Confirmations:
    """The confirmation runs among run folders and beside them, from the sweep.json in the folder above each.

    A damaged sweep.json is reported and skipped, so that its run folders can still be compared one by one.
    """
    found: dict[Path, Confirms] = {}
    for folder in dict.fromkeys(path.parent for path in run_folders):
        try:
            sweep = read_sweep(folder)
        except CheckpointError as error:
            say(f"warning: which runs confirm a choice is not known, so all may be chosen: {error}")
            continue
        if sweep is not None:
            found |= confirmations_of(sweep)
    return found


def choices_of(sweep: Sweep, records: dict[str, RunRecord]) -> list[Choice]:
    """The choice of each optimizer, with its confirmation."""
    return choose_best(list(records.values()), confirmations_of(sweep))


def sweep_table(sweep: Sweep, records: dict[str, RunRecord], choices: Sequence[Choice]) -> Table:
    """A table with one row per run: its settings, losses, status, and whether it is the best of its optimizer."""
    keys = [
        key for key in dict.fromkeys(key for entry in sweep.runs for key in entry.settings) if key != "optimizer.name"
    ]
    base = load_config(sweep.base)
    shared = {key: get_setting(base, key) for key in keys}
    marks = {run.folder: "best" for choice in choices for run in choice.runs}
    marks |= {sweep.folder / entry.name: "confirmation, not used" for entry in sweep.runs if entry.confirms is not None}
    marks |= {run.folder: "confirmation" for choice in choices for run in choice.confirmation}
    rows: list[list[Cell]] = []
    for entry in sorted(sweep.runs, key=lambda entry: _order(sweep, entry, shared)):
        record = records.get(entry.name)
        lowest = record.series("valid/loss").best() if record else None
        rows.append([
            OPTIMIZER_NAMES.get(optimizer := entry.settings["optimizer.name"], optimizer),
            *(show(entry.settings.get(key, shared[key])) for key in keys),
            record.valid_loss if record else None, lowest[1] if lowest else None, lowest[0] if lowest else None,
            record.end_train_loss if record and record.finished else None, _status(entry, record),
            marks.get(sweep.folder / entry.name, ""),
        ])  # fmt: skip
    return Table(
        slug="sweep",
        title=f"Runs of the sweep in {sweep.folder}",
        columns=[
            "optimizer",
            *map(short_key, keys),
            "valid loss",
            "lowest",
            "at step",
            "train loss",
            "status",
            "choice",
        ],
        rows=rows,
        formats=dict.fromkeys(("valid loss", "lowest", "train loss"), ".4f"),
        notes=[
            "valid loss: at the end of training, in nats per token; for each optimizer the setting with the lowest is chosen, "
            "the test loss is not used",
            *(f"{choice.name}: {note}" for choice in choices for note in choice.notes),
            *selection_notes(choices),
        ],
    )


def _order(sweep: Sweep, entry: Entry, shared: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key: optimizers in the order in which they were added, then settings by size."""
    optimizers = list(dict.fromkeys(e.settings["optimizer.name"] for e in sweep.runs))
    values = [entry.settings.get(key, value) for key, value in shared.items()]
    numbers = [(0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value)) for value in values]
    return (optimizers.index(entry.settings["optimizer.name"]), *numbers)


def _status(entry: Entry, record: RunRecord | None) -> str:
    step = f" at step {record.last_step:,}" if record else ""
    if entry.status == "failed":
        return f"failed with code {entry.exit_code}{step}"
    return entry.status + (step if entry.status in ("interrupted", "diverged") else "")


def compare_line(sweep: Sweep, choices: Sequence[Choice]) -> str | None:
    """The sweep's last line: the command that compares the best runs, and their confirmation; None if no run was chosen."""
    chosen = [choice for choice in choices if choice.runs]
    if not chosen:
        return None
    words = ["megatron-lion", "compare", str(sweep.folder), "--best", "--output", str(sweep.folder / "comparison")]
    confirmed = [choice for choice in chosen if choice.confirmation]
    seeds = ", ".join(map(str, sweep.confirm_seeds))
    what = "compare the best"
    if len(confirmed) == len(chosen):
        what += f" on the confirmation seeds {seeds}"
    elif confirmed:
        what += f" ({', '.join(choice.name for choice in confirmed)} on the confirmation seeds {seeds})"
    elif any(choice.factor for choice in chosen):
        what += " (not confirmed; --confirm 5 trains them on fresh seeds)"
    return f"{what}: {shlex.join(words)}"


def summarise(sweep: Sweep) -> tuple[Table, str | None]:
    """Writes table.md and table.csv into the sweep's folder; returns the table and the line that compares its best runs.

    Raises:
        StorageError: the file system refused.
    """
    records = read_records(sweep)
    choices = choices_of(sweep, records)
    table = sweep_table(sweep, records, choices)
    write_whole(sweep.folder / "table.md", to_markdown(table).encode())
    write_whole(sweep.folder / "table.csv", to_csv(table).encode())
    return table, compare_line(sweep, choices)


def sweep_tables(folders: Sequence[str | Path], *, judged: bool = True) -> list[Table]:
    """The table of each folder that is a sweep's; without `judged`, the notes on the choices are omitted."""
    sweeps = [sweep for folder in folders if (sweep := read_sweep(Path(folder))) is not None]
    tables = []
    for number, sweep in enumerate(sweeps):
        records = read_records(sweep)
        table = sweep_table(sweep, records, choices_of(sweep, records))
        notes = table.notes if judged else table.notes[:1]
        tables.append(replace(table, slug=f"sweep-{number + 1}" if number else "sweep", notes=notes))
    return tables
