"""The network: attention against megatron-core's own, parameter counts, initial weights, streams of randomness."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_lion.model.sizes import flops_per_token, memory_bytes, model_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    return tmp_path_factory.mktemp(f"model-{device}")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


def both_attentions(rank: int, config: Any) -> dict[str, Any]:
    """Compares outputs and gradients of our attention core and megatron-core's, causal and with a padding mask."""
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lion.model.attention import SdpaAttention

    found: dict[str, Any] = {}
    with tiny.opened_run(config) as run:
        settings = run.model[0].config
        sequence, batch, heads, channels = 12, 3, settings.num_attention_heads, settings.kv_channels
        generator, where = torch.Generator().manual_seed(0), run.device.torch_device
        padding_B11S = torch.zeros(batch, 1, 1, sequence, dtype=torch.bool)
        padding_B11S[1, ..., 7:] = padding_B11S[2, ..., 3:] = True
        causal_11SS = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)[None, None]
        for name, kind, mask, theirs in [
            ("causal", AttnMaskType.causal, None, causal_11SS),
            ("padding", AttnMaskType.padding, padding_B11S, padding_B11S.expand(batch, 1, sequence, sequence)),
        ]:
            draw = [torch.randn(sequence, batch, heads, channels, generator=generator).to(where) for _ in range(3)]
            upstream = torch.randn(sequence, batch, heads * channels, generator=generator).to(where)
            results = []
            for core, used in ((SdpaAttention, mask), (DotProductAttention, theirs)):
                attention = core(config=settings, layer_number=1, attn_mask_type=kind, attention_type="self")
                inputs = [tensor.clone().requires_grad_() for tensor in draw]
                output = attention(*inputs, None if used is None else used.to(where), attn_mask_type=kind)
                output.backward(upstream)
                results.append([output.detach(), *(tensor.grad for tensor in inputs)])
            found[name] = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
        for wrong in ({"attention_type": "cross"}, {"attention_type": "self", "attention_bias": 1}):
            bias = wrong.pop("attention_bias", None)
            try:
                attention = SdpaAttention(config=settings, layer_number=1, attn_mask_type=AttnMaskType.causal, **wrong)
                attention(*draw, None, attention_bias=bias)
                found[f"refused {wrong}{bias}"] = False
            except ValueError:
                found[f"refused {wrong}{bias}"] = True
    return found


def test_attention_equals_megatrons(folder: Path, corpus: str, device: str) -> None:
    config = tiny.tiny_config(folder / "attention", corpus, device=device)
    found = run_distributed(both_attentions, 1, config, device=device)[0]
    # Softmax and two products in fp32 over 12 positions: a few roundings of 2^-24 = 6e-8 on numbers of order 1. CUDA's
    # memory-efficient attention multiplies fp32 numbers as sums of TF32 parts, exact to about 2^-21: eight times more.
    assert max(found["causal"] + found["padding"]) < (3e-6 if device == "cpu" else 2.4e-5)
    assert all(value is True for name, value in found.items() if name.startswith("refused"))


def kernel_orders(rank: int, configs: dict[str, Any]) -> dict[str, list[int]]:
    """The order of attention kernels in which torch would choose, for each config, inside of the model's attention."""
    from unittest.mock import patch

    import torch
    from torch.nn import functional as F

    found = {}
    attend = F.scaled_dot_product_attention
    for name, config in configs.items():
        orders = []

        def recorded(*args: Any, orders: list[Any] = orders, **options: Any) -> torch.Tensor:
            orders.append(torch._C._get_sdp_priority_order())
            return attend(*args, **options)

        with patch.object(F, "scaled_dot_product_attention", recorded):
            tiny.train_each(rank, {name: config})
        assert all(order == orders[0] for order in orders)
        found[name] = orders[0]
    return found


def test_cudnns_attention_is_preferred_if_it_is_asked_for(folder: Path, corpus: str) -> None:
    from torch.nn.attention import SDPBackend

    configs = {
        name: tiny.tiny_config(folder / f"order {name}", corpus, train__steps=1, **changes)
        for name, changes in {
            "cudnn": {"model__attention": "cudnn"},
            "sdpa": {"model__attention": "sdpa"},
        }.items()
    }  # fmt: skip
    found = run_distributed(kernel_orders, 1, configs)[0]
    assert found["cudnn"][0] == SDPBackend.CUDNN_ATTENTION.value
    assert found["sdpa"][0] != SDPBackend.CUDNN_ATTENTION.value


def both_losses(rank: int, configs: dict[str, Any]) -> dict[str, list[float]]:
    return {name: result["losses"] + result["norms"] for name, result in tiny.train_each(rank, configs).items()}


def test_attention_and_recomputation_are_a_matter_of_speed(folder: Path, corpus: str, device: str) -> None:
    variants: dict[str, dict[str, Any]] = {
        "sdpa": {"model__attention": "sdpa"},
        "cudnn": {"model__attention": "cudnn"},
        "unfused": {"model__attention": "unfused"},
        "recompute": {"model__recompute": True, "model__hidden_dropout": 0.1, "model__attention_dropout": 0.1},
        "dropout": {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1},
    }
    configs = {
        name: tiny.tiny_config(folder / name, corpus, device=device, train__steps=2, **changes)
        for name, changes in variants.items()
    }
    found = run_distributed(both_losses, 1, configs, device=device)[0]
    # On CUDA, attention is exact to 2^-21 instead of 2^-24 (see above). The fusions of a first pass without gradients
    # and of one with gradients are compiled separately and may round differently; another dropout shows as 1e-2.
    unfused, again = (2e-6, 0.0) if device == "cpu" else (1.6e-5, 2e-6)
    assert found["unfused"] == pytest.approx(found["sdpa"], rel=unfused)
    # On a CPU there is no kernel of cuDNN, so torch takes the next one.
    assert found["cudnn"] == pytest.approx(found["sdpa"], rel=0.0 if device == "cpu" else 1.6e-5, abs=0.0)
    assert found["recompute"] == pytest.approx(found["dropout"], rel=again, abs=0.0), "dropout is drawn again"
    assert found["dropout"] != found["sdpa"]


