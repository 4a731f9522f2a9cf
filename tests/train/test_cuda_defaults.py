"""Defaults that apply on CUDA only, tested on a CPU: loader workers, pinned batches, fusions.

`install_cpu_stand_in` maps CUDA device names to the CPU, so `Device("cuda", 0, "gloo")` uses every default of CUDA.
The tests replace only what needs a real device: the choice of the device, its name and its memory counter.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.device import Device, install_cpu_stand_in

STEPS = 5
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda-defaults")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


def test_loader_workers_change_no_bit_of_a_run_or_of_a_resumed_one(folder: Path, corpus: str) -> None:
    settings = {"train__steps": STEPS, "train__test_every": 3, "train__test_batches": 1, **DROPOUT}
    plain = tiny.tiny_config(folder / "workers0", corpus, data__num_workers=0, **settings)
    ahead = tiny.tiny_config(folder / "workers2", corpus, data__num_workers=2, **settings)
    halved = dataclasses.replace(ahead, run_dir=str(folder / "resumed"))
    half = dataclasses.replace(halved, train=dataclasses.replace(halved.train, stop_after=2))
    found = run_distributed(tiny.train_each, 1, {"plain": plain, "ahead": ahead, "half": half})[0]
    found["resumed"] = run_distributed(tiny.train_each, 1, {"": halved})[0][""]
    assert found["half"]["manifest"]["step"] == 2
    for name in ("ahead", "resumed"):
        assert found[name]["losses"] == found["plain"]["losses"], name
        assert found[name]["norms"] == found["plain"]["norms"], name
        for key in ("state_fingerprint", "weights_fingerprint", "consumed_samples"):
            assert found[name]["manifest"][key] == found["plain"]["manifest"][key], (name, key)


@contextmanager
def defaults_of_cuda(folder: Path) -> Iterator[Device]:
    install_cpu_stand_in()
    stand_in = Device("cuda", 0, "gloo")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with (
        mock.patch("megatron_lion.device.select_device", return_value=stand_in),
        mock.patch("megatron_lion.train.loop.select_device", return_value=stand_in),
        mock.patch.object(Device, "name", return_value="stand-in"),
        mock.patch.object(Device, "max_memory_gib", return_value=0.0),
    ):
        yield stand_in


def facts_of(config: Any) -> dict[str, Any]:
    """Returns the settings that a run on the selected device is built with, and its first batch."""
    from torch.utils.data import DataLoader

    from megatron_lion.train.fingerprint import weights_fingerprint

    asked: dict[str, Any] = {}

    class Recorder(DataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.update(workers=kwargs["num_workers"], pinned=kwargs["pin_memory"])
            super().__init__(*args, **kwargs)

    with tiny.opened_run(config) as run, mock.patch("torch.utils.data.DataLoader", Recorder):
        model = run.model[0].config
        batch = next(run.train_batches())
        return {
            **asked,
            "batch": batch,
            "weights": weights_fingerprint(run.model),
            "bias_activation_fusion": model.bias_activation_fusion,
            "bias_dropout_fusion": model.bias_dropout_fusion,
            "use_cpu_initialization": model.use_cpu_initialization,
            "batch_p2p_comm": model.batch_p2p_comm,
        }


def facts_of_both(rank: int, folder: Path, config: Any) -> dict[str, dict[str, Any]]:
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # torch warns that no accelerator is present
    found = {"cpu": facts_of(config)}
    with defaults_of_cuda(folder):
        found["cuda"] = facts_of(config)
    return found


def test_each_default_is_taken_and_changes_neither_weights_nor_batches(folder: Path, corpus: str) -> None:
    found = run_distributed(facts_of_both, 1, folder, tiny.tiny_config(folder / "facts", corpus))[0]
    switches = ("bias_activation_fusion", "bias_dropout_fusion", "batch_p2p_comm", "pinned")
    for name in switches:
        assert (found["cpu"][name], found["cuda"][name]) == (False, True), name
    assert (found["cpu"]["use_cpu_initialization"], found["cuda"]["use_cpu_initialization"]) == (True, False)
    assert (found["cpu"]["workers"], found["cuda"]["workers"]) == (0, 2)
    assert found["cpu"]["weights"] == found["cuda"]["weights"]
    plain, pinned = found["cpu"]["batch"], found["cuda"]["batch"]
    assert plain.keys() == pinned.keys()
    assert all(plain[key].equal(pinned[key]) for key in plain)


def both_runs(rank: int, folder: Path, configs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs each config with the defaults of the CPU and with those of CUDA."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    found = {}
    for name, config in configs.items():
        found[f"{name}/cpu"] = tiny.train(config)
    with defaults_of_cuda(folder):
        for name, config in configs.items():
            found[f"{name}/cuda"] = tiny.train(dataclasses.replace(config, run_dir=config.run_dir + "-cuda"))
    return found


def assert_equal_but_for_rounding(found: dict[str, dict[str, Any]], name: str) -> None:
    """Fused bias, GELU and dropout skip some of the roundings to fp32 (2^-24 = 6e-8 each) of a pass over two layers.

    A loss is a mean over 128 tokens, so these average out; 2e-6 is 30 of them. The other form of GELU changes the loss
    by 3e-6 in the first step and 9e-6 in the second.
    """
    plain, fused = found[f"{name}/cpu"], found[f"{name}/cuda"]
    assert len(plain["losses"]) == len(fused["losses"]) == 3
    assert fused["losses"] == pytest.approx(plain["losses"], rel=2e-6), name
    assert fused["norms"] == pytest.approx(plain["norms"], rel=2e-5), name


@pytest.mark.slow
def test_a_run_with_megatron_cores_fusions_is_the_run_of_the_cpu(folder: Path, corpus: str) -> None:
    """The fusions are compiled for the CPU here. The fused GELU is the tanh form, so the erf form must stay unfused."""
    settings = {"train__steps": 3, "train__test_every": 2, "probe__every": 3, "probe__num_batches": 1,
                "model__elementwise": "megatron", "model__loss": "megatron"}  # fmt: skip
    configs = {
        gelu: tiny.tiny_config(folder / gelu, corpus, model__gelu=gelu, model__init_method_std=0.2, **settings)
        for gelu in ("tanh", "erf")
    }
    found = run_distributed(both_runs, 1, folder, configs)[0]
    assert list((folder / "inductor").rglob("*.so")), "nothing was compiled"
    for gelu in configs:
        assert_equal_but_for_rounding(found, gelu)
        plain, fused = (found[f"{gelu}/{kind}"]["probes"] for kind in ("cpu", "cuda"))
        assert len(plain) == len(fused) == 2
        for one, other in zip(plain, fused, strict=True):
            assert other["probe/grad_l2"] == pytest.approx(one["probe/grad_l2"], rel=2e-5)
    assert found["erf/cpu"]["losses"] != pytest.approx(found["tanh/cpu"]["losses"], rel=2e-6), "the forms must differ"


@pytest.mark.slow
def test_two_stages_with_all_defaults_of_cuda_are_those_of_the_cpu(folder: Path, corpus: str) -> None:
    """Two pipeline stages exchange activations in batches (batch_p2p_comm); loss and layers are the Triton kernels."""
    config = tiny.tiny_config(folder / "stages", corpus, train__steps=3, parallel__pipeline_model_parallel_size=2)
    assert_equal_but_for_rounding(run_distributed(both_runs, 2, folder, {"": config})[0], "")
