"""Runs the steps of plans one after another, on one or several nodes; a rerun continues where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from megatron_lion.errors import EnvironmentFault, PeerError, StoppedOnRequest
from megatron_lion.jobs import Jobs, child_end, child_failure
from megatron_lion.reproduce.artefacts import Plan, Step
from megatron_lion.reproduce.node_marks import NodeMarks
from megatron_lion.streams import say


def run_plan(
    plan: Plan,
    processes: int,
    jobs: Jobs,
    *,
    first: int = 1,
    total: int | None = None,
    check: Callable[[Step], None] = lambda step: None,
) -> None:
    """Runs all steps; launch/torchrun.sh starts the trainings of the full scale, on one or several nodes.

    On several nodes the same command runs on each node. Steps that are not trainings run on the node whose number
    (SLURM or NODE_RANK) is 0, and the others wait for it.

    Args:
        plan: the plan.
        processes: processes of this machine for the steps that use several.
        jobs: runs the steps and forwards signals to them.
        first: number of the first step in the log.
        total: number of steps in the log.
        check: called before each step, to raise if it must not run.

    Raises:
        StoppedOnRequest: a signal arrived.
        PeerError: the first node gave no sign of life for half an hour.
        MegatronLionError: a step failed, here or on the first node; it has the step's exit code.
    """
    rank, nodes = node_rank(), int(os.environ.get("NNODES", "1"))
    marks = NodeMarks(_output(plan), plan.artefact) if nodes > 1 else None
    with marks.alive() if marks is not None and rank == 0 else nullcontext():
        for number, step in enumerate(plan.steps, first):
            check(step)
            if step.makes is not None and step.makes.is_file():
                continue
            say(f"\n[{number}/{total or len(plan.steps)}] {step.title}\n    {step.shown(processes)}")
            if marks is not None and rank != 0 and not step.launched:
                marks.wait(number, step.title, lambda: jobs.asked)
                continue
            code = jobs.run_command(step.launch_words()) if step.launched else jobs.run(
                step.verb, list(step.words), processes if step.spread else 1
            )  # fmt: skip
            # Launched steps need no mark: their launchers already wait for each other.
            if marks is not None and rank == 0 and not step.launched:
                marks.set(number, code if code >= 0 else PeerError.exit_code)
            if code and jobs.asked:
                raise StoppedOnRequest(f"stopped in `{step.verb}` ({step.title}); the same command continues there")
            if code:
                raise child_failure(
                    f"{plan.artefact} stopped: `{step.verb}` ({step.title}) ended with {child_end(code)}; see above",
                    code,
                )


def node_rank() -> int:
    """Number of this node among those of the job, from 0."""
    return int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")))


def need_gpus() -> None:
    """Checks that this machine has a GPU, which the paper's runs need.

    Raises:
        EnvironmentFault: there is no CUDA device; the message names --print and --scale tiny.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "--scale full: no CUDA device here; --print shows the plan, --scale tiny runs on two cores"
        )


def _output(plan: Plan) -> Path:
    """The folder of the plan's results, which the nodes share."""
    return next(
        (Path(step.words[step.words.index("--output") + 1]).parent for step in plan.steps if "--output" in step.words),
        Path(),
    )
