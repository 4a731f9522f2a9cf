"""Inputs of a step other than gradients, on every implementation: rates that are replaced, and found_inf."""

from __future__ import annotations

import copy

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits, same_state

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def two_groups(implementation, **settings):
    """Two groups, of two parameters and one, with a gradient of 1 each, so that every step goes down by the rate."""
    params = [torch.nn.Parameter(torch.zeros(size, device=DEVICE)) for size in (70, 3, 40)]
    for param in params:
        param.grad = torch.ones_like(param)
    return Lion([{"params": params[:2]}, {"params": params[2:]}], implementation=implementation, **settings), params


def moved(optimizer, params):
    """Returns how far a step moves each group; all elements of a group move by the same amount."""
    before = [param.detach().clone() for param in params]
    optimizer.step()
    by_param = [(old - param.detach()).unique().tolist() for old, param in zip(before, params, strict=True)]
    assert by_param[0] == by_param[1]
    return by_param[0] + by_param[2]


def rate(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_old_kept", [False, True])
def test_a_rate_tensor_that_is_replaced_takes_effect_at_once(implementation, is_old_kept):
    """Powers of two as rates: every difference is exact."""
    kept = []
    optimizer, params = two_groups(implementation, lr=rate(0.5))
    groups = optimizer.param_groups
    assert moved(optimizer, params) == [0.5, 0.5]
    for first, second in ((0.25, 0.5), (0.25, 0.125), (2.0, 4.0), (0.0, 1.0)):
        if is_old_kept:
            kept += [group["lr"] for group in groups]
        for group, value in zip(groups, (first, second), strict=True):
            if float(group["lr"]) != value:  # the one of the two that stays keeps its tensor
                group["lr"] = rate(value)
        assert moved(optimizer, params) == [first, second]
        assert moved(optimizer, params) == [first, second]
    groups[0]["lr"], groups[1]["lr"] = groups[1]["lr"], groups[0]["lr"]
    assert moved(optimizer, params) == [1.0, 0.0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rate_may_turn_from_a_number_to_a_tensor_and_back(implementation):
    optimizer, params = two_groups(implementation, lr=0.5)
    groups = optimizer.param_groups
    assert moved(optimizer, params) == [0.5, 0.5]
    groups[1]["lr"] = rate(0.25)
    assert moved(optimizer, params) == [0.5, 0.25]
    groups[0]["lr"] = 2.0
    assert moved(optimizer, params) == [2.0, 0.25]
    groups[0]["lr"], groups[1]["lr"] = rate(4.0), 0.125
    assert moved(optimizer, params) == [4.0, 0.125]
    groups[0]["lr"] = rate([8.0])
    assert moved(optimizer, params) == [8.0, 0.125]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_a_rate_tensor_of_another_dtype_is_a_number_like_any_other(implementation, dtype):
    """Building refuses such a rate, but a scheduler may put one in later."""
    optimizer, params = two_groups(implementation, lr=rate(0.5))
    assert moved(optimizer, params) == [0.5, 0.5]
    optimizer.param_groups[0]["lr"] = rate(2, dtype)
    assert moved(optimizer, params) == [2.0, 0.5]
    optimizer.param_groups[0]["lr"] = rate(4, dtype)
    assert moved(optimizer, params) == [4.0, 0.5]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["weight_decay", "betas"])
def test_other_hyper_parameters_that_are_replaced_take_effect_at_once(implementation, name):
    optimizer, params = two_groups(implementation, lr=rate(0.5), betas=(0.5, 0.5))
    assert moved(optimizer, params) == [0.5, 0.5]
    if name == "weight_decay":
        optimizer.param_groups[1]["weight_decay"] = 1.0
        assert moved(optimizer, params) == [0.5, 0.5 * (1.0 - 0.5)]  # from -0.5
    else:
        optimizer.param_groups[1]["betas"] = (0.5, 0.25)
        assert moved(optimizer, params) == [0.5, 0.5]
        # From 0 by halves and twice 1: 0.75. By a half, then a quarter of it and three quarters of 1: 0.875.
        found = [optimizer.state[param]["exp_avg"].unique().tolist() for param in params]
        assert found == [[0.75], [0.75], [0.875]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [1.0, 2.0, 0.5, -1.0, 1e-40, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", [("none", "fp32", False), ("split32", "int8", True)])
def test_any_found_inf_but_0_leaves_every_bit_alone(implementation, value, mode):
    """On the first step, which makes the tables, and on later ones, which find them made."""
    settings = {"master_weights": mode[0], "momentum": mode[1], "cautious": mode[2], "count_steps": True}
    params = [torch.nn.Parameter(torch.linspace(-1, 1, size, device=DEVICE).bfloat16()) for size in (70, 3)]
    optimizer = Lion(params, lr=0.1, weight_decay=0.1, implementation=implementation, **settings)
    optimizer.init_state()
    for param in params:
        param.decoupled_grad = torch.linspace(1, -2, len(param), device=DEVICE)
    for number in range(3):
        before = copy.deepcopy(optimizer)
        for shape in ((), (1,)):
            optimizer.step(found_inf=torch.full(shape, value, device=DEVICE))
            assert same_state(optimizer, before)
        zero = torch.full((), (0.0, -0.0)[number % 2], device=DEVICE)
        optimizer.step(found_inf=zero)
        assert [float(optimizer.state[param]["step"]) for param in params] == [number + 1] * 2
        assert not any(
            same_bits(param.detach(), old) for param, old in zip(params, before.param_groups[0]["params"], strict=True)
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64])
def test_found_inf_may_have_any_dtype(implementation, dtype):
    optimizer, params = two_groups(implementation, lr=0.5)
    for found, expected in ((1, [0.0, 0.0]), (0, [0.5, 0.5]), (1, [0.0, 0.0]), (0, [0.5, 0.5])):
        found_inf = torch.tensor(found, dtype=dtype, device=DEVICE)
        before = [params[0][0].item(), params[2][0].item()]
        optimizer.step(found_inf=found_inf)
        assert [before[0] - params[0][0].item(), before[1] - params[2][0].item()] == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_multiplier_also_decides_which_elements_of_cautious_lion_move(implementation):
    """The count of agreeing elements, which sets how far the others go, is of the multiplied gradients."""
    ends = []
    for factor in (None, -0.25):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 40, device=DEVICE))
        name = "reference" if factor is None else implementation
        optimizer = Lion([param], lr=0.1, betas=(0.5, 0.5), cautious=True, implementation=name)
        for step in range(3):
            grad = torch.cos(torch.arange(40.0, device=DEVICE) * (step + 1))
            multiplier = None
            if factor is None:
                grad = grad * -0.25
            else:
                multiplier = torch.tensor([factor], device=DEVICE)
            param.grad = grad
            optimizer.step(grad_multiplier=multiplier)
        ends.append(param.detach())
    assert same_bits(*ends)
