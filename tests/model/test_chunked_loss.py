"""The chunked loss: output layer and cross-entropy a few rows at a time, against float64, the fused loss and megatron-core's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F

from megatron_lion.config_checks import check_config
from megatron_lion.errors import ConfigError
from megatron_lion.model import chunked_loss
from megatron_lion.model.fused_loss import fused_cross_entropy
from megatron_lion.model.sizes import memory_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(dtype: torch.dtype, rows: int = 11) -> list[torch.Tensor]:
    """Hidden states, output matrix, labels, and upstream gradients, the third of which is 0."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 24, generator=generator).to(DEVICE, dtype) for size in (rows, 90))
    labels = torch.randint(0, 90, (rows,), generator=generator).to(DEVICE)
    upstream = (torch.rand(rows, generator=generator) + 0.5).to(DEVICE)
    upstream[2:3] = 0.0
    return [hidden, weight, labels, upstream]


def results(loss: Any, tensors: list[torch.Tensor], times: int = 1) -> list[torch.Tensor]:
    """Losses, and gradients of hidden states and matrix after that many backward passes."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in tensors[:2])
    losses = loss(hidden, weight, tensors[2])
    for _ in range(times):
        losses.backward(tensors[3].to(losses.dtype), retain_graph=True)
    assert hidden.grad is not None
    assert weight.grad is not None
    return [losses.detach(), hidden.grad, weight.grad]


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return fused_cross_entropy(F.linear(hidden, weight), labels)


def exact(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_losses_and_gradients_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_ROWS", chunk)
    tensors = case(torch.float32)
    found = results(chunked_loss.chunked_cross_entropy, tensors)
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    for ours, expected in zip(found, results(exact, doubles), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[1][2].any(), "a masked row has no gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_near_those_of_the_fused_loss(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_ROWS", 4)
    tensors = case(dtype)
    for ours, expected in zip(
        results(chunked_loss.chunked_cross_entropy, tensors), results(fused, tensors), strict=True
    ):
        assert ours.dtype == expected.dtype
        # Each of the three parts of the matrix's gradient is rounded once.
        assert (ours - expected).float().norm() <= torch.finfo(dtype).eps * expected.float().norm()


@pytest.mark.slow
def test_many_small_parts_of_a_gradient_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """700 equal rows of one chunk each: in bfloat16 their sum would stop growing at 256 times a part."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ROWS", 1)
    hidden, weight, labels, upstream = case(torch.bfloat16, rows=1)
    once = results(chunked_loss.chunked_cross_entropy, [hidden, weight, labels, torch.ones_like(upstream)])[2].float()
    many = [hidden.expand(700, -1), weight, labels.expand(700), torch.ones(700, device=DEVICE)]
    gradient = results(chunked_loss.chunked_cross_entropy, many)[2].float()
    torch.testing.assert_close(gradient, 700 * once, rtol=2**-7, atol=0.0)


def test_the_backward_pass_may_run_again() -> None:
    tensors = case(torch.float32)
    once, twice = (results(chunked_loss.chunked_cross_entropy, tensors, times) for times in (1, 2))
    torch.testing.assert_close(twice[1], 2 * once[1])
    torch.testing.assert_close(twice[2], 2 * once[2])


TP2 = {"parallel__tensor_model_parallel_size": 2}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP1": (1, {}),
    "bf16": (1, {"train__precision": "bf16"}),
    "TP2": (2, TP2),
    "PP2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "TP2 sequence parallel": (2, {**TP2, "parallel__sequence_parallel": True}),
}


def train_in_small_chunks(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    chunked_loss.CHUNK_ROWS = 7
    return tiny.train_each(rank, configs)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chunked")
    corpus = tiny.write_corpus(folder / "corpus")
    jobs = {
        f"{name} {loss}": (
            size,
            tiny.tiny_config(
                folder / f"{name} {loss}", corpus, model__loss=loss, train__steps=2, train__global_batch_size=2,
                train__micro_batch_size=2, train__test_every=2, train__test_batches=1, optimizer__name="sgd", optimizer__lr=0.1,
                optimizer__clip_grad=0.0, **changes,
            ),
        )
        for name, (size, changes) in RUNS.items()
        for loss in ("megatron", "chunked")
    }  # fmt: skip
    return tiny.run_all(jobs, train_in_small_chunks)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_training_is_the_same(outcomes: dict[str, Any], name: str) -> None:
    ours, theirs = (outcomes[f"{name} {loss}"] for loss in ("chunked", "megatron"))
    assert "failed" not in ours, ours["failed"]
    tolerance = 2e-3 if name == "bf16" else 1e-6
    assert len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=tolerance)


def test_bert_is_refused(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path, "unused", model__kind="bert", model__loss="chunked")
    with pytest.raises(ConfigError, match=r"model\.loss: chunked needs model\.kind gpt2; use fused or auto"):
        check_config(config, 1)


def test_the_estimate_of_memory_counts_one_chunk() -> None:
    def activations(loss: str, samples: int) -> int:
        config = tiny.tiny_config(
            "unused", "unused", model__loss=loss, train__micro_batch_size=samples, train__global_batch_size=samples,
            train__precision="bf16",
        )  # fmt: skip
        return memory_bytes(config, 1)["activations"]

    # 128 rows of the embedding, 32 channels; 1,024 samples of 16 tokens, of which 4,096 tokens are a chunk.
    saved = activations("fused", 1024) - activations("chunked", 1024)
    assert saved == 128 * (2 * (1024 * 16 - 4096) - 4 * 32)
