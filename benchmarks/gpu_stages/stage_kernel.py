"""Stage `kernel`: time of the fused step relative to that of a copy of its bytes, launches and host waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from contenders import Case, ours
from optimizer_step import SIZES, Shapes, bandwidths, describe, time_once

from .stage import Stage, release_memory
from .stage_facts import REHEARSAL_NUMEL

# (master weights, momentum): bytes read and written per parameter with fp32 gradients, counted from the kernel.
MODES = {("split32", "fp32"): 20.0, ("split32", "bf16"): 16.0, ("split24", "int8"): 12.125}
# The shards and models of the paper come first; one flat tensor of 10^9 elements measures the kernel without its tables.
ORDER = ("gpt2-124m", "gpt2-124m-dp16", "gpt2-355m", "flat-1b")
REHEARSAL_SHAPES: Shapes = [(33,), (1025,)]
REPLAYS = 50
# An L2 cache holds up to 60 MB; a shard of 124M at DP 16 takes 60 to 90 MB.
COPIES, LARGE = 4, 5 * 10**7
# Number of steps in a replayed graph: the launch gap of one replay, some microseconds, is then small.
GRAPH_MS = 4.0


def run(stage: Stage) -> None:
    copy = bandwidths(stage.device, REHEARSAL_NUMEL if stage.rehearse else None)["copy"]
    for size in ORDER[:1] if stage.rehearse else ORDER:
        for mode in MODES:
            stage.attempt(part_name(size, mode), 3, lambda s=size, m=mode: measure(stage, s, m, copy))


def part_name(size: str, mode: tuple[str, str]) -> str:
    return f"{size} {mode[0]}, {mode[1]} momentum"


def measure(stage: Stage, size: str, mode: tuple[str, str], copy: float) -> None:
    """Measures one mode on one size: kernel time, the time its bytes need at copy speed, launches, waits."""
    shapes = REHEARSAL_SHAPES if stage.rehearse else SIZES[size]
    numel = sum(int(torch.Size(shape).numel()) for shape in shapes)
    # A small size is in memory several times and steps alternate between the copies, so the L2 cache has none of it.
    cases = [make_case(mode, shapes, stage.device) for _ in range(COPIES if numel < LARGE else 1)]
    case = cases[0]
    facts = describe(case, stage.device)
    eager = [time_once(case.step, stage.device) for _ in range(4 if stage.rehearse else 13)][3:]
    seconds, how = kernel_seconds(cases, stage.device)
    moved = MODES[mode]
    stage.row(
        part_name(size, mode),
        over_bound=seconds / (moved * numel / copy), kernel_ms=seconds * 1e3, timed_by=how,
        step_wall_ms=statistics.median(wall for _, wall in eager) * 1e3,
        state_bytes_per_parameter=case.state_bytes() / numel, **facts, copy_gb_per_s=copy / 1e9, size=size,
        mode="/".join(mode), parameters=numel, tensors=len(shapes), bytes_per_parameter=moved,
    )  # fmt: skip
    del case, cases
    release_memory()


def make_case(mode: tuple[str, str], shapes: Shapes, device: str) -> Case:
    """LION on tensors of these shapes after one step, with the kernel compiled and its tables on the device."""
    case = ours(*mode, torch.float32, "triton")([torch.full(shape, 0.5, device=device) for shape in shapes])
    for grad in case.grads:
        grad.normal_()
    case.step()
    return case


def kernel_seconds(cases: list[Case], device: str) -> tuple[float, str]:
    """(seconds of one step on the device without the host's part, method of timing).

    The tables are on the device, so a captured step is the kernel alone.
    """
    case = cases[0]
    if device == "cpu":
        return statistics.median(time_once(case.step, device)[0] for _ in range(2)), "wall"
    steps = max(1, round(GRAPH_MS / 1e3 / max(time_once(case.step, device)[0], 1e-5)))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for number in range(steps):
            cases[number % len(cases)].step()
    return median_of_replays(graph.replay) / steps, f"graph of {steps} steps"


def median_of_replays(replay: Callable[[], None]) -> float:
    """Median seconds of a replay between two events, over REPLAYS after three warm-up replays."""
    for _ in range(3):
        replay()
    return statistics.median(time_once(replay, "cuda")[0] for _ in range(REPLAYS))
