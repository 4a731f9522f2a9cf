"""The bytes that a training step moves for each logit, between the output layer's matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from counted_bytes import CountedBytes, counted_kernels
from distributed import run_distributed

# The logits, [16 x 4, 1024], are the only tensors of this size or more.
SIZES = {"model__vocab_size": 1024, "train__precision": "bf16", "train__micro_batch_size": 4}


def measured(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Runs a forward and a backward pass of each config's model."""
    from megatron_lion.device import select_device
    from megatron_lion.model import chunked_loss
    from megatron_lion.model.build import build_model, build_objective
    from megatron_lion.parallel import process_groups

    found = {}
    device = select_device("cpu")
    chunked_loss.CHUNK_ROWS = 16  # a quarter of the micro-batch
    for name, config in configs.items():
        batch, length = config.train.micro_batch_size, config.model.seq_length
        masked = 8 if config.model.kind == "bert" else length
        with process_groups(device, tensor_model_parallel_size=1, pipeline_model_parallel_size=1):
            (model,) = build_model(config, device, config.model.vocab_size)
            tokens = torch.randint(0, 1024, (batch, length), generator=torch.Generator().manual_seed(0))
            fields = {
                "tokens": tokens, "labels": tokens[:, :masked], "loss_mask": torch.ones(batch, masked),
                "position_ids": torch.arange(length).expand(batch, -1), "positions": torch.arange(masked).expand(batch, -1),
                "types": torch.zeros_like(tokens), "padding_mask": torch.ones_like(tokens), "is_random": torch.zeros(batch).long(),
            }  # fmt: skip
            logits = batch * masked * 1024
            with CountedBytes(logits) as counted, counted_kernels(counted) as kernels:
                output, loss_of = build_objective(config.model.kind).forward_step(iter([fields]), model)
                loss_of(output)[0].backward()
            a_logit = {name: count / logits for name, count in counted.bytes.items()}
            found[name] = (counted.products, a_logit, {key: count / logits for key, count in kernels.items()})
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    configs = {
        f"{kind} {loss}": tiny.tiny_config(
            folder / f"{kind}-{loss}", "unused", model__kind=kind, model__loss=loss, model__hidden_size=hidden, **SIZES
        )
        # The embedding must be smaller than the logits: 1,024 x hidden against 1,024 x rows.
        for kind, hidden in (("gpt2", 32), ("bert", 16))
        for loss in ("fused", "megatron", "chunked")
        if (kind, loss) != ("bert", "chunked")
    }
    result: dict[str, Any] = run_distributed(measured, 1, configs)[0]
    return result


def test_gpt2_moves_six_bytes_a_logit(found: dict[str, Any]) -> None:
    products, operations, kernels = found["gpt2 fused"]
    assert products == 3, "the output layer's product, and the two of its backward pass"
    assert operations == {}, "no operation of torch reads or writes a tensor of the logits' size"
    # 4 + 2 bytes; for each row also its label, three numbers out, three in, and a label again: 48 bytes for 1,024 logits.
    assert 6 <= kernels["load"] + kernels["store"] <= 6.1
    assert 2 <= kernels["store"] <= 2.1


def test_chunked_logits_are_never_whole(found: dict[str, Any]) -> None:
    products, operations, kernels = found["gpt2 chunked"]
    assert products == 0, "no tensor of the logits' size in any operation"
    assert operations == {}
    assert 6 <= kernels["load"] + kernels["store"] <= 6.1


def test_bert_moves_two_more_for_its_hits_and_six_in_its_output_bias(found: dict[str, Any]) -> None:
    products, operations, kernels = found["bert fused"]
    assert products == 3
    assert operations.pop("max") == pytest.approx(2, abs=0.02)
    # megatron-core's output layer adds its bias (read and write), and sums the gradient for it.
    assert operations == {"add": 4, "sum": pytest.approx(2, abs=0.02)}
    assert 6 <= kernels["load"] + kernels["store"] <= 6.1


def test_the_counter_sees_megatron_cores_passes(found: dict[str, Any]) -> None:
    products, operations, kernels = found["gpt2 megatron"]
    assert products == 3
    assert sum(operations.values()) == pytest.approx(52, abs=0.1)
    assert not kernels
