"""The norm, clip coefficient and gate of a step in two Triton launches: values, bits, host waits and launches.

On a CPU the kernels run in Triton's interpreter; `in_triton` makes a run take the path of a CUDA device.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from distributed import run_distributed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter; on a GPU benchmarks/gpu.py compares the modes and counts launches and waits",
)
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")


def some_gradients() -> dict[str, list[torch.Tensor]]:
    """Sizes around a chunk, of one element and of none; every dtype, alone and together."""
    generator = torch.Generator().manual_seed(5)
    sizes = (1, 4095, 4096, 4097, 0, 20_000, 7)
    found = {
        str(dtype): [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    found["mixed"] = [grad for grads in found.values() for grad in grads]
    whole = torch.randn(3, 5001, generator=generator).to(DEVICE)
    found["unaligned"] = [whole[1], whole[2, 3:]]
    found["none"] = []
    return found


def values_of_the_scalars(rank: int) -> list[str]:
    """Compares `TritonNorm` with float64 and with the torch form in one process; returns what differs."""
    from torch.distributed import group

    from megatron_lion.optim.grad_norm import TritonNorm, plain_scalars, with_replicas

    wrong = []
    for name, grads in some_gradients().items():
        norm = TritonNorm(DEVICE, group.WORLD)
        exact = torch.stack([torch.zeros((), device=DEVICE, dtype=torch.float64), *(g.double().norm() for g in grads)])
        length = float(exact.norm())
        for divisor, clip in itertools.product((None, 1.0, 0.0, 3.0, 8191.0), (0.0, 0.3, 1e6)):
            count = max(1.0, divisor or 1.0)
            given = None if divisor is None else torch.tensor([divisor], dtype=torch.float64, device=DEVICE)
            found = norm.scalars(grads, [], clip, divisor=given)
            if not math.isclose(float(found.norm), length / count, rel_tol=2e-6, abs_tol=1e-30):
                wrong.append(f"{name}, divisor {divisor}: norm {float(found.norm)}, not {length / count}")
            expected = [] if divisor is None else [float(torch.tensor(1.0) / torch.tensor(count, dtype=torch.float32))]
            # Of the norm that was found: the coefficient itself has no error but float32's rounding.
            expected += [] if not clip else [float(torch.tensor(min(1.0, clip / (float(found.norm) + 1e-6))))]
            multipliers = [] if found.multipliers is None else found.multipliers.tolist()
            if multipliers != expected or float(found.found_inf) != 0:
                wrong.append(f"{name}, divisor {divisor}, clip {clip}: {multipliers}, {float(found.found_inf)}")
            scaled = [g.float() * torch.tensor(1 / count, device=DEVICE) for g in grads]
            plain = plain_scalars(scaled, group.WORLD, clip, None, DEVICE)
            if not math.isclose(float(plain.norm), float(found.norm), rel_tol=3e-6, abs_tol=1e-30):
                wrong.append(f"{name}: the torch form has norm {float(plain.norm)}")
    ones, replica = [torch.ones(5000, device=DEVICE)], torch.full((4100,), 1e15, device=DEVICE)
    norm = TritonNorm(DEVICE, group.WORLD)
    for bad, where, counts, skips in (
        (None, "", None, 0.0),
        (float("nan"), "grads", None, 1.0),
        (float("inf"), "grads", None, 1.0),
        (float("nan"), "replicas", None, 1.0),
        (float("-inf"), "replicas", None, 1.0),
        (None, "", [3.0, 1.0], 0.0),
        (None, "", [3.0, 0.0], 1.0),
        (None, "", [float("nan")], 1.0),
    ):
        grads, replicas = [g.clone() for g in ones], [replica.clone()]
        if bad is not None:
            (grads if where == "grads" else replicas)[0][4097 if where == "grads" else 3] = bad
        given = None if counts is None else torch.tensor(counts, dtype=torch.float64, device=DEVICE)
        found = norm.scalars(grads, replicas, 1.0, counts=given)
        plain = plain_scalars(with_replicas(grads, replicas), group.WORLD, 1.0, given, DEVICE)
        for form, result in (("Triton", found), ("torch", plain)):
            if float(result.found_inf) != skips:
                wrong.append(f"{form}, {bad} in {where}, counts {counts}: found_inf {float(result.found_inf)}")
        if not skips and float(found.norm) != math.sqrt(5000):
            wrong.append(f"a finite replica changed the norm: {float(found.norm)}")
    return wrong


def test_the_scalars_are_those_of_float64_and_of_the_torch_form() -> None:
    assert run_distributed(values_of_the_scalars, 1, device=DEVICE.type) == [[]]


class Watch:
    """Counts the host's waits and the launches of a block, without what Triton's interpreter does itself."""

    READS: ClassVar = {
        "tolist",
        "item",
        "__float__",
        "__bool__",
        "__int__",
        "__index__",
        "cpu",
        "numpy",
        "__contains__",
    }
    # They make no kernel: views, and allocations.
    QUIET: ClassVar = {
        "view", "slice", "select", "detach", "alias", "as_strided", "_unsafe_view", "reshape", "t", "transpose", "permute",
        "expand", "unsqueeze", "squeeze", "empty", "empty_like", "empty_strided", "split", "_record_function_enter_new",
        "_record_function_exit", "unbind", "lift_fresh",
    }  # fmt: skip

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.paused = False

    def counted(self, kernel: Any, name: str) -> Any:
        watch = self

        class Counted:
            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **options: Any) -> None:
                    watch.launches.append(name)
                    watch.paused = True
                    try:
                        kernel[grid](*args, **options)
                    finally:
                        watch.paused = False

                return launch

        return Counted()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        watch = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if not watch.paused and getattr(func, "__name__", "") in watch.READS:
                    watch.waits.append(func.__name__)
                return func(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                if not watch.paused and name not in watch.QUIET and not func.name().startswith("c10d"):
                    watch.launches.append(name)
                return func(*args, **(kwargs or {}))

        with Functions(), Operations():
            yield


@contextlib.contextmanager
def in_triton(run: Any, watch: Watch | None = None) -> Iterator[None]:
    """Lets the run's optimizer take the path of a CUDA device."""
    from megatron_lion.optim import distributed_optimizer, kernel_launch, norm_kernels

    patch = pytest.MonkeyPatch()
    patch.setattr(distributed_optimizer, "runs_in_triton", lambda device: True)
    patch.setattr(run.optimizer.inner, "implementation", "triton", raising=False)
    if watch is not None:
        for module, name in (
            (kernel_launch, "lion_kernel"),
            (norm_kernels, "square_sum_kernel"),
            (norm_kernels, "scalars_kernel"),
        ):
            patch.setattr(module, name, watch.counted(getattr(module, name), name))
    try:
        yield
    finally:
        patch.undo()


