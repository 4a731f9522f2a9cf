"""Slow, independent implementations to compare the fast ones with. numpy only; this file does not import the package.

`lion_float64` follows Algorithm 1 of arXiv 2411.07724 line by line. `lion_float32` rounds after every operation in
the documented order; numpy neither fuses nor reorders. `LionFloat32` adds the state between steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def lion_float64(theta, exp_avg, grad, *, lr, betas, weight_decay):
    """Returns (θ_{k+1}, m_k) in double precision."""
    beta1, beta2 = betas
    c = beta1 * exp_avg + (1 - beta1) * grad
    return theta - lr * (np.sign(c) + weight_decay * theta), beta2 * exp_avg + (1 - beta2) * grad


def lion_float32(theta, exp_avg, grad, *, lr, betas, weight_decay):
    """Returns (θ_{k+1}, m_k) in float32, each operation rounded once."""
    f32 = np.float32
    beta1, beta2 = betas
    with np.errstate(all="ignore"):
        c = exp_avg * f32(beta1) + grad * f32(1 - beta1)
        sign = np.where(np.isfinite(c), np.sign(c), f32("nan")).astype(f32)
        u = sign + theta * f32(weight_decay)
        return theta - u * f32(lr), exp_avg * f32(beta2) + grad * f32(1 - beta2)


def round_to_bfloat16(values, *, halves_up):
    """Returns float32 values rounded to 16 bits, still as float32; halves away from zero, or to even."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    half = np.uint64(0x8000) if halves_up else np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))
    rounded = ((bits + half) & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32("nan"), rounded).astype(np.float32)


@dataclass
class LionFloat32:
    """Float32 LION over one array: float32 master weights, float32 momentum from zero."""

    theta: np.ndarray
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    exp_avg: np.ndarray = field(init=False)

    def __post_init__(self):
        self.exp_avg = np.zeros_like(self.theta)

    def step(self, grad):
        self.theta, self.exp_avg = lion_float32(
            self.theta, self.exp_avg, grad, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )


def cautious_lion_float64(theta, exp_avg, grad, *, lr, betas, weight_decay):
    """Cautious LION: only coordinates whose update has the sign of the gradient move, by a larger step."""
    beta1, beta2 = betas
    sign = np.sign(beta1 * exp_avg + (1 - beta1) * grad)
    mask = (sign * grad > 0).astype(np.float64)
    update = sign * mask / max(mask.mean(), 1e-3)
    return theta - lr * (update + weight_decay * theta), beta2 * exp_avg + (1 - beta2) * grad
