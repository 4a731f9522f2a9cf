"""A fully_reshardable save puts each whole tensor on one rank, with the names, shapes and values of megatron-core's own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from distributed import run_distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PADDED = {"model__hidden_size": 36, "model__vocab_size": 100, "model__make_vocab_size_divisible_by": 4}
CASES = {
    "DP1": (1, {}),
    "DP2": (2, {}),
    "DP2 split32": (
        2, {"train__precision": "bf16", "optimizer__master_weights": "split32"},
    ),
    "DP2 TP2": (4, {"parallel__tensor_model_parallel_size": 2}),
    "DP4 AdamW, several buckets": (4, {"optimizer__name": "adamw", "parallel__overlap_grad_reduce": True, **PADDED}),
}  # fmt: skip
NUMBERS = {"param": 1, "exp_avg": 2, "exp_avg_sq": 3}


def described(item: ShardedTensor) -> tuple[Any, ...]:
    return item.key, tuple(item.global_shape), tuple(item.local_shape), tuple(item.global_offset), item.dtype


def states(rank: int, config: Any, bucket_size: int | None) -> dict[str, Any]:
    """Fills the state with `expected` numbers and returns what this rank would save and load.

    bucket_size: elements at which a bucket ends; None: megatron-core's default, which is larger than these models.
    """
    from megatron_lion.model import build
    from megatron_lion.train.model_state import model_sharded_state

    settings = functools.partial(build.DistributedDataParallelConfig, bucket_size=bucket_size)
    with mock.patch.object(build, "DistributedDataParallelConfig", settings), tiny.opened_run(config) as run:
        wrapper = run.optimizer.megatron
        held: dict[int, int] = {}
        kinds = ("param", *wrapper.optimizer_state_keys)
        number = 0
        for buffer in wrapper.buffers:
            for parameter in buffer.param_index_map:
                if parameter in wrapper.model_param_group_index_map:
                    span = wrapper._get_model_param_range_map(parameter)["param"]
                    held[number] = span.size
                    values = {kind: expected(number, kind, parameter.numel())[span.start : span.end] for kind in kinds}
                    with torch.no_grad():
                        wrapper._set_main_param_and_optimizer_states(parameter, values)
                number += 1
        own = wrapper.sharded_tensors(model_sharded_state(run.model, ""), is_loading=False, layout="fully_reshardable")
        wanted = wrapper.sharded_tensors(
            model_sharded_state(run.model, ""), is_loading=True, layout="fully_reshardable"
        )
        upstream = DistributedOptimizer.sharded_param_state_fully_reshardable(
            wrapper, model_sharded_state(run.model, ""), False, {}
        )
        return {
            "own": {(n, k): (described(i), i.data.flatten().tolist()) for n, s in own.items() for k, i in s.items()},
            "main": all(is_main_replica(item.replica_id) for state in own.values() for item in state.values()),
            "wanted": {(n, k): described(item) for n, state in wanted.items() for k, item in state.items()},
            "upstream": {
                (n, k): (described(i), is_main_replica((*i.replica_id[:-1], 0)))
                for n, s in upstream.items() for k, i in s.items()
            },
            "held": held,
            "dp": parallel_state.get_data_parallel_rank(), "tp": parallel_state.get_tensor_model_parallel_rank(),
            "buckets": sum(len(buffer.buckets) for buffer in wrapper.buffers),
        }  # fmt: skip


def expected(number: int, kind: str, numel: int) -> torch.Tensor:
    """The state of a parameter: the element's index, modulo a prime, and a number of parameter and kind."""
    return torch.arange(numel) % 61 + float(100 * number + 1000 * NUMBERS[kind])


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_is_whole_on_the_rank_with_the_largest_part_of_it(name: str, tmp_path: Path) -> None:
    size, changes = CASES[name]
    corpus = tiny.write_corpus(tmp_path / "corpus", vocab_size=100)
    config = tiny.tiny_config(tmp_path / "run", corpus, **changes)
    results = run_distributed(states, size, config, 2000 if "several" in name else None)
    if "several" in name:
        assert results[0]["buckets"] > 1
    for tp in {result["tp"] for result in results}:
        ranks = sorted((result for result in results if result["tp"] == tp), key=lambda result: result["dp"])
        mains = {at for at, (_, is_main) in ranks[0]["upstream"].items() if is_main}
        owned = [at for result in ranks for at in result["own"]]
        assert sorted(owned) == sorted(mains), "each tensor once"
        for result in ranks:
            assert result["main"]
            assert result["wanted"] == {
                at: described for at, (described, _) in result["upstream"].items() if at[0] in result["held"]
            }
            for (number, kind), (description, values) in result["own"].items():
                assert description == result["upstream"][number, kind][0]
                assert values == expected(number, kind, len(values)).tolist(), (number, kind)
                assert result["held"][number] == max(other["held"].get(number, 0) for other in ranks)
