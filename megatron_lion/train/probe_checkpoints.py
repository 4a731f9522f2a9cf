"""Full-gradient probe of a run's saved checkpoints, at any layout, with or without optimizer state."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lion.config import ParallelConfig, ProbeConfig, RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.device import select_device
from megatron_lion.errors import BusyError, StoppedOnRequest
from megatron_lion.files import make_folder
from megatron_lion.gradient.full_gradient import probe_run
from megatron_lion.gradient.probe_result import ProbeResult
from megatron_lion.jobs import world_size_from_env
from megatron_lion.parallel import agree, broadcast_object
from megatron_lion.runs.folder import locked, read_config
from megatron_lion.runs.metrics import MetricsWriter
from megatron_lion.runs.probes import probe_file, read_probe
from megatron_lion.runs.sealed_json import write_sealed
from megatron_lion.runs.steps import open_checkpoint, step_folder
from megatron_lion.train.choices import settle
from megatron_lion.train.restore import restore_run, restore_weights, why_no_state
from megatron_lion.train.run import Run, build_run
from megatron_lion.train.session import session

_log = logging.getLogger(__name__)
_SETTINGS = ("data", "dropout")


@dataclass(frozen=True)
class ProbedStep:
    """The probe result of one checkpoint.

    Attributes:
        step: optimizer steps of the checkpoint.
        path: the result file.
        content: content of the result file.
        is_new: whether it was computed now; False if the file already existed.
    """

    step: int
    path: Path
    content: dict[str, Any]
    is_new: bool


def probe_config(
    run_dir: Path,
    *,
    probe: dict[str, Any],
    parallel: ParallelConfig,
    micro_batch_size: int | None = None,
    device: str = "auto",
) -> RunConfig:
    """Returns a run's settings, adapted for probing it.

    Args:
        run_dir: folder of a run that `pretrain` started.
        probe: fields of `ProbeConfig` that differ from the run's; None values are ignored.
        parallel: the layout of this job.
        micro_batch_size: samples per micro-batch, or None for the run's.
        device: "auto", "cuda" or "cpu".

    Raises:
        CheckpointError: the folder is not a run folder.
        ConfigError: the settings do not fit this number of processes.
    """
    config = read_config(run_dir)
    given = {key: value for key, value in probe.items() if value is not None}
    config = replace(
        config,
        run_dir=str(run_dir),
        device=device,  # type: ignore[arg-type]
        parallel=replace(parallel, timeout_s=config.parallel.timeout_s),
        # The sums of a probe must be exact, whatever the run's own steps are taken with.
        train=replace(
            config.train,
            micro_batch_size=micro_batch_size or config.train.micro_batch_size,
            accumulate_allreduce_grads_in_fp32=True,
        ),
        probe=replace(config.probe, mode="frozen", **given),
    )
    check_config(config, world_size_from_env())
    return config


def probe_checkpoints(
    config: RunConfig,
    steps: list[int],
    *,
    again: bool = False,
    on_batch: Callable[[int, int, int], None] = lambda step, done, total: None,
) -> Iterator[ProbedStep]:
    """Probes checkpoints one after another; called on every process of the job.

    A step that already has a result with the same settings is not computed again. Each result is written once it is
    complete: an interrupted probe leaves no file and starts over, and finished steps are kept. If the run itself has no
    result for a step, the values are also written to metrics.jsonl; otherwise the file name contains the settings.

    Args:
        config: from `probe_config`.
        steps: from `choose_steps`.
        again: compute results that already exist, too.
        on_batch: called with (step, batches done, number of batches) after each batch.

    Yields:
        A `ProbedStep` for each step, in order.

    Raises:
        CheckpointError, ConfigError, DataError: the run, the settings or the data are invalid.
        StoppedOnRequest: a stop signal arrived.
    """
    run_dir = Path(config.run_dir)
    device = select_device(config.device)
    with session(config, device) as (stop, ranks):
        run: Run | None = None
        for step in steps:
            path = _result_path(run_dir, step, config.probe)
            # Rank 0 decides for all: a rank that skipped a probe would leave the others waiting in its collectives.
            found = broadcast_object(_usable(path, config.probe) if ranks.is_main else None)
            if found is not None and not again:
                yield ProbedStep(step, path, found, is_new=False)
                continue
            if run is None:
                config = settle(config, device, ranks)
                run = build_run(config, device, ranks, for_training=False, for_probing=True)
                stop["at_once"] = False  # a probe ends after the batch at hand, on all ranks alike
            masters = _restore(run, step)
            result = probe_run(
                run,
                on_batch=functools.partial(_report, on_batch, step, run),
                should_stop=lambda: stop["now"],
                master_weights=masters,
            )
            if result is None:
                raise StoppedOnRequest(
                    f"stopped in the probe of step {step}; run the same command to start that step over"
                )
            with agree("writing the probe"):
                if ranks.is_main:
                    _write(run_dir, path, result, config)
            yield ProbedStep(step, path, result.as_dict(), is_new=True)


def _report(on_batch: Callable[[int, int, int], None], step: int, run: Run, done: int) -> None:
    on_batch(step, done, run.num_probe_batches)


def _restore(run: Run, step: int) -> bool:
    """Loads a checkpoint; returns whether the master weights were loaded with it."""
    with agree("opening the checkpoint"):  # what follows is collective
        checkpoint = open_checkpoint(step_folder(run.run_dir, step))
    reason = why_no_state(run, checkpoint)
    if reason is None:
        restore_run(run, checkpoint)
        return True
    if run.ranks.is_main:
        _log.warning("step %d: θ is taken from the model's own weights: %s", step, reason)
    restore_weights(run, checkpoint)
    return False


def _result_path(run_dir: Path, step: int, probe: ProbeConfig) -> Path:
    """The step's own file, or one named after the settings if that file has a result of other settings."""
    own = probe_file(run_dir, step)
    if not own.exists() or _has_settings(read_probe(own), probe):
        return own
    return own.with_name(f"{own.stem}-{probe.num_batches}-{probe.data}{'-dropout' if probe.dropout else ''}.json")


def _usable(path: Path, probe: ProbeConfig) -> dict[str, Any] | None:
    """Returns the content of a result that need not be computed again, or None.

    Earlier versions estimated noise from a sample of coordinates, without an error; their results do not state the size of
    the data set.
    """
    if not path.exists():
        return None
    content = read_probe(path)
    return content if _has_settings(content, probe) and "population_samples" in content else None


def _has_settings(content: dict[str, Any], probe: ProbeConfig) -> bool:
    """Whether a result was computed with these settings."""
    if probe.num_batches == "all":
        enough = content["num_samples"] == content.get("population_samples")
    else:
        enough = content["num_batches"] == probe.num_batches
    same = enough and content["mode"] == "frozen" and all(content[key] == getattr(probe, key) for key in _SETTINGS)
    return same and bool(content["ladder"] or not probe.ladder)


def _write(run_dir: Path, path: Path, result: ProbeResult, config: RunConfig) -> None:
    make_folder(path.parent)
    if path == probe_file(run_dir, result.step):
        try:
            # The lock keeps a training job from appending to metrics.jsonl at the same time.
            with locked(run_dir):
                writer = MetricsWriter(run_dir, replace(config, log=type(config.log)()), is_main=True)
                writer.write(result.step, result.metrics())
                if writer.failure is not None:
                    raise writer.failure
        except BusyError:
            _log.warning(
                "%s is training now: step %d is written to %s only, not to metrics.jsonl", run_dir, result.step, path
            )
    write_sealed(path, result.as_dict())
