"""Runs the steps of plans one after another. A rerun of the same command goes on where it stopped: every verb does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lion.errors import EnvironmentFault, MegatronLionError, StoppedOnRequest
from megatron_lion.jobs import Jobs
from megatron_lion.reproduce.artefacts import Plan, Step
from megatron_lion.shipped import shipped_folder


def say(text: str) -> None:
    """A line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_plan(plan: Plan, processes: int, jobs: Jobs, *, first: int = 1, total: int | None = None) -> None:
    """Runs all steps on this machine; trainings of the full scale through launch/torchrun.sh, on this and other nodes.

    On several nodes the same command is given on each: what is not a training runs on the node that SLURM or
    NODE_RANK calls 0, and the others wait for it.

    Args:
        plan: what to run.
        processes: for steps that are spread over this machine.
        jobs: passes signals on.
        first, total: for the numbers that are shown.

    Raises:
        StoppedOnRequest: a signal came.
        MegatronLionError: a step failed; with its exit code.
    """
    rank, nodes = node_rank(), int(os.environ.get("NNODES", "1"))
    for number, step in enumerate(plan.steps, first):
        say(f"\n[{number}/{total or len(plan.steps)}] {step.title}\n    {step.shown(processes)}")
        mark = _mark(plan, number)
        if step.launched or nodes == 1 or rank == 0:
            code = jobs.run_command(["bash", *launch_words(step)]) if step.launched else jobs.run(
                step.verb, list(step.words), processes if step.spread else 1
            )  # fmt: skip
            if code and jobs.asked:
                raise StoppedOnRequest(f"stopped in `{step.verb}` ({step.title}); the same command goes on there")
            if code:
                error = MegatronLionError(
                    f"{plan.artefact} stopped: `{step.verb}` ({step.title}) ended with code {code}; see above"
                )
                error.exit_code = code if code > 0 else 1
                raise error
            if nodes > 1 and rank == 0 and not step.launched:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.write_text("done\n")
        else:
            _wait_for(mark, lambda: jobs.asked)


def launch_words(step: Step) -> list[str]:
    """The script of launch/ and its arguments."""
    script = shipped_folder("launch") / "torchrun.sh"
    place = step.words.index("--config")
    return [str(script), step.words[place + 1], *step.words[:place], *step.words[place + 2 :]]


def node_rank() -> int:
    """This node's number in a job of several."""
    return int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")))


def need_gpus() -> None:
    """Refuses to begin the paper's runs on a machine without GPUs.

    Raises:
        EnvironmentFault: says how to see the plan.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "--scale full: no CUDA device here; --print shows the plan, --scale tiny runs on two cores"
        )


def _mark(plan: Plan, number: int) -> Path:
    """Tells the other nodes that a step of the first one is done (on a file system that all see)."""
    output = next(
        (Path(step.words[step.words.index("--output") + 1]).parent for step in plan.steps if "--output" in step.words),
        Path(),
    )
    return output / ".steps" / f"{plan.artefact}-{number}"


def _wait_for(mark: Path, asked: Callable[[], bool]) -> None:
    while not mark.exists():
        if asked():
            raise StoppedOnRequest("stopped while waiting for the first node; the same command goes on there")
        time.sleep(2.0)
