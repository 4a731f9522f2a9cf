"""`env` reports the commit and whether Triton compiles."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_lion import device
from megatron_lion.cli import main
from megatron_lion.device import Device
from megatron_lion.model import kernel_choice
from megatron_lion.optim import triton_check

REPO = Path(__file__).resolve().parents[2]


def test_a_checkout_reports_its_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    found = json.loads(capsys.readouterr().out)
    if shutil.which("git") is None or not (REPO / ".git").exists():
        assert found["git"] is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert head.startswith(found["git"].removesuffix("-dirty").rpartition("-g")[2])


def test_it_reports_whether_triton_compiles(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["env", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["triton_kernel"] in ("interpreted", "not needed without a CUDA device")
    monkeypatch.setattr(triton_check, "why_no_triton", lambda: "no C compiler")
    assert main(["env", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["triton_kernel"] == "not available: no C compiler"


def test_it_reports_the_loss_of_a_run_on_this_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*words: str) -> str:
        assert main(["env", *words]) == 0
        return str(json.loads(capsys.readouterr().out)["loss"])

    assert found("--device", "cpu") == "megatron: the device is a CPU, on which it is faster"
    monkeypatch.setattr(device, "select_device", lambda wanted: Device("cuda", 0, "nccl"))
    monkeypatch.setattr(Device, "name", lambda self: "stand-in")
    for reason, expected in (
        (None, "fused: Triton runs its kernels"),
        ("no C compiler", "megatron: no Triton, no C compiler"),
    ):
        monkeypatch.setattr(kernel_choice, "why_no_triton", lambda reason=reason: reason)
        assert found() == expected
