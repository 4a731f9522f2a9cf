"""`train.deterministic`: what it sets, where it applies, and that everything is restored after a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed

from megatron_lion import determinism
from megatron_lion.configfile import dump_config, load_config
from megatron_lion.determinism import deterministic
from megatron_lion.runs.folder import changeable

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1, "optimizer__weight_decay": 0.1}


def switches() -> dict[str, Any]:
    """Returns everything that the context manager sets."""
    import torch._inductor.config

    return {
        "torch": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "inductor": getattr(torch._inductor.config, "deterministic", None),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


ON = {
    "torch": True,
    "warn only": False,
    "cudnn": (False, True),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain")
def test_all_is_set_and_restored() -> None:
    before = switches()
    with deterministic(True):
        inside = switches()
    assert inside.pop("inductor") in (True, None)  # None: a torch without it
    assert inside == ON
    assert switches() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert switches() == before
    with deterministic(False):
        assert switches() == before


@pytest.mark.usefixtures("plain")
def test_settings_of_the_user_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    has_inductor = hasattr(torch._inductor.config, "deterministic")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if has_inductor:
        torch._inductor.config.deterministic = False
    try:
        before = switches()
        with deterministic(True), deterministic(True):
            assert switches()["warn only"] is False
        assert switches() == before
        torch.use_deterministic_algorithms(False)
        if has_inductor:
            torch._inductor.config.deterministic = True
            with deterministic(True):
                pass
            assert switches()["inductor"] is True
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "given", "used"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", ":16:8"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8"),
        ("NCCL_ALGO", "Ring", "Ring"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "0"),
    ],
)
@pytest.mark.usefixtures("plain")
def test_variables_that_serve_are_kept(name: str, given: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, given)
    with deterministic(True):
        assert os.environ[name] == used
    assert os.environ[name] == given


def test_a_torch_without_inductors_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace()
    monkeypatch.setattr(determinism, "_inductor_config", lambda: config)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert vars(config) == {}


def watched_runs(rank: int, config: Any, probe_dir: str) -> dict[str, Any]:
    """Records the switches during and after a run, a failing run, and a probe of the run's checkpoint."""
    from torch.nn import functional as F

    from megatron_lion.config import ParallelConfig
    from megatron_lion.model import attention
    from megatron_lion.train import loop, probe_checkpoints, session

    for name in VARIABLES:
        os.environ.pop(name, None)
    seen: dict[str, Any] = {"before": switches(), "devices": set(), "math": set(), "efficient": set()}

    def watch(module: Any, name: str, key: str) -> None:
        call = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(key, switches())
            return call(*args, **kwargs)

        setattr(module, name, watched)

    def kernels(device: torch.device) -> Any:
        seen["devices"].add(device.type)
        return choose(torch.device("cuda"))

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen["math"].add(torch.backends.cuda.math_sdp_enabled())
        seen["efficient"].add(torch.backends.cuda.mem_efficient_sdp_enabled())
        return plain_attend(*args, **kwargs)

    watch(session, "process_groups", "process groups")
    watch(loop, "build_run", "model")
    watch(loop, "train_step", "step")
    choose, plain_attend = attention.reproducible_kernels, F.scaled_dot_product_attention
    attention.reproducible_kernels, F.scaled_dot_product_attention = kernels, attend
    tiny.train(config)
    seen["after"] = switches()

    watch(session, "process_groups", "probe's process groups")
    watch(probe_checkpoints, "probe_run", "probe")
    settings = probe_checkpoints.probe_config(Path(config.run_dir), probe={"num_batches": 1}, parallel=ParallelConfig())
    list(probe_checkpoints.probe_checkpoints(dataclasses.replace(settings, device="cpu"), [2]))
    seen["after the probe"] = switches()

    def fail(*args: Any, **kwargs: Any) -> None:
        seen["failing"] = switches()
        raise RuntimeError("no model")

    loop.build_run = fail
    try:
        tiny.train(dataclasses.replace(config, run_dir=probe_dir))
    except RuntimeError as error:
        seen["error"] = str(error)
    seen["after an error"] = switches()
    return seen


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_corpus(tmp_path_factory.mktemp("deterministic") / "corpus")


