"""Chooses the number of samples of a forward pass from the memory of the device; without torch, for --dry-run."""

from __future__ import annotations

from dataclasses import replace

from megatron_lion.config import RunConfig
from megatron_lion.model.sizes import memory_bytes

CPU_SAMPLES = 8
"""Most samples of a pass on a CPU, whose caches larger ones would leave."""
MOST_TOKENS = 65_536
"""Most tokens of a pass: matrices of this length keep any device busy, and more only cost memory."""
USABLE, RESERVED = 0.75, 2**30
"""Share of the memory that the estimate of tensors may fill, and bytes for the libraries: the estimate leaves temporary
tensors, communication buffers and fragmentation out."""
BUBBLE = 4
"""Micro-batches for each pipeline stage at least, if the share allows it: the idle share is (stages - 1) / micro-batches."""


def choose_micro_batch(config: RunConfig, world_size: int, memory: int | None, vocab_size: int | None = None) -> int:
    """Returns the largest divisor of a process's share of the global batch that fits.

    Args:
        config: the run's settings; `train.micro_batch_size` is not read.
        world_size: number of processes; the data-parallel size divides the global batch.
        memory: bytes of the device with the least memory; None on a CPU.
        vocab_size: ids before padding, as for `model_size`.

    Returns:
        At least 1, also if not even one sample seems to fit.

    Example:
        >>> [choose_micro_batch(RunConfig(), 16, gib * 2**30) for gib in (8, 16, 24)]
        [10, 20, 40]
        >>> choose_micro_batch(RunConfig(), 1, None)
        8
    """
    share = config.train.global_batch_size // config.data_parallel_size(world_size)
    stages = config.parallel.pipeline_model_parallel_size
    most = CPU_SAMPLES if memory is None else max(1, MOST_TOKENS // config.model.seq_length)
    if stages > 1:
        most = min(most, max(1, share // (BUBBLE * stages)))
    for size in sorted(divisors(share), reverse=True):
        if size <= most and (memory is None or _fits(config, size, world_size, memory, vocab_size)):
            return size
    return 1


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number of at least 1, ascending.

    Example:
        >>> divisors(40)
        [1, 2, 4, 5, 8, 10, 20, 40]
    """
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return small + [number // candidate for candidate in reversed(small) if candidate * candidate != number]


def _fits(config: RunConfig, size: int, world_size: int, memory: int, vocab_size: int | None) -> bool:
    sized = replace(config, train=replace(config.train, micro_batch_size=size))
    return sum(memory_bytes(sized, world_size, vocab_size).values()) <= USABLE * memory - RESERVED
