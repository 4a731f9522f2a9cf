"""Breakdown of a training step's time by group of kernels, from torch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_lion.train import step as step_module
from megatron_lion.train.run import Run

GROUPS = ("matrix products", "attention", "loss", "element-wise", "gradient buffers", "optimizer", "copies")
# Ranges that this module puts around calls that have no torch operation.
OPTIMIZER, BUFFERS = "megatron_lion: optimizer", "megatron_lion: gradient buffers"
MATRIX = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot"}


def profile_steps(run: Run, take_one: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Milliseconds per step by group: of kernels on CUDA, of the operations on a CPU.

    Args:
        run: the run; its optimizer and gradient buffers are marked with ranges.
        take_one: function that takes one step.
        steps: number of profiled steps.

    Returns:
        `ms` and `launches` by group (on CUDA also `unattributed`: kernels of no known operation), and `busy_ms` (time in
        which the device ran at least one kernel), each per step.
    """
    on_cuda = run.device.kind == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with marked(run):
        run.device.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                take_one()
            run.device.synchronize()
    events = profile.events()
    spent, launches = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0)
    for event in events:
        # Calls of the CUDA runtime may share their number with other operations, whose kernels would then count twice.
        if event.device_type != DeviceType.CPU or event.name.startswith(("cuda", "cuLaunch")):
            continue
        if not on_cuda:
            spent[group_of(event)] += event.self_cpu_time_total
            continue
        for kernel in event.kernels:
            group = "copies" if kernel.name.startswith("Memcpy HtoD") else group_of(event)
            launches[group] += 1
            spent[group] += kernel.duration
    # Annotations appear on the device too, as ranges from the first to the last kernel inside, gaps included.
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    ranges = [(e.time_range.start, e.time_range.end) for e in on_device]
    busy = covered(ranges) if on_cuda else sum(spent.values())
    if on_cuda:
        spent["unattributed"] = sum(end - start for start, end in ranges) - sum(spent.values())
    per_step = {name: microseconds / 1e3 / steps for name, microseconds in spent.items()}
    counts = {name: count / steps for name, count in launches.items()} if on_cuda else None
    return {"ms": per_step, "busy_ms": busy / 1e3 / steps, "launches": counts}


def group_of(event: Any) -> str:
    """The group of an operation, from its name and the names of its callers, also in the backward pass."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    chain = "\n".join(names)
    if OPTIMIZER in names:
        return "optimizer"
    if BUFFERS in names or "AccumulateGrad" in chain:  # Megatron's hook adds to the fp32 buffer in it
        return "gradient buffers"
    if any(
        word in chain for word in ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
    ):
        return "attention"
    if "CrossEntropy" in chain:
        return "loss"
    return "matrix products" if MATRIX.intersection(names) else "element-wise"


def covered(ranges: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: overlapping kernels of two streams count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def marked(run: Run) -> Iterator[None]:
    """Puts named ranges around the optimizer's step and all calls on whole gradient buffers."""
    plain_start, plain_end, plain_finalize = (
        run.optimizer.start_step,
        run.optimizer.end_step,
        step_module.finalize_model_grads,
    )
    plain_zero = [chunk.zero_grad_buffer for chunk in run.model]

    def ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            # The profiler attributes no kernel to torch.profiler.record_function, which is a user annotation. LION's launch
            # is inside no torch operation and would be unattributed. This range has the scope of a function instead.
            with _RecordFunctionFast(name):
                return call(*args, **named)

        return wrapped

    run.optimizer.start_step = ranged(OPTIMIZER, plain_start)
    run.optimizer.end_step = ranged(OPTIMIZER, plain_end)
    step_module.finalize_model_grads = ranged(BUFFERS, plain_finalize)
    for chunk, zero in zip(run.model, plain_zero, strict=True):
        chunk.zero_grad_buffer = ranged(BUFFERS, zero)
    try:
        yield
    finally:
        run.optimizer.start_step, run.optimizer.end_step = plain_start, plain_end
        step_module.finalize_model_grads = plain_finalize
        for chunk, zero in zip(run.model, plain_zero, strict=True):
            chunk.zero_grad_buffer = zero
