"""Lion-κ: LION itself for κ = ‖·‖₁, the equations in numpy for the others, and the solutions that it must reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from family_cases import floats, numpy_gradient, same_bits
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.family.kappas import KAPPAS, Kappa
from megatron_lion.family.lion_kappa import LionKappa
from megatron_lion.family.lyapunov import optimality
from megatron_lion.optim.lion import Lion

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    values=st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=12), dtype=st.sampled_from(DTYPES),
    betas=st.sampled_from([(0.9, 0.99), (0.95, 0.0), (0.7, 0.7)]), decay=st.sampled_from([0.0, 0.1, 1.0]),
    lr=st.sampled_from([0.0, 1e-5, 0.03, 1.0]), tensor_lr=st.booleans(),
)  # fmt: skip
@examples(200)
def test_the_l1_norm_gives_lion_bit_for_bit(values, dtype, betas, decay, lr, tensor_lr):
    """Parameters and momentum, with infinities, NaN and both zeros among the values."""
    start, *gradients = torch.tensor(values, dtype=torch.float32).to(dtype).unbind(1)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": torch.tensor(lr) if tensor_lr else lr, "betas": betas, "weight_decay": decay}
    mine, lion = LionKappa([ours], **settings), Lion([theirs], **settings, implementation="reference")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        lion.step()
        assert same_bits(ours.detach(), theirs.detach())
        assert same_bits(mine.state[ours]["exp_avg"], lion.state[theirs]["exp_avg"])


@pytest.mark.parametrize("kappa", KAPPAS)
def test_steps_are_the_equations_in_numpy(kappa):
    rng = np.random.default_rng(3)
    theta, m = rng.standard_normal((4, 6)), np.zeros((4, 6))
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = LionKappa([param], lr=0.05, betas=(0.8, 0.95), weight_decay=0.3, kappa=kappa, p=3.0, delta=0.7)
    for _ in range(20):
        g = rng.standard_normal((4, 6)) * 2
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        direction = numpy_gradient(kappa, 0.8 * m + 0.2 * g, 3.0, 0.7)
        theta, m = theta - 0.05 * (direction + 0.3 * theta), 0.95 * m + 0.05 * g
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), m, rtol=1e-12, atol=1e-12)


TARGET = torch.tensor([[5.0, -0.4, 1.0], [0.2, 0.1, -0.3]], dtype=torch.float64)
DECAY, DELTA = 0.5, 1.5


def closest(kappa: str) -> torch.Tensor:
    """The solution of min ‖θ - TARGET‖²/2 + κ*(λθ)/λ in closed form: a projection, for Huber of the shrunk target."""
    if kappa == "l1":
        return TARGET.clamp(-1 / DECAY, 1 / DECAY)
    if kappa == "huber":
        return (TARGET / (1 + DELTA * DECAY)).clamp(-1 / DECAY, 1 / DECAY)
    norms = TARGET.norm(dim=1, keepdim=True) if kappa == "group_l2" else TARGET.norm()
    return TARGET * (1 / (DECAY * norms)).clamp(max=1.0)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_it_reaches_the_solution_of_its_problem(kappa):
    """With a falling rate; the solution is in closed form, and the residual there is 0."""
    param = torch.nn.Parameter(torch.zeros_like(TARGET))
    optimizer = LionKappa([param], lr=0.0, betas=(0.9, 0.99), weight_decay=DECAY, kappa=kappa, p=2.0, delta=DELTA)
    for step in range(6000):
        param.grad = param.detach() - TARGET
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 6000)
        optimizer.step()
    torch.testing.assert_close(param.detach(), closest(kappa), rtol=0, atol=2e-3)
    found = optimality(Kappa(kappa, 2.0, DELTA), [closest(kappa)], [closest(kappa) - TARGET], DECAY)
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.excess <= 1e-12


def test_the_first_steps_are_as_long_as_kappa_says():
    """√d η for the sign, η for a norm of the tensor, √rows η for rows."""
    lengths = {}
    for kappa in KAPPAS[:2] + KAPPAS[3:]:
        param = torch.nn.Parameter(torch.zeros(4, 9))
        param.grad = torch.linspace(1, 2, 36).view(4, 9)
        LionKappa([param], lr=0.1, kappa=kappa).step()
        lengths[kappa] = float(param.detach().norm())
    assert lengths == pytest.approx({"l1": 0.6, "lp": 0.1, "group_l2": 0.2}, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_delta_steps_like_the_sign_and_smaller_ones_are_refused(dtype):
    """A δ that is 0 in float32 would divide a gradient of 0 by 0."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    for delta in (1e-46, math.nextafter(2.0**-126, 0)):
        with pytest.raises(ValueError, match=r"needs at least 1\.18e-38"):
            LionKappa([param], lr=0.5, kappa="huber", delta=delta)
    param.grad = torch.tensor([0.0, 3e4, -1.0], dtype=dtype)
    LionKappa([param], lr=0.5, kappa="huber", delta=2.0**-126).step()
    assert param.tolist() == [0.0, -0.5, 0.5]
