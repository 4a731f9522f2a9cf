"""CLion: the sign, or in a step with a small element the mix itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_cases import same_bits
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.family.clion import CLion
from megatron_lion.optim.lion import Lion

SHAPES = [(5, 3), (4,)]


@given(threshold=st.sampled_from([0.01, 0.05, 0.3]), seed=st.integers(0, 99))
@examples(60)
def test_steps_are_the_equations_in_numpy(threshold, seed):
    """Gradients whose size differs between steps, with exact zeros; one small element decides for both parameters."""
    rng = np.random.default_rng(seed)
    thetas, ms = [rng.standard_normal(shape) for shape in SHAPES], [np.zeros(shape) for shape in SHAPES]
    params = [torch.nn.Parameter(torch.from_numpy(theta.copy())) for theta in thetas]
    optimizer = CLion(params, lr=0.1, betas=(0.5, 0.8), weight_decay=0.2, threshold=threshold)
    for _ in range(8):
        gs = [rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 2, shape) * rng.choice([0.02, 5]) for shape in SHAPES]
        gs[0][0] = 0
        for param, g in zip(params, gs, strict=True):
            param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        cs = [0.5 * m + 0.5 * g for m, g in zip(ms, gs, strict=True)]
        sizes = np.abs(np.concatenate([c.ravel() for c in cs]))
        is_sign = sizes[sizes > 0].min() >= threshold
        for number, (c, g) in enumerate(zip(cs, gs, strict=True)):
            thetas[number] -= 0.1 * ((np.sign(c) if is_sign else c) + 0.2 * thetas[number])
            ms[number] = 0.8 * ms[number] + 0.2 * g
        for param, theta in zip(params, thetas, strict=True):
            np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-11, atol=1e-13)


def test_a_tiny_threshold_gives_lion_and_a_huge_one_gives_momentum():
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
    copies = [[torch.nn.Parameter(start.clone()) for start in starts] for _ in range(3)]
    settings = {"lr": 0.05, "weight_decay": 0.1}
    tiny, huge = CLion(copies[0], **settings, threshold=1e-30), CLion(copies[1], **settings, threshold=1e30)
    lion = Lion(copies[2], **settings, implementation="reference")
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        for number, shape in enumerate(SHAPES):
            grad = torch.randn(shape, generator=generator)
            for params in copies:
                params[number].grad = grad.clone()
        before = [param.detach().clone() for param in copies[1]]
        mixed = [huge.state[param].get("exp_avg", torch.zeros(())) * 0.9 + param.grad * 0.1 for param in copies[1]]
        for optimizer in (tiny, huge, lion):
            optimizer.step()
        for old, c, param in zip(before, mixed, copies[1], strict=True):
            torch.testing.assert_close(param.detach(), old - 0.05 * (c + 0.1 * old))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(copies[0], copies[2], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_what_is_not_finite_is_no_step_of_finite_length(bad, threshold):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, bad, 2.0])
    CLion([param], lr=0.1, threshold=threshold).step()
    assert param.detach().isfinite().tolist() == [True, False, True]


def test_the_threshold_has_no_default_and_must_be_above_zero():
    with pytest.raises(TypeError, match="threshold"):
        CLion([torch.nn.Parameter(torch.ones(1))])
    for wrong in (0.0, -1.0, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="threshold"):
            CLion([torch.nn.Parameter(torch.ones(1))], threshold=wrong)
