"""Gradient buffers in bf16: every optimizer steps, clips, skips, saves and resumes with them; a probe does not use them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from distributed import run_distributed

from megatron_lion.config import ParallelConfig
from megatron_lion.config_checks import check_config
from megatron_lion.errors import ConfigError

KEY = "train.accumulate_allreduce_grads_in_fp32"
BF16 = {"train__precision": "bf16", "train__accumulate_allreduce_grads_in_fp32": False, "train__micro_batch_size": 2}
SHARDS = {"optimizer__master_weights": "shards"}
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion split32": {"optimizer__master_weights": "split32"},
    "lion shards": {**SHARDS, "checkpoint__layout": "dp_reshardable"},
    "sgd": {"optimizer__name": "sgd", "optimizer__lr": 0.1},
    "adamw": {"optimizer__name": "adamw"},
    "adamw whole": {"optimizer__name": "adamw", "parallel__use_distributed_optimizer": False},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (1, changes) for name, changes in OPTIMIZERS.items()},
    "lion split32 DP2": (2, {**OVERLAP, "optimizer__master_weights": "split32"}),
    "sgd TP2": (2, {**OPTIMIZERS["sgd"], "parallel__tensor_model_parallel_size": 2}),
}


def trained(rank: int, jobs: dict[str, list[Any]]) -> dict[str, Any]:
    """Trains each run with its configs one after the other."""
    return {name: [tiny.train(config) for config in configs][-1] for name, configs in jobs.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Each run whole, in two halves, and with fp32 buffers."""
    folder = tmp_path_factory.mktemp("bf16")
    corpus = tiny.write_corpus(folder / "corpus")
    found: dict[str, Any] = {}
    for size in (1, 2):
        jobs: dict[str, list[Any]] = {}
        for name, (count, changes) in LAYOUTS.items():
            if count == size:

                def config(kind: str, name: str = name, changes: dict[str, Any] = changes, **more: Any) -> Any:
                    return tiny.tiny_config(folder / f"{name} {kind}", corpus, **{**BF16, **changes, **more})

                jobs[f"{name} whole"] = [config("whole")]
                jobs[f"{name} halves"] = [config("halves", train__stop_after=3), config("halves")]
                jobs[f"{name} fp32"] = [config("fp32", train__accumulate_allreduce_grads_in_fp32=True)]
        found |= run_distributed(trained, size, jobs)[0]
    return folder, corpus, found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_resumed_run_has_the_bits_of_the_whole_one(runs: Any, name: str) -> None:
    _, _, found = runs
    whole, halves, exact = (found[f"{name} {kind}"] for kind in ("whole", "halves", "fp32"))
    assert halves["losses"] == whole["losses"]
    assert halves["norms"] == whole["norms"]
    for key in ("state_fingerprint", "weights_fingerprint"):
        assert halves["manifest"][key] == whole["manifest"][key]
    assert whole["manifest"]["state_fingerprint"] != exact["manifest"]["state_fingerprint"]
    assert whole["losses"] == pytest.approx(exact["losses"], rel=2e-3)
    assert whole["norms"] == pytest.approx(exact["norms"], rel=1e-2)


def errors(rank: int, config: Any) -> tuple[str, str]:
    return tiny.error_of(tiny.train, config)


@pytest.mark.slow
def test_a_run_keeps_its_buffers(runs: Any) -> None:
    folder, corpus, _ = runs
    config = tiny.tiny_config(folder / "sgd whole", corpus, **{**BF16, **OPTIMIZERS["sgd"]})
    train = dataclasses.replace(config.train, accumulate_allreduce_grads_in_fp32=True)
    ((kind, message),) = run_distributed(errors, 1, dataclasses.replace(config, train=train))
    assert kind == "CheckpointError"
    assert f"({KEY}: False, now True)" in message


LR = (0.125, 16.0)
"""Of a sign, and of a clipped gradient, so that bf16 weights around 1 show the steps."""


