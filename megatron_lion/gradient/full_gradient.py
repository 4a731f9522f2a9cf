"""The full-gradient probe of a run: accumulates the gradient, reads the noise ladder, and builds the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from megatron_lion.config import RunConfig
from megatron_lion.errors import DataError
from megatron_lion.gradient.accumulate import FullGradient
from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.noise import NoiseEstimate, Rung, as_dict, estimate_noise, make_rung, rungs_of, unseen
from megatron_lion.gradient.norms import GradientNorms, NormTable, parameter_rows
from megatron_lion.gradient.parameter_kinds import is_padding
from megatron_lion.gradient.part_noise import noise_by_part
from megatron_lion.gradient.probe_result import ProbeResult
from megatron_lion.gradient.sign_statistics import SignStatistics, sign_statistics
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import Ranks, derive_seed

_log = logging.getLogger(__name__)


class ProbedRun(Protocol):
    """The attributes of a run that a probe needs."""

    config: RunConfig
    ranks: Ranks
    model: list[Any]
    optimizer: TrainOptimizer
    corpora: Any
    objective: Any
    probe_samples: Any
    step: int

    @property
    def forward_step(self) -> Any: ...

    def probe_batches(self) -> Iterator[dict[str, torch.Tensor]]: ...


def probe_run(
    run: ProbedRun,
    *,
    on_batch: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
    master_weights: bool = True,
) -> ProbeResult | None:
    """Averages loss and gradient over the global batches of `run.probe_samples` and measures the mean gradient.

    Parameters, optimizer state and the data position of training do not change. With `probe.dropout` the caller
    restores the random states. A collective call.

    Args:
        run: the run, between two steps.
        on_batch: called with the number of batches done after each batch.
        should_stop: called on every process for each batch; True ends the probe.
        master_weights: whether θ is the optimizer's fp32 master weights; otherwise the model's own weights.

    Returns:
        The result, or None if any process was asked to stop; the run is then unchanged.

    Raises:
        DataError: the loss counts nothing in a batch; on all ranks.
    """
    config = run.config
    started = time.perf_counter()
    samples = run.probe_samples
    rungs = rungs_of(samples.num_batches) if config.probe.ladder else [samples.num_batches]
    dropout_seed = derive_seed(config.seed, f"probe dropout at {run.step}") if config.probe.dropout else None
    groups = GroupedBatches(GradientSketch(run.model), samples.num_batches) if config.probe.ladder else None
    signs = _sign_statistics(run) if config.probe.ladder and master_weights and samples.num_batches > 1 else None
    batches = run.probe_batches()
    read: list[tuple[int, GradientNorms]] = []
    with FullGradient(
        run.model, run.optimizer, run.forward_step, run.ranks,
        num_microbatches=config.num_microbatches(run.ranks.world_size),
        micro_batch_size=config.micro_batch_size, seq_length=config.model.seq_length,
        vocab_size=run.corpora.vocab_size, dropout_seed=dropout_seed, groups=groups,
        master_weights=master_weights, count_names=run.objective.count_names,
    ) as full:  # fmt: skip
        while full.num_batches < samples.num_batches:
            if full.add(batches, stop=should_stop()):
                return None
            if not full.losses[-1][1]:
                raise nothing_counted(config, f"batch {full.num_batches}", "num_tokens")
            if full.num_batches in rungs:
                table = full.read()
                norms = table.norms()
                read.append((full.num_batches, norms))
                if signs is not None:
                    signs.read(
                        full.shards(),
                        batches=full.num_batches,
                        count=full.count,
                        scale=table.scale,
                        grad_l2=norms.grad_l2,
                    )
            on_batch(full.num_batches)
        if (name := run.objective.uncounted(full.counts)) is not None:
            raise nothing_counted(config, f"all {full.num_batches} batches", name)
        population = samples.population / config.train.global_batch_size if samples.population is not None else None
        ladder, noise, by_part = _ladder(read, table, groups, config.train.global_batch_size, population)
        found = None
        if signs is not None:
            signs_table = signs.finish(full.shards(), table.scale)
            found = sign_statistics(signs_table, table.norms, as_dict(noise) if noise else None, by_part, population)
        loss_error = standard_error(full.losses)
        if loss_error is not None:
            loss_error *= math.sqrt(unseen(full.num_batches, population))
        result = ProbeResult(
            step=run.step, mode="frozen", data=config.probe.data, dropout=config.probe.dropout,
            num_batches=full.num_batches, num_samples=samples.num_samples,
            num_tokens=samples.num_samples * config.model.seq_length, loss=full.loss, loss_standard_error=loss_error,
            table=table, seconds=time.perf_counter() - started, rungs=ladder, noise=noise, noise_by_part=by_part, signs=found,
            facts={
                "theta": "master weights" if master_weights else "the model's own weights",
                "population_samples": samples.population,
                **probe_facts(config, run.ranks),
            },
        )  # fmt: skip
    warn_of(result, run.ranks)
    return result


def _sign_statistics(run: ProbedRun) -> SignStatistics | None:
    """Follows the signs of LION's update direction; None for another optimizer."""
    settings = run.config.optimizer
    if settings.name != "lion":
        return None
    names = [name for name in parameter_rows(run.model) if not is_padding(name)]
    device = next(run.model[0].parameters()).device
    return SignStatistics(
        names, settings.resolved_betas(), settings.clip_grad, run.model[0].config, device,
        freeze_key_bias=settings.freeze_key_bias,
    )  # fmt: skip


