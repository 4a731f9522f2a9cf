"""Every constructor argument of Lion and Sgd with wrong types and values: one ValueError or TypeError with the remedy."""

from __future__ import annotations

import copy
import inspect
import io
import shutil
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_state

from megatron_lion.config import OptimizerConfig
from megatron_lion.optim import implementations, triton_check
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.sgd import Sgd

NUMBER = r"needs a finite number, 0 or above"
TWO = r"betas = .*: needs two numbers, each at least 0 and below 1"
FLAG = r"needs True or False"
WHOLE = r"in a group: holds for the whole optimizer; give it to Lion\(…\) itself"
ITERABLE = r"params is {}: should be an iterable of tensors or groups, such as model.parameters\(\)"


def weight(*size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(*(size or (3,)), device=DEVICE))


WRONG: dict[str, list[tuple[Any, str]]] = {
    "lr": [
        *[(value, rf"^lr = .*: {NUMBER}$") for value in (None, -1e-4, float("nan"), float("inf"), True, False, 1j, [1e-4], {})],
        *[(value, rf"^lr = .*: {NUMBER}$") for value in (10**400, Decimal("1e-4"), Fraction(1, 3), np.array(1e-4), np.ones(2))],
        ("1e-4", rf"^lr = '1e-4': {NUMBER}; convert the text with float\(\) \(YAML reads 1e-4 as text\)$"),
        (b"1e-4", rf"^lr = b'1e-4': {NUMBER}"),
        (torch.tensor(1), r"lr is a tensor of 1 elements, torch.int64: needs one element, torch.float32"),
        (torch.tensor(1j), r"torch.complex64: needs one element, torch.float32"),
        (torch.tensor(True), r"torch.bool: needs one element, torch.float32"),
    ],
    "betas": [
        *[(value, TWO) for value in (None, 0.9, "0.9", "01", (0.9,), (0.9, "x"), ("0.9", "0.99"), (0.9, 0.95, 0.99), (), {})],
        *[(value, TWO) for value in ((0.9, 1.0), (-0.1, 0.9), (0.9, True), (None, 0.9), {0.9, 0.99}, torch.ones(2), np.zeros(2))],
    ],
    "weight_decay": [
        *[(value, rf"^weight_decay = .*: {NUMBER}$") for value in (None, -0.1, True, float("nan"), [0.1], Decimal("0.1"))],
        ("0.1", rf"^weight_decay = '0.1': {NUMBER}; convert the text"),
    ],
    **{name: [(value, rf"^{name} = .*: {FLAG}$") for value in (None, "no", 1, 0)] for name in ("maximize", "cautious", "count_steps")},
    **{
        name: [(value, rf"^{name} = .*: needs one of {allowed}$") for value in (3, "x", ["fp32"], torch.bfloat16, torch.ones(2))]
        for name, allowed in {
            "init_exp_avg": "zeros, first_gradient",
            "implementation": "auto, reference, foreach, cpp, triton",
            "master_weights": "none, fp32, split32, split24",
            "momentum": "fp32, bf16, int8",
            "momentum_dtype": "fp32, bf16, int8",
        }.items()
    },
    "sum_agreement": [(value, r"^sum_agreement = .*: needs a function, or None$") for value in (3, "sum", True)],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_by_name(name: str) -> None:
    for value, message in WRONG[name]:
        with pytest.raises(ValueError, match=message):
            Lion([weight()], **{name: value})
        if name in ("lr", "betas", "weight_decay", "maximize"):  # those of a group
            optimizer = Lion([weight()])
            with pytest.raises(ValueError, match=message):
                optimizer.add_param_group({"params": [weight()], name: value})
            assert len(optimizer.param_groups) == 1


def test_no_argument_is_left_out() -> None:
    assert {*inspect.signature(Lion).parameters} == {"params", *WRONG}


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (None, TypeError, ITERABLE.format("NoneType")),
        (3, TypeError, ITERABLE.format("int")),
        (torch.nn.Linear(2, 2), TypeError, ITERABLE.format("Linear")),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), TypeError, ITERABLE.format("Sequential")),
        ("weight", TypeError, "can only optimize Tensors, but one of the params is str"),
        (torch.nn.Linear(2, 2).state_dict(), TypeError, "can only optimize Tensors, but one of the params is str"),
        (torch.ones(2), TypeError, "should be an iterable of Tensors or dicts"),
        ([[torch.ones(2)]], TypeError, "can only optimize Tensors, but one of the params is list"),
        ([], ValueError, "empty parameter list"),
        ((tensor for tensor in ()), ValueError, "empty parameter list"),
        ([{"lr": 1.0}], ValueError, "^a group with lr has no params: needs its tensors"),
        ([{}], ValueError, "^a group with no keys has no params"),
        ([{"params": None}], TypeError, ITERABLE.format("NoneType")),
        ([{"params": torch.nn.Linear(2, 2)}], TypeError, ITERABLE.format("Linear")),
        ([{"params": [torch.ones(2)]}, torch.ones(2)], TypeError, "param_group must be a dict"),
        ([torch.eye(2).to_sparse()], ValueError, "torch.sparse_coo: needs a dense float32"),
        ([torch.ones(2, dtype=torch.complex64)], ValueError, "torch.complex64.*needs a dense float32"),
        ([torch.ones(2, dtype=torch.int64)], ValueError, "torch.int64.*needs a dense float32"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
@pytest.mark.parametrize("optimizer", [Lion, Sgd])
def test_wrong_parameters_are_refused(optimizer: Any, params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer(params, lr=0.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *[
            (key, value, rf"^{key} = .* {WHOLE}$")
            for key, value in {
                "implementation": "foreach", "master_weights": "split32", "momentum": 0.9, "momentum_dtype": "int8",
                "count_steps": True, "sum_agreement": None,
            }.items()
        ],
        *[(key, 0.1, f"^{key} = 0.1 in a group: its name is lr$") for key in ("learning_rate", "lrs")],
        *[(key, 0.1, f"^{key} = 0.1 in a group: its name is weight_decay$") for key in ("wd", "decay")],
        *[(key, 0.1, f"^{key} = 0.1 in a group: did you mean weight_decay\\?$") for key in ("weight_decy", "weight_decays")],
        ("maximise", True, r"^maximise = True in a group: did you mean maximize\?$"),
        *[(key, 0.9, rf"^{key} = 0.9 in a group: needs betas = \(β1, β2\)$") for key in ("beta", "beta1", "beta2")],
        ("differentiable", True, "^differentiable = True in a group: needs False"),
        ("cautious", True, r"^cautious = True in a group of Lion\(…, cautious=False\): needs one value for all$"),
    ],
)  # fmt: skip
def test_a_group_with_a_wrong_key_is_not_added(key: str, value: Any, message: str) -> None:
    optimizer = Lion([weight()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight()], key: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [weight()], "name": "late", "lr_scale": 2.0, "differentiable": False})
    assert optimizer.param_groups[1]["lr_scale"] == 2.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_other_kinds_take_the_same_step(implementation: str) -> None:
    ends = []
    for kind in (float, np.float64, torch.tensor, lambda value: np.float32(value)):
        param = weight(40)
        param.grad = torch.linspace(-1, 1, 40, device=DEVICE)
        # Exact in float32, so that every kind of number has the same value.
        optimizer = Lion(
            [param], lr=kind(0.25), betas=[kind(0.5), kind(0.75)], weight_decay=kind(0.125), implementation=implementation
        )  # fmt: skip
        optimizer.step()
        ends.append(optimizer)
    assert all(same_state(ends[0], other) for other in ends[1:])


