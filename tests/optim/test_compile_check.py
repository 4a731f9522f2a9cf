"""The check whether Triton can compile: it runs once, gives its reason in one line, and LION works without Triton."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from lion_cases import DEVICE

from megatron_lion.optim import triton_check
from megatron_lion.optim.implementations import choose_implementation
from megatron_lion.optim.lion import Lion


@pytest.fixture(autouse=True)
def nothing_known():
    """Each test runs the check as a new process would."""
    caches = (triton_check._check, triton_check.warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Makes the kernel's launch raise; returns a list that grows with each launch."""
    launches: list[int] = []

    def launch(value: float) -> float:
        launches.append(1)
        raise error

    monkeypatch.setattr(triton_check, "_add_one", launch)
    return launches


def on_cuda(*dtypes: torch.dtype) -> list[SimpleNamespace]:
    """The attributes that `choose_implementation` reads of slots with parameters on a CUDA device."""
    return [
        SimpleNamespace(param=SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=dtype))
        for dtype in dtypes
    ]


def lion(implementation: str = "auto") -> tuple[Lion, torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    return Lion([param], lr=0.5, implementation=implementation), param


def test_a_kernel_runs_here() -> None:
    assert triton_check.why_no_triton() is None
    assert triton_check.triton_kernel() == ("interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled")


def test_the_check_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = broken(monkeypatch, RuntimeError("no"))
    assert {triton_check.why_no_triton() for _ in range(3)} == {"RuntimeError: no"}
    assert len(launches) == 1


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "_add_one", lambda value: value)
    assert triton_check.why_no_triton() == "the compiled kernel computed 2 + 1 = 2"


def test_without_a_device_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = broken(monkeypatch, RuntimeError("no"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_check, "_is_interpreted", lambda: False)
    assert triton_check.triton_kernel() == "not needed without a CUDA device"
    assert launches == []
    with pytest.raises(ValueError, match=r"'triton': no CUDA device is visible.*; or use implementation = 'auto'"):
        lion("triton")
    assert launches == []


def test_the_capture_of_a_graph_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = broken(monkeypatch, RuntimeError("no"))
    monkeypatch.setattr(triton_check, "_is_capturing", lambda: True)
    assert triton_check.why_no_triton() is None
    assert launches == []
    monkeypatch.setattr(triton_check, "_is_capturing", lambda: False)
    assert triton_check.why_no_triton() == "RuntimeError: no"
    monkeypatch.setattr(triton_check, "_is_capturing", lambda: True)
    assert triton_check.why_no_triton() == "RuntimeError: no"


@pytest.mark.parametrize(
    ("compiler", "has_header", "message"),
    [
        (None, True, "no C compiler: Triton builds its launcher with one; install gcc or set CC"),
        ("/nonexistent/cc", True, "no C compiler (/nonexistent/cc): Triton builds its launcher with one"),
        ("exit 1", True, "cc failed with exit code 1; set CC to another compiler"),
        (
            "exit 1",
            False,
            "Python.h: Triton builds its launcher with it; install Python's development files (python3-dev)",
        ),
    ],
    ids=["none", "missing", "failing", "no header"],
)
def test_triton_without_a_compiler(compiler, has_header, message, tmp_path, monkeypatch) -> None:
    """The exceptions are those of the installed Triton's own build of a launcher."""
    from triton.runtime import build

    for function in vars(build).values():  # later versions of Triton look for the compiler once in a process
        getattr(function, "cache_clear", lambda: None)()
    script = tmp_path / "cc"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    else:
        monkeypatch.setenv("CC", compiler if compiler.startswith("/") else str(script))
    include = tmp_path / "include"
    include.mkdir()
    if has_header:
        (include / "Python.h").write_text("")
    monkeypatch.setattr(triton_check.sysconfig, "get_paths", lambda scheme=None: {"include": str(include)})
    monkeypatch.setattr(triton_check, "_add_one", lambda value: build.compile_module_from_src("int x;", "launcher"))
    reason = triton_check.why_no_triton()
    assert reason is not None
    assert message in reason
    assert "\n" not in reason
    assert triton_check.triton_kernel() == f"not available: {reason}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "triton is not installed; run pip install triton"),
        (AssertionError("libcuda.so cannot found!\nPossible files are located at …"), "AssertionError: libcuda.so cannot found!"),
        (AssertionError(), "AssertionError"),
    ],
    ids=["no package", "first line", "no text"],
)  # fmt: skip
def test_other_reasons(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, error)
    assert triton_check.why_no_triton() == reason


def test_auto_continues_with_foreach_and_logs_one_line(monkeypatch, caplog) -> None:
    assert choose_implementation("auto", on_cuda(torch.float32)) == "triton"
    triton_check._check.cache_clear()
    launches = broken(monkeypatch, RuntimeError("Failed to find C compiler."))
    with caplog.at_level(logging.WARNING):
        assert {choose_implementation("auto", on_cuda(torch.float32)) for _ in range(3)} == {"foreach"}
    assert [record.getMessage() for record in caplog.records] == [
        "Triton cannot run kernels on this machine, so LION uses the slower foreach implementation: no C compiler: Triton "
        "builds its launcher with one; install gcc or set CC"
    ]
    assert len(launches) == 1


def test_auto_does_not_ask_if_it_would_not_take_triton(monkeypatch) -> None:
    launches = broken(monkeypatch, RuntimeError("no"))
    assert choose_implementation("auto", on_cuda(torch.float64)) == "foreach"
    if DEVICE.type == "cpu":
        lion()[0].step()
    assert launches == []


def test_triton_by_name_is_an_error_with_the_reason(monkeypatch) -> None:
    broken(monkeypatch, RuntimeError("Failed to find C compiler."))
    optimizer, param = lion("triton")
    with pytest.raises(RuntimeError, match=r"'triton': no C compiler: .*; or use implementation = 'foreach'"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_first_step_may_be_one_that_must_not_wait() -> None:
    """The check waits for its own result even if the caller has forbidden waits, and leaves the ban in place."""
    optimizer, param = lion()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert triton_check._check.cache_info().currsize == 1
    assert param.tolist() == [0.5] * 3