FUSED = {"train__precision": "bf16", "optimizer__master_weights": "split32", "train__micro_batch_size": 2}
TP2 = {"parallel__tensor_model_parallel_size": 2}
SHARDS = {**FUSED, "optimizer__master_weights": "shards"}
RUNS: dict[str, dict[str, Any]] = {
    "DP2": {**FUSED, "optimizer__clip_grad": 0.0},
    "DP2, clipped": {**FUSED, "optimizer__clip_grad": 0.05},
    "TP2, clipped": {**FUSED, "optimizer__clip_grad": 0.05, **TP2},
    "adamw, clipped": {**SHARDS, "optimizer__name": "adamw", "optimizer__clip_grad": 0.05},
}


def steps_both_ways(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Three steps of each run: in torch, in Triton, and in Triton with the division by megatron-core."""
    from megatron_lion.optim.distributed_optimizer import FusedDistributedOptimizer
    from megatron_lion.train.fingerprint import state_fingerprint

    found: dict[str, Any] = {}
    for name, config in configs.items():
        ways: dict[str, Any] = {}
        for way in ("torch", "triton", "triton, buffer divided"):
            with tiny.opened_run(config) as run, contextlib.ExitStack() as stack:
                is_lion = config.optimizer.name == "lion"
                if way != "torch":
                    stack.enter_context(in_triton(run) if is_lion else in_triton_norm())
                patch = pytest.MonkeyPatch()
                if way.endswith("divided"):
                    patch.setattr(FusedDistributedOptimizer, "divides_in_kernel", lambda self: False)
                batches = run.train_batches()
                divides = run.optimizer.divides_by_count
                results = [tiny.step_once(run, batches) for _ in range(3)]
                patch.undo()
                ways[way] = {
                    "losses": [result.loss for result in results],
                    "norms": [result.grad_l2 for result in results],
                    "state": state_fingerprint(run.model, run.optimizer),
                    "divides": divides,
                    "buffer": float(run.model[0].buffers[0].grad_data.norm()),
                }
        found[name] = ways
    return found


@contextlib.contextmanager
def in_triton_norm() -> Iterator[None]:
    from megatron_lion.optim import distributed_optimizer

    patch = pytest.MonkeyPatch()
    patch.setattr(distributed_optimizer, "runs_in_triton", lambda device: True)
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("norms")
    corpus = tiny.write_corpus(folder / "corpus")
    configs = {name: tiny.tiny_config(folder / name, corpus, **changes) for name, changes in RUNS.items()}
    return run_distributed(steps_both_ways, 2, configs)


@INTERPRETED
@pytest.mark.parametrize("name", RUNS)
def test_a_step_divides_as_it_reads_with_the_bits_of_a_divided_buffer(
    both_ways: list[dict[str, Any]], name: str
) -> None:
    """Both ranks: equal norms, losses and state; without clipping also those of the path in torch."""
    for found in both_ways:
        ways = found[name]
        is_lion = not name.startswith("adamw")
        assert [way["divides"] for way in ways.values()] == [False, is_lion, False]
        one, other = ways["triton"], ways["triton, buffer divided"]
        unlike = {"divides": None, "buffer": None}
        assert {**one, **unlike} == {**other, **unlike}
        # 8 samples of 16 tokens: the buffer that nobody divided holds the sum over them.
        assert one["buffer"] == pytest.approx(other["buffer"] * (128 if is_lion else 1), rel=1e-5)
        assert one["norms"] == pytest.approx(ways["torch"]["norms"], rel=2e-6)
        assert one["losses"] == pytest.approx(ways["torch"]["losses"], rel=1e-3)
        if "clipped" not in name:
            assert (one["losses"], one["state"]) == (ways["torch"]["losses"], ways["torch"]["state"])
    for way in both_ways[0][name]:
        first, second = ({**found[name][way], "buffer": None} for found in both_ways)  # each rank reduces its own shard
        assert first == second


def waits_and_launches(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """What the host reads in a whole step, and what the optimizer's section of it launches."""
    found = {}
    for name, config in configs.items():
        with tiny.opened_run(config) as run, contextlib.ExitStack() as stack:
            watch = Watch()
            is_lion = config.optimizer.name == "lion"
            stack.enter_context(in_triton(run, watch) if is_lion else in_triton_norm())
            batches = run.train_batches()
            for _ in range(2):  # the first step makes the tables
                tiny.step_once(run, batches)
            # Read before: the loader's own tensors are in host memory, where no read is a wait.
            ready = [next(batches) for _ in range(config.num_microbatches(1))]
            whole, section = Watch(), Watch()
            stack.enter_context(in_triton(run, whole) if is_lion else contextlib.nullcontext())
            with whole.on():
                tiny.step_once(run, iter(ready))
            if is_lion:
                divisor = torch.ones(1, dtype=torch.float64)
                stack.enter_context(in_triton(run, section))
                with section.on():
                    run.optimizer.start_step(divisor=divisor, counts=divisor)
            buckets = sum(len(buffer.buckets) for buffer in run.optimizer.megatron.buffers)
            found[name] = {"waits": whole.waits, "launches": section.launches, "buckets": buckets}
    return found


@INTERPRETED
def test_a_step_waits_once_and_launches_three_kernels(tmp_path: Path) -> None:
    """The one wait is the read of losses and norm, after the launches. The launches do not depend on the tensors' number."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    cases = {"DP2, clipped": RUNS["DP2, clipped"], "adamw": {**RUNS["adamw, clipped"], "optimizer__clip_grad": 0.0}}
    configs = {name: tiny.tiny_config(tmp_path / name, corpus, **changes) for name, changes in cases.items()}
    found = run_distributed(waits_and_launches, 1, configs)[0]
    assert found["DP2, clipped"]["waits"] == found["adamw"]["waits"] == ["tolist"]
    launches, buckets = found["DP2, clipped"]["launches"], found["DP2, clipped"]["buckets"]
    assert launches == ["square_sum_kernel", "scalars_kernel", "lion_kernel"]
    assert len(launches) <= buckets + 2
