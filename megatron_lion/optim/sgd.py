"""SGD with momentum and decoupled or coupled weight decay: the paper's baseline, with state that can be sharded.

torch's own SGD creates its momentum lazily and has no decoupled decay, and megatron-core's DistributedOptimizer refuses
it. This one has exactly one state tensor, `momentum_buffer`, from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .update import check_rates


class Sgd(torch.optim.Optimizer):
    """Stochastic gradient descent.

        b_k     = momentum · b_{k-1} + g_k                     (b_0 = 0)
        θ_{k+1} = (1 - lr · weight_decay) θ_k - lr · b_k       decoupled
        with g_k + weight_decay · θ_k in place of g_k          coupled

    Without decay this is torch.optim.SGD, bit for bit.

    Args:
        params: parameters or groups.
        lr: learning rate, a finite number, at least 0, or a float32 tensor of one element.
        momentum: in [0, 1).
        weight_decay: a finite number, at least 0.
        coupled_weight_decay: add the decay to the gradient, as torch.optim.SGD does.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state.

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
        lr: float | torch.Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        coupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "coupled_weight_decay": coupled_weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and state as torch does, after checking the groups' settings."""
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            _check_group({**own, **group})
        super().load_state_dict(state_dict)

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


def _check_group(group: dict[str, Any]) -> None:
    check_rates(group)
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum = {group['momentum']}: needs a number, at least 0 and below 1")
