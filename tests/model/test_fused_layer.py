"""Layers with the fused element-wise operations against megatron-core's, with the same weights and batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed
from elementwise_runs import QUICK, assert_the_same, losses, run_jobs

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import save_config
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, EnvironmentFault
from megatron_lion.model import kernel_choice
from megatron_lion.runs.folder import kept_choices

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elementwise")


@pytest.fixture(scope="module")
def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_jobs(folder, [QUICK], {})


def test_training_is_the_same(logged: dict[str, list[dict[str, Any]]]) -> None:
    assert_the_same(logged, QUICK)


def test_the_operations_are_computed_apart(logged: dict[str, list[dict[str, Any]]]) -> None:
    assert losses(logged["gpt2 bf16 fused"]) != losses(logged["gpt2 bf16 megatron"]), "they round at other places"


def gradients(rank: int, configs: dict[str, RunConfig]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the parameters' gradients, summed over two micro-batches, for each config's model."""
    from megatron_lion.device import select_device
    from megatron_lion.model.build import build_model
    from megatron_lion.parallel import process_groups, seed_everything

    found = {}
    # Memory without values is then NaN: megatron-core and the kernels return it for gradients that they have added elsewhere.
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = select_device("cpu")
    size = next(iter(configs.values())).parallel.tensor_model_parallel_size
    with process_groups(device, tensor_model_parallel_size=size, pipeline_model_parallel_size=1) as ranks:
        seed_everything(0, ranks)  # sequence parallelism has a stream of random numbers, also without dropout
        for name, config in configs.items():
            (model,) = build_model(config, device, 64)
            torch.manual_seed(1)
            for parameter in model.parameters():  # also biases and gains, which begin as 0 and 1
                parameter.data.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.05)
            for seed in range(2):
                tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(seed))
                losses = model(tokens, torch.arange(16).expand(3, -1), None, labels=tokens.roll(-1, 1))
                losses.mean().backward()
            found[name] = {key: parameter.main_grad.clone() for key, parameter in model.module.named_parameters()}
    return found


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_every_parameters_gradient_is_megatron_cores(folder: Path, ranks: int, sequence_parallel: bool) -> None:
    variants: dict[str, dict[str, Any]] = {
        "megatron": {"model__elementwise": "megatron"},
        "fused": {"model__elementwise": "fused"},
        # What CUDA takes by default in 16 bits.
        "all": {"model__elementwise": "fused", "model__loss": "fused", "train__gradient_accumulation_fusion": True},
    }
    configs = {
        name: tiny.tiny_config(
            folder / name, "unused", model__hidden_size=32, model__num_layers=2, model__vocab_size=64, model__hidden_dropout=0.0,
            model__attention_dropout=0.0, model__seq_length=16, parallel__tensor_model_parallel_size=ranks,
            parallel__sequence_parallel=sequence_parallel, **changes,
        )
        for name, changes in variants.items()
    }  # fmt: skip
    for found in run_distributed(gradients, ranks, configs):
        for kind in ("fused", "all"):
            assert found[kind].keys() == found["megatron"].keys()
            for name, expected in found["megatron"].items():
                assert expected.abs().max() > 0, name
                torch.testing.assert_close(
                    found[kind][name],
                    expected,
                    rtol=2e-4,
                    atol=float(expected.abs().max()) * 2e-6,
                    msg=f"{kind}: {name}",
                )


def test_evaluation_needs_no_gradients_and_drops_nothing(folder: Path) -> None:
    assert run_distributed(evaluated, 1, folder) == [True]


def evaluated(rank: int, folder: Path) -> bool:
    from megatron_lion.device import select_device
    from megatron_lion.model.build import build_model
    from megatron_lion.parallel import process_groups

    outputs = []
    device = select_device("cpu")
    for kind in ("megatron", "fused"):
        config = tiny.tiny_config(folder / kind, "unused", model__elementwise=kind, model__vocab_size=64,
                                  model__hidden_dropout=0.5, model__seq_length=16)  # fmt: skip
        with process_groups(device, tensor_model_parallel_size=1, pipeline_model_parallel_size=1):
            (model,) = build_model(config, device, 64)
            model.eval()
            tokens = torch.arange(32).view(2, 16)
            with torch.no_grad():
                outputs.append(model(tokens, torch.arange(16).expand(2, -1), None))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    return not outputs[1].requires_grad


def test_the_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    choose, cpu, gpu = kernel_choice.choose_elementwise, Device("cpu", 0, "gloo"), Device("cuda", 0, "nccl")
    assert choose("auto", cpu, "sdpa") == choose("megatron", gpu, "sdpa") == "megatron"
    assert choose("auto", gpu, "transformer_engine") == choose("megatron", gpu, "transformer_engine") == "megatron"
    with pytest.raises(EnvironmentFault, match=r"model.elementwise: fused: Transformer Engine is installed.*sdpa"):
        choose("fused", gpu, "transformer_engine")
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda: "no compiler")
    with pytest.raises(EnvironmentFault, match=r"model.elementwise: fused: no compiler; or use auto or megatron"):
        choose("fused", cpu, "sdpa")
    # On CUDA the ranks of a group agree; here one of them has no Triton.
    monkeypatch.setattr(kernel_choice, "all_reduce_sum", lambda failed, group: failed)
    monkeypatch.setattr(kernel_choice.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    on_cpu = SimpleNamespace(kind="cuda", torch_device=torch.device("cpu"))
    assert choose("auto", on_cpu, "sdpa") == "megatron"
    assert "element-wise operations, which is slower: no compiler" in caplog.text
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda: None)
    assert choose("auto", on_cpu, "sdpa") == "fused"


def test_a_run_of_an_earlier_version_keeps_megatron_cores_operations(tmp_path: Path) -> None:
    """Dropout would drop other elements in the middle of the run."""
    config = RunConfig(run_dir=str(tmp_path))
    (tmp_path / "checkpoints" / "step_0000003").mkdir(parents=True)
    save_config(config, tmp_path / "config.yaml")
    assert kept_choices(config, 1).model.elementwise == "auto"
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if "elementwise" not in line))
    assert kept_choices(config, 1).model.elementwise == "megatron"
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, elementwise="fused"))
    assert kept_choices(asked, 1).model.elementwise == "fused"


def test_fused_layers_exclude_transformer_engine() -> None:
    config = tiny.tiny_config("unused", "unused", model__elementwise="fused", model__attention="transformer_engine")
    with pytest.raises(
        ConfigError, match=r"model\.elementwise: fused needs model.attention sdpa, cudnn or unfused; use auto"
    ):
        check_config(config, 1)
