"""CLion: LION that takes the sign only if no element of its mix is small."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from ..optim.update import Forms, Slot, compute_dtype
from .plain_rule import PlainRule, check_above_zero, check_betas, move, nan_if_not_finite


class CLion(PlainRule):
    """LION with the mix itself in place of its sign in steps where a non-zero element of the mix is below ν.

        c_k     = β1 m_{k-1} + (1-β1) g_k
        u_k     = sign(c_k)   if |c_j| ≥ ν for every j with c_j ≠ 0, over all parameters of the step
                = c_k         otherwise
        θ_{k+1} = θ_k - η (u_k + λ θ_k)
        m_k     = β2 m_{k-1} + (1-β2) g_k                  m_0 = 0

    The choice is one for all parameters, so a single element decides it, and the other kind of step is SGD with momentum,
    of another length at the same rate. Choose ν from the smallest |c_j| that you observe: below all of them this is LION,
    bit for bit. It is another rule than `Lion(cautious=True)`.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`.
        lr: η ≥ 0, of both kinds of steps.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ ≥ 0, decoupled.
        threshold: ν > 0. It has no default: a published value was not found.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = CLion([weight], lr=1.0, betas=(0.5, 0.5), threshold=0.1)
        >>> weight.grad = torch.tensor([4.0, -0.25])   # c = (2, -0.125): the sign
        >>> optimizer.step()
        >>> weight.grad = torch.tensor([-1.0, 0.125])  # c = (0.5, 0): an element that is 0 does not count
        >>> optimizer.step()
        >>> weight.grad = torch.tensor([0.0, 0.25])    # c = (0.25, 0.125), then m = (0.25, 0.125)
        >>> optimizer.step()
        >>> weight.grad = torch.tensor([1.0, 0.0])     # c = (0.625, 0.0625): as it is
        >>> optimizer.step()
        >>> weight.tolist()
        [-3.625, -0.0625]

    Source: Huang, Zhang and Chen, *CLion: Efficient Cautious Lion Optimizer with Enhanced Generalization*, 2026, arXiv
    2604.14587. The equations were taken from a catalogue that cites it; the paper's own text was not at hand.
    """

    WHOLE: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        threshold: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "threshold": threshold})

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if betas or ν are out of range."""
        check_betas(group)
        check_above_zero("threshold", group["threshold"])

    def forms(self, param: torch.Tensor) -> Forms:
        """One momentum of the parameter's shape."""
        return {"exp_avg": (compute_dtype(param), param.shape)}

    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step; see the class."""
        mixed = []
        for slot in slots:
            beta1, beta2 = slot.group["betas"]
            exp_avg_N = slot.state["exp_avg"]
            mixed.append(exp_avg_N * beta1 + slot.grad * (1 - beta1))
            exp_avg_N.copy_(exp_avg_N * beta2 + slot.grad * (1 - beta2))
        # Without a wait for the device: each step computes both directions.
        small = [((mixed_N != 0) & (mixed_N.abs() < self.defaults["threshold"])).any() for mixed_N in mixed]
        is_small = torch.stack([one.to(small[0].device) for one in small]).any() if small else None
        for slot, mixed_N in zip(slots, mixed, strict=True):
            if is_small is not None:
                sign_N = mixed_N.sign() + nan_if_not_finite(mixed_N)
                move(slot, torch.where(is_small.to(mixed_N.device), mixed_N, sign_N))
