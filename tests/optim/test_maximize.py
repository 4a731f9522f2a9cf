"""`maximize`: a step on the negated gradient, in every implementation and form, for the groups that ask for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits, same_state
from reference import LionFloat32

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maximize_is_a_step_on_the_negated_gradient_in_the_groups_that_ask_for_it(implementation):
    rng = np.random.default_rng(1)
    starts = [rng.standard_normal(size).astype(np.float32) for size in (70, 33)]
    params = [torch.nn.Parameter(torch.from_numpy(start.copy()).to(DEVICE)) for start in starts]
    groups = [{"params": params[:1], "maximize": True}, {"params": params[1:]}]
    optimizer = Lion(groups, implementation=implementation, **HYPER)
    oracles = [LionFloat32(start, **HYPER) for start in starts]
    for number in range(4):
        if number == 2:  # as any option of a group, it may change between steps
            optimizer.param_groups[0]["maximize"], optimizer.param_groups[1]["maximize"] = False, True
        multiplier = None if number % 2 else torch.tensor([0.25], device=DEVICE)
        for param, oracle, group in zip(params, oracles, optimizer.param_groups, strict=True):
            grad = rng.standard_normal(len(param)).astype(np.float32)
            param.grad = torch.from_numpy(grad).to(DEVICE)
            oracle.step(grad * np.float32((-1 if group["maximize"] else 1) * (1.0 if number % 2 else 0.25)))
        optimizer.step(grad_multiplier=multiplier)
    for param, oracle in zip(params, oracles, strict=True):
        assert same_bits(param.detach().cpu(), torch.from_numpy(oracle.theta))
        assert same_bits(optimizer.state[param]["exp_avg"].cpu(), torch.from_numpy(oracle.exp_avg))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", [("split32", "int8", True), ("fp32", "bf16", False), ("split24", "fp32", True)])
def test_maximize_in_packed_and_cautious_forms_equals_negated_gradients(implementation, mode):
    settings = {"master_weights": mode[0], "momentum": mode[1], "cautious": mode[2], "init_exp_avg": "first_gradient"}
    ends = []
    for maximize in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1, 2, size, device=DEVICE).bfloat16()) for size in (70, 33)]
        optimizer = Lion(params, maximize=maximize, implementation=implementation, **HYPER, **settings)
        for number in range(3):
            for param in params:
                grad = torch.cos(torch.arange(float(len(param)), device=DEVICE) * (number + 1))
                param.decoupled_grad = grad if maximize else -grad
            optimizer.step()
        ends.append(optimizer)
    assert same_state(*ends)


def test_float64_maximizes_too():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    Lion([param], lr=0.5, maximize=True, implementation="cpp").step()
    assert param.tolist() == [1.5] * 3
