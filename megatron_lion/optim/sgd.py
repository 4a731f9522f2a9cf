"""SGD with momentum and decoupled or coupled weight decay: the paper's baseline, with state that can be sharded.

torch's own SGD creates its momentum lazily and has no decoupled decay, and megatron-core's DistributedOptimizer refuses
it. This one has exactly one state tensor, `momentum_buffer`, from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Sgd(torch.optim.Optimizer):
    """Stochastic gradient descent.

        b_k     = momentum · b_{k-1} + g_k                     (b_0 = 0)
        θ_{k+1} = (1 - lr · weight_decay) θ_k - lr · b_k       decoupled
        with g_k + weight_decay · θ_k in place of g_k          coupled

    Without decay this is torch.optim.SGD, bit for bit.

    Args:
        params: parameters or groups.
        lr: learning rate, at least 0.
        momentum: in [0, 1).
        weight_decay: at least 0.
        coupled_weight_decay: add the decay to the gradient, as torch.optim.SGD does.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight.grad = torch.tensor([2.0])
        >>> Sgd([weight], lr=0.1, weight_decay=0.5).step()
        >>> round(weight.item(), 4)
        0.75
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        coupled_weight_decay: bool = False,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr} and weight_decay {weight_decay} must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} must be in [0, 1)")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "coupled_weight_decay": coupled_weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns the closure's loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]  # a shard may be empty
            if not params:
                continue
            grads = [p.grad for p in params]
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            if decay and group["coupled_weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=decay))
            elif decay:
                torch._foreach_mul_(params, 1.0 - lr * decay)
            buffers = [self.momentum_buffer(p) for p in params]
            torch._foreach_mul_(buffers, float(group["momentum"]))
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-lr)
        return loss

    def momentum_buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the parameter's momentum, a tensor like it; zeros on first use."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer
