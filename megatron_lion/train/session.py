"""What surrounds a run's computation on every rank: deterministic kernels, process groups, and a request to stop."""

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
    """The flag that a signal sets (`stop["now"]`), and the ranks of the layout that the settings ask for.

    Args:
        config: its sections train and parallel count.
        device: of this process.
    """
    parallel = config.parallel
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