@pytest.mark.parametrize("momentum", ["fp32", "bf16", "int8"])
def test_momentum_has_two_names(momentum: str) -> None:
    """The second is that of the configs. Nothing that is saved knows it."""
    assert momentum in str(inspect.get_annotations(OptimizerConfig)["momentum_dtype"])
    built = [
        Lion([torch.nn.Parameter(torch.ones(70))], betas=(0.9, 0.95), **names)
        for names in (
            {"momentum": momentum},
            {"momentum_dtype": momentum},
            {"momentum": momentum, "momentum_dtype": momentum},
        )
    ]
    for optimizer in built:
        optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 70)
        optimizer.step()
        assert optimizer.layout.momentum == momentum
        assert same_state(optimizer, built[0])
        assert same_state(copy.deepcopy(optimizer), built[0])
        keys = [optimizer.param_groups[0].keys(), optimizer.defaults.keys(), optimizer.__getstate__().keys()]
        assert keys == [built[0].param_groups[0].keys(), built[0].defaults.keys(), built[0].__getstate__().keys()]
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        assert b"momentum_dtype" not in file.getvalue()
    assert Lion([weight()]).layout.momentum == "fp32"
    other = "int8" if momentum != "int8" else "fp32"
    for one, two in ((momentum, other), (other, momentum)):
        with pytest.raises(ValueError, match=f"momentum = '{one}', momentum_dtype = '{two}': two names of one setting"):
            Lion([weight()], betas=(0.9, 0.95), momentum=one, momentum_dtype=two)