def stepped(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Steps on known gradients: in torch, in Triton with a divisor, and with one infinity."""
    from megatron_lion.optim import distributed_optimizer

    found = {}
    for name, config in configs.items():
        for way in ("torch", "triton") if name == "lion split32" else ("torch",):
            with tiny.opened_run(config) as run, contextlib.ExitStack() as stack:
                if way == "triton":
                    stack.enter_context(patch.object(distributed_optimizer, "runs_in_triton", lambda device: True))
                    run.optimizer.inner.implementation = "triton"
                (chunk,), optimizer = run.model, run.optimizer
                generator = torch.Generator().manual_seed(0)
                weights = {key: value.detach().double().clone() for key, value in chunk.named_parameters()}
                count = 8.0 if way == "triton" else 1.0
                total = 0.0
                for parameter in chunk.parameters():
                    grad = torch.randn(parameter.shape, generator=generator).bfloat16()
                    parameter.main_grad.copy_(grad)
                    total += float((grad.double() / count).square().sum())
                optimizer.set_lr(LR[name == "sgd"])
                divisor = torch.tensor([count], dtype=torch.float64) if way == "triton" else None
                assert optimizer.divides_by_count is (way == "triton")
                norm = float(optimizer.start_step(divisor=divisor))
                skipped = [optimizer.end_step(norm).skipped]
                moved = {
                    key: ((value.detach().double() - weights[key]), parameter_grad.double() / count)
                    for (key, value), parameter_grad in zip(
                        chunk.named_parameters(), [p.main_grad.clone() for p in chunk.parameters()], strict=True
                    )
                }
                weights = {key: value.detach().clone() for key, value in chunk.named_parameters()}
                next(chunk.parameters()).main_grad.view(-1)[3] = math.inf
                skipped.append(optimizer.end_step(float(optimizer.start_step(divisor=divisor))).skipped)
                same = all(torch.equal(weights[key], value) for key, value in chunk.named_parameters())
                dtypes = {buffer.grad_data.dtype for buffer in chunk.buffers}
                found[name, way] = {"norm": norm, "exact": math.sqrt(total), "skipped": skipped, "same": same, "moved": moved,
                                    "dtypes": dtypes}  # fmt: skip
    return found


def test_the_norm_the_clipping_and_the_gate_read_bf16(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    plain = {"optimizer__weight_decay": 0.0, "optimizer__clip_grad": 1.0, "optimizer__momentum": 0.0}
    configs = {
        name: tiny.tiny_config(tmp_path, corpus, **{**BF16, **changes, **plain}) for name, changes in OPTIMIZERS.items()
    }
    found = run_distributed(stepped, 1, configs)[0]
    assert len(found) == len(OPTIMIZERS) + 1
    for (name, _), step in found.items():
        assert step["dtypes"] == {torch.bfloat16}
        assert step["norm"] == pytest.approx(step["exact"], rel=1e-6)
        assert step["skipped"] == [False, True]
        assert step["same"] is True
        for key, (moved, grad) in step["moved"].items():
            # SGD's first step is the clipped gradient; LION's and AdamW's have its sign. bf16 weights round either.
            wanted = -LR[name == "sgd"] * (grad / step["norm"] if name == "sgd" else grad.sign())
            assert torch.allclose(moved, wanted, rtol=1e-2, atol=1e-2), (name, key)


def probed(rank: int, run_dir: Path) -> tuple[set[Any], dict[str, Any]]:
    """The dtypes of a probe's buffers, and the result at the last checkpoint."""
    from megatron_lion.train import probe_checkpoints as module

    dtypes: set[Any] = set()
    plain = module.build_run

    def watched(*args: Any, **options: Any) -> Any:
        run = plain(*args, **options)
        dtypes.update(buffer.grad_data.dtype for chunk in run.model for buffer in chunk.buffers)
        return run

    config = module.probe_config(run_dir, probe={"num_batches": 2}, parallel=ParallelConfig(), device="cpu")
    with patch.object(module, "build_run", watched):
        (step,) = module.probe_checkpoints(config, [5])
    return dtypes, step.content


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion split32", "lion shards"])
def test_a_probe_of_the_checkpoints_sums_in_fp32(runs: Any, name: str) -> None:
    folder, _, found = runs
    ((dtypes, content),) = run_distributed(probed, 1, folder / f"{name} whole")
    assert dtypes == {torch.float32}
    # dp_reshardable state fits the run's own buffers only.
    assert content["theta"] == ("master weights" if name == "lion split32" else "the model's own weights")
    assert content["all"]["grad_l2"] == pytest.approx(found[f"{name} whole"]["norms"][-1], rel=0.5)


def test_it_needs_bf16_and_no_probe(tmp_path: Path) -> None:
    for changes, message in (
        ({"train__precision": "fp16"}, f"{KEY}: false needs train.precision bf16; use true"),
        (
            {"probe__every": 2},
            f"{KEY}: false rounds the sums that a probe reads; set probe.every 0, and run `megatron-lion",
        ),
    ):
        with pytest.raises(ConfigError) as found:
            check_config(tiny.tiny_config(tmp_path, "none", **{**BF16, **changes}), 1)
        assert str(found.value).startswith(message)
    check_config(tiny.tiny_config(tmp_path, "none", **BF16), 1)
