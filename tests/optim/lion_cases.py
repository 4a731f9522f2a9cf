"""Shared by the LION tests: the device, the implementations, hyper-parameters and awkward values."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from megatron_lion.optim import cpp_compiler
from megatron_lion.optim.lion import Lion

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The C++ loop is for tensors on a CPU, and needs a compiler.
HAS_COMPILER = any(shutil.which(name) for name in cpp_compiler.COMPILERS)
FAST = ("foreach", "cpp", "triton") if DEVICE.type == "cpu" and HAS_COMPILER else ("foreach", "triton")
IMPLEMENTATIONS = ("reference", *FAST)
MASTERS = ("none", "fp32", "split32", "split24")
MOMENTA = ("fp32", "bf16", "int8")

# ±0, the smallest and a medium subnormal, the smallest normal, bfloat16 ties of both parities, a carry into the
# exponent, the largest number, infinities, NaN.
AWKWARD_BITS = (
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00412345, 0x00800000, 0x3F808000, 0x3F818000, 0xBF808000,
    0x3F7FFFFF, 0x3FFF8000, 0x3F80807F, 0x3F808080, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F800000, 0xFF800000,
    0x7FC00000, 0x7FFFFFFF,
)  # fmt: skip
AWKWARD = tuple(struct.unpack("<f", struct.pack("<I", bits))[0] for bits in AWKWARD_BITS)

floats = st.floats(width=32, allow_nan=True) | st.sampled_from(AWKWARD) | st.floats(-4, 4, width=32)
finite_floats = st.floats(-1e3, 1e3, width=32)
betas = st.sampled_from([(0.9, 0.99), (0.9, 0.95), (0.0, 0.5), (0.95, 0.0), (0.7, 0.7)])
lrs = st.sampled_from([0.0, 1e-5, 1e-4, 0.03, 1.0])
decays = st.sampled_from([0.0, 0.01, 0.1, 1.0])


def tensor(values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Returns whether two tensors are equal bit for bit; -0 differs from 0, any NaN equals any other."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    nan = left.isnan() & right.isnan()
    return bool((nan | (left.view(whole) == right.view(whole))).all())


def same_state(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    """Returns whether two optimizers hold the same parameters and state, bit for bit."""
    pairs = zip(parameters(left), parameters(right), strict=True)
    return all(
        same_bits(a.detach(), b.detach())
        and left.state[a].keys() == right.state[b].keys()
        and all(same_bits(value, right.state[b][key]) for key, value in left.state[a].items())
        for a, b in pairs
    )


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def after_steps_on_views(
    implementation: str, lengths: Sequence[int], first: int, device: torch.device | str, **options: Any
) -> Lion:
    """Returns an optimizer after two steps on neighbouring views of a bf16 buffer from element `first`, in two groups.

    Asserts that the gradients and the elements on both sides of the views do not change.
    """
    generator = torch.Generator().manual_seed(first)
    values = torch.randn(first + sum(lengths) + 5, generator=generator).to(device, torch.bfloat16)
    grads = torch.randn(values.shape, generator=generator).to(device)
    buffer, grad_buffer = values.clone(), grads.clone()
    params = [torch.nn.Parameter(view) for view in buffer[first:-5].split(list(lengths))]
    for param, grad in zip(params, grad_buffer[first:-5].split(list(lengths)), strict=True):
        param.decoupled_grad = grad
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.1}]
    optimizer = Lion(groups, lr=0.01, implementation=implementation, **options)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(grad_buffer, grads)
    assert torch.equal(buffer[:first], values[:first])
    assert torch.equal(buffer[-5:], values[-5:])
    return optimizer
