"""Stage `facts`: the card and its speed of copies and matrix products, to which other figures are compared."""

from __future__ import annotations

import statistics

import torch
from optimizer_step import bandwidths, time_once

from .stage import Stage

REHEARSAL_NUMEL = 2**20


def run(stage: Stage) -> None:
    stage.attempt("device", 1, lambda: device(stage))
    stage.attempt("bandwidth", 2, lambda: bandwidth(stage))
    stage.attempt("matmul", 2, lambda: matmul(stage))


def device(stage: Stage) -> None:
    if stage.device == "cpu":
        stage.row("device", multiprocessors=None, compute_capability=None)
        return
    properties = torch.cuda.get_device_properties(0)
    stage.row(
        "device",
        compute_capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        l2_mib=properties.L2_cache_size / 2**20,
        total_memory_gib=properties.total_memory / 2**30,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
        cudnn=torch.backends.cudnn.version(),
    )


def bandwidth(stage: Stage) -> None:
    """Bytes read and written per second by a copy of 2 GiB (4 MiB in a rehearsal) and by a multiplication in place."""
    found = bandwidths(stage.device, REHEARSAL_NUMEL if stage.rehearse else None)
    stage.row("bandwidth", copy_gb_per_s=found["copy"] / 1e9, in_place_gb_per_s=found["in_place"] / 1e9)


def matmul(stage: Stage) -> None:
    """Speed of a bf16 product of random square matrices: the median of ten after three warm-up products."""
    size = 8192 if stage.device == "cuda" else 256
    left, right = (torch.randn(size, size, device=stage.device, dtype=torch.bfloat16) for _ in range(2))
    times = [time_once(lambda: left @ right, stage.device)[0] for _ in range(13)][3:]
    stage.row("matmul", size=size, tflops=2 * size**3 / statistics.median(times) / 1e12)
