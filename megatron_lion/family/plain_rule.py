"""What the optimizers of this room share: checks, state in full precision, loading, and the decoupled step.

Each rule is plain torch, for whole parameters on any device: a module in one process or in DDP. A sharded parameter
(DTensor) is refused, because most of these rules need more of it than one element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from ..optim.arguments import check_iterable, check_new_group
from ..optim.update import (
    FOREIGN_OPTIONS,
    HARMLESS_KEYS,
    SAVED_SETTINGS,
    Forms,
    Slot,
    asks_for_state,
    check_forms,
    check_params,
    check_rates,
    check_saved_keys,
    compute_dtype,
    fit_gradient,
    is_in_range,
    is_sharded,
    rate_of,
)

# Keys that software adds to groups and that change no step; options of LION would.
KNOWN_KEYS = HARMLESS_KEYS - {"betas", "caution", "maximize", *SAVED_SETTINGS, *FOREIGN_OPTIONS}


class PlainRule(torch.optim.Optimizer, ABC):
    """Base of the rules of this room; a rule defines `forms` and `take`.

    State tensors are float32 (float64 for float64 parameters) whatever the parameter's dtype, and a load keeps them so.
    A 16-bit parameter is its own master weight.

    Attributes:
        WHOLE: settings that hold for the whole optimizer. They are saved in every group, and a state or a group with
            another value is refused.
        COUNTS_STEPS: whether the state has `step`, a 0-d float32 tensor on the CPU.
    """

    WHOLE: ClassVar[tuple[str, ...]] = ()
    COUNTS_STEPS: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_iterable(params)
        super().__init__(params, defaults)

    @abstractmethod
    def forms(self, param: torch.Tensor) -> Forms:
        """Returns the dtype and shape of each state tensor of a parameter, `step` excepted; each begins as zeros."""

    @abstractmethod
    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step for parameters with gradients in the compute dtype."""

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if a setting of this rule is out of range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings and tensors."""
        check_new_group(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:  # of any check: a refused group must not stay
            self.param_groups.pop()
            raise

    @torch.no_grad()
    # torch declares two overloads, with and without a closure.
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns the closure's loss if one is given.

        A first step at rate 0 with gradients of zeros only creates the state, as torch.distributed.checkpoint expects.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_first = not self.state
        slots = self.slots()
        if not (is_first and self.is_request(slots)):
            self.take(slots)
        return loss

    def is_request(self, slots: Sequence[Slot]) -> bool:
        """Returns whether a first step asks for the state alone."""
        return asks_for_state(self.param_groups, slots)

    def slots(self) -> list[Slot]:
        """Returns the parameters that have a gradient and at least one element, with their state."""
        found = []
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.numel():
                    found.append(self.slot(param, param.grad, group, (number, index)))
        return found

    def slot(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], place: tuple[int, int]) -> Slot:
        """Returns a parameter with a gradient of its memory order, in the compute dtype, and with its state."""
        state, forms = self.state[param], self.forms(param)
        if not state:
            for name, (dtype, shape) in forms.items():
                same_order = torch.preserve_format if tuple(shape) == tuple(param.shape) else torch.contiguous_format
                like = param if tuple(shape) == tuple(param.shape) else param.new_empty(tuple(shape))
                state[name] = torch.zeros_like(like, dtype=dtype, memory_format=same_order, requires_grad=False)
            if self.COUNTS_STEPS:
                state["step"] = torch.zeros((), dtype=torch.float32)
        check_forms(param, state, forms, place)
        return Slot(param, fit_gradient(param, grad).to(compute_dtype(param)), state, group)

    def numbers(self) -> dict[int, int]:
        """Returns the number of each parameter in the order of the groups, as in a state dict, by its `id`."""
        params = [param for group in self.param_groups for param in group["params"]]
        return {id(param): number for number, param in enumerate(params)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and state; torch's own method would cast the state to the parameters' dtype.

        A load that fails changes nothing.

        Raises:
            ValueError: a setting is missing, unknown or another than here, the state is of another optimizer or model, a
                state tensor is not of floats, or a `step` is not a whole number.
        """
        saved: dict[Any, dict[str, torch.Tensor]] = {}
        params = [param for group in self.param_groups for param in group["params"]]

        def set_aside(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            for mine, group in zip(
                self.param_groups, loaded["param_groups"], strict=False
            ):  # torch compares the numbers
                known = {*mine, *KNOWN_KEYS}
                check_saved_keys(group, sorted(set(self.defaults) & set(mine)), known, type(self).__name__)
                self._check_group({**group, "params": mine["params"]})
            numbers = [number for group in loaded["param_groups"] for number in group["params"]]
            saved.update(self._fit_state(loaded["state"], dict(zip(numbers, params, strict=False))))
            return {**loaded, "state": {}}

        def put_in(_: torch.optim.Optimizer) -> None:
            for param, state in saved.items():
                self.state[param] = state

        old = self.state, self.param_groups
        before = self.register_load_state_dict_pre_hook(set_aside)
        after = self.register_load_state_dict_post_hook(put_in, prepend=True)
        try:
            super().load_state_dict(state_dict)
        except BaseException:  # of any kind, an interrupt too: the optimizer keeps the state that it had
            self.state, self.param_groups = old
            raise
        finally:
            before.remove()
            after.remove()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rates(group)
        check_params(group)
        if any(map(is_sharded, group["params"])):
            raise ValueError(f"{type(self).__name__} with DTensor parameters: needs whole parameters, as in DDP")
        for name in self.WHOLE:
            if group[name] != self.defaults[name]:
                raise ValueError(
                    f"{name} = {group[name]!r} in a group, {self.defaults[name]!r} in this optimizer: needs one value; build "
                    f"{type(self).__name__}(…, {name}={group[name]!r}) to continue a state as saved"
                )
        self.check_own(group)

    def _fit_state(self, state: dict[Any, Any], params: dict[Any, torch.Tensor]) -> dict[Any, dict[str, torch.Tensor]]:
        owner = type(self).__name__
        fitted = {}
        for number, entry in state.items():
            if number not in params:
                raise ValueError(f"state of {number}, which is in no group: needs the groups it was saved with")
            param, forms = params[number], self.forms(params[number])
            names = {*forms, *(("step",) if self.COUNTS_STEPS else ())}
            if not isinstance(entry, dict) or set(entry) != names:
                found = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(f"state of parameter {number} has {found}: needs {sorted(names)}, saved by {owner}")
            for name, (_, shape) in forms.items():
                value = entry[name]
                if not isinstance(value, torch.Tensor) or tuple(value.shape) != tuple(shape):
                    raise ValueError(
                        f"{name} of parameter {number} does not have the shape {tuple(shape)}: load the same model"
                    )
                if not value.is_floating_point():
                    raise ValueError(
                        f"{name} of parameter {number} is {value.dtype}: needs floats, as saved by {owner}"
                    )
            own = {name: _copied(entry[name], dtype, param) for name, (dtype, _) in forms.items()}
            if self.COUNTS_STEPS:
                step = entry["step"]
                if not is_in_range(step, float("inf")) or not float(step).is_integer():
                    raise ValueError(f"step of parameter {number} is {step!r}: needs one whole number, at least 0")
                own["step"] = torch.tensor(float(step), dtype=torch.float32)
            fitted[param] = own
        return fitted


def check_betas(group: dict[str, Any]) -> None:
    """Raises ValueError if a group's `betas` are not two numbers in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_in_range(beta, 1) for beta in betas):
        raise ValueError(f"betas = {betas}: needs two numbers, each at least 0 and below 1")


def check_above_zero(name: str, value: Any) -> None:
    """Raises ValueError if a setting is not a finite number above 0."""
    if not is_in_range(value, float("inf")) or not float(value) > 0:
        raise ValueError(f"{name} = {value!r}: needs a finite number above 0")


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError if a setting is not a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value!r}: needs a whole number, at least {least}")


def nan_if_not_finite(values_N: torch.Tensor) -> torch.Tensor:
    """Returns 0 for finite elements and NaN for the others, so that a sum with it hides nothing."""
    return values_N - values_N


def move(slot: Slot, direction_N: torch.Tensor) -> None:
    """Applies θ ← θ - η(u + λθ) in the compute dtype, each operation rounded once, as LION does.

    Args:
        slot: parameter and group.
        direction_N: u, of the parameter's shape, in the compute dtype.
    """
    param_N = slot.param.to(direction_N.dtype)
    param_N.sub_((direction_N + param_N * slot.group["weight_decay"]) * rate_of(slot.group))
    if param_N is not slot.param:
        slot.param.copy_(param_N)


def generator_of(seed: int, number: int, step: int, device: torch.device) -> torch.Generator:
    """Returns a generator whose stream depends on the four arguments alone, so that a resumed run draws the same values.

    Args:
        seed: of the optimizer.
        number: of the parameter.
        step: number of the step.
        device: of the values.
    """
    generator = torch.Generator(device=device)
    # Odd multipliers: neighbouring parameters and steps get seeds that are far apart.
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) % 2**63
    return generator.manual_seed(mixed)


def _copied(value: torch.Tensor, dtype: torch.dtype, param: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(param, dtype=dtype, requires_grad=False) if value.shape == param.shape else None
    if made is None:
        return value.detach().to(device=param.device, dtype=dtype, copy=True)
    return made.copy_(value.detach())
