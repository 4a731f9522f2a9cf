"""The convex functions κ of Lion-κ: value, subgradient, conjugate κ*, and the norm that bounds the domain of κ*.

| name | κ(x) | ∂κ(x) used in the step | κ*(y) |
|---|---|---|---|
| l1 | ‖x‖₁ | sign(x), 0 at 0 | 0 if ‖y‖∞ ≤ 1, else ∞ |
| lp | ‖x‖_p, p ≥ 1 | sign(x)·(abs(x)/‖x‖_p)^{p-1}, 0 at x = 0 | 0 if ‖y‖_q ≤ 1, else ∞; 1/p + 1/q = 1 |
| huber | Σ x²/(2δ) if abs(x) ≤ δ, else abs(x) - δ/2 | clip(x/δ, -1, 1) | δ‖y‖₂²/2 if ‖y‖∞ ≤ 1, else ∞ |
| group_l2 | Σ_rows ‖x_row‖₂ | x_row/‖x_row‖₂, 0 at 0 | 0 if every ‖y_row‖₂ ≤ 1, else ∞ |

κ of several tensors is the sum over them. A row is `x[i]`; a tensor with fewer than two dimensions is one row.

Source: Chen, Liu, Liang and Liu, *Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts*, ICLR 2024,
arXiv 2310.05898; the conjugates are textbook results (dual norms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..optim.update import check_choice, is_in_range
from .plain_rule import check_above_zero

KAPPAS = ("l1", "lp", "huber", "group_l2")

# The smallest normal float32. Less may count as 0 in a step, and its inverse is inf: an element of 0 would become NaN.
SMALLEST_DELTA = 2.0**-126


@dataclass(frozen=True)
class Kappa:
    """One of the functions above.

    Attributes:
        name: one of `KAPPAS`.
        p: exponent of "lp", at least 1.
        delta: δ of "huber", at least `SMALLEST_DELTA`; the limit as δ → 0 is "l1".

    Raises:
        ValueError: a setting is not one of those.

    Example:
        >>> Kappa("huber", delta=2.0).gradient(torch.tensor([1.0, -3.0, 0.0]))
        tensor([ 0.5000, -1.0000,  0.0000])
    """

    name: str = "l1"
    p: float = 2.0
    delta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kappa", self.name, KAPPAS)
        if not is_in_range(self.p, math.inf) or self.p < 1:
            raise ValueError(f"p = {self.p!r}: needs a finite number, at least 1")
        check_above_zero("delta", self.delta)
        if float(self.delta) < SMALLEST_DELTA:
            raise ValueError(
                f"delta = {self.delta!r}: needs at least {SMALLEST_DELTA:.2e}; use kappa='l1' for smaller ones"
            )

    def value(self, x_N: torch.Tensor) -> torch.Tensor:
        """Returns κ(x) of one tensor, 0-d; 0 if it has no element."""
        if self.name == "huber":
            size_N = x_N.abs()
            return torch.where(size_N <= self.delta, x_N * x_N / (2 * self.delta), size_N - self.delta / 2).sum()
        if self.name == "l1":
            return x_N.abs().sum()
        if not x_N.numel():
            return x_N.new_zeros(())
        rows_GN = _rows(x_N) if self.name == "group_l2" else x_N.reshape(1, -1)
        return _norms(rows_GN, 2.0 if self.name == "group_l2" else self.p).sum()

    def gradient(self, x_N: torch.Tensor) -> torch.Tensor:
        """Returns the subgradient of the table, of the shape of x; NaN if x is not finite."""
        if not x_N.numel():
            return torch.zeros_like(x_N)
        if self.name == "l1":
            found_N = x_N.sign()
        elif self.name == "huber":
            found_N = (x_N / self.delta).clamp(-1.0, 1.0)
        elif self.name == "group_l2":
            rows_GN = _rows(x_N)
            largest_G1 = _one_if_zero(rows_GN.abs().amax(dim=1, keepdim=True))
            scaled_GN = rows_GN / largest_G1  # squares of tiny or huge elements would be 0 or inf
            norm_G1 = _one_if_zero(torch.linalg.vector_norm(scaled_GN, dim=1, keepdim=True))
            found_N = (scaled_GN / norm_G1).view(x_N.shape)
        else:
            scaled_N = x_N / _one_if_zero(x_N.abs().amax())
            norm = _one_if_zero(torch.linalg.vector_norm(scaled_N, self.p))
            found_N = scaled_N.sign() * (scaled_N.abs() / norm).pow(self.p - 1)
        return found_N + (x_N - x_N)  # sign and clamp alone turn inf into 1

    def conjugate(self, y_N: torch.Tensor) -> torch.Tensor:
        """Returns κ*(y) inside its domain, 0-d: 0 for a norm. Outside it is ∞; see `dual_norm`."""
        return self.delta / 2 * (y_N * y_N).sum() if self.name == "huber" else y_N.new_zeros(())

    def dual_norm(self, y_N: torch.Tensor) -> torch.Tensor:
        """Returns the norm of y, 0-d, that is at most 1 exactly in the domain of κ*; 0 if y has no element."""
        if not y_N.numel():
            return y_N.new_zeros(())
        if self.name == "group_l2":
            return _norms(_rows(y_N), 2.0).amax()
        if self.name == "lp" and self.p > 1:
            return _norms(y_N.reshape(1, -1), self.p / (self.p - 1)).squeeze(0)
        return y_N.abs().amax()


def _rows(x_N: torch.Tensor) -> torch.Tensor:
    return x_N.reshape(x_N.shape[0] if x_N.dim() > 1 else 1, -1)


def _norms(rows_GN: torch.Tensor, p: float) -> torch.Tensor:
    """Returns ‖row‖_p of each row, [G]: powers of elements of about size 1, so that they are neither all 0 nor inf."""
    largest_G1 = rows_GN.abs().amax(dim=1, keepdim=True)
    divisor_G1 = torch.where(largest_G1.isinf(), 1.0, _one_if_zero(largest_G1))  # inf / inf would be NaN
    return torch.linalg.vector_norm(rows_GN / divisor_G1, p, dim=1) * largest_G1.squeeze(1)


def _one_if_zero(size: torch.Tensor) -> torch.Tensor:
    return torch.where(size == 0, 1.0, size)