def test_where_it_holds(tmp_path: Path, corpus: str) -> None:
    config = tiny.tiny_config(tmp_path / "run", corpus, train__steps=2, train__deterministic=True)
    seen = run_distributed(watched_runs, 1, config, str(tmp_path / "other"))[0]
    for key in ("process groups", "model", "step", "probe's process groups", "probe", "failing"):
        assert {name: seen[key][name] for name in ON} == ON, key
    for key in ("after", "after the probe", "after an error"):
        assert seen[key] == seen["before"], key
    assert seen["error"] == "no model"
    # The attention core passes its own device and uses the kernels it receives: none that uses atomics.
    assert (seen["devices"], seen["math"], seen["efficient"]) == ({"cpu"}, {True}, {False})


def test_attention_kernels() -> None:
    from torch.nn.attention import SDPBackend

    from megatron_lion.model.attention import reproducible_kernels

    assert reproducible_kernels(torch.device("cuda", 0)) == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert reproducible_kernels(torch.device("cpu")) is None


def test_the_setting_reaches_megatron_core(tmp_path: Path, corpus: str) -> None:
    from megatron_lion.device import Device
    from megatron_lion.model.mcore_settings import build_transformer_config

    device = Device("cpu", 0, "gloo")
    on, off = (tiny.tiny_config(tmp_path, corpus, train__deterministic=wanted) for wanted in (True, False))
    with deterministic(True):
        assert build_transformer_config(on, device).deterministic_mode is True
        assert build_transformer_config(off, device).deterministic_mode is False
    # An evaluation builds the model outside the context manager.
    assert build_transformer_config(on, device).deterministic_mode is False


@pytest.mark.slow
def test_runs_with_it_are_equal_and_a_resumed_run_may_change_it(tmp_path: Path, corpus: str) -> None:
    """Padded buckets, dropout and bf16; two processes with tensor parallelism, whose embedding masks its output."""
    changes = {"train__steps": 4, "train__precision": "bf16", "model__hidden_size": 36, **DROPOUT}
    first, second = {}, {}
    for layout, (size, more) in {"DP1": (1, {}), "TP2": (2, {"parallel__tensor_model_parallel_size": 2})}.items():
        for name, wanted in {"one": True, "two": True, "without": False}.items():
            run_dir = tmp_path / f"{layout}-{name}"
            config = tiny.tiny_config(run_dir, corpus, **changes, **more, train__deterministic=wanted)
            first[f"{layout} {name}"] = size, config
        half = tiny.tiny_config(tmp_path / f"{layout}-half", corpus, **changes, **more, train__stop_after=2)
        first[f"{layout} half"] = size, half
        train = dataclasses.replace(half.train, stop_after=None, deterministic=True)
        second[f"{layout} resumed"] = size, dataclasses.replace(half, train=train)
    found = {**tiny.run_all(first), **tiny.run_all(second)}
    for name, outcome in found.items():
        assert "failed" not in outcome, (name, outcome)
    for layout in ("DP1", "TP2"):
        expected = found[f"{layout} one"]
        for name in ("two", "without", "resumed"):  # on a CPU also the run without it
            other = found[f"{layout} {name}"]
            for key in ("state_fingerprint", "weights_fingerprint"):
                assert other["manifest"][key] == expected["manifest"][key], (layout, name, key)
            assert other["losses"] == expected["losses"]


def test_a_saved_run_without_the_key_loads(tmp_path: Path, corpus: str) -> None:
    config = tiny.tiny_config(tmp_path / "run", corpus)
    text = dump_config(config)
    assert "  deterministic: false\n" in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("  deterministic: false\n", ""))
    assert load_config(path) == config
    assert changeable("train.deterministic")