def shapes_and_numbers(rank: int, config: Any) -> dict[str, Any]:
    import torch

    from megatron_lion.optim.parameter_shards import named_global_parameters

    with tiny.opened_run(config) as run:
        found = {
            name: (
                tuple(p.shape),
                float(p.double().mean()),
                float(p.double().std()) if p.numel() > 1 else 0.0,
                p.detach().clone(),
            )
            for chunk in run.model
            for name, p in named_global_parameters(chunk)
        }
        assert all(isinstance(item[3], torch.Tensor) for item in found.values())
    return found


def test_parameter_counts_and_initial_weights(folder: Path, corpus: str, device: str) -> None:
    config = tiny.tiny_config(folder / "weights", corpus, device=device, model__hidden_size=64)
    deeper = tiny.tiny_config(folder / "deeper", corpus, device=device, model__hidden_size=64, model__num_layers=3)
    found, more = (run_distributed(shapes_and_numbers, 1, item, device=device)[0] for item in (config, deeper))
    assert sum(math.prod(shape) for shape, *_ in found.values()) == model_size(config.model, tiny.VOCAB).num_parameters
    std = config.model.init_method_std
    for name, (shape, mean, spread, tensor) in found.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif len(shape) == 1:
            assert (tensor == 1).all(), name
        else:
            expected = std / math.sqrt(2 * 2) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else std
            # 5 standard errors of the mean and of the standard deviation of N numbers.
            assert abs(mean) < 5 * expected / math.sqrt(tensor.numel()), name
            assert abs(spread / expected - 1) < 5 / math.sqrt(2 * tensor.numel()), name
    matrices = [item[3] for item in found.values() if len(item[0]) > 1]
    starts = {
        tuple(round(float(value) / float(tensor.std()), 3) for value in tensor.flatten()[:4]) for tensor in matrices
    }
    assert len(starts) == len(matrices), "each tensor has its own random stream"
    same = [name for name in found if (name in more and "layers" not in name) or "linear_qkv" in name]
    assert all(tiny.same_bits(found[name][3], more[name][3]) for name in same), "adding a layer changes no other"


def test_sizes_of_the_papers_models() -> None:
    """GPT-2 124M and 350M with 50,257 ids padded to 50,304 rows."""
    small, medium = ModelConfig(), ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16)
    assert model_size(small).num_parameters == 124_475_904
    assert model_size(small).num_parameters_unpadded == 124_439_808
    assert model_size(medium).num_parameters == 354_871_296
    assert flops_per_token(small) == pytest.approx(6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024)


def test_memory_follows_the_layout() -> None:
    bf16 = TrainConfig(precision="bf16", micro_batch_size=8)
    run = RunConfig(train=bf16, optimizer=OptimizerConfig(name="lion", master_weights="shards"))
    one, sixteen = memory_bytes(run, 1), memory_bytes(run, 16)
    d = 124_475_904
    assert (one["parameters"], one["gradients"], one["optimizer"]) == (2 * d, 4 * d, 8 * d)
    assert sixteen["optimizer"] == 8 * d // 16
    fused = RunConfig(train=bf16, optimizer=OptimizerConfig(name="lion"))
    assert memory_bytes(fused, 1)["optimizer"] == 6 * d
    adamw = RunConfig(train=bf16, optimizer=OptimizerConfig(name="adamw"))
    assert memory_bytes(adamw, 1)["optimizer"] == 12 * d + 4 * 148, "148 tensors with a counter of steps each"


def streams(rank: int, config: Any) -> dict[str, Any]:
    from megatron_lion.train.random_state import rng_state

    with tiny.opened_run(config) as run:
        states = {name: state.numpy(force=True).tobytes() for name, state in rng_state().items()}
        return {"place": (run.ranks.dp_rank, run.ranks.tp_rank, run.ranks.pp_rank), **states}


def test_dropout_streams(folder: Path, corpus: str, device: str) -> None:
    """Outside split regions equal within a tensor-parallel group, inside them not; different on each data rank and stage."""
    tracked = "tracker.model-parallel-rng"
    config = tiny.tiny_config(folder / "rng", corpus, device=device, parallel__tensor_model_parallel_size=2)
    tp_dp = run_distributed(streams, 4, config, device=device)
    by_place = {item["place"]: item for item in tp_dp}
    assert len(by_place) == 4
    for data in (0, 1):
        assert by_place[data, 0, 0]["torch"] == by_place[data, 1, 0]["torch"]
        assert by_place[data, 0, 0][tracked] != by_place[data, 1, 0][tracked]
    assert by_place[0, 0, 0]["torch"] != by_place[1, 0, 0]["torch"]
    assert len({item[tracked] for item in tp_dp}) == 4
    config = tiny.tiny_config(folder / "rng2", corpus, device=device, parallel__pipeline_model_parallel_size=2)
    stages = run_distributed(streams, 2, config, device=device)
    assert stages[0]["torch"] != stages[1]["torch"]
    assert stages[0][tracked] != stages[1][tracked]
