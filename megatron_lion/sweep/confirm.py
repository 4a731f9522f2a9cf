"""Plans the confirmation of a sweep: each optimizer's chosen setting on fresh seeds, which took no part in the choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count, islice

from megatron_lion.compare.best import Choice
from megatron_lion.compare.optimism import count_of
from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config
from megatron_lion.sweep.grid import with_settings
from megatron_lion.sweep.plan import PlannedRun, check_all, run_name
from megatron_lion.sweep.summary import choices_of, read_records
from megatron_lion.sweep.sweep_file import Entry, Sweep


def unfinished_grid(sweep: Sweep) -> list[str]:
    """Names of the grid runs without a result, of all grids: until they have one, the choice may change."""
    return [entry.name for entry in sweep.grid_runs if entry.status not in ("finished", "diverged")]


def waiting_text(sweep: Sweep, planned: Sequence[PlannedRun]) -> str:
    """Why the confirmation is not planned yet, and what is needed.

    Args:
        sweep: the sweep, whose grid is unfinished.
        planned: the grid runs of this command.
    """
    unfinished = unfinished_grid(sweep)
    here = {run.name for run in planned}
    other = [name for name in unfinished if name not in here]
    verb = "is" if len(unfinished) == 1 else "are"
    text = f"confirmation: planned once the choice is known; {count_of(len(unfinished), 'run')} of the grid {verb} not finished"
    if other:
        return f"{text}, of which other --grid flags planned {', '.join(other)}: give those flags first, then this command again"
    return f"{text}; the same command continues"


def fresh_seeds(sweep: Sweep, base_seed: int, number: int) -> tuple[int, ...]:
    """The smallest `number` seeds above the base seed that no grid run has.

    The seeds of earlier confirmation runs count as fresh, so repeating a command plans the same runs.
    """
    used = {entry.settings.get("seed", base_seed) for entry in sweep.grid_runs}
    return tuple(islice((seed for seed in count(base_seed + 1) if seed not in used), number))


def plan_confirmation(sweep: Sweep, number: int, processes: int) -> tuple[list[PlannedRun], list[Choice]]:
    """Adds the missing confirmation runs to a sweep whose grid is finished; writes nothing.

    Args:
        sweep: the sweep; its base.yaml exists.
        number: seeds for each optimizer.
        processes: processes that train a run together.

    Returns:
        The runs of the confirmation, finished or not, and the choices that they confirm.

    Raises:
        ConfigError: a run's settings are invalid.
    """
    base = load_config(sweep.base)
    seeds = fresh_seeds(sweep, base.seed, number)
    entries = {entry.name: entry for entry in sweep.runs}
    choices = [choice for choice in choices_of(sweep, read_records(sweep)) if choice.runs]
    planned = []
    for choice in choices:
        chosen = entries[choice.runs[0].folder.name]
        planned += [(chosen.name, _confirmation_run(sweep, base, chosen, seed)) for seed in seeds]
    check_all([run for _, run in planned], processes)
    sweep.confirm_seeds = list(seeds)
    runs = [sweep.add(run, confirms=name) for name, run in planned]
    sweep.refresh()
    return runs, choices


def _confirmation_run(sweep: Sweep, base: RunConfig, chosen: Entry, seed: int) -> PlannedRun:
    """The run with the settings of `chosen` and another seed."""
    settings = {key: value for key, value in chosen.settings.items() if key != "seed"}
    name = f"{run_name(settings)}-confirm-seed{seed}"
    settings["seed"] = seed
    config = dataclasses.replace(with_settings(base, settings)[0], run_dir=str(sweep.folder / name))
    return PlannedRun(name=name, settings=settings, config=config)
