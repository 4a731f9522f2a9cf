"""The checks of the GPU check can fail: they find a wrong update, a changed neighbour and two runs that differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lion.optim import update

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_stages import bitwise, gradient_check, modes
from gpu_stages import stage_run as run
from gpu_stages.stage import Stage

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
FORM = bitwise.Form("split32", "fp32", False, torch.float32, 3)


def test_forms_cover_every_combination() -> None:
    assert len(set(bitwise.FORMS)) == 4 * 3 * 2 * 2 * 2


def test_a_last_bit_of_the_momentum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bitwise.difference(FORM, "cpu") is None
    plain = update.lion_update

    def rounded_once(
        param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, lr: Any, betas: Any, *rest: Any
    ) -> None:
        fused = torch.lerp(grad, exp_avg, betas[1])
        plain(param, grad, exp_avg, lr, betas, *rest)
        exp_avg.copy_(fused)

    monkeypatch.setattr(update, "lion_update", rounded_once)
    found = bitwise.difference(FORM, "cpu")
    assert found is not None
    assert found.startswith("exp_avg")


def test_a_write_behind_a_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = update.reference_step

    def one_too_far(slots: Any, *rest: Any) -> None:
        plain(slots, *rest)
        param = slots[-1].param
        param.as_strided((1,), (1,), param.storage_offset() + param.numel()).add_(1.0)

    monkeypatch.setattr("megatron_lion.optim.implementations.reference_step", one_too_far)
    assert bitwise.difference(FORM, "cpu") == "parameters"


def test_nan_is_one_value_and_the_sign_of_zero_counts() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert bitwise.same_bits(bits[:1], bits[1:])
    assert not bitwise.same_bits(torch.zeros(1), -torch.zeros(1))
    assert not bitwise.same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "passed"),
    [({}, True), ({"state": "b"}, False), ({"weights": "b"}, False), ({"losses": [1.0, 2.5]}, False)],
)
def test_modes_that_differ_fail(tmp_path: Path, change: dict[str, Any], passed: bool) -> None:
    stage = Stage("correct", tmp_path, 60.0, True, {})
    one = {"losses": [1.0, 2.0], "norms": [1.0, 1.0], "state": "a", "weights": "a"}
    modes.compare(stage, "pair", one, {**one, **change})
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["passed"] is passed
    assert row["first_other_loss"] == (2 if "losses" in change else None)


GOOD = {"step": 130, "state_fingerprint": "s", "weights_fingerprint": "w", "consumed_samples": 8}


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ({"signalled": True, "code": 75, "manifest": GOOD}, True),
        ({"signalled": True, "code": 0, "manifest": GOOD}, False),
        ({"signalled": False, "code": 75, "manifest": GOOD}, False),  # the run ended before the signal
        ({"signalled": True, "code": 75, "manifest": {**GOOD, "state_fingerprint": "other"}}, False),
        ({"signalled": True, "code": 1, "error": "FileNotFoundError: no checkpoint"}, False),
    ],
)
def test_a_resumed_run_that_ends_elsewhere_fails(tmp_path: Path, found: dict[str, Any], passed: bool) -> None:
    manifest = tmp_path / "twin" / "checkpoints" / "step_0000130" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps(GOOD))
    run.same_as_undisturbed(Stage("run", tmp_path, 60.0, True, {}), tmp_path / "twin", found)
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["passed"] is passed


@pytest.mark.parametrize(("alpha", "passed"), [(1.0, True), (1.0 + 2.0**-12, False)])
def test_a_wrong_weight_gradient_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, passed: bool
) -> None:
    def scaled(values: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
        total.addmm_(grad.float().t(), values.float(), alpha=alpha)

    monkeypatch.setattr(gradient_check, "add_weight_gradient", scaled)
    gradient_check.check_weight_gradients(Stage("correct", tmp_path, 60.0, True, {}))
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["passed"] is passed
    assert row["relative_difference"] < row["separate_difference"] < 4e-3
    assert row["same_bits"] is True
