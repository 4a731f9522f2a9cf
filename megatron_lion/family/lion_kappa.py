"""Lion-κ: LION with the subgradient of any convex function κ in place of the sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from ..optim.update import Forms, Slot, compute_dtype
from .kappas import Kappa
from .plain_rule import PlainRule, check_betas, move


class LionKappa(PlainRule):
    """Minimizes f(θ) + κ*(λθ)/λ by LION's step with ∂κ in place of the sign.

        c_k     = β1 m_{k-1} + (1-β1) g_k
        θ_{k+1} = θ_k - η (∂κ(c_k) + λ θ_k)
        m_k     = β2 m_{k-1} + (1-β2) g_k                  m_0 = 0

    The decay is what makes κ* appear. For a norm κ, κ* is 0 in the unit ball of the dual norm and ∞ outside: the step
    solves min f(θ) subject to that norm of λθ being at most 1, for κ = ‖·‖₁ the box ‖θ‖∞ ≤ 1/λ. For Huber's function
    there is also the penalty δλ‖θ‖₂²/2. Without decay nothing is added to f. `megatron_lion.family.kappas` has the
    functions, `megatron_lion.family.lyapunov` the distance from a solution and the function that falls along the way.

    With kappa="l1" every step is that of `Lion`, bit for bit, with the same order of operations.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`.
        lr: η ≥ 0. Steps differ in length: for d elements ‖∂κ‖₂ is √d for "l1" and 1 for "lp" with p = 2.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ ≥ 0, decoupled.
        kappa: "l1", "lp", "huber" or "group_l2" (rows of a matrix).
        p: exponent of "lp", at least 1; the norm is that of each tensor.
        delta: δ of "huber", at least 2^-126: elements of c below it move in proportion to c.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> weight.grad = torch.tensor([30.0, -40.0])
        >>> LionKappa([weight], lr=0.1, betas=(0.9, 0.99), kappa="lp", p=2.0).step()
        >>> weight
        Parameter containing:
        tensor([ 0.9400, -1.9200], requires_grad=True)

    Source: Chen, Liu, Liang and Liu, *Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts*, ICLR 2024,
    arXiv 2310.05898. Their m is -m here, and their decay is implicit: ε = η / (1 - ηλ).
    """

    WHOLE: ClassVar[tuple[str, ...]] = ("kappa", "p", "delta")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kappa: str = "l1",
        p: float = 2.0,
        delta: float = 1.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "kappa": kappa, "p": p, "delta": delta}
        super().__init__(params, settings)

    @property
    def kappa(self) -> Kappa:
        """κ, with its value, subgradient and conjugate."""
        return Kappa(*(self.defaults[name] for name in self.WHOLE))

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if betas, κ, p or δ are out of range."""
        check_betas(group)
        _ = self.kappa

    def forms(self, param: torch.Tensor) -> Forms:
        """One momentum of the parameter's shape."""
        return {"exp_avg": (compute_dtype(param), param.shape)}

    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step; see the class."""
        kappa = self.kappa
        for slot in slots:
            beta1, beta2 = slot.group["betas"]
            exp_avg_N = slot.state["exp_avg"]
            move(slot, kappa.gradient(exp_avg_N * beta1 + slot.grad * (1 - beta1)))
            exp_avg_N.copy_(exp_avg_N * beta2 + slot.grad * (1 - beta2))
