"""The norm's kernels on one rank: the value, equal bits in each repetition, no wait, a CUDA graph, and time over bytes."""

from __future__ import annotations

import statistics

import torch
import torch.distributed as dist
from optimizer_step import SIZES, bandwidths, time_once

from megatron_lion.optim.grad_norm import TritonNorm

from .stage import Stage
from .stage_facts import REHEARSAL_NUMEL

REPEATS = 30


def check_norms(stage: Stage) -> None:
    """Compares with float64, then captures the section in a graph and times its replays (on a CPU: the plain calls)."""
    shapes = [(33,), (5000,)] if stage.rehearse else SIZES["gpt2-124m"]
    device = torch.device(stage.device, 0) if stage.device == "cuda" else torch.device("cpu")
    grads = [torch.full(shape, 0.5, device=device).normal_() for shape in shapes]
    norm = TritonNorm(device, dist.group.WORLD)
    divisor = torch.full((1,), 81_920.0, dtype=torch.float64, device=device)

    def scalars() -> torch.Tensor:
        found = norm.scalars(grads, grads[:1], 1.0, divisor=divisor, counts=divisor)
        assert found.multipliers is not None
        return torch.cat([found.norm.view(1), found.multipliers.double(), found.found_inf.double().view(1)])

    first = scalars()
    exact = float(torch.stack([grad.double().norm() for grad in grads]).norm()) / 81_920
    same = all(torch.equal(scalars(), first) for _ in range(5))
    replay = scalars
    if stage.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            scalars()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = scalars()

        def replay() -> torch.Tensor:
            graph.replay()
            return captured

    same_replay = torch.equal(replay(), first)
    seconds = statistics.median(time_once(replay, stage.device)[0] for _ in range(3 if stage.rehearse else REPEATS))
    moved = 4 * sum(grad.numel() for grad in grads)
    copy = bandwidths(stage.device, REHEARSAL_NUMEL if stage.rehearse else None)["copy"]
    apart = abs(float(first[0]) / exact - 1)
    stage.row(
        "norm kernels", passed=apart < 2e-6 and same and same_replay, relative_difference=apart, same_bits=same,
        replay_has_the_bits=same_replay, over_bound=seconds / (moved / copy), ms=seconds * 1e3,
    )  # fmt: skip
