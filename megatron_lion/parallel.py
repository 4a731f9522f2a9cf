"""Process groups, random seeds, collectives, and errors that all ranks raise together.

Ranks fail together: `agree` raises an error of one rank on all ranks, before a collective in which the others would
wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.collective_faults import is_collective_fault, is_own_fault, one_line, start_fault, worker_fault
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, MegatronLionError, PeerError, StoppedOnRequest, WorkerError
from megatron_lion.peer_watch import PeerWatch, failure_text
from megatron_lion.peers import alone, mark, set_timeout, waits, watched
from megatron_lion.rendezvous import join_job, stopped_also_in_cpp


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank, world_size: rank and number of processes of the whole job.
        dp_rank, dp_size, tp_rank, tp_size, pp_rank, pp_size: the same in megatron-core's data-, tensor- and
            pipeline-parallel groups.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0


@contextmanager
def process_groups(
    device: Device,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    timeout_s: float = 600,
) -> Iterator[Ranks]:
    """Joins the job, builds megatron-core's groups, watches the other ranks, and destroys the groups at the end.

    A collective that fails in the block is raised as PeerError. After an error that not all ranks share, the groups
    stay: with NCCL their destruction waits for ranks that wait for this one. The command line then ends the process.

    Args:
        device: from `select_device`.
        tensor_model_parallel_size, pipeline_model_parallel_size: their product must divide the world size.
        timeout_s: longest time that a collective waits for a peer, seconds.

    Yields:
        This process's ranks.

    Raises:
        ConfigError: the layout does not fit the number of processes.
        PeerError: the other processes did not join the job, or one was lost or late in the block; names its rank.
        EnvironmentFault: the backend cannot start or work on this machine.
    """
    from megatron.core import parallel_state

    destroy = True
    ours = not dist.is_initialized()
    if ours:
        try:
            join_job(device, timeout_s)
        except (RuntimeError, ValueError) as error:
            raise start_fault(error) from error
    try:
        with watched(timeout_s) as watch, _collective_faults(watch):
            with stopped_also_in_cpp():
                ranks = _join_groups(device, tensor_model_parallel_size, pipeline_model_parallel_size, timeout_s)
            yield ranks
    except BaseException as error:
        told = isinstance(error, MegatronLionError) and error.told_by is not None
        destroy = dist.get_world_size() == 1 or (told and not isinstance(error, PeerError))
        raise
    finally:
        # mcore 0.19.2: it forgets its groups, but torch.distributed keeps each alive, with its threads and sockets.
        groups = dict.fromkeys(parallel_state._global_process_group_list or ())
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        if destroy and ours and dist.is_initialized():
            dist.destroy_process_group()
        elif destroy and dist.is_initialized():
            for group in groups:
                if group is not None:  # None means the default group, which its owner destroys
                    dist.destroy_process_group(group)


def _join_groups(device: Device, tensor_parallel: int, pipeline_parallel: int, timeout_s: float) -> Ranks:
    """Builds megatron-core's groups over the default group, all with this time limit."""
    from megatron.core import parallel_state

    set_timeout(timeout_s)  # the default group may be older than this job
    world_size = dist.get_world_size()
    layout = tensor_parallel * pipeline_parallel
    if world_size % layout:
        raise ConfigError(
            f"parallel: tensor_model_parallel_size {tensor_parallel} x pipeline_model_parallel_size "
            f"{pipeline_parallel} = {layout} does not divide the {world_size} processes of this job"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        # On CUDA too: mcore 0.19.2 uses its gloo groups only to gather optimizer state on data-parallel rank 0
        # (distrib_optim_fully_reshardable_mem_efficient). Our checkpoints gather over the data-parallel group
        # itself, so unused gloo groups would cost each process sockets and host name lookups.
        create_gloo_process_groups=False,
        # mcore 0.19.2: declared as int, but only passed to timedelta, so fractions of a minute are kept.
        distributed_timeout_minutes=timeout_s / 60,
    )
    return Ranks(
        rank=dist.get_rank(),
        world_size=world_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tensor_parallel,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pipeline_parallel,
    )


@contextmanager
def _collective_faults(watch: PeerWatch | None) -> Iterator[None]:
    """Raises a failed collective or a lost loader worker of the block as PeerError, and leaves each error for the other ranks to read."""
    try:
        yield
    except BaseException as error:
        if is_own_fault(error):
            fault = start_fault(error)
            _leave_message(watch, fault)
            raise fault from error
        if (worker := worker_fault(error)) is not None:
            _leave_message(watch, worker)
            raise worker from error
        if not is_collective_fault(error):
            _leave_message(watch, error)
            raise
        lost = watch.blame(error) if watch is not None else PeerError(f"lost a peer: {one_line(error)}")
        _leave_message(watch, lost)
        raise lost from error