def nothing_counted(config: RunConfig, which: str, name: str) -> DataError:
    """The error of a probe whose loss counts nothing in some samples; all ranks raise it, and the first prints it."""
    split = "test" if config.probe.data == "test" else "training"
    error = DataError(
        f"probe: the loss counts nothing in {which} of the {split} samples ({name} is 0); check the data and its index cache "
        "(data.cache, or the run's folder cache)"
    )
    error.told_by = 0
    return error


def _ladder(
    read: list[tuple[int, GradientNorms]],
    table: NormTable,
    grouped: GroupedBatches | None,
    batch_samples: int,
    population: float | None,
) -> tuple[tuple[Rung, ...], NoiseEstimate | None, dict[str, Any] | None]:
    if grouped is None:
        return (), None, None
    groups = grouped.finish([count for count, _ in read])
    ladder = tuple(make_rung(count, norms, groups, population) for count, norms in read)
    noise = estimate_noise(groups, read[-1][1], batch_samples=batch_samples, population=population)
    by_part = noise_by_part(groups, table, batch_samples=batch_samples, population=population) if noise else None
    return ladder, noise, by_part


def standard_error(losses: list[tuple[float, int]]) -> float | None:
    """Standard error of a mean loss from (loss sum, count) of independent batches; None for a single batch.

    Example:
        >>> standard_error([(2.0, 1), (4.0, 1)])
        1.0
    """
    if len(losses) < 2:
        return None
    means = [loss / tokens for loss, tokens in losses]
    center = math.fsum(means) / len(means)
    return math.sqrt(math.fsum((mean - center) ** 2 for mean in means) / (len(means) - 1) / len(means))


def probe_facts(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Returns the facts that a probe file states about the run and about the job that probed it."""
    return {
        "global_batch_size": config.train.global_batch_size, "seq_length": config.model.seq_length,
        "precision": config.train.precision, "weight_decay": config.optimizer.weight_decay, "optimizer": config.optimizer.name,
        "dp_size": ranks.dp_size, "tp_size": ranks.tp_size, "pp_size": ranks.pp_size,
    }  # fmt: skip


def warn_of(result: ProbeResult, ranks: Ranks) -> None:
    """Logs a warning if the gradient is not finite or zero, or the KKT residual is undefined."""
    if not ranks.is_main:
        return
    norms = result.table.norms()
    if norms.grad_l2 == 0.0:
        _log.warning("probe at step %d: the gradient is exactly zero (loss %g)", result.step, result.loss)
    if not math.isfinite(norms.grad_l2):
        bad = [
            name for name, part in result.table.grouped(lambda name: name).items() if not math.isfinite(part.grad_l2)
        ]
        _log.warning(
            "probe at step %d: the gradient is not finite, first in %s",
            result.step,
            bad[0] if bad else "its total norm",
        )
    if norms.kkt_residual is None:
        _log.warning(
            "probe at step %d: no parameter has a weight decay, so there is no box and the KKT residual is undefined",
            result.step,
        )
