"""How far Lion-κ is from a solution of its problem, and the Lyapunov function that falls on the way there.

The problem is min F(θ) = f(θ) + κ*(λθ)/λ. With gradient g = ∇f(θ), θ solves its optimality conditions (KKT) exactly if
-g ∈ ∂κ*(λθ), which by Fenchel and Young is: λθ lies in the domain of κ*, and the gap

    R(θ) = κ(g) + κ*(λθ) + λ⟨g, θ⟩ ≥ 0

is 0. For κ = ‖·‖₁ this is the residual ‖g‖₁ + λ⟨g, θ⟩ of the paper by Dong, Li and Lin.

    H(θ, m) = F(θ) + C (κ*(λθ) + κ(m) + λ⟨m, θ⟩),   C = εβ1 / (ελ(1-β1) + 1-β2),   ε = η / (1 - ηλ)

The bracket is a gap too, so H ≥ F, and inf outside the domain of κ*. From a point of the domain every step stays in it.
What holds for exact gradients g:

- **Continuous time** (η → 0 with (1-β2)/η and β1 fixed): H never rises, for a differentiable κ and f and θ in the
  domain of κ*.
- **Discrete time**, f with L-Lipschitz gradient, β1 ≤ β2, ηλ < 1, constant η and betas:
  H_{k+1} - H_k ≤ L‖θ_{k+1} - θ_k‖₂²/2 - ε(1+Cλ) D1 - C(1-β2)/(β2-β1) D2, where D1, D2 ≥ 0 (second term absent if
  β1 = β2). D1 = ⟨∂κ(c) + λθ_{k+1}, c + s⟩ with any s ∈ ∂κ*(λθ_{k+1}), D2 = ⟨∂κ(c) - ∂κ(m_k), c - m_k⟩. H may
  therefore rise by at most L‖θ_{k+1} - θ_k‖₂²/2.
- For Huber's κ, D1 ≥ δ‖∂κ(c) + λθ_{k+1}‖₂², so H falls at **every** step if ε ≤ 2δ(1+Cλ)/L. The other functions have
  no such rate: with κ = ‖·‖₁ the last steps are as long as the first, and H rises and falls near a solution.

Source: Chen, Liu, Liang and Liu, arXiv 2310.05898, for the function and the two statements, there with implicit decay.
The constant C is their ratio in the terms of this package's step; the statement on Huber's κ follows from the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .kappas import Kappa


class Optimality(NamedTuple):
    """Distance from the optimality conditions; both are 0 at a solution and only there.

    Attributes:
        gap: R(θ), with κ* as inside of its domain. Negative values are rounding if `excess` is 0.
        excess: how far λθ is outside of the domain of κ*: its dual norm minus 1, at least 0.
    """

    gap: float
    excess: float


def optimality(
    kappa: Kappa, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], weight_decay: float
) -> Optimality:
    """Returns how far parameters are from the optimality conditions of Lion-κ.

    Args:
        kappa: κ.
        params: θ.
        grads: ∇f(θ), one for each parameter.
        weight_decay: λ ≥ 0. With 0 the conditions are those of min f: the gap is κ(∇f).

    Example:
        >>> theta, target = torch.tensor([2.0, -1.0]), torch.tensor([5.0, -1.0])  # min ‖θ - target‖²/2 in the box of 2
        >>> optimality(Kappa("l1"), [theta], [theta - target], weight_decay=0.5)
        Optimality(gap=0.0, excess=0.0)
    """
    gap, excess = 0.0, 0.0
    for param, grad in zip(params, grads, strict=True):
        y, g = weight_decay * param.detach().double(), grad.double()
        gap += float(kappa.value(g) + kappa.conjugate(y) + (g * y).sum())
        beyond = float(kappa.dual_norm(y)) - 1
        if beyond > excess or math.isnan(beyond):  # max() would drop NaN
            excess = beyond
    return Optimality(gap, excess)


def lyapunov(
    kappa: Kappa,
    loss: float,
    params: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    tolerance: float = 1e-6,
) -> float:
    """Returns H(θ, m).

    Args:
        kappa: κ.
        loss: f(θ).
        params: θ.
        momenta: m, the `exp_avg` of each parameter.
        lr: η, with ηλ < 1.
        betas: (β1, β2).
        weight_decay: λ ≥ 0.
        tolerance: by how much the dual norm of λθ may exceed 1 and still count as inside: rounding of θ.

    Returns:
        H, or inf outside of the domain of κ*.

    Raises:
        ValueError: ηλ is 1 or more.
    """
    if lr * weight_decay >= 1:
        raise ValueError(f"lr x weight_decay = {lr * weight_decay}: needs less than 1")
    beta1, beta2 = betas
    implicit = lr / (1 - lr * weight_decay)
    coupling = implicit * beta1 / (implicit * weight_decay * (1 - beta1) + 1 - beta2)
    total = loss
    for param, momentum in zip(params, momenta, strict=True):
        y, m = weight_decay * param.detach().double(), momentum.double()
        if float(kappa.dual_norm(y)) > 1 + tolerance:
            return math.inf
        conjugate = float(kappa.conjugate(y))
        if weight_decay:
            total += conjugate / weight_decay
        total += coupling * (conjugate + float(kappa.value(m)) + float((m * y).sum()))
    return total
