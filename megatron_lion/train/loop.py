"""`pretrain`: the training loop, which steps, logs, probes, measures held-out losses and saves.

build → resume → announce → while steps remain: step, log, probe, test, save → end. The step neither logs nor prints.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.config import RunConfig
from megatron_lion.device import select_device
from megatron_lion.errors import NumericsError, StoppedOnRequest
from megatron_lion.files import make_folder, read_own, storage_errors, sync_folder
from megatron_lion.gradient.full_gradient import probe_run
from megatron_lion.gradient.moving import MovingWindow
from megatron_lion.gradient.probe_result import ProbeResult
from megatron_lion.logs import log_file, warn
from megatron_lion.model.sizes import flops_per_token, model_size
from megatron_lion.parallel import Ranks, agree, broadcast_object
from megatron_lion.peers import mark
from megatron_lion.runs.folder import environment_facts, keep_settings, locked, prepare_run_folder
from megatron_lion.runs.metrics import MetricsWriter
from megatron_lion.runs.paths import environment_file, facts_file, metrics_file, rank_log_file, tokenizer_folder
from megatron_lion.runs.probes import probe_file
from megatron_lion.runs.sealed_json import write_sealed
from megatron_lion.runs.series import parse_line
from megatron_lion.runs.steps import list_steps
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.choices import settle
from megatron_lion.train.console import TrainProgress, announce
from megatron_lion.train.health import Health, LastBatch, damaged_state
from megatron_lion.train.random_state import random_state_kept
from megatron_lion.train.restore import is_import, restore_run
from megatron_lion.train.run import Run, build_run, save_run, sync_parameters
from megatron_lion.train.schedule import is_due, lr_at
from megatron_lion.train.session import session
from megatron_lion.train.step import TrainStep, mean_losses, train_step

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, *, fresh: bool = False, fall_back: bool = False) -> None:
    """Trains to `config.train.steps`, or resumes the run in `config.run_dir` from its newest complete checkpoint.

    Args:
        config: the checked settings.
        fresh: move an old run in that folder aside and start over.
        fall_back: if the newest checkpoint is damaged or incomplete, move it aside and resume from the newest intact one.

    Raises:
        StoppedOnRequest: a stop signal arrived; a checkpoint was saved first, if there was anything to save.
        NumericsError: the state is not finite, or too many consecutive steps had non-finite gradients; not saved.
        DataError: the loss counted nothing in too many consecutive steps, or in the held-out samples.
        ConfigError, DataError, CheckpointError, BusyError: raised before anything is computed.
        StorageError: the run folder could not be written.
    """
    device = select_device(config.device)
    with ExitStack() as stack:
        stop, ranks = stack.enter_context(session(config, device))
        run_dir = Path(config.run_dir)
        config = settle(config, device, ranks, fresh=fresh)
        with agree("opening the run folder"):
            if ranks.is_main:  # one lock per job: a second rank of this job could not acquire it
                stack.enter_context(locked(run_dir))
                prepare_run_folder(config, fresh=fresh)
        with agree("opening the log"):
            stack.enter_context(log_file(rank_log_file(run_dir, ranks.rank)))
        run_id, latest = ckpt.newest_checkpoint(run_dir, ranks, fresh=fresh, fall_back=fall_back)
        imported = latest if latest is not None and is_import(latest) else None
        run = build_run(config, device, ranks, imported=imported)
        stack.callback(run.close)
        run.run_id = run_id
        resumed = latest if imported is None else None
        if resumed is not None:
            restore_run(run, resumed)
        with agree("writing the facts of the run"):
            if ranks.is_main:
                keep_settings(config, None if latest is None else latest.step)
            describe_run(run)
        announce(run, resumed=resumed is not None, source=imported.manifest["source"] if imported is not None else None)
        with agree("opening metrics.jsonl"):
            metrics = MetricsWriter(run_dir, config, is_main=ranks.is_main, start=run.step)
            stack.callback(metrics.close)
        progress = stack.enter_context(
            TrainProgress(config, start=run.step, shown=config.log.progress and ranks.is_main)
        )
        stop["at_once"] = False  # from here on there is something to save
        train(run, metrics, progress, stop)


def train(run: Run, metrics: MetricsWriter, progress: TrainProgress, stop: dict[str, bool]) -> None:
    """Runs the remaining steps; a collective call.

    Args:
        run: from `build_run`, restored if it resumes.
        metrics: receives the log lines.
        progress: the progress line.
        stop: flag; a stop signal sets `stop["now"]`.

    Raises:
        StoppedOnRequest: a rank was asked to stop.
        NumericsError, DataError: see `pretrain`.
    """
    config, ranks = run.config, run.ranks
    batches = LastBatch(run.train_batches())
    clock = _Clock(run)
    health = Health(run, metrics)
    last = config.train.steps
    stop_after = min(last, config.train.stop_after or last)
    window = None
    if config.probe.every and config.probe.mode == "moving":
        window = MovingWindow(config, run.model, run.optimizer, ranks, run.corpora.vocab_size)
    complete = observe(run, metrics, progress, stop, health, window, at_start=True)
    if _asked_to_stop(run, metrics, stop) and (run.step < stop_after or not complete):
        place = f"before step {run.step + 1} of {last}" if run.step < last else "in a measurement of the last step"
        raise StoppedOnRequest(f"stopped {place}; run the same command to start there")
    save_due = False
    while run.step < stop_after or (save_due and run.step < last):
        mark(f"step {run.step + 1}")
        on_gradient = window.add if window is not None and window.wants(run.step + 1) else None
        result = train_step(
            run.model,
            run.optimizer,
            batches,
            run.objective,
            config,
            ranks,
            lr_at(config, run.step + 1),
            on_gradient=on_gradient,
        )
        if window is not None and on_gradient is not None and not result.skipped:
            window.add_loss(result.loss, result.num_tokens)
        run.step += 1
        run.consumed_samples += config.train.global_batch_size
        clock.count(result)
        health.judge(result)
        is_periodic = is_due(run.step, config.checkpoint.every) or run.step in config.checkpoint.at_steps
        save_due = save_due or is_periodic or run.step >= stop_after
        # Before the log line: a run whose end cannot be saved must not look finished to readers of metrics.jsonl.
        may_save = save_due and health.may_save(batches.last)
        if run.step % config.train.log_every == 0 or run.step == 1 or run.step >= stop_after:
            values = clock.values(result)
            metrics.write(run.step, values)
            progress.update(run.step, values)
        complete = observe(run, metrics, progress, stop, health, window)
        clock.leave_out()
        asked = _asked_to_stop(run, metrics, stop)
        if asked and not save_due:
            save_due, may_save = True, health.may_save(batches.last)
        if may_save:
            mark(f"saving step {run.step}")
            with agree("writing the metrics"):
                metrics.sync()
            save(run, health)
            save_due = False
            clock.restart()
        # After the last step, a measurement may be missing.
        if asked and not save_due and (run.step < stop_after or not complete):
            then = "resumes" if run.step < stop_after else "makes the measurements that are missing"
            message = f"stopped after step {run.step} of {last}, checkpoint saved; the same command {then}"
            raise StoppedOnRequest(message)


def save(run: Run, health: Health) -> None:
    """Saves a checkpoint and removes old ones; a collective call.

    Raises:
        NumericsError: the state is not finite; nothing is written and nothing removed.
    """
    checkpoint, last = run.config.checkpoint, run.config.train.steps
    if health.skipped_in_a_row:  # only at the end of an fp16 run; see `Health.judge`
        warn(
            logger,
            f"warning: the last {health.skipped_in_a_row} step(s) overflowed the loss scale and changed nothing; the state before "
            f"them is saved as step {run.step}",
            shown=run.ranks.is_main,
        )
    try:
        logger.info("saved %s", save_run(run).folder)
    except NumericsError as error:
        raise damaged_state(run, str(error)) from error
    with agree("removing old checkpoints"):
        if run.ranks.is_main:
            # The save of a step that was skipped was made after a later step.
            steps = list_steps(run.run_dir)
            chosen = {min((found for found in steps if found >= step), default=step) for step in checkpoint.at_steps}
            ckpt.remove_old(run.run_dir, keep=checkpoint.keep, always_keep={0, last, *chosen})


def observe(
    run: Run,
    metrics: MetricsWriter,
    progress: TrainProgress,
    stop: dict[str, bool],
    health: Health,
    window: MovingWindow | None = None,
    *,
    at_start: bool = False,
) -> bool:
    """Probes the full gradient and measures held-out losses if they are due; a collective call.

    Training state does not change: parameters, optimizer state, random states and data position stay the same. An
    interrupted measurement leaves nothing; the resumed run repeats it before its first step.

    Args:
        run: the run, between two steps.
        metrics: receives the measured values.
        progress: the progress line.
        stop: flag; a stop signal sets `stop["now"]`.
        health: asked if a held-out loss is not finite.
        window: gradient sums of `probe.mode` moving, or None.
        at_start: before the first step of this job; step 0 is measured, or what an interrupted job left out of a later step.

    Returns:
        False if a stop signal ended a measurement.
    """
    config = run.config
    probe_due = is_due(run.step, config.probe.every) or (run.step == 0 and config.probe.every > 0)
    test_due = config.train.test_every > 0 and (
        run.step in (0, config.train.steps) or is_due(run.step, config.train.test_every)
    )
    if at_start and run.step > 0:
        probe_due, test_due = probe_is_missing(run), test_due and held_out_is_missing(run)
    if not (probe_due or test_due):
        return True
    complete = True
    sync_parameters(run.model)
    values: dict[str, Any] = {}
    with random_state_kept():
        if test_due:
            progress.note("measuring the held-out losses")
            mark(f"measuring the held-out losses of step {run.step}")
            count = config.train.test_batches * config.num_microbatches(run.ranks.world_size)
            for split, name in ((1, "valid"), (2, "test")):
                means = mean_losses(
                    run.model, run.held_out_batches(split), run.objective, config, count, what=f"the {name} split",
                    should_stop=lambda: _asked_to_stop(run, metrics, stop),
                )  # fmt: skip
                if means is None:
                    complete, values = False, {}
                    break
                if not all(map(math.isfinite, means.values())):
                    health.require_finite_state()
                values.update({f"{name}/{key}": value for key, value in means.items()})
        result = None
        if probe_due:
            mark(f"probing the full gradient at step {run.step}")
        if probe_due and window is not None:
            result = window.take(run.step)
        elif probe_due and complete:
            result = _probe(run, progress, stop)
            complete = result is not None
        values.update(result.metrics() if result is not None else {})
    if values:
        metrics.write(run.step, values)
        progress.measured(values)
    # The file is written last because `probe_is_missing` looks for it. If the job is killed between the two writes, the
    # probe is repeated, and readers of metrics.jsonl use the last line of a step.
    if result is not None:
        write_probe(run, result)
    progress.note("")
    return complete


def _probe(run: Run, progress: TrainProgress, stop: dict[str, bool]) -> ProbeResult | None:
    total = run.num_probe_batches
    progress.note(f"probing the full gradient, {total:,} batches")
    return probe_run(
        run,
        on_batch=lambda done: progress.note(f"probing the full gradient, batch {done:,} of {total:,}"),
        should_stop=lambda: stop["now"],
    )


def write_probe(run: Run, result: ProbeResult) -> None:
    """Writes RUN/probe/step_0000100.json; a collective call."""
    with agree("writing the probe"):
        if run.ranks.is_main:
            path = probe_file(run.run_dir, result.step)
            make_folder(path.parent)
            write_sealed(path, result.as_dict())


def probe_is_missing(run: Run) -> bool:
    """Whether a probe was due at the restored step but its file does not exist; a collective call."""
    # Rank 0 decides for all, because the probe that follows is a collective.
    due = is_due(run.step, run.config.probe.every)
    return bool(broadcast_object(due and not probe_file(run.run_dir, run.step).exists() if run.ranks.is_main else None))


def held_out_is_missing(run: Run) -> bool:
    """Whether metrics.jsonl has no held-out loss of the restored step; a collective call."""
    path = metrics_file(run.run_dir)
    found: list[dict[str, Any] | None] = []
    with agree("reading the metrics"), storage_errors(path):
        if run.ranks.is_main and path.exists():
            found = [parse_line(line) for line in read_own(path).splitlines()]
    return bool(broadcast_object(not any(line and line["step"] == run.step and "valid/loss" in line for line in found)))


def describe_run(run: Run) -> None:
    """Writes run.json, environment.json and the tokenizer into the run folder, on the first rank."""
    if not run.ranks.is_main:
        return
    config, tokenizer = run.config, run.corpora.tokenizer
    size = model_size(config.model, run.corpora.vocab_size)
    write_sealed(facts_file(run.run_dir), {
        "format": 1, "run_id": run.run_id,
        "name": config.label, "model": config.model.kind, "optimizer": config.optimizer.name, "seed": config.seed,
        "num_parameters": size.num_parameters, "num_parameters_unpadded": size.num_parameters_unpadded,
        "vocab_size": run.corpora.vocab_size, "seq_length": config.model.seq_length,
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "data_digest": run.corpora.digest, "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        "world_size": run.ranks.world_size, "precision": config.train.precision, "device": run.device.name(),
        "train_overlaps": run.corpora.overlaps,
    })  # fmt: skip
    write_sealed(environment_file(run.run_dir), environment_facts(run.device.name(), run.ranks.world_size))
    folder = tokenizer_folder(run.run_dir)
    if tokenizer is not None and not folder.is_dir():
        # Renamed when complete: a job that is killed here must not leave half a tokenizer under the final name.
        temporary = folder.with_name(f".{folder.name}.tmp")
        tokenizer.save(temporary)
        with storage_errors(folder):
            os.replace(temporary, folder)
        sync_folder(folder.parent)


class _Clock:
    """Measures tokens per second since it was last read, excluding probes, held-out measurements and saves."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.flops = flops_per_token(run.config.model, run.corpora.vocab_size)
        self.peak = run.device.peak_flops(run.config.train.precision)
        self.restart()

    def restart(self) -> None:
        self.tokens, self.seconds, self.loss_sum, self.started = 0, 0.0, 0.0, time.perf_counter()

    def leave_out(self) -> None:
        """Excludes the time since the last step."""
        self.started = time.perf_counter()

    def count(self, result: TrainStep) -> None:
        now = time.perf_counter()
        self.seconds += now - self.started
        self.tokens += result.num_tokens
        self.started = now

    def values(self, result: TrainStep) -> dict[str, float | int | None]:
        """Returns the values of a step's log line; rates cover the steps since the last line."""
        run = self.run
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens, self.seconds = 0, 0.0
        mfu = rate * self.flops / (self.peak * run.ranks.world_size) if self.peak else None
        return {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.parts.items()},
            "optim/lr": lr_at(run.config, run.step),
            "optim/grad_l2": result.grad_l2 if math.isfinite(result.grad_l2) else None,
            "optim/skipped_steps": run.optimizer.num_skipped,
            "perf/tokens_per_s": rate,
            "perf/mfu": mfu,
            "memory/max_gib": run.device.max_memory_gib(),
            "progress/consumed_samples": run.consumed_samples,
            "progress/consumed_tokens": run.consumed_samples * run.config.model.seq_length,
        }


def _asked_to_stop(run: Run, metrics: MetricsWriter, stop: dict[str, bool]) -> bool:
    """Whether a stop signal reached any rank; a collective call.

    Raises:
        StorageError: the first rank could not write a metric, on all ranks.
    """
    # A signal reaches the ranks at different times, or only one of them. All must stop after the same step; otherwise a
    # rank that continues would wait for the others in its next collective. The same holds for a full disk on one rank.
    flags = [stop["now"], metrics.failure is not None]
    if dist.get_world_size() > 1:
        box = torch.tensor(flags, dtype=torch.int32, device=run.device.torch_device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        flags = [bool(flag) for flag in box.tolist()]
    if flags[1]:
        with agree("writing metrics.jsonl"):
            if metrics.failure is not None:
                raise metrics.failure
    return flags[0]


__all__ = ["Ranks", "pretrain"]
