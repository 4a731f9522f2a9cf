"""The effect of clipping on the parameters, compared with float64 arithmetic on known gradients.

SGD without momentum moves a parameter of 0 to -η · factor · g, so that the parameter shows the factor. LION's fused step
shows it in the momentum, which is (1 - β2) · factor · g after a step from 0.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import run_distributed

LR, BETA2 = 0.5, 0.95
SGD = {"optimizer__name": "sgd", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0}
FUSED = {"train__precision": "bf16", "optimizer__betas": (0.9, BETA2)}
UNSHARDED = {"parallel__use_distributed_optimizer": False}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP1 unsharded": (1, {**SGD, **UNSHARDED}),
    "DP1 bf16 unsharded": (1, {**SGD, **UNSHARDED, "train__precision": "bf16"}),
    "DP1 fp16": (1, {**SGD, "train__precision": "fp16"}),
    "DP2": (2, SGD),
    "TP2": (2, {**SGD, "parallel__tensor_model_parallel_size": 2}),
    "PP2": (2, {**SGD, "parallel__pipeline_model_parallel_size": 2}),
    "DP1 fused": (1, {**FUSED, "optimizer__master_weights": "fp32"}),
    "DP2 fused": (2, {**FUSED, "optimizer__master_weights": "split32"}),
    "TP2 fused": (2, {**FUSED, "optimizer__master_weights": "split32", "parallel__tensor_model_parallel_size": 2}),
}
# The limit as a multiple of the gradient's norm (of 1 if that is 0), and the factor of the gradient.
CASES = {
    "off": (0.0, 1.0),
    "far below the limit": (3.0, 1.0),
    "at the limit": (1.0, 1.0),
    "above": (0.25, 1.0),
    "far above": (1e-3, 1.0),
    "no gradient": (1.0, 0.0),
    # The norm is about the 1e-6 that is added to it before the division.
    "tiny": (1.0, 2.0**-20),
}


def known_gradient(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Multiples of 2^-10 that every dtype holds, also scaled; equal on ranks that hold copies of one parameter."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(random.integers(-8, 9, tuple(parameter.shape))).to(torch.float32) / 1024


def step_clipped(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """What this rank's slices were and became: run → case → (norm, skipped, limit, [(gradient, after, weights)])."""
    from megatron_lion.optim.parameter_shards import local_shards, named_global_parameters

    found: dict[str, Any] = {}
    for name, config in configs.items():
        with tiny.opened_run(config) as run:
            own = list(local_shards(run.model, run.optimizer))
            total = torch.zeros((), dtype=torch.float64)
            for shard in own:
                gradient = known_gradient(shard.name, shard.parameter).view(-1)
                total += gradient[shard.start : shard.start + shard.main.numel()].double().square().sum()
            torch.distributed.all_reduce(total)
            fused = config.optimizer.name == "lion"
            found[name] = {}
            for case, (ratio, size) in CASES.items():
                limit = ratio * (math.sqrt(total) * size or 1.0)
                scale = float(run.optimizer.scale_loss(torch.ones(()))) * size
                with torch.no_grad():
                    for chunk in run.model:
                        for parameter_name, parameter in named_global_parameters(chunk):
                            parameter.main_grad.copy_(known_gradient(parameter_name, parameter) * scale)
                    for shard in own:
                        (shard.state["exp_avg"] if fused else shard.main).zero_()
                run.optimizer.clip_grad = limit
                run.optimizer.set_lr(LR)
                result = run.optimizer.step()
                slices = []
                for shard in local_shards(run.model, run.optimizer):
                    span = slice(shard.start, shard.start + shard.main.numel())
                    gradient = known_gradient(shard.name, shard.parameter).view(-1)[span] * size
                    after = (shard.state["exp_avg"] if fused else shard.main).detach().clone()
                    slices.append((gradient, after, shard.parameter.detach().view(-1)[span].clone()))
                found[name][case] = result.grad_l2, result.skipped, limit, slices
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run → the results of its ranks."""
    folder = tmp_path_factory.mktemp("clipping")
    corpus = tiny.write_corpus(Path(folder, "corpus"))
    found: dict[str, Any] = {}
    for size in (1, 2):
        configs = {
            name: tiny.tiny_config(folder / name, corpus, **changes)
            for name, (count, changes) in RUNS.items()
            if count == size
        }
        results = run_distributed(step_clipped, size, configs)
        found.update({name: [result[name] for result in results] for name in configs})
    return found


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", list(RUNS))
def test_the_update_is_that_of_the_clipped_gradient(steps: dict[str, Any], name: str, case: str) -> None:
    ranks = [rank[case] for rank in steps[name]]
    slices = [piece for *_, pieces in ranks for piece in pieces]
    gradient = np.concatenate([piece[0].numpy().astype(np.float64) for piece in slices])
    after = np.concatenate([piece[1].numpy().astype(np.float64) for piece in slices])
    norm = np.sqrt(np.square(gradient).sum())
    limit = ranks[0][2]
    assert [rank[2] for rank in ranks] == [limit] * len(ranks)
    assert [rank[1] for rank in ranks] == [False] * len(ranks)
    # Float32 sums of one tensor each, then of the tensors: a few roundings of 2^-24.
    assert [rank[0] for rank in ranks] == pytest.approx([norm] * len(ranks), rel=1e-6, abs=0.0)
    factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    expected = gradient * factor * ((1 - BETA2) if "fused" in name else -LR)
    assert (expected != 0).mean() > 0.9 or case == "no gradient"
    # The norm's error, and one rounding each of the factor, the clipped gradient and its product with the rate.
    assert np.abs(after - expected).max() <= 1.5e-6 * np.abs(expected).max()
    if "fused" not in name:
        for _, main, weights in slices:
            assert torch.equal(main.to(weights.dtype), weights)
