"""StoSignSGD: the sign of a momentum with as much uniform noise as makes it unbiased."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from ..optim.update import Forms, Slot, compute_dtype, is_in_range
from .plain_rule import PlainRule, check_count, generator_of, move, nan_if_not_finite


class StoSignSGD(PlainRule):
    """Signed steps whose expected value is the momentum, divided by its largest size so far.

        m_k     = β m_{k-1} + (1-β) g_k                            m_0 = 0
        G_k     = max(G_{k-1}, |m_k|)      element by element      G_0 = 0
        n_k     ~ uniform in [-1, 1), each element on its own
        θ_{k+1} = θ_k - η (sign(m_k + G_k n_k) + λ θ_k)            sign(0) = 0

    As |m_k| ≤ G_k, the sign is +1 with probability (1 + m_k/G_k)/2, so its expected value is m_k/G_k. An element whose
    momentum was always 0 has G = 0 and only decays. Two state tensors, as in AdamW.

    **Noise.** It depends on `seed`, the parameter's number and the step alone: a resumed run draws the same values, and
    workers with the same seed and equal averaged gradients (DDP) stay equal. It differs between a CPU and a GPU.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `momentum`, `weight_decay`.
        lr: η ≥ 0.
        momentum: β in [0, 1). The default is this package's: a published value was not found.
        weight_decay: λ ≥ 0, decoupled.
        seed: of the noise, a whole number, at least 0.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = StoSignSGD([weight], lr=0.5, momentum=0.0)
        >>> weight.grad = torch.tensor([2.0, -3.0, 0.0])  # the first step is the sign: |m| = G
        >>> optimizer.step()
        >>> weight.tolist()
        [-0.5, 0.5, 0.0]

    Source: Yu, Pan, Liu and Zhang, *StoSignSGD: Unbiased Structural Stochasticity Fixes SignSGD for Training Large
    Language Models*, 2026, arXiv 2604.15416. The equations were taken from a catalogue that cites it; the paper's own
    text was not at hand.
    """

    WHOLE: ClassVar[tuple[str, ...]] = ("seed",)
    COUNTS_STEPS: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "seed": seed})

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if the momentum or the seed is out of range."""
        if not is_in_range(group["momentum"], 1):
            raise ValueError(f"momentum = {group['momentum']!r}: needs a number, at least 0 and below 1")
        check_count("seed", group["seed"], 0)

    def forms(self, param: torch.Tensor) -> Forms:
        """m and G, both of the parameter's shape."""
        return {name: (compute_dtype(param), param.shape) for name in ("exp_avg", "exp_avg_max")}

    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step; see the class."""
        numbers = self.numbers()
        for slot in slots:
            beta = slot.group["momentum"]
            exp_avg_N, largest_N = slot.state["exp_avg"], slot.state["exp_avg_max"]
            exp_avg_N.copy_(exp_avg_N * beta + slot.grad * (1 - beta))
            torch.maximum(largest_N, exp_avg_N.abs(), out=largest_N)
            step = int(slot.state["step"])
            generator = generator_of(self.defaults["seed"], numbers[id(slot.param)], step, slot.param.device)
            # Drawn in order of the elements, so that the noise does not depend on the memory order of the parameter.
            noise_N = torch.rand(slot.param.shape, generator=generator, dtype=exp_avg_N.dtype, device=slot.param.device)
            sum_N = exp_avg_N + largest_N * (noise_N * 2 - 1)
            move(slot, sum_N.sign() + nan_if_not_finite(sum_N))
            slot.state["step"].add_(1)
