"""Weight gradients that the matrix product adds to the fp32 buffer: right at every layout, closer than 16-bit ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from distributed import run_distributed
from megatron.core import tensor_parallel
from tiny_bert import tiny_bert, write_bert_corpus
from tiny_gpt2 import tiny_gpt2, write_text_corpus

from megatron_lion.device import Device
from megatron_lion.errors import EnvironmentFault
from megatron_lion.model import weight_gradients
from megatron_lion.model.weight_gradients import TorchProducts, choose_fusion
from megatron_lion.model.weight_gradients import weight_gradients as report

TP2 = {"parallel__tensor_model_parallel_size": 2}
BF16 = {"train__precision": "bf16", "train__global_batch_size": 8, "train__micro_batch_size": 2}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": ("gpt2", 1, {}),
    "gpt2 recomputed": ("gpt2", 1, {"model__recompute": True}),
    "gpt2 fp16": ("gpt2", 1, {"train__precision": "fp16"}),
    "gpt2 bf16 buffers": ("gpt2", 1, {"train__accumulate_allreduce_grads_in_fp32": False}),
    "gpt2 fused loss": ("gpt2", 1, {"model__loss": "fused"}),
    "gpt2 chunked loss": ("gpt2", 1, {"model__loss": "chunked"}),
    "bert": ("bert", 1, {"data__mask_probability": 0.18}),
    "bert recomputed, fused loss": ("bert", 1, {"model__loss": "fused", "model__recompute": True}),
    "gpt2 TP2": ("gpt2", 2, {**TP2, "parallel__sequence_parallel": True}),
    "gpt2 PP2": ("gpt2", 2, {"parallel__pipeline_model_parallel_size": 2}),
    "gpt2 DP2 overlapped": ("gpt2", 2, {"parallel__overlap_grad_reduce": True, "parallel__use_distributed_optimizer": False}),
    "bert TP2": ("bert", 2, {**TP2, "data__mask_probability": 0.18}),
}  # fmt: skip
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
BUILD = {"gpt2": tiny_gpt2, "bert": tiny_bert}


@contextlib.contextmanager
def recorded_products(exact: dict[int, torch.Tensor]) -> Iterator[None]:
    """Adds each product that megatron-core asks for in float64 also to `exact`, by the place of its buffer."""
    plain = TorchProducts.wgrad_gemm_accum_fp32

    def recorded(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        product = grad_output.double().t() @ total_input.double()
        exact[main_grad.data_ptr()] = exact.get(main_grad.data_ptr(), 0) + product
        plain(total_input, grad_output, main_grad)

    with (
        patch.object(TorchProducts, "wgrad_gemm_accum_fp32", staticmethod(recorded)),
        patch.object(TorchProducts, "wgrad_gemm_accum_fp16", staticmethod(recorded)),  # for 16-bit buffers
    ):
        yield


@contextlib.contextmanager
def empties_of_nan() -> Iterator[None]:
    """Fills new memory with NaN, as torch does in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def accumulated(run: Any) -> dict[str, torch.Tensor]:
    """Runs the micro-batches of a step; returns copies of the buffers by parameter, reduced only if that overlaps."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (model,) = run.model
    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=run.forward_step, data_iterator=run.train_batches(), model=model, forward_only=False,
        num_microbatches=run.config.num_microbatches(run.ranks.world_size), seq_length=run.config.model.seq_length,
        micro_batch_size=run.config.micro_batch_size,
    )  # fmt: skip
    if run.config.parallel.overlap_grad_reduce:
        model.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


def buffers(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """The buffers of each config without the fusion, twice with it, and the float64 sums of the recorded products."""
    import dataclasses

    found = {}
    for name, config in configs.items():
        for fusion in (False, True):
            train = dataclasses.replace(config.train, gradient_accumulation_fusion=fusion)
            with tiny.opened_run(dataclasses.replace(config, train=train)) as run, empties_of_nan():
                exact: dict[int, torch.Tensor] = {}
                found[name, fusion] = accumulated(run)
                with recorded_products(exact):
                    again = accumulated(run)
                assert all(tiny.same_bits(again[key], value) for key, value in found[name, fusion].items()), name
                places = {parameter.main_grad.data_ptr(): key for key, parameter in run.model[0].named_parameters()}
                if run.config.parallel.overlap_grad_reduce:
                    for product in exact.values():
                        torch.distributed.all_reduce(product)
                found[name, "exact" if fusion else "without"] = {places[place]: sum_ for place, sum_ in exact.items()}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("gradients")
    corpora = {"gpt2": write_text_corpus(folder / "corpus"), "bert": write_bert_corpus(folder / "bert")}
    results: dict[str, list[Any]] = {}
    for size in (1, 2):
        configs = {
            name: BUILD[kind](folder / name, corpora[kind], **{**BF16, **changes})
            for name, (kind, count, changes) in CASES.items()
            if count == size
        }
        ranks = run_distributed(buffers, size, configs)
        results |= {
            name: [{key: rank[name, key] for key in (False, True, "exact", "without")} for rank in ranks]
            for name in configs
        }
    return results


@pytest.mark.parametrize("name", list(CASES))
def test_the_buffers_are_those_of_a_run_without_it_and_closer_to_the_exact_sums(found: Any, name: str) -> None:
    for rank in found[name]:
        separate, fused, exact = rank[False], rank[True], rank["exact"]
        assert rank["without"] == {}
        linear = {key for key in fused if key.endswith(LINEAR)}
        # With two pipeline stages the last one has its own copy of the embedding, which only the output layer uses.
        own_output = {key for key in fused if "output_layer.weight" in key}
        assert set(exact) == linear | own_output
        assert len(linear) == (4 if "PP2" in name else 8)
        for key, value in fused.items():
            assert value.isfinite().all(), key
            if key not in exact:
                assert tiny.same_bits(value, separate[key]), key
                continue
            scale = exact[key].norm()
            off, on = ((buffer.double() - exact[key]).norm() / scale for buffer in (separate[key], value))
            if value.dtype == torch.bfloat16:  # one rounding a micro-batch instead of two
                assert on < 0.9 * off < 4e-3, (key, float(on), float(off))
                continue
            # fp32 sums of 16-bit products, against a rounding to 8 bits (11 in fp16) in each of the micro-batches.
            assert on < 2e-7 < 2e-5 < off < 4e-3, (key, float(on), float(off))


def test_the_tied_output_layer_adds_its_part_once(found: Any) -> None:
    (rank,) = found["gpt2"]
    tied = "module.module.embedding.word_embeddings.weight"
    assert rank[True][tied].abs().sum() > 0
    for name in ("gpt2 fused loss", "gpt2 chunked loss"):
        apart = (found[name][0][True][tied] - rank[True][tied]).norm() / rank[True][tied].norm()
        assert apart < 5e-3, name


def trained(rank: int, jobs: dict[str, list[Any]]) -> dict[str, Any]:
    """Trains each run with its configs one after the other."""
    return {name: [tiny.train(config) for config in configs][-1] for name, configs in jobs.items()}


def test_a_resumed_run_has_the_bits_of_the_whole_one_and_keeps_its_choice(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")

    def config(name: str, **changes: Any) -> Any:
        return tiny.tiny_config(tmp_path / name, corpus, **{**BF16, **changes})

    on = {"train__gradient_accumulation_fusion": True}
    jobs = {
        "whole": [config("whole", **on)],
        "halves": [config("halves", **on, train__stop_after=3), config("halves")],
        "off": [config("off", train__gradient_accumulation_fusion=False)],
        "auto": [config("auto")],
    }
    found = run_distributed(trained, 1, jobs)[0]
    for one, other in (("whole", "halves"), ("off", "auto")):
        assert found[one]["losses"] == found[other]["losses"]
        for key in ("state_fingerprint", "weights_fingerprint"):
            assert found[one]["manifest"][key] == found[other]["manifest"][key]
    assert found["whole"]["manifest"]["weights_fingerprint"] != found["off"]["manifest"]["weights_fingerprint"]
    stored = {name: (tmp_path / name / "config.yaml").read_text() for name in jobs}
    for name, choice in (("whole", "true"), ("halves", "true"), ("off", "false"), ("auto", "false")):
        assert f"gradient_accumulation_fusion: {choice}\n" in stored[name]


def test_a_run_of_an_earlier_version_resumes_without_it(tmp_path: Path) -> None:
    from megatron_lion.config import RunConfig
    from megatron_lion.configfile import save_config
    from megatron_lion.runs.folder import kept_choices

    config = RunConfig(run_dir=str(tmp_path))
    assert kept_choices(config, 1).train.gradient_accumulation_fusion == "auto"
    (tmp_path / "checkpoints" / "step_0000003").mkdir(parents=True)
    save_config(config, tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if "gradient_accumulation_fusion" not in line]
    assert len(older) == len(lines) - 1
    (tmp_path / "config.yaml").write_text("".join(older))
    assert kept_choices(config, 1).train.gradient_accumulation_fusion is False


CPU, CUDA = Device("cpu", 0, "gloo"), Device("cuda", 0, "nccl")


def test_auto_is_on_only_on_cuda_in_16_bits_with_a_torch_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "why_no_fusion", lambda device: None)
    assert [choose_fusion("auto", precision, CUDA) for precision in ("bf16", "fp16", "fp32")] == [True, True, False]
    assert [choose_fusion(wanted, "bf16", CPU) for wanted in ("auto", True, False)] == [False, True, False]
    assert choose_fusion(False, "bf16", CUDA) is False
    assert (report(CUDA), report(CPU)) == ("added by torch's product", "not needed without a CUDA device")
    monkeypatch.setattr(weight_gradients, "why_no_fusion", lambda device: "torch 2.9: no overload")
    assert choose_fusion("auto", "bf16", CUDA) is False
    assert report(CUDA) == "in 16 bits first: torch 2.9: no overload"
    with pytest.raises(EnvironmentFault, match=r"^train.gradient_accumulation_fusion: torch 2.9: no overload; or use"):
        choose_fusion(True, "bf16", CUDA)


def test_a_product_that_fails_or_is_wrong_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_gradients.why_no_fusion.__wrapped__(CPU) is None
    monkeypatch.setattr(weight_gradients, "add_weight_gradient", lambda *operands: None)
    assert "computed 1 + 16 = 1 in torch.bfloat16" in str(weight_gradients.why_no_fusion.__wrapped__(CPU))

    def missing(*operands: torch.Tensor) -> None:
        raise NotImplementedError("Could not run 'aten::addmm.dtype_out'\nmore lines")

    monkeypatch.setattr(weight_gradients, "add_weight_gradient", missing)
    reason = weight_gradients.why_no_fusion.__wrapped__(CPU)
    assert reason == f"torch {torch.__version__}: NotImplementedError: Could not run 'aten::addmm.dtype_out'"


def test_cudas_product_takes_the_buffer_as_addend_and_output() -> None:
    """Its arguments are those of an overload that CUDA has; meta tensors check shapes and dtypes without a device."""
    total, rows, columns = (torch.empty(size, device="meta") for size in ((6, 4), (8, 6), (8, 4)))
    for dtype in (torch.bfloat16, torch.float16):
        result = torch.addmm(total, rows.to(dtype).t(), columns.to(dtype), out_dtype=torch.float32, out=total)
        assert result is total
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", "CUDA")


def test_apexs_extension_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = object()
    monkeypatch.setattr(tensor_parallel.layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    weight_gradients.install()
    assert tensor_parallel.layers.fused_weight_gradient_mlp_cuda is apex
    assert report(CUDA) == "added by Apex's product"
