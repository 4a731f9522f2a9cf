"""What a GPT-2 layer moves and launches between its matrix products and its attention core."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from counted_bytes import CountedBytes, counted_kernels
from distributed import run_distributed

TOKENS, WIDTH = 64, 256
UNIT = 2 * TOKENS * WIDTH  # bytes of a bf16 tensor of the residual stream
WEIGHTS = 12 * WIDTH * WIDTH
ATTENTION = "_scaled_dot_product"
SIZES = {
    "model__hidden_size": WIDTH, "model__num_attention_heads": 4, "model__seq_length": 32, "model__vocab_size": 64,
    "model__hidden_dropout": 0.0, "model__attention_dropout": 0.0, "train__precision": "bf16", "train__micro_batch_size": 2,
}  # fmt: skip


def measured(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Runs a forward and a backward pass of each config's model."""
    from megatron_lion.device import select_device
    from megatron_lion.model.build import build_model
    from megatron_lion.parallel import process_groups

    found = {}
    device = select_device("cpu")
    for name, config in configs.items():
        with process_groups(device, tensor_model_parallel_size=1, pipeline_model_parallel_size=1):
            (model,) = build_model(config, device, config.model.vocab_size)
            tokens = torch.arange(TOKENS).view(2, 32)
            with CountedBytes(UNIT // 2) as counted, counted_kernels(counted) as kernels:
                model(tokens, torch.arange(32).expand(2, -1), None, labels=tokens).sum().backward()
            moved = {key: value for key, value in counted.bytes.items() if ATTENTION not in key}
            found[name] = (Counter(moved), Counter(kernels), counted.launches)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    configs = {
        f"{kind} {layers}": tiny.tiny_config(
            folder / "run", "unused", model__elementwise=kind, model__loss=kind, model__num_layers=layers, **SIZES
        )
        for kind in ("fused", "megatron")
        for layers in (1, 2)
    }  # fmt: skip
    measurements: dict[str, Any] = run_distributed(measured, 1, configs)[0]
    result = {}
    for kind in ("fused", "megatron"):
        # Two layers less one: what is outside of the layers drops out.
        one, two = (measurements[f"{kind} {layers}"] for layers in (1, 2))
        result[kind] = [two[index] - one[index] for index in range(3)]
    # Launches of embeddings, final norm, loss and the rest.
    result["outside"] = {
        kind: sum(measurements[f"{kind} 1"][2].values()) - sum(result[kind][2].values())
        for kind in ("fused", "megatron")
    }
    return result


def test_megatron_cores_operations_pass_75_times_over_the_residual_stream(found: dict[str, Any]) -> None:
    """Unfused, as they run on a CPU; the counter does not see the list that `cat` reads, 3 of 6."""
    moved, kernels, launches = found["megatron"]
    gradients = {name: moved.pop(name) / UNIT for name in ("add_",)}
    assert {name: value / UNIT for name, value in moved.items()} == {
        "add": 30, "native_layer_norm": 4, "native_layer_norm_backward": 6, "gelu": 8, "gelu_backward": 12, "sum": 9, "cat": 3,
    }  # fmt: skip
    assert gradients["add_"] == WEIGHTS * (2 + 4 + 4) / UNIT, "DDP: reads bf16, reads and writes fp32"
    assert sum(launches.values()) == 45
    assert not kernels


def test_the_kernels_pass_48_times(found: dict[str, Any]) -> None:
    moved, kernels, launches = found["fused"]
    assert moved.keys() == {"add_"}, "no operation of torch on a tensor of this size, but DDP's on weight gradients"
    # LayerNorm 2 forward and 3 + 1 backward, twice; GELU 8 and 12; the residual sums 3 and 1, twice; query, key and value 6.
    passes = 2 * (2 + 4) + 8 + 12 + 2 * (3 + 1) + 6
    assert passes == 46
    # 13 bias and gain gradients of this width: 32 rows make one row of partial sums in fp32, written and read.
    partial = 13 * 2 * 4 / (2 * 32)
    # Vectors: statistics, parameters, and the gradient buffers. There are few tokens here; for 1,024 it is 0.1.
    assert passes + partial <= kernels["distinct"] / UNIT <= passes + partial + 1.5
    # Parameters are read again by each program; they come from the cache.
    assert (kernels["load"] + kernels["store"] - kernels["distinct"]) / UNIT <= 2.2
    assert sum(launches.values()) == 35


def test_gpt2_small_moves_900_mb_for_1024_tokens() -> None:
    """The passes above, for 12 layers of 768 columns; 75 passes were 1,416 MB."""
    unit = 2 * 1024 * 768 / 1e6
    assert 12 * 75 * unit == pytest.approx(1416, abs=1)
    assert 12 * (46 + 13 / 8) * unit == pytest.approx(899, abs=1)
    assert 12 * (46 + 13 / 16) * unit == pytest.approx(883, abs=1), "with 64 rows a program, from 8,192 tokens"


def test_a_whole_model_launches_fewer_kernels(found: dict[str, Any]) -> None:
    """GPT-2 Small's 12 layers, and what is outside of them, with the loss that goes with it."""
    launches = {kind: outside + 12 * sum(found[kind][2].values()) for kind, outside in found["outside"].items()}
    assert launches["fused"] <= 461
    assert launches["megatron"] >= 590
