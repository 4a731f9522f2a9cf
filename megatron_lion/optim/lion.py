"""LION, the evolved sign momentum optimizer: the algorithm, its plain reference and `torch.optim` form.

This file stands alone: it needs torch, and reaches for its neighbours only when the Triton kernel or a
reduced-precision state is asked for.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

INIT_CHOICES = ("zeros", "first_gradient")
IMPLEMENTATION_CHOICES = ("auto", "reference", "foreach", "triton")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Slot(NamedTuple):
    """One parameter's part in one step: everything flat-addressable and on one device."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]


class AdamWPair(NamedTuple):
    """LION's learning rate and weight decay that correspond to an AdamW pair."""

    lr: float
    weight_decay: float


def from_adamw(lr: float, weight_decay: float, ratio: float = 10.0) -> AdamWPair:
    """Suggests LION's learning rate and decay from a pair that was tuned for AdamW.

    A signed step has norm η√d, several times an AdamW step of the same η, so the rate goes down by `ratio`;
    the decay goes up by as much, which keeps the product ηλ, the strength of the decay, as it was.

    Args:
        lr: AdamW's learning rate.
        weight_decay: AdamW's decoupled weight decay.
        ratio: between 3 and 10 in practice; start with 10 and try 3 if training is slow.

    Returns:
        The pair (lr / ratio, weight_decay * ratio).

    Example:
        >>> from_adamw(lr=1e-3, weight_decay=0.1, ratio=8)
        AdamWPair(lr=0.000125, weight_decay=0.8)

    Source: Chen et al., *Symbolic Discovery of Optimization Algorithms*, 2023, section 5.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio = {ratio}: needs a finite number above 0, usually between 3 and 10")
    return AdamWPair(lr / ratio, weight_decay * ratio)


class Lion(torch.optim.Optimizer):
    """Updates parameters by the sign of an interpolated momentum (LION, Algorithm 1).

    With gradient g_k, momentum m, rate η, decay λ and interpolation weights β1, β2:

        c_k     = β1 m_{k-1} + (1-β1) g_k
        θ_{k+1} = θ_k - η (sign(c_k) + λ θ_k)          sign(0) = 0
        m_k     = β2 m_{k-1} + (1-β2) g_k

    Both θ and m on the right are those of before the step. Every coordinate moves by exactly η (and decays):
    LION keeps one state tensor where AdamW keeps two, and ‖θ‖∞ ≤ 1/λ, once true, stays true. β1 = β2 is
    Signum, the sign of the momentum itself.

    Coming from AdamW: take a learning rate 3-10 times smaller and a weight decay 3-10 times larger, so that
    ηλ stays (see `from_adamw`). For language models (0.9, 0.95) or (0.95, 0.98) are usual betas. LION wants
    larger batches than AdamW: the sign of a noisy gradient is noisier than the gradient.

    **Order of floating-point operations.** Every implementation computes, in float32 (float64 for float64
    parameters) with each operation rounded once, to nearest, and no fused multiply-add:

        g = float(grad) [* grad_multiplier]
        c = (m * β1) + (g * (1-β1))
        u = s(c) + (θ * λ)              s(c) = ±1, 0 at ±0, NaN where c is NaN or ±inf
        θ = θ - (u * η)
        m = (m * β2) + (g * (1-β2))

    1-β is taken in double precision; β, 1-β, λ and η are then rounded to float32. So "reference", "foreach"
    and "triton" agree bit for bit, wherever a shard begins or ends. θ - η(s + λθ) is kept in this form: the
    common θ(1-ηλ) loses the decay where ηλ is near 2^-24: with η = 1e-5 and λ = 0.01, 1 - ηλ rounds to
    1 - 1.19e-7 in float32, 19 % off. A gradient that is NaN or ±inf makes its parameter NaN: it is never
    turned into a step.

    **State.** `exp_avg`, in float32 whatever the parameter's dtype (float64 for float64). With
    ``init_exp_avg="first_gradient"`` or ``count_steps`` also `step`, a 0-d float32 tensor on the parameter's
    device. Parameters need to be float32, bfloat16, float16 or float64, real, dense, without gaps in memory.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`; other keys stay.
        lr: η ≥ 0; a float, or a 0-d float32 tensor that may change in place (needed inside a CUDA graph).
            The Triton kernel reads it from device memory, without waiting for the device.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ ≥ 0, decoupled.
        init_exp_avg: "zeros" (m_0 = 0, the practice) or "first_gradient" (m_0 = g_1, as the proof has it).
        implementation: "reference" (the equations), "foreach" (few launches), "triton" (one launch for all
            tensors) or "auto": Triton on CUDA where it is installed, else foreach.
        count_steps: keep `step` also with m_0 = 0, for software that looks for it in the state.

    Raises:
        ValueError: a hyper-parameter, or a tensor given to `step`, is outside what is listed above.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        >>> optimizer = Lion([weight], lr=0.1, weight_decay=0.5)
        >>> weight.grad = torch.tensor([3.0, -4.0, 0.0])
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([ 0.8500, -1.8000,  0.4750], requires_grad=True)

    Source: Chen et al. 2023 (LION); Dong, Li and Lin, *Convergence Rate Analysis of LION*, arXiv 2411.07724,
    Algorithm 1, and Lemma 6 for m_0 = g_1.
    """

    _SETTINGS = ("init_exp_avg", "implementation", "count_steps")

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        init_exp_avg: str = "zeros",
        implementation: str = "auto",
        count_steps: bool = False,
    ) -> None:
        _check_choice("init_exp_avg", init_exp_avg, INIT_CHOICES)
        _check_choice("implementation", implementation, IMPLEMENTATION_CHOICES)
        self.init_exp_avg = init_exp_avg
        self.implementation = implementation
        self.count_steps = count_steps or init_exp_avg == "first_gradient"
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        """Adds to torch's picture of an optimizer what copying and pickling would lose."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._SETTINGS}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyper-parameters and tensors."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def init_state(self) -> None:
        """Makes the state of every parameter that has none; `step` does so itself at a first gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_multiplier: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> float | None:
        """Takes one step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_multiplier: one float32 element on the parameters' device; every gradient is multiplied by it
                as it is read (clip coefficient, inverse loss scale). The gradients themselves stay.
            found_inf: one element on the parameters' device; unless it is 0, nothing changes: parameters,
                momentum and `step` keep their bits. Triton reads it on the device, the others on the host.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self._slots()
        if not slots:
            return loss
        first = self.init_exp_avg == "first_gradient"
        self._update(slots, self._choose(slots), first, grad_multiplier, found_inf)
        return loss

    def _update(
        self,
        slots: Sequence[Slot],
        implementation: str,
        first: bool,
        multiplier: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        taken: float | torch.Tensor = 1.0
        if implementation == "triton":
            from .kernels import lion_step

            lion_step(slots, first, multiplier, found_inf, self.__dict__.setdefault("_plans", {}))
            if found_inf is not None:
                taken = (found_inf == 0).to(torch.float32).view(())
        elif found_inf is not None and bool(found_inf):
            return
        elif implementation == "foreach":
            from .foreach import foreach_step

            foreach_step(slots, first, multiplier)
        else:
            reference_step(slots, first, multiplier)
        steps = [slot.state["step"] for slot in slots if "step" in slot.state]
        if steps:
            torch._foreach_add_(steps, taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and state; unlike torch's own, it leaves the state's dtype as it should be.

        torch casts every state tensor to its parameter's dtype, which would destroy a float32 momentum of
        bfloat16 parameters. The usual hooks run as ever.
        """
        saved: dict[Any, dict[str, torch.Tensor]] = {}
        numbers: list[Any] = []

        def set_aside(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            saved.update(loaded["state"])
            numbers.extend(number for group in loaded["param_groups"] for number in group["params"])
            loaded["state"] = {}

        def put_in(_: torch.optim.Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            for number, param in zip(numbers, params, strict=True):
                if saved.get(number):
                    self._load_state_of(param, saved[number])

        before = self.register_load_state_dict_pre_hook(set_aside)
        after = self.register_load_state_dict_post_hook(put_in, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _load_state_of(self, param: torch.Tensor, saved: dict[str, torch.Tensor]) -> None:
        state = self._state_of(param)
        for key, value in saved.items():
            if key not in state:
                continue  # a `step` written by an optimizer that counts, read by one that does not
            if value.numel() != state[key].numel():
                raise ValueError(
                    f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}: "
                    "load the state of the same model"
                )
            state[key].copy_(value.reshape(state[key].shape))

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = cast(dict[str, torch.Tensor], self.state[param])
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=compute_dtype(param), requires_grad=False)
            if self.count_steps:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state

    def _slots(self) -> list[Slot]:
        slots = []
        for group in self.param_groups:
            for param in group["params"]:
                grad = getattr(
                    param, "decoupled_grad", None
                )  # Megatron's place for a gradient of another dtype
                grad = param.grad if grad is None else grad
                if grad is not None:
                    _check_layout(param, grad)
                    state = {key: _local(value) for key, value in self._state_of(param).items()}
                    slots.append(Slot(_local(param), _local(grad), state, group))
        return slots

    def _choose(self, slots: Sequence[Slot]) -> str:
        if self.implementation != "auto":
            return self.implementation
        fits = all(slot.param.is_cuda and slot.param.dtype != torch.float64 for slot in slots)
        return "triton" if fits and _has_triton() else "foreach"


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """Dtype of a parameter's update and momentum: float64 for a float64 parameter, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def lion_update(
    param_N: torch.Tensor,
    grad_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """The equations themselves, in place on `param_N` and `exp_avg_N`; all three of one compute dtype.

    Every line is a chain of torch operations that round once each: no `alpha=`, no `lerp`, no `addcmul`,
    which fuse or do not fuse depending on an element's place in the tensor.
    """
    beta1, beta2 = betas
    interpolation_N = exp_avg_N * beta1 + grad_N * (1 - beta1)
    nan_if_not_finite_N = interpolation_N - interpolation_N  # else 0: torch.sign alone calls NaN 0 and inf 1
    direction_N = interpolation_N.sign() + nan_if_not_finite_N + param_N * weight_decay
    param_N.sub_(direction_N * lr)
    exp_avg_N.copy_(exp_avg_N * beta2 + grad_N * (1 - beta2))


def reference_step(slots: Sequence[Slot], first_gradient: bool, multiplier: torch.Tensor | None) -> None:
    """Applies `lion_update` to one parameter after the other."""
    for param, grad, state, group in slots:
        grad_N = grad.to(compute_dtype(param))
        if multiplier is not None:
            grad_N = grad_N * multiplier.view(())
        exp_avg_N = state["exp_avg"]
        if first_gradient:
            exp_avg_N.copy_(torch.where(state["step"] == 0, grad_N, exp_avg_N))
        param_N = param.to(compute_dtype(param))  # the parameter itself where the dtype is the same
        lion_update(param_N, grad_N, exp_avg_N, group["lr"], group["betas"], group["weight_decay"])
        if param_N is not param:
            param.copy_(param_N)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of this rank, for a DTensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} = {given!r}: needs one of {', '.join(allowed)}")


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, weight_decay = group["lr"], group["betas"], group["weight_decay"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or lr.dtype != torch.float32:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements, {lr.dtype}: needs one, torch.float32")
    elif not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr = {lr}: needs a finite number, 0 or above")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {betas}: needs two numbers, each at least 0 and below 1")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay = {weight_decay}: needs a finite number, 0 or above")
    for param in group["params"]:
        if param.dtype not in SUPPORTED_DTYPES or param.layout != torch.strided:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is {param.dtype}, {param.layout}: needs a dense "
                "float32, bfloat16, float16 or float64 tensor"
            )


def _check_layout(param: torch.Tensor, grad: torch.Tensor) -> None:
    if grad.layout != torch.strided or grad.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(param.shape)} is {grad.dtype}, {grad.layout}: "
            "needs a dense real one; turn off `sparse=True` of embeddings"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"gradient of shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}"
        )
    if param.is_contiguous() and grad.is_contiguous():
        return
    if param.stride() != grad.stride() or not _without_gaps(param):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has strides {tuple(param.stride())}, its gradient "
            f"{tuple(grad.stride())}: needs the same order without gaps for both; call .contiguous() on them"
        )


def _without_gaps(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
