"""StoSignSGD: its state in numpy, an expected step that is m/G, and noise that a resumed run draws again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_lion.family.sto_sign_sgd import StoSignSGD


def test_state_and_steps_are_the_equations_in_numpy():
    """θ moves by exactly ±η and the decay; m and G are as defined; an element without a gradient only decays."""
    rng = np.random.default_rng(0)
    theta, m, largest = rng.standard_normal((6, 5)), np.zeros((6, 5)), np.zeros((6, 5))
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = StoSignSGD([param], lr=0.1, momentum=0.7, weight_decay=0.3)
    for _ in range(10):
        g = rng.standard_normal((6, 5))
        g[0] = 0
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m = 0.7 * m + 0.3 * g
        largest = np.maximum(largest, np.abs(m))
        after = param.detach().numpy().copy()
        direction = -(after - theta) / 0.1 - 0.3 * theta
        np.testing.assert_allclose(direction[0], 0, atol=1e-12)
        np.testing.assert_allclose(np.abs(direction[1:]), 1, rtol=1e-10)
        is_certain = np.abs(m) == largest
        np.testing.assert_array_equal(np.sign(direction[1:])[is_certain[1:]], np.sign(m[1:])[is_certain[1:]])
        theta = after
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), m, rtol=1e-12)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg_max"].numpy(), largest, rtol=1e-12)


@pytest.mark.parametrize("share", [-1.0, -0.6, 0.0, 0.25, 0.9])
def test_the_expected_step_is_the_momentum_over_its_largest_size(share):
    """100,000 elements with m/G = share: the mean sign is within five standard errors of it, and the noise is uniform."""
    count = 100_000
    param = torch.nn.Parameter(torch.zeros(count))
    optimizer = StoSignSGD([param], lr=1.0, momentum=0.0, seed=3)
    for gradient in (-2.0, 2.0 * share):  # G = 2 after the first
        param.grad = torch.full((count,), gradient)
        before = param.detach().clone()
        optimizer.step()
    signs = before - param.detach()
    assert set(signs.tolist()) <= {-1.0, 1.0}
    assert abs(float(signs.double().mean()) - share) <= 5 * math.sqrt((1 - share**2) / count)


def test_noise_differs_between_steps_parameters_and_seeds():
    def signs(seed: int) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2)]
        optimizer = StoSignSGD(params, lr=1.0, momentum=0.0, seed=seed)
        found = []
        for gradient in (1.0, 1e-3, 1e-3):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.full((64,), gradient)
            optimizer.step()
            found += [old - param.detach() for old, param in zip(before, params, strict=True)]
        return found[2:]

    first, again, other = signs(0), signs(0), signs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    different = [*first, *other]
    for number, one in enumerate(different):
        for two in different[number + 1 :]:
            assert 10 <= int((one != two).sum()) <= 54  # 64 fair coins


def test_what_is_not_finite_becomes_nan():
    for bad in (float("nan"), float("inf")):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.tensor([1.0, bad, 2.0])
        StoSignSGD([param], lr=0.1).step()
        assert param.detach().isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    "settings", [{"momentum": 1.0}, {"momentum": -0.1}, {"seed": -1}, {"seed": 1.5}, {"seed": True}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        StoSignSGD([torch.nn.Parameter(torch.ones(1))], **settings)
