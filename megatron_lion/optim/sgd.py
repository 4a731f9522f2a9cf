"""SGD with momentum and decoupled or coupled weight decay: the paper's baseline, with state that can be sharded.

torch's own SGD creates its momentum lazily and has no decoupled decay, and megatron-core's DistributedOptimizer refuses
it. This one has exactly one state tensor, `momentum_buffer`, from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .arguments import check_flags, check_iterable, check_new_group
from .update import FOREIGN_OPTIONS as LION_OPTIONS
from .update import HARMLESS_KEYS, check_params, check_rates, check_saved_keys, is_in_range

# Options of torch.optim.SGD, with the values for which its step is this one's.
FOREIGN_OPTIONS = {"nesterov": False, "maximize": False, "dampening": 0}
SETTINGS = ("lr", "momentum", "weight_decay", "coupled_weight_decay")
# A state with LION's options is a state of LION.
_OF_LION = {"betas", "init_exp_avg", "cautious", "caution", *LION_OPTIONS}
KNOWN_KEYS = {*SETTINGS, *FOREIGN_OPTIONS, *(HARMLESS_KEYS - _OF_LION)}


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
        check_iterable(params)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings and tensors."""
        check_new_group(param_group)
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            check_params(self.param_groups[-1])
        except Exception:  # of any check: a refused group must not stay
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and state as torch does, after checking both; a load that fails changes nothing.

        A state of torch.optim.SGD is loaded if its step is this one's: without decay, nesterov, maximize and dampening.

        Raises:
            ValueError: a setting is missing, unknown or another than here, or the state is of another optimizer or model.
        """

        def fit(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(
                self.param_groups, loaded["param_groups"], strict=False
            )  # torch refuses another number of groups
            groups = [_fit_saved_group(own, group) for own, group in pairs]
            params = [param for group in self.param_groups for param in group["params"]]
            numbers = [number for group in loaded["param_groups"] for number in group["params"]]
            state = _fit_saved_state(loaded["state"], dict(zip(numbers, params, strict=False)))
            return {**loaded, "state": state, "param_groups": [*groups, *loaded["param_groups"][len(groups) :]]}

        old = self.state, self.param_groups
        hook = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = old
            raise
        finally:
            hook.remove()

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
    for name, value in FOREIGN_OPTIONS.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"{name} = {group[name]}, an option of torch.optim.SGD: needs {value}; Sgd has no other step"
            )
    if not is_in_range(group["momentum"], 1):
        raise ValueError(f"momentum = {group['momentum']!r}: needs a number, at least 0 and below 1")
    check_flags(coupled_weight_decay=group.get("coupled_weight_decay", False))


def _fit_saved_group(own: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group that was saved, checked; one of torch.optim.SGD without decay gets this optimizer's kind of decay."""
    check_saved_keys(group, ("lr", "momentum", "weight_decay"), {*own, *KNOWN_KEYS}, "Sgd")
    _check_group(group)
    coupled = own["coupled_weight_decay"]
    # torch's SGD has no such key, and its decay is coupled.
    saved = group.get("coupled_weight_decay", bool(group["weight_decay"]) or coupled)
    if saved != coupled:
        raise ValueError(
            f"coupled_weight_decay = {saved} in the state, {coupled} in this optimizer: build "
            f"Sgd(…, coupled_weight_decay={saved}) to continue as saved, or change it in the state's param_groups"
        )
    return {"coupled_weight_decay": coupled, **group}


def _fit_saved_state(state: dict[Any, Any], params: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    """Returns the saved state, checked, without the empty momentum (None) of a torch.optim.SGD that has none."""
    fitted = {}
    for number, entry in state.items():
        if number not in params:
            raise ValueError(f"state of {number}, which is in no group: needs the groups it was saved with")
        if not isinstance(entry, dict):
            raise ValueError(f"state of parameter {number} is {type(entry).__name__}: needs a dict that an Sgd saved")
        if strange := sorted(map(str, entry.keys() - {"momentum_buffer"})):
            raise ValueError(f"state of another optimizer, with {', '.join(strange)}: needs a state of Sgd")
        buffer = entry.get("momentum_buffer")
        if buffer is None:
            continue
        _check_buffer(buffer, params[number], f"parameter {number}")
        fitted[number] = entry
    return fitted


def _check_buffer(buffer: Any, parameter: torch.Tensor, place: str) -> None:
    if not isinstance(buffer, torch.Tensor) or not buffer.is_floating_point() or buffer.shape != parameter.shape:
        found = (
            f"{buffer.dtype}, shape {tuple(buffer.shape)}"
            if isinstance(buffer, torch.Tensor)
            else type(buffer).__name__
        )
        raise ValueError(
            f"momentum_buffer of {place} is {found}; the parameter has shape {tuple(parameter.shape)}: load the state of the "
            "same model and layout"
        )
