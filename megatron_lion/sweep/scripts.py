"""Writes the missing runs of a sweep as a shell script or as a SLURM array job."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.errors import EnvironmentFault
from megatron_lion.jobs import job_words
from megatron_lion.plain_text import plain
from megatron_lion.shipped import shipped_folder
from megatron_lion.sweep.execute import job_arguments
from megatron_lion.sweep.plan import PlannedRun, as_typed
from megatron_lion.sweep.sweep_file import Sweep

_SHELL = """#!/bin/sh
# {count} of the sweep in {folder} ({config}), one after another.
# Running the script again resumes the unfinished runs.
PYTHON=${{PYTHON:-{python}}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
trap 'exit 75' HUP INT QUIT TERM USR1          # Ctrl-C: the run saves, and no other starts

{commands}"""

_CHOICE = """SWEEP=${{SWEEP:-{folder}}}                  # its folder; each run has one in it
case $SLURM_ARRAY_TASK_ID in
{cases}
*) echo "this sweep has no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
set -- "$SWEEP/base.yaml" --run_dir "$SWEEP/$name" "$@"
exit_file=$SWEEP/exits/$name"""


def shell_script(sweep: Sweep, runs: Sequence[PlannedRun], processes: int) -> str:
    """A shell script with one command per run, which also records the run's exit code for the sweep's table."""
    commands = [
        f'"$PYTHON" {shlex.join(job_words("pretrain", job_arguments(sweep, run), processes))}\n'
        f"echo $? > {shlex.quote(str(sweep.folder / 'exits' / run.name))}\n"
        for run in runs
    ]
    return _SHELL.format(
        count=_count(runs), folder=plain(str(sweep.folder)), config=plain(sweep.config), python=shlex.quote(sys.executable),
        commands="\n".join(commands),
    )  # fmt: skip


def slurm_script(sweep: Sweep, runs: Sequence[PlannedRun], processes: int, script: Path) -> str:
    """launch/slurm.sbatch as an array job with one task per run.

    Tasks run at the same time, so each has its own index files of the data; runs of the shell script share them.

    Args:
        sweep: the sweep.
        runs: its missing runs, one per task.
        processes: GPUs of a node.
        script: path of the script, for the comment that shows how to submit it.

    Raises:
        EnvironmentFault: launch/ is not installed with the package, or the template lacks a line.
    """
    cases = [
        f"{place}) name={shlex.quote(run.name)}; set -- "
        + shlex.join(word for key, value in run.settings.items() for word in (f"--{key}", as_typed(value)))
        + " ;;"
        for place, run in enumerate(runs)
    ]
    launch = shipped_folder("launch")
    last = len(runs) - 1
    choice = _CHOICE.format(folder=shlex.quote(str(sweep.folder)), cases="\n".join(cases))
    return _with_lines(
        launch / "slurm.sbatch",
        {
            "# SLURM job": f"# SLURM job array: {_count(runs)} of the sweep in {plain(str(sweep.folder))} ({plain(sweep.config)}), "
            "a task each.",
            "#   sbatch ": f"#   sbatch {plain(shlex.quote(str(script)))}          (with --array=0-{last}%4 four at a time)",
            "#SBATCH --job-name": f"#SBATCH --job-name=megatron-lion-sweep\n#SBATCH --array=0-{last}",
            "#SBATCH --nodes": "#SBATCH --nodes=1",
            "#SBATCH --gpus-per-node": f"#SBATCH --gpus-per-node={processes}",
            "#SBATCH --cpus-per-task": f"#SBATCH --cpus-per-task={4 * processes}",
            "#SBATCH --output": "#SBATCH --output=slurm-%A_%a.out",
            "LAUNCH=": f"LAUNCH=${{LAUNCH:-{shlex.quote(os.path.relpath(launch / 'torchrun.sh'))}}}\n"
            f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
            "export NPROC_PER_NODE=": f"export NPROC_PER_NODE=${{NPROC_PER_NODE:-{processes}}}           # GPUs per node",
            "# A sweep chooses": choice,
        },
    )


def _with_lines(template: Path, lines: dict[str, str]) -> str:
    """The text of a template in which the line that begins with each key is replaced."""
    text = template.read_text(encoding="utf-8").splitlines()
    for start, line in lines.items():
        places = [place for place, old in enumerate(text) if old.startswith(start)]
        if len(places) != 1:
            raise EnvironmentFault(
                f"--slurm: {template} has {len(places)} lines that begin with '{start}', expected one; restore the file, or use --print"
            )
        text[places[0]] = line
    return "\n".join(text) + "\n"


def _count(runs: Sequence[PlannedRun]) -> str:
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
