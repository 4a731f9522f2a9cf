"""Smoothness along the optimizer's own steps: from a checkpoint, takes the run's next steps in memory and measures again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import RunConfig
from megatron_lion.device import select_device
from megatron_lion.errors import ConfigError, StoppedOnRequest
from megatron_lion.files import make_folder
from megatron_lion.gradient.full_gradient import probe_facts
from megatron_lion.gradient.probe_result import finite_only
from megatron_lion.gradient.smoothness import gradient_along, own_weights, smoothness
from megatron_lion.parallel import agree, all_reduce_sum, broadcast_object
from megatron_lion.runs.paths import smoothness_file
from megatron_lion.runs.sealed_json import write_sealed
from megatron_lion.runs.smoothness_files import FORMAT, read_smoothness
from megatron_lion.runs.steps import open_checkpoint, step_folder
from megatron_lion.train.choices import settle
from megatron_lion.train.probe_checkpoints import ProbedStep
from megatron_lion.train.restore import restore_run, why_no_state
from megatron_lion.train.run import Run, build_run, sync_parameters
from megatron_lion.train.schedule import lr_at
from megatron_lion.train.session import session
from megatron_lion.train.step import train_step


def check_steps(config: RunConfig, steps: list[int], num_steps: int) -> None:
    """Checks that the run has its next steps.

    Raises:
        ConfigError: it has not; the message names the checkpoint.
    """
    last = config.train.steps
    if num_steps < 1:
        raise ConfigError(f"--smoothness {num_steps}: must be at least 1 step")
    if late := [step for step in steps if step + num_steps > last]:
        remedy = f"give --steps of at most {last - num_steps}" if num_steps <= last else "give fewer steps"
        raise ConfigError(f"--smoothness {num_steps}: {_too_late(config, late[0], num_steps)}; {remedy}")


def choose_checkpoints(config: RunConfig, steps: list[int], num_steps: int) -> tuple[list[int], list[str]]:
    """Chooses those of `steps` from which the run's next steps can be taken.

    Returns:
        The chosen steps, and for each other one the reason why it is left out.

    Raises:
        ConfigError: none is left.
        CheckpointError: a checkpoint cannot be opened.
    """
    chosen, left_out = [], []
    for step in steps:
        manifest = open_checkpoint(step_folder(Path(config.run_dir), step)).manifest
        if step + num_steps > config.train.steps:
            left_out.append(_too_late(config, step, num_steps))
        elif manifest.get("state_layout") is None:
            left_out.append(f"step {step} holds no optimizer state")
        else:
            chosen.append(step)
    if not chosen:
        raise ConfigError(
            f"--smoothness {num_steps}: {left_out[-1]}; give --steps of another checkpoint, or fewer steps"
        )
    return chosen, left_out


def _too_late(config: RunConfig, step: int, num_steps: int) -> str:
    rest = max(0, config.train.steps - step)
    return f"the run ends at step {config.train.steps}, {rest} step(s) after step {step}, and {num_steps} are needed"


def smoothness_checkpoints(
    config: RunConfig,
    steps: list[int],
    num_steps: int,
    *,
    again: bool = False,
    on_batch: Callable[[int, int, int], None] = lambda step, done, total: None,
) -> Iterator[ProbedStep]:
    """Measures the change of the gradient along the run's next steps from each checkpoint; called on every process.

    The steps are those that the run itself took: same samples, learning rates, momentum and, at the run's layout, dropout
    masks. Nothing of the run changes. A result that exists is not computed again; an interrupted one starts over.

    Args:
        config: from `probe_config`.
        steps: steps of checkpoints.
        num_steps: number of optimizer steps between the two points.
        again: compute results that exist, too.
        on_batch: called with (step, batches done, number of batches) after each step and each batch of both gradients.

    Yields:
        A `ProbedStep` for each step, in order.

    Raises:
        CheckpointError, ConfigError, DataError: the run, the settings or the data are invalid.
        StoppedOnRequest: a stop signal arrived.
    """
    run_dir = Path(config.run_dir)
    check_steps(config, steps, num_steps)
    device = select_device(config.device)
    with session(config, device) as (stop, ranks):
        run: Run | None = None
        for step in steps:
            path = smoothness_file(run_dir, step, num_steps, config.probe.num_batches, config.probe.data)
            # Rank 0 decides for all: a rank that skipped a step would leave the others waiting in its collectives.
            found = None
            with agree("reading an old result"):
                if ranks.is_main and not again and path.exists():
                    found = read_smoothness(path)
            found = broadcast_object(found)
            if found is not None:
                yield ProbedStep(step, path, found, is_new=False)
                continue
            if run is None:
                config = settle(config, device, ranks)
                run = build_run(config, device, ranks, for_probing=True)
                stop["at_once"] = False  # ends after the batch at hand, on all ranks alike
            content = _measure(run, step, num_steps, on_batch, lambda: stop["now"])
            if content is None:
                raise StoppedOnRequest(f"stopped at step {step}; run the same command to start that step over")
            with agree("writing the result"):
                if ranks.is_main:
                    make_folder(path.parent)
                    write_sealed(path, content)
            yield ProbedStep(step, path, content, is_new=True)


def _measure(
    run: Run, step: int, num_steps: int, on_batch: Callable[[int, int, int], None], should_stop: Callable[[], bool]
) -> dict[str, Any] | None:
    started, total = time.perf_counter(), num_steps + 2 * run.num_probe_batches
    _restore(run, step)
    before = own_weights(run)
    skipped = _take_steps(run, num_steps, lambda done: on_batch(step, done, total), should_stop)
    if skipped is None:
        return None
    moved = [after_N.sub_(before_N) for after_N, before_N in zip(own_weights(run), before, strict=True)]
    del before
    # The second point first: D must be known while a gradient is read, and the checkpoint gives the first point again.
    second = gradient_along(
        run, run.probe_batches(step), moved,
        on_batch=lambda done: on_batch(step, num_steps + done, total), should_stop=should_stop,
    )  # fmt: skip
    if second is None:
        return None
    _restore(run, step)
    first = gradient_along(
        run, run.probe_batches(step), moved,
        on_batch=lambda done: on_batch(step, num_steps + run.num_probe_batches + done, total), should_stop=should_stop,
    )  # fmt: skip
    if first is None:
        return None
    config, samples = run.config, run.probe_samples
    assert samples is not None
    return {key: finite_only(value) for key, value in {
        "format": FORMAT, "step": step, "num_steps": num_steps, "skipped_steps": skipped,
        "lr_first": lr_at(config, step + 1), "lr_last": lr_at(config, step + num_steps),
        "data": config.probe.data, "num_batches": samples.num_batches, "num_samples": samples.num_samples,
        "num_tokens": samples.num_samples * config.model.seq_length, "population_samples": samples.population,
        **probe_facts(config, run.ranks), **smoothness(run, first, second, moved),
        "seconds": round(time.perf_counter() - started, 3),
    }.items()}  # fmt: skip


def _restore(run: Run, step: int) -> None:
    with agree("opening the checkpoint"):  # what follows is collective
        checkpoint = open_checkpoint(step_folder(run.run_dir, step))
        if (reason := why_no_state(run, checkpoint)) is not None:
            raise ConfigError(f"--smoothness: no step can be taken from step {step}: {reason}")
    restore_run(run, checkpoint)


def _take_steps(run: Run, number: int, on_step: Callable[[int], None], should_stop: Callable[[], bool]) -> int | None:
    """Takes the run's next steps in memory; returns how many of them changed nothing, or None if a process was stopped."""
    skipped = 0
    with closing(_closable(run.train_batches())) as batches:
        for done in range(1, number + 1):
            # A signal reaches the ranks at different times; all must leave after the same step.
            asked = torch.tensor([float(should_stop())], device=run.device.torch_device)
            if all_reduce_sum(asked).item():
                return None
            result = train_step(
                run.model, run.optimizer, batches, run.objective, run.config, run.ranks, lr_at(run.config, run.step + 1)
            )
            run.step += 1
            run.consumed_samples += run.config.train.global_batch_size
            skipped += result.skipped
            on_step(done)
    sync_parameters(run.model)
    return skipped


def _closable(batches: Iterator[dict[str, torch.Tensor]]) -> Any:
    """A generator of the same batches; closing it ends the workers that read ahead."""
    yield from batches
