"""Edges of the int8 momentum, byte for byte on every implementation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS
from reference import round_to_bfloat16

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
TINY = 2.0**-126


def packed_by_numpy(values):
    """All q, then all s, of whole blocks of finite values."""
    f32 = np.float32
    blocks = values.reshape(-1, 32)
    scales = round_to_bfloat16(np.abs(blocks).max(axis=1) * f32(1 / 127), halves_up=False)
    scales = np.where(scales < f32(TINY), f32(0), scales)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, f32(1) / scales, f32(0)).astype(f32)
    q = np.clip(np.rint(blocks * inverse[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([q.view(np.uint8).ravel(), (scales.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)])


def block(*values):
    return np.array([*values, *[0.0] * (32 - len(values))], np.float32)


BLOCKS = {
    "the smallest scale": block(127 * TINY, -64 * TINY, TINY),
    "just below the smallest scale": block(126 * TINY, -64 * TINY, TINY),
    "the smallest scale but one": block(128 * TINY, -64 * TINY, TINY),
    "halves go to even": block(127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5),
    "a scale rounded down, so that the largest is beyond 127": block(127 * (1 + 2**-8), -127 * (1 + 2**-8), 1.0),
    "a scale rounded up": block(127 * (1 + 3 * 2**-8), 1.0),
    "the largest at the end": block(*[1.0] * 31, -254.0),
    "zeros": block(0.0, -0.0),
    "the largest number": block(3.4028235e38, -3.4e38, 1e36),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", list(BLOCKS))
def test_a_block_is_packed_as_the_definition_says(implementation, name):
    # With β2 = 0 the new momentum is the gradient.
    values = np.concatenate([block(1.0), BLOCKS[name], block(-1.0)])
    param = torch.nn.Parameter(torch.zeros(96, device=DEVICE))
    optimizer = Lion([param], betas=(0.9, 0.0), momentum="int8", implementation=implementation)
    param.grad = torch.from_numpy(values).to(DEVICE)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].cpu().numpy().tolist() == packed_by_numpy(values).tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_blocks_are_packed_as_the_definition_says(implementation):
    rng = np.random.default_rng(1)
    scale = np.float32(2) ** rng.integers(-120, 120, (60, 1)).astype(np.float32)
    values = (rng.standard_normal((60, 32)).astype(np.float32) * scale).ravel()
    param = torch.nn.Parameter(torch.zeros(len(values), device=DEVICE))
    optimizer = Lion([param], betas=(0.9, 0.0), momentum="int8", implementation=implementation)
    param.grad = torch.from_numpy(values).to(DEVICE)
    optimizer.step()
    assert np.array_equal(optimizer.state[param]["exp_avg"].cpu().numpy(), packed_by_numpy(values))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("master_weights", "dtype"), [("split32", torch.int16), ("split24", torch.int8)])
def test_a_master_weight_that_is_nan_has_one_form(implementation, master_weights, dtype):
    """0x7FC0 and a remainder of 0: an equal state has equal bytes, whatever NaN the arithmetic made."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
    optimizer = Lion([param], lr=0.1, master_weights=master_weights, implementation=implementation)
    param.grad = torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.bfloat16, device=DEVICE)
    optimizer.step()
    assert param.detach().view(torch.int16)[1:].tolist() == [0x7FC0, 0x7FC0]
    remainder = optimizer.state[param]["master_param"]
    assert remainder.dtype == dtype
    assert remainder[1:].tolist() == [0, 0]
