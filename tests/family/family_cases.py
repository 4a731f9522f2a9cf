"""Shared by the tests of LION's relatives: awkward floats, bitwise comparison, and κ in numpy (float64)."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

SMALLEST = 2.0**-149
AWKWARD = (0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
floats = st.floats(-4, 4, width=32) | st.floats(width=32) | st.sampled_from(AWKWARD)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit; -0 differs from 0, any NaN equals any other."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    same = (left.isnan() & right.isnan()) | (left.view(whole) == right.view(whole))
    return left.dtype == right.dtype and bool(same.all())


def rows(x):
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)


def numpy_gradient(name, x, p, delta):
    """∂κ(x) from the definitions, without care for tiny or huge values."""
    if name == "l1":
        return np.sign(x)
    if name == "huber":
        return np.clip(x / delta, -1, 1)
    if name == "group_l2":
        norms = np.linalg.norm(rows(x), axis=1, keepdims=True)
        return np.divide(rows(x), norms, out=np.zeros_like(rows(x)), where=norms > 0).reshape(x.shape)
    norm = (np.abs(x) ** p).sum() ** (1 / p)
    return np.sign(x) * np.abs(x) ** (p - 1) / norm ** (p - 1) if norm else np.zeros_like(x)


def numpy_value(name, x, p, delta):
    if name == "l1":
        return np.abs(x).sum()
    if name == "huber":
        return np.where(np.abs(x) <= delta, x**2 / (2 * delta), np.abs(x) - delta / 2).sum()
    if name == "group_l2":
        return np.linalg.norm(rows(x), axis=1).sum()
    return (np.abs(x) ** p).sum() ** (1 / p)


def numpy_dual_norm(name, y, p):
    if name == "group_l2":
        return np.linalg.norm(rows(y), axis=1).max()
    if name == "lp" and p > 1:
        q = p / (p - 1)
        return (np.abs(y) ** q).sum() ** (1 / q)
    return np.abs(y).max()


def numpy_conjugate(name, y, delta):
    """κ*(y) inside of its domain."""
    return delta / 2 * (y**2).sum() if name == "huber" else 0.0
