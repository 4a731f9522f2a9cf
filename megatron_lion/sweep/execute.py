"""Runs the missing runs of a sweep one after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.errors import DataError, EnvironmentFault, StoppedOnRequest, StorageError
from megatron_lion.jobs import STOPPED, Jobs, child_failure
from megatron_lion.streams import say
from megatron_lion.sweep.plan import PlannedRun
from megatron_lion.sweep.sweep_file import Entry, Sweep, write_exit
from megatron_lion.sweep.warm_runs import WarmRun, can_fork

# Causes that all runs share: the data, the disk, the installation. The sweep stops, as the next runs would fail too.
ENDS_ALL = (DataError.exit_code, StorageError.exit_code, EnvironmentFault.exit_code)


def missing(sweep: Sweep, planned: Sequence[PlannedRun], *, again: bool) -> list[PlannedRun]:
    """The runs that are not finished; diverged runs only if `again`."""
    done = {"finished"} if again else {"finished", "diverged"}
    status = {entry.name: entry.status for entry in sweep.runs}
    return [run for run in planned if status[run.name] not in done]


def run_missing(sweep: Sweep, runs: Sequence[PlannedRun], processes: int) -> bool:
    """Runs each run to its end; records the exit code of a failed run and starts the next.

    Args:
        sweep: the sweep; its sweep.json is written after each run.
        runs: the runs to start or resume.
        processes: processes that train a run together.

    Returns:
        Whether a stop signal arrived during the last run, which finished nevertheless.

    Raises:
        StoppedOnRequest: a signal arrived; the run in progress saved a checkpoint.
        MegatronLionError: a run failed for a cause that the others share; it has the run's exit code.
    """
    spent: list[float] = []
    with Jobs(WarmRun if can_fork() else None) as jobs:
        for place, run in enumerate(runs):
            left = f", about {_duration(sum(spent) / len(spent) * (len(runs) - place))} left" if spent else ""
            say(f"\n[{place + 1}/{len(runs)}] {run.name}{left}")
            started = time.monotonic()
            code = jobs.run("pretrain", job_arguments(sweep, run), processes, stdout=sys.stderr)
            write_exit(sweep.folder, run.name, code)
            sweep.save()
            # If a signal arrives but the last run still finishes, the sweep is finished.
            if code == STOPPED or (jobs.asked and place + 1 < len(runs)):
                raise stopped(sweep, f"in {run.name}")
            if code in ENDS_ALL:
                raise child_failure(
                    f"the sweep stopped at {run.name}: it ended with code {code}, whose cause affects all runs; see above",
                    code,
                )
            if code == 0:
                spent.append(time.monotonic() - started)
        return bool(jobs.asked)


def stopped(sweep: Sweep, where: str) -> StoppedOnRequest:
    """The error that ends a sweep after a stop signal."""
    finished = sum(entry.status == "finished" for entry in sweep.runs)
    return StoppedOnRequest(
        f"stopped {where}, {finished} of {len(sweep.runs)} runs are finished; the same command continues"
    )


def job_arguments(sweep: Sweep, run: PlannedRun) -> list[str]:
    """The arguments of `pretrain` for runs that run one after another, which therefore can share the data's index files."""
    cache = [] if run.config.data.cache else ["--data.cache", str(Path(sweep.folder) / "cache")]
    return [*run.words(sweep.base), *cache]


def failed(sweep: Sweep) -> list[Entry]:
    """Runs that ended with an error that may not occur again."""
    return [entry for entry in sweep.runs if entry.status == "failed"]


def _duration(seconds: float) -> str:
    """A time in its largest unit.

    Example:
        >>> _duration(45), _duration(600), _duration(86400)
        ('45 seconds', '10 minutes', '24.0 hours')
    """
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
