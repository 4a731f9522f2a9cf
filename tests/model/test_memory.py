"""Computed memory equals what built models and optimizers really allocate, in every mode and at every layout."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.config import ModelConfig, RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.model.sizes import _shards, _Tensor, memory_bytes, process_memory

# Sizes that are no multiples of 64, so that parameters and buckets need padding.
ODD = {
    "model__hidden_size": 36, "model__vocab_size": 101, "model__make_vocab_size_divisible_by": 4, "model__seq_length": 17,
}  # fmt: skip
WHOLE = {"parallel__use_distributed_optimizer": False}
WINDOW = {"probe__every": 4, "probe__num_batches": 2, "probe__mode": "moving"}
MODES: dict[str, dict[str, Any]] = {
    **{
        f"{precision} {name} {'sharded' if sharded else 'whole'}": {
            "train__precision": precision, "optimizer__name": name, "parallel__use_distributed_optimizer": sharded,
        }
        for precision, name, sharded in itertools.product(("fp32", "bf16", "fp16"), ("lion", "sgd", "adamw"), (True, False))
    },
    **{
        f"bf16 {master}/{momentum}": {
            "train__precision": "bf16", "optimizer__master_weights": master, "optimizer__momentum_dtype": momentum,
        }
        for master, momentum in itertools.product(("fp32", "split32", "split24"), ("fp32", "bf16", "int8"))
    },
    **{
        f"bf16 {name}, bf16 gradients": {
            "train__precision": "bf16", "optimizer__name": name, "train__accumulate_allreduce_grads_in_fp32": False,
        }
        for name in ("lion", "adamw")
    },
}  # fmt: skip
FEW = ("bf16 split24/int8", "bf16 adamw sharded", "fp32 sgd whole")


def settings(layout: str, mode: str, **changes: Any) -> tuple[int, RunConfig]:
    size, parallel = tiny.LAYOUTS[layout]
    config = tiny.tiny_config("unused", "unused", **{**ODD, **parallel, **MODES[mode], **changes})
    check_config(config, size)
    return size, config


def allocated(rank: int, configs: dict[str, RunConfig]) -> dict[str, Any]:
    """Work of one process: builds each model and optimizer; returns its ranks and the bytes of the tensors they hold."""
    from megatron_lion.device import select_device
    from megatron_lion.gradient.moving import MovingWindow
    from megatron_lion.model.build import build_model
    from megatron_lion.optim.train_optimizer import build_optimizer
    from megatron_lion.parallel import process_groups

    def bytes_of(tensors: Any, known: set[int]) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        new = {address: storage.nbytes() for address, storage in storages.items() if address not in known}
        known.update(new)
        return sum(new.values())

    device, found = select_device("cpu"), {}
    for name, config in configs.items():
        parallel, known = config.parallel, {0}  # address 0: a tensor without elements
        layout = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        with process_groups(
            device, tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1]
        ) as ranks:
            model = build_model(config, device, config.model.vocab_size or 0)
            optimizer = build_optimizer(config.optimizer, model, precision=config.train.precision)
            parameters = list(model[0].parameters())
            memory = {
                "parameters": bytes_of(parameters, known),
                "gradients": bytes_of([parameter.main_grad for parameter in parameters], known),
            }
            inner = optimizer.inner
            state = [tensor for entry in inner.state.values() for tensor in entry.values()]
            masters = [tensor for group in inner.param_groups for tensor in group["params"]]
            memory["optimizer"] = bytes_of([*state, *masters], known)
            if config.probe.every:
                window = MovingWindow(config, model, optimizer, ranks, config.model.vocab_size or 0)
                window.add()
                memory["probe"] = bytes_of(window._sums, known)
            found[name] = ((ranks.tp_rank, ranks.pp_rank, ranks.dp_rank), memory)
    return found


def assert_as_computed(jobs: dict[str, tuple[int, RunConfig]]) -> None:
    for size in sorted({size for size, _ in jobs.values()}):
        configs = {name: config for name, (count, config) in jobs.items() if count == size}
        found = run_distributed(allocated, size, configs)
        for name, config in configs.items():
            totals = []
            for tensor_rank, stage, data_rank in (ranks := [of_rank[name][0] for of_rank in found]):
                (computed,) = process_memory(config, size, stage=stage, tensor_rank=tensor_rank, data_ranks=[data_rank])
                activations = computed.pop("activations")
                measured = found[ranks.index((tensor_rank, stage, data_rank))][name][1]
                assert computed == measured, (name, tensor_rank, stage, data_rank)
                totals.append(sum(measured.values()) + activations)
            assert sum(memory_bytes(config, size).values()) == max(totals), name


def test_every_mode_on_one_process() -> None:
    jobs = {mode: settings("DP1", mode) for mode in MODES}
    jobs["bert"] = settings("DP1", "bf16 adamw sharded", model__kind="bert", **WINDOW)
    jobs["window"] = settings("DP1", "fp32 sgd whole", **WINDOW)
    assert_as_computed(jobs)


def test_layouts() -> None:
    jobs = {f"{layout} {mode}": settings(layout, mode) for layout in ("DP2", "TP2", "PP2") for mode in FEW}
    jobs |= {f"{layout} window": settings(layout, FEW[0], **WINDOW) for layout in ("DP2", "TP2", "PP2")}
    jobs["DP2 whole window"] = settings("DP2", "bf16 sgd whole", **WINDOW)
    jobs |= {f"{layout} bert": settings(layout, FEW[1], model__kind="bert") for layout in ("TP2", "PP2")}
    assert_as_computed(jobs)


@pytest.mark.slow
def test_layouts_of_four_processes() -> None:
    modes = (*FEW, "bf16 split32/bf16", "fp16 lion whole")
    jobs = {f"{layout} {mode}": settings(layout, mode) for layout in ("DP4", "TP2xDP2", "TP2xPP2") for mode in modes}
    pipeline = {"parallel__tensor_model_parallel_size": 1, "parallel__pipeline_model_parallel_size": 4}
    for kind in ("gpt2", "bert"):
        jobs[f"PP4 {kind}"] = settings("TP2xPP2", FEW[0], model__num_layers=4, model__kind=kind, **pipeline, **WINDOW)
        jobs[f"TP2xPP2 {kind}"] = settings("TP2xPP2", FEW[1], model__kind=kind, **WINDOW)
    assert_as_computed(jobs)


def test_buckets_are_those_of_megatron() -> None:
    """Buckets of more than 40 million elements are too large to build here; upstream lays out tensors without memory."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for seed in range(40):
        dice = random.Random(seed)
        tensors = [_Tensor(dice.randint(1, 900), is_shared=dice.random() < 0.15) for _ in range(dice.randint(1, 25))]
        params = [torch.nn.Parameter(torch.empty(tensor.numel, device="meta")) for tensor in tensors]
        for tensor, param in zip(tensors, params, strict=True):
            param.shared_embedding = tensor.is_shared
        bucket_size, ranks = dice.choice([None, 300, 2000]), dice.choice([1, 2, 3, 8, 60])
        layout = DistributedOptimizer._compute_per_buffer_param_layout(
            params, bucket_size, ranks, SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
        )
        buffer, pieces = _shards(tensors, bucket_size, ranks)
        assert buffer == layout.bucket_indices[-1][1]
        shares = [(end - begin) // ranks for begin, end in layout.bucket_indices]
        owners = [rank for share in shares for rank in range(ranks) for _ in range(share)]
        for rank in range(ranks):
            expected = [
                (tensor, owned)
                for tensor, param in zip(tensors, params, strict=True)
                if (owned := owners[slice(*layout.param_index_map[param][:2])].count(rank))
            ]
            assert sorted(pieces[rank], key=repr) == sorted(expected, key=repr), seed


def test_activations_follow_the_layout() -> None:
    def activations(**changes: Any) -> int:
        config = tiny.tiny_config("unused", "unused", **{**MODES["bf16 lion sharded"], **changes})
        size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
        return memory_bytes(config, size)["activations"]

    whole = activations()
    batch, length, hidden, rows, layers = 1, 16, 32, 128, 2
    assert whole == layers * 34 * batch * length * hidden + 6 * batch * length * rows
    assert activations(train__precision="fp32") == 2 * layers * 34 * length * hidden + 4 * length * rows
    split = activations(parallel__tensor_model_parallel_size=2)
    assert split == layers * 22 * length * hidden + 3 * length * rows
    sequence = activations(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
    assert sequence == layers * 17 * length * hidden + 3 * length * rows
    assert activations(model__recompute=True) == (layers * 2 + 34) * length * hidden + 6 * length * rows


def test_paper_model_in_every_mode() -> None:
    """124,475,904 parameters on one process; every size is a multiple of 128 but the buffer, so nothing is padded."""
    d = 124_475_904
    states = {"shards/fp32": 8, "fp32/bf16": 6, "split32/fp32": 6, "split32/bf16": 4, "split24/int8": 1 + 34 / 32}
    for mode, width in states.items():
        master, momentum = mode.split("/")
        changes = {
            "optimizer__master_weights": master,
            "optimizer__momentum_dtype": momentum,
            "train__precision": "bf16",
        }
        config = tiny.tiny_config("unused", "unused", **changes)
        memory = memory_bytes(RunConfig(model=ModelConfig(), optimizer=config.optimizer, train=config.train), 1)
        assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (2 * d, 4 * d, width * d)


@pytest.mark.slow
def test_activations_are_near_what_a_forward_pass_stores(tmp_path: Path) -> None:
    """A tiny model with dropout in float32 on a CPU; the estimate covers models of any size."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = tiny.tiny_config(
        tmp_path / "run", corpus, model__num_layers=4, model__hidden_size=128, model__seq_length=64,
        model__hidden_dropout=0.1, train__micro_batch_size=4,
    )  # fmt: skip
    assert run_distributed(stored_for_backward, 1, config)[0] == pytest.approx(
        memory_bytes(config, 1)["activations"], rel=0.3
    )


def stored_for_backward(rank: int, config: RunConfig) -> int:
    """Returns the bytes that autograd stores in the forward pass of a micro-batch, without the parameters."""
    import torch

    with tiny.opened_run(config) as run:
        known = {parameter.untyped_storage().data_ptr() for parameter in run.model[0].parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, loss = run.objective.forward_step(run.train_batches(), run.model[0])
            loss(output)
        return sum(storage.nbytes() for storage in kept.values())