def _leave_message(watch: PeerWatch | None, error: BaseException) -> None:
    if watch is not None and isinstance(error, PeerError) and not isinstance(error, WorkerError):
        watch.end("lost", failure_text(error), error.lost)
    elif watch is not None:
        watch.end("failed", failure_text(error))


def derive_seed(seed: int, stream: str) -> int:
    """Derives a seed for one use of randomness ("init", "data", "dropout", "masking", "probe") from the run's seed.

    The seed is below 2^31. A hash separates the streams, so that no use shares or shifts the numbers of another.

    Example:
        >>> derive_seed(1234, "init") == derive_seed(1234, "init") != derive_seed(1234, "data")
        True
    """
    import hashlib

    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def seed_everything(seed: int, ranks: Ranks) -> None:
    """Seeds all generators for dropout: equal within a tensor-parallel group, different on every data-parallel rank and stage.

    Inside regions that are split over the tensor-parallel group, Megatron's tracked stream differs on each of its ranks.
    """
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    # Megatron seeds its tracked stream with base + 2718 + tp_rank. Bases that are 100 apart for stages and 1,000,003
    # apart for data ranks keep these seeds different too. Both large terms are below 2^30.
    base = derive_seed(seed, "dropout") // 2 + 100 * ranks.pp_rank + 1_000_003 * ranks.dp_rank % (2**30)
    random.seed(base)
    np.random.seed(base % 2**32)
    torch.manual_seed(base)
    tensor_parallel.model_parallel_cuda_manual_seed(base)


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sums `values` over a group, in place, and returns it.

    Args:
        values: any shape, any dtype that the backend supports.
        group: all processes by default.
    """
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
        mark()
    return values


def reduce_sums(outputs: list[dict[str, torch.Tensor]], names: Sequence[str], device: torch.device) -> dict[str, float]:
    """Returns the sums of `sum_on_device` by name; waits for the device."""
    return dict(zip(names, sum_on_device(outputs, names, device).tolist(), strict=True))


def sum_on_device(outputs: list[dict[str, torch.Tensor]], names: Sequence[str], device: torch.device) -> torch.Tensor:
    """Sums scalars over micro-batches and data-parallel ranks; every rank gets the sums, on every pipeline stage.

    Args:
        outputs: one dict of scalars for each micro-batch; empty except on the last pipeline stage.
        names: the scalars to sum.
        device: device of the reduction.

    Returns:
        The sums, float64 [names], on the device.
    """
    from megatron.core import parallel_state

    # One tensor, so one collective and one wait for all names; float64, so that rounding is below float32's digits.
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    for output in outputs:
        totals += torch.stack([output[name].double() for name in names])
    if dist.get_world_size() > 1:
        # Only the last stage has losses, and all its tensor-parallel ranks have the same: count each once.
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            totals.zero_()
        dist.all_reduce(totals)
        mark()
    return totals


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Returns the plain Python value of rank `source` on every rank; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    mark()
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns the plain Python values of all ranks in order; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    mark()
    return values


@contextmanager
def agree(what: str) -> Iterator[None]:
    """Runs a block that may fail on some ranks only; if it fails on any, raises the error on all ranks.

    Use it around work that a collective follows: reading files, checking data, writing. Otherwise the other ranks would
    wait in that collective for the failed one until the timeout. It is itself a collective call.

    Args:
        what: the stage's name, for the message on ranks that did not fail themselves.

    Raises:
        MegatronLionError: of this rank, or else of the lowest rank that failed.
    """
    error: MegatronLionError | None = None
    found: list[Any] = []
    with alone(what):  # the others wait in the collective for as long as the slowest works
        try:
            yield
        except StoppedOnRequest:
            # A signal raises it at any line, at another one on each rank. The others may be in a collective of the block,
            # which must not receive this function's message.
            raise
        except MegatronLionError as caught:
            error = caught
        waits()
        if dist.is_initialized() and dist.get_world_size() > 1:
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, None if error is None else (type(error), str(error)))
    if found:
        failed = [(rank, item) for rank, item in enumerate(found) if item is not None]
        if failed:
            rank, (kind, message) = failed[0]
            error = error or kind(f"{what} failed on rank {rank}: {message}")
            error.told_by = rank  # all ranks raise it, one rank reports it
    if error is not None:
        raise error
