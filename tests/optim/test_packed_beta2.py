"""β2 at its limit for a packed momentum, and just above it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
LIMIT = 255 / 256  # bfloat16 and an int8 block's scale have 8 bits: 1 - 2^-8
PACKED = ("bf16", "int8")
ABOVE = math.nextafter(LIMIT, 1.0)


def build(momentum, beta2, implementation="foreach", size=96):
    param = torch.nn.Parameter(torch.zeros(size, device=DEVICE))
    return Lion([param], lr=0.01, betas=(0.9, beta2), momentum=momentum, implementation=implementation), param


@pytest.mark.parametrize("momentum", PACKED)
def test_above_the_limit_is_refused_by_name(momentum):
    message = rf"momentum = '{momentum}' with betas = \(0.9, {ABOVE}\): needs the second at most 0.99609375.*'fp32'"
    with pytest.raises(ValueError, match=message):
        build(momentum, ABOVE)
    optimizer, param = build(momentum, LIMIT)
    with pytest.raises(ValueError, match=r"needs the second at most 0\.99609375"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "betas": (0.9, ABOVE)})
    assert optimizer.param_groups[0]["params"] == [param]
    assert len(optimizer.param_groups) == 1
    build("fp32", ABOVE)
    build("fp32", 0.9999)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", PACKED)
def test_at_the_limit_every_step_rounds_once_within_the_stated_bound(implementation, momentum):
    optimizer, param = build(momentum, LIMIT, implementation)
    rng = np.random.default_rng(1)
    before = np.zeros(96)
    for number in range(40):
        grad = rng.standard_normal(96).astype(np.float32) * np.float32(10.0 ** (number % 5 - 2))
        param.grad = torch.from_numpy(grad).to(DEVICE)
        optimizer.step()
        exact = before * LIMIT + grad.astype(np.float64) * (1 - LIMIT)
        before = optimizer.get_unscaled_state(param, "exp_avg").cpu().double().numpy()
        # bfloat16 keeps 8 bits; int8 half a step of max/127 and its scale's rounding. The sum itself is float32.
        bound = np.abs(exact) * 2**-8 + (np.abs(grad) + np.abs(exact)) * 2.0**-23
        if momentum == "int8":
            bound = np.abs(exact).reshape(3, 32).max(axis=1).repeat(32) * (0.502 / 127)
        assert (np.abs(before - exact) <= bound).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", PACKED)
def test_at_the_limit_a_momentum_without_gradients_shrinks_at_every_step(implementation, momentum):
    """From every 8-bit fraction, since the smallest one shrinks by the most bits and the largest by the fewest."""
    size = 128 if momentum == "bf16" else 128 * 32
    optimizer, param = build(momentum, LIMIT, implementation, size)
    values = torch.arange(128, 256, device=DEVICE, dtype=torch.float32)
    if momentum == "int8":
        values = (values[:, None] * torch.linspace(1, 0.5, 32, device=DEVICE)).view(-1)
    optimizer.set_scaled_state(param, "exp_avg", values)
    param.grad = torch.zeros_like(param)
    largest = optimizer.get_unscaled_state(param, "exp_avg").view(128, -1).amax(dim=1)
    first = largest.clone()
    for _ in range(300 if implementation != "triton" else 20):  # interpreted, a launch takes 10 ms
        optimizer.step()
        smaller = optimizer.get_unscaled_state(param, "exp_avg").view(128, -1).amax(dim=1)
        assert (smaller < largest).all()
        largest = smaller
    if implementation != "triton":
        # 128 steps take a fraction of 8 bits through its binade; exactly it would be 0.31.
        assert (largest <= first * 2.0**-2).all()


def test_a_config_is_checked_against_the_same_limit():
    from megatron_lion import config_checks
    from megatron_lion.optim import layouts

    assert config_checks.MAX_PACKED_BETA2 == layouts.MAX_PACKED_BETA2 == LIMIT