# ---- devices


def test_triton_without_a_device_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_check, "_is_interpreted", lambda: False)
    triton_check._check.cache_clear()
    with pytest.raises(ValueError, match=r"^implementation = 'triton': no CUDA device.*use implementation = 'auto'$"):
        Lion([weight()], implementation="triton")
    triton_check._check.cache_clear()
    assert Lion([weight()]).implementation == "auto"


def test_triton_with_parameters_on_the_cpu_is_refused_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: the model may still move to the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_check, "why_no_triton", lambda: None)
    monkeypatch.setattr(triton_check, "_is_interpreted", lambda: False)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Lion([param], implementation="triton")
    with pytest.raises(ValueError, match="parameters that are not on a CUDA device: move the model there before"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_parameters_on_several_devices() -> None:
    """Each device is updated by itself; the C++ loop works on one only. A meta device stands for the second."""
    for implementation in ("auto", "reference", "foreach", "cpp"):
        here, there = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
        here.grad, there.grad = torch.ones(3), torch.ones(3, device="meta")
        optimizer = Lion([here, there], lr=0.5, implementation=implementation)
        if implementation == "cpp":
            with pytest.raises(ValueError, match="'cpp' with parameters that are not on the CPU: use 'auto'"):
                optimizer.step()
        else:
            optimizer.step()
            assert here.tolist() == [0.5] * 3
    here.grad = None
    here.decoupled_grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="a parameter on cpu has a gradient on meta: needs both on one device"):
        Lion([here]).step()


def test_without_the_other_files_only_the_equations_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lion_without_the_rest").mkdir()
    for name in ("lion.py", "update.py"):
        shutil.copyfile(Path(implementations.__file__).with_name(name), tmp_path / "lion_without_the_rest" / name)
    monkeypatch.syspath_prepend(tmp_path)
    from lion_without_the_rest.lion import Lion as Alone

    for settings in (
        {"implementation": "foreach"},
        {"cautious": True},
        {"momentum": "int8"},
        {"master_weights": "fp32"},
    ):
        with pytest.raises(ValueError, match=r"needs the other files of megatron_lion/optim beside lion\.py"):
            Alone([torch.nn.Parameter(torch.ones(3))], betas=(0.9, 0.95), **settings)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Alone([param], lr=0.5, count_steps=True)
    optimizer.step()
    assert param.tolist() == [0.5] * 3
    assert float(optimizer.state[param]["step"]) == 1.0
    for name in [name for name in sys.modules if name.startswith("lion_without_the_rest")]:
        del sys.modules[name]


# ---- SGD


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "0.1"}, rf"^lr = '0.1': {NUMBER}; convert the text"),
        ({"lr": None}, rf"^lr = None: {NUMBER}$"),
        ({"lr": True}, rf"^lr = True: {NUMBER}$"),
        ({"weight_decay": "x"}, rf"^weight_decay = 'x': {NUMBER}"),
        *[
            ({"momentum": value}, "^momentum = .*: needs a number, at least 0 and below 1$")
            for value in (None, "0.9", True, 1.0, -0.1, (0.9,), float("nan"))
        ],
        *[({"coupled_weight_decay": value}, rf"^coupled_weight_decay = .*: {FLAG}$") for value in (None, "no", 1)],
    ],
    ids=str,
)
def test_wrong_arguments_of_sgd_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sgd([weight()], **{"lr": 0.1, **settings})
