"""Context of a run on every rank: stop signals, deterministic kernels and process groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_lion.config import RunConfig
from megatron_lion.determinism import deterministic
from megatron_lion.device import Device
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.signals import stop_signals


@contextmanager
def session(config: RunConfig, device: Device) -> Iterator[tuple[dict[str, bool], Ranks]]:
    """Installs stop signals, deterministic kernels and process groups, and removes them after the block.

    Args:
        config: settings; only the sections train and parallel are used.
        device: this process's device.

    Yields:
        The flag that a stop signal sets (`stop["now"]`), and this process's ranks.
    """
    parallel = config.parallel
    # Determinism before process groups: NCCL and cuBLAS read their environment variables when they start.
    with (
        stop_signals() as stop,
        deterministic(config.train.deterministic),
        process_groups(
            device,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            timeout_s=parallel.timeout_s,
        ) as ranks,
    ):
        yield stop, ranks
