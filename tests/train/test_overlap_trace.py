"""The order of events in a traced step: what the overlap flags launch during the passes, and what waits for their end."""

from __future__ import annotations

import functools
import itertools
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from distributed import run_distributed

SETTINGS = {"model__num_layers": 4, "train__global_batch_size": 4}  # two micro-batches on each of two processes
REDUCE, OVERLAPPED = {"parallel__overlap_grad_reduce": True}, {"parallel__overlap_param_gather": True}
FLAGS: dict[str, dict[str, Any]] = {"none": {}, "reduce": REDUCE, "both": {**REDUCE, **OVERLAPPED}}
BACKWARD = "autograd::engine::evaluate_function: "


def mark(name: str, *unused: Any) -> None:
    """Leaves an event in the trace."""
    with torch.profiler.record_function(name):
        pass


def traced(rank: int, configs: dict[str, Any]) -> dict[str, tuple[int, list[str]]]:
    """Number of buckets, and the names of two consecutive steps' events in the order of their starts."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from torch.profiler import ProfilerActivity, profile

    # megatron-core's own buckets have at least 40 million elements; this one ends after each layer's 12,704.
    small = functools.partial(DistributedDataParallelConfig, bucket_size=12_000)
    found = {}
    for name, config in configs.items():
        with patch("megatron_lion.model.build.DistributedDataParallelConfig", small), tiny.opened_run(config) as run:
            (chunk,) = run.model
            batches = run.train_batches()
            tiny.step_once(run, batches)
            for path, module in chunk.named_modules():
                if path.endswith("embedding.word_embeddings") or path.split(".")[-2:-1] == ["layers"]:
                    # In front of DDP's own hook, which may launch a collective.
                    module.register_forward_pre_hook(
                        functools.partial(mark, f"begin {path.split('.')[-1]}"), prepend=True
                    )
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                for _ in range(2):
                    mark("step")
                    tiny.step_once(run, batches)
            events = sorted(trace.events(), key=lambda event: event.time_range.start)
            kept = [event.name for event in events if event.name.startswith(("c10d::", "begin ", "step", BACKWARD))]
            found[name] = (sum(len(group.buckets) for group in chunk.bucket_groups), kept)
    return found


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    folder = tmp_path_factory.mktemp("overlap")
    corpus = tiny.write_corpus(folder / "corpus")
    configs = {name: tiny.tiny_config(folder / name, corpus, **SETTINGS, **flags) for name, flags in FLAGS.items()}
    found: dict[str, tuple[int, list[str]]] = run_distributed(traced, 2, configs)[0]
    return found


def places(names: list[str], part: str) -> list[int]:
    return [place for place, name in enumerate(names) if part in name]


def second_step(names: list[str]) -> int:
    """The place at which the second step begins."""
    return places(names, "step")[1]


def test_a_bucket_is_reduced_as_soon_as_its_gradients_are_complete(traces: Any) -> None:
    buckets, names = traces["reduce"]
    assert buckets == 5
    step = names[second_step(names) :]
    last, reductions = places(step, BACKWARD)[-1], places(step, "reduce_scatter")
    assert len(reductions) == buckets
    assert [place < last for place in reductions] == [True, True, True, True, False]
    # Each waits for the backward operations of its own layer, not for those of a later bucket.
    between = [len(places(step[a:b], BACKWARD)) for a, b in itertools.pairwise(reductions)]
    assert all(count > 5 for count in between)


def test_without_the_flag_the_reduction_follows_the_last_backward_operation(traces: Any) -> None:
    buckets, names = traces["none"]
    assert buckets == 1
    step = names[second_step(names) :]
    assert places(step, "reduce_scatter")[0] > places(step, BACKWARD)[-1]


def test_later_buckets_are_gathered_from_inside_the_forward_pass(traces: Any) -> None:
    buckets, names = traces["both"]
    assert len(places(names[: second_step(names)], "allgather")) == buckets, "the first step's own, in its forward pass"
    step = names[second_step(names) :]
    gathers, begins = (
        places(step, "allgather"),
        [places(step, f"begin {name}")[0] for name in ("word_embeddings", 0, 1, 2, 3)],
    )
    assert len(gathers) == buckets
    # The first module waits for its own bucket and launches the next one; each layer launches the bucket after its own.
    assert gathers[0] > begins[0]
    assert gathers[-1] < begins[-1]
    assert [len(places(step[a:b], "allgather")) for a, b in itertools.pairwise(begins)] == [2, 1, 1, 1]


def test_without_the_flag_all_parameters_are_gathered_before_the_next_forward_pass(traces: Any) -> None:
    for name, expected in (("none", 1), ("reduce", 5)):
        _, names = traces[name]
        first, second = names[: second_step(names)], names[second_step(names) :]
        assert len(places(first, "allgather")) == expected
        assert places(first, "allgather")[0] > places(first, "reduce_scatter")[-1]
        assert places(second, "allgather")[0] > places(second, "begin 3")[-1], "none in the forward pass"


def test_gpt2_small_has_three_buckets_of_which_two_can_overlap() -> None:
    """At DP 16, as docs/performance.md counts them; megatron-core lays the parameters out from the last to the first."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    norm, attention = [(768,), (768,)], [(768, 768), (768,), (2304, 768), (2304,)]
    mlp = [(3072, 768), (3072,), (768, 3072), (768,)]
    shapes = [(50304, 768), (1024, 768), *[*norm, *attention, *norm, *mlp] * 12, *norm]
    params = [torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16)) for shape in shapes]
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    layout = DistributedOptimizer.compute_full_param_layout(params, max(40_000_000, 1_000_000 * 16), 16, settings)
    (buffer,) = layout.layouts.values()
    sizes = [round((end - start) / 1e6, 1) for start, end in buffer.bucket_indices]
    assert sizes == [40.2, 40.2, 44.1], "5.7 layers each; the rest with the embeddings, whose gradient is complete last"
