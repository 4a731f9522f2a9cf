"""A sweep's missing runs as a shell script, and as an array job for SLURM."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.errors import EnvironmentFault
from megatron_lion.jobs import job_words
from megatron_lion.sweep.execute import job_arguments
from megatron_lion.sweep.plan import PlannedRun, as_typed
from megatron_lion.sweep.sweep_file import Sweep

_SHELL = """#!/bin/sh
# {count} of the sweep in {folder} ({config}), one after another.
# The same script again resumes what is not finished.
PYTHON=${{PYTHON:-{python}}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
trap 'exit 75' INT TERM          # Ctrl-C: the run saves, and no other begins

{commands}"""

_SLURM = """#!/usr/bin/env bash
# SLURM job array: {count} of the sweep in {folder} ({config}), a task each.
# On preemption or at the time limit SLURM sends SIGUSR1, the run saves and leaves with 75, and the task queues itself again.
#
#   sbatch {script}          (with --array=0-{last}%4 four at a time)
#
#SBATCH --job-name=megatron-lion-sweep
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
set -u

SWEEP=${{SWEEP:-{quoted_folder}}}                  # its folder; each run has one in it
LAUNCH=${{LAUNCH:-{launcher}}}              # of the repository
export NPROC_PER_NODE=${{NPROC_PER_NODE:-{processes}}}           # GPUs a node
export MASTER_PORT=${{MASTER_PORT:-$((29500 + SLURM_ARRAY_TASK_ID))}}
export NNODES=$SLURM_JOB_NUM_NODES
export JOB_ID=$SLURM_JOB_ID
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

cd "${{SLURM_SUBMIT_DIR:-.}}" || exit 2
case $SLURM_ARRAY_TASK_ID in
{cases}
*) echo "this sweep has no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
srun --kill-on-bad-exit=1 "$LAUNCH" "$SWEEP/base.yaml" --run_dir "$SWEEP/$name" "$@" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0" 2>/dev/null || kill -USR1 "$step"' USR1 TERM
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
echo "$code" > "$SWEEP/exits/$name"
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


def shell_script(sweep: Sweep, runs: Sequence[PlannedRun], processes: int) -> str:
    """One command a run, and its exit code kept for the sweep's table."""
    commands = [
        f'"$PYTHON" {shlex.join(job_words("pretrain", job_arguments(sweep, run), processes))}\n'
        f"echo $? > {shlex.quote(str(sweep.folder / 'exits' / run.name))}\n"
        for run in runs
    ]
    return _SHELL.format(
        count=_count(runs), folder=sweep.folder, config=sweep.config, python=shlex.quote(sys.executable),
        commands="\n".join(commands),
    )  # fmt: skip


def slurm_script(sweep: Sweep, runs: Sequence[PlannedRun], processes: int, script: Path) -> str:
    """An array job in the manner of launch/slurm.sbatch; tasks run beside each other, each with its own index files.

    Args:
        sweep: whose runs.
        runs: those that are missing, one a task.
        processes: GPUs of a node.
        script: where it will lie, for the line that tells how to submit it.

    Raises:
        EnvironmentFault: the package is not in a checkout, so that launch/torchrun.sh is not there.
    """
    cases = [
        f"{place}) name={shlex.quote(run.name)}; set -- "
        + shlex.join(word for key, value in run.settings.items() for word in (f"--{key}", as_typed(value)))
        + " ;;"
        for place, run in enumerate(runs)
    ]
    return _SLURM.format(
        count=_count(runs), folder=sweep.folder, config=sweep.config, script=script, last=len(runs) - 1,
        processes=processes, cpus=4 * processes, quoted_folder=shlex.quote(str(sweep.folder)), cases="\n".join(cases),
        launcher=shlex.quote(os.path.relpath(_launcher())),
    )  # fmt: skip


def _count(runs: Sequence[PlannedRun]) -> str:
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}"


def _launcher() -> Path:
    path = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
    if not path.is_file():
        raise EnvironmentFault(
            "--slurm: the script calls launch/torchrun.sh of a checkout of the repository, which is not installed with the "
            "package; run this in a checkout, or use --print"
        )
    return path
