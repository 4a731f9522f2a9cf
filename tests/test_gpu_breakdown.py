"""The GPU check's breakdown of a step: time by group of kernels, overlaps counted once, host waits by line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import optimizer_step
from gpu_stages import breakdown


def operation(*names: str, kernels: tuple[tuple[str, float], ...] = ()) -> SimpleNamespace:
    """A profiled operation, innermost name first, with the (name, microseconds) of each kernel it launched."""
    parent = operation(*names[1:]) if len(names) > 1 else None
    launched = [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]
    return SimpleNamespace(name=names[0], cpu_parent=parent, device_type=DeviceType.CPU, kernels=launched)


def kernel(start: float, end: float, annotation: bool = False) -> SimpleNamespace:
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(device_type=DeviceType.CUDA, time_range=time_range, is_user_annotation=annotation)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("aten::mm", "aten::linear"), "matrix products"),
        (("aten::mm", "MmBackward0", "autograd::engine::evaluate_function: MmBackward0"), "matrix products"),
        (("aten::_flash_attention_forward", "aten::scaled_dot_product_attention"), "attention"),
        (("aten::bmm", "aten::_scaled_dot_product_attention_math"), "attention"),
        (("aten::exp", "_VocabParallelCrossEntropy"), "loss"),
        (("aten::mul_", "autograd::engine::evaluate_function: _VocabParallelCrossEntropyBackward"), "loss"),
        (("aten::add_", "torch::autograd::AccumulateGrad"), "gradient buffers"),
        (("aten::zero_", breakdown.BUFFERS), "gradient buffers"),
        (("aten::mul", breakdown.OPTIMIZER), "optimizer"),
        (("aten::gelu",), "element-wise"),
    ],
)
def test_operations_belong_to_groups(names: tuple[str, ...], group: str) -> None:
    assert breakdown.group_of(operation(*names)) == group


def test_kernels_are_counted_by_group_and_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: products of 40 µs, the optimizer 10 µs, a copy of 2 µs to the device, which is busy for 49 µs."""
    events = [
        operation("aten::mm", kernels=(("gemm", 30.0), ("gemm", 10.0))),
        operation("lion", breakdown.OPTIMIZER, kernels=(("lion_kernel", 10.0),)),
        operation("aten::to", kernels=(("Memcpy HtoD (Pinned -> Device)", 2.0),)),
        operation("cudaLaunchKernel", kernels=(("gemm", 30.0),)),  # shares its number with another operation
        kernel(0.0, 30.0), kernel(20.0, 30.0), kernel(30.0, 40.0), kernel(50.0, 52.0), kernel(60.0, 67.0),
        kernel(0.0, 200.0, annotation=True),
    ]  # fmt: skip

    class Profile:
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def events(self) -> list[Any]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    device = SimpleNamespace(kind="cuda", synchronize=lambda: None)
    steps: list[int] = []
    chunk = SimpleNamespace(zero_grad_buffer=len)
    run = SimpleNamespace(device=device, optimizer=SimpleNamespace(start_step=len, end_step=abs), model=[chunk])
    found = breakdown.profile_steps(run, lambda: steps.append(1), 2)
    assert len(steps) == 2
    assert {name: ms for name, ms in found["ms"].items() if ms} == {
        "matrix products": 0.02,
        "optimizer": 0.005,
        "copies": 0.001, "unattributed": 0.0035,
    }  # fmt: skip
    assert found["launches"]["matrix products"] == 1.0
    assert found["launches"]["optimizer"] == 0.5
    assert found["busy_ms"] == pytest.approx(0.0245)
    assert (run.optimizer.start_step, run.optimizer.end_step, chunk.zero_grad_buffer) == (len, abs, len), (
        "the ranges are removed again"
    )


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))))
def test_covered_is_the_length_of_the_union(pairs: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in pairs]
    union = {moment for start, end in ranges for moment in range(start, end)}
    assert breakdown.covered([(float(a), float(b)) for a, b in ranges]) == len(union)


def test_host_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/parallel.py", 199)
        warnings.warn_explicit("something else", UserWarning, "/x/parallel.py", 200)

    assert optimizer_step.host_waits(step) == {"parallel.py:199": 2}
    assert modes == ["warn", "default"]
