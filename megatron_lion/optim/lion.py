"""LION, the evolved sign momentum optimizer, as a `torch.optim.Optimizer`.

This file and update.py, which holds the equations, work without the rest of the package: they need torch alone.
Faster implementations and packed state are imported when they are needed; "auto" is "reference" if they are missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from .update import (
    AdamWPair,
    PlainLayout,
    Slot,
    asks_for_state,
    check_choice,
    check_forms,
    check_group,
    check_saved_state,
    fit_gradient,
    fit_saved_groups,
    from_adamw,
    is_sharded,
    local_of,
    reference_step,
    settle_groups,
)

__all__ = ["AdamWPair", "Lion", "from_adamw"]

INIT_CHOICES = ("zeros", "first_gradient")
IMPLEMENTATION_CHOICES = ("auto", "reference", "foreach", "cpp", "triton")
MASTER_CHOICES = ("none", "fp32", "split32", "split24")
MOMENTUM_CHOICES = ("fp32", "bf16", "int8")
# Whether only lion.py and update.py were copied into another project.
IS_ALONE = importlib.util.find_spec(".foreach", __package__) is None
if not IS_ALONE:
    from .arguments import check_flags, check_function, check_iterable, check_new_lion_group
    from .implementations import check_implementation, choose_implementation, step_without_tables


class Lion(torch.optim.Optimizer):
    """Updates parameters by the sign of an interpolated momentum (LION, Algorithm 1).

    With gradient g_k, momentum m, rate η, decay λ and interpolation weights β1, β2:

        c_k     = β1 m_{k-1} + (1-β1) g_k
        θ_{k+1} = θ_k - η (sign(c_k) + λ θ_k)          sign(0) = 0
        m_k     = β2 m_{k-1} + (1-β2) g_k

    θ and m on the right are the values before the step. Every coordinate moves by exactly η and decays; it only
    decays if c_k is 0. LION keeps one state tensor, AdamW two. Once ‖θ‖∞ ≤ 1/λ holds, it holds at every later
    step. β1 = β2 is Signum, the sign of the momentum itself.

    Coming from AdamW: take a learning rate 3-10 times smaller and a weight decay 3-10 times larger, so that
    ηλ is unchanged (see `from_adamw`). LION needs larger batches than AdamW: the sign of a noisy gradient is noisier
    than the gradient. The default betas, (0.9, 0.99), are those of the LION paper (Chen et al.), which takes (0.95, 0.98)
    for language models. The run configs of this package have (0.9, 0.95), the setting of the runs by Dong, Li and Lin
    that it reproduces.

    **Order of floating-point operations.** Every implementation computes, in float32 (float64 for float64
    parameters) with each operation rounded once, to nearest, and no fused multiply-add:

        g = float(grad) [* grad_multiplier]
        c = (m * β1) + (g * (1-β1))
        u = s(c) + (θ * λ)              s(c) = ±1, 0 at ±0, NaN if c is NaN or ±inf
        θ = θ - (u * η)
        m = (m * β2) + (g * (1-β2))

    1-β is computed in double precision; β, 1-β, λ and η are then rounded to float32. So "reference", "foreach", "cpp"
    and "triton" agree bit for bit, wherever a shard begins or ends. The update is θ - η(s + λθ) because the common
    θ(1-ηλ) - ηs needs 1-ηλ as a float32 number. At η = 1e-5 and λ = 0.01 that is 1 - 1.19e-7, a decay 19 % too strong.
    Below ηλ = 3e-8 it is 1, no decay at all. A gradient that is NaN or ±inf makes its parameter NaN: it is never
    turned into a step.

    **State.** One tensor `exp_avg` a parameter, float32 for every dtype of the parameter (float64 for float64).
    m_0 = g_1 needs no counter: `exp_avg` starts as NaN, which means "not begun", and takes the first gradient.
    Reduced precision (see `megatron_lion.optim.precision`): `momentum` stores `exp_avg` in fewer bits.
    `master_weights` adds `master_param`: the float32 value of a 16-bit parameter ("fp32"), or the remainder of
    its bfloat16 value ("split32", exact; "split24", 8 bits of it). `load_state_dict` reads the state of any mode
    into any other.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`, `maximize`; other keys are
            kept. Every dense memory order is supported.
        lr: η ≥ 0; a float, or a 0-d float32 tensor that may change in place (needed inside a CUDA graph).
            The Triton kernel reads it from device memory, without waiting for the device.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ ≥ 0, decoupled.
        init_exp_avg: "zeros" (m_0 = 0, the usual choice) or "first_gradient" (m_0 = g_1, as in the proof).
        implementation: "reference" (the equations), "foreach" (few launches), "cpp" (one compiled pass, on a
            CPU), "triton" (one launch for all tensors) or "auto": Triton on CUDA if it can compile there, C++ on a
            CPU with a compiler for parameters of 2^20 elements and more together, or if it was compiled before, else
            foreach.
        master_weights: "none" (the parameter is its own master), "fp32", "split32" or "split24".
        momentum: "fp32" (the default), "bf16" or "int8" (blocks of 32 elements with a bfloat16 scale). The last two need
            β2 ≤ 0.996: a momentum that shrinks by less than 2^-8 a step would not shrink at all.
        momentum_dtype: another name of `momentum`, the one that the configs use.
        cautious: move only elements where s(c) and the gradient have the same sign, by φη; φ is the inverse of their
            share in the parameter (Cautious LION; reads gradient and momentum twice).
        sum_agreement: needed if cautious parameters are shards; see `megatron_lion.optim.cautious.factors`.
        maximize: ascend: every gradient is negated as it is read.
        count_steps: keep a 0-d float32 `step` in every parameter's state, for software that expects it.

    Raises:
        ValueError: a hyper-parameter, or a tensor given to `step`, is not one of those listed above.
        TypeError: `params` is no iterable of tensors or groups.
        RuntimeError: at the first step, the chosen implementation cannot be compiled on this machine.

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

    _fleet: Any = None  # tables of the fused kernel, kept between steps
    _SETTINGS = ("init_exp_avg", "implementation", "count_steps", "layout", "cautious", "sum_agreement")

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        init_exp_avg: str = "zeros",
        implementation: str = "auto",
        master_weights: str = "none",
        momentum: str | None = None,
        momentum_dtype: str | None = None,
        cautious: bool = False,
        sum_agreement: Callable[[Sequence[torch.Tensor], torch.Tensor], None] | None = None,
        maximize: bool = False,
        count_steps: bool = False,
    ) -> None:
        name, momentum = _one_momentum(momentum, momentum_dtype)
        check_choice("init_exp_avg", init_exp_avg, INIT_CHOICES)
        check_choice("implementation", implementation, IMPLEMENTATION_CHOICES)
        check_choice("master_weights", master_weights, MASTER_CHOICES)
        check_choice(name, momentum, MOMENTUM_CHOICES)
        is_packed = (master_weights, momentum) != ("none", "fp32")
        if not IS_ALONE:
            check_iterable(params)
            check_flags(cautious=cautious, count_steps=count_steps)
            check_function("sum_agreement", sum_agreement)
            check_implementation(implementation)
        elif cautious or is_packed or implementation not in ("auto", "reference"):
            raise ValueError(
                f"implementation = {implementation!r}, master_weights = {master_weights!r}, momentum = {momentum!r}, cautious = "
                f"{cautious}: needs the other files of megatron_lion/optim beside lion.py; copy the whole folder"
            )
        self.init_exp_avg = init_exp_avg
        self.implementation = implementation
        self.count_steps = count_steps
        self.cautious = cautious
        self.sum_agreement = sum_agreement
        self.layout = PlainLayout()
        if is_packed:
            from .layouts import PackedLayout

            self.layout = PackedLayout(master_weights, momentum)
        saved = {"init_exp_avg": init_exp_avg, "cautious": cautious, "maximize": maximize}
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **saved})

    def __getstate__(self) -> dict[str, Any]:
        """Returns torch's state for copying and pickling, with the settings that it would lose."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy; groups that were pickled by an older version get the settings that they lack."""
        super().__setstate__(state)
        settle_groups(self.param_groups, self._saved_settings())
        for param, own in self.state.items():
            self.layout.fit(param, own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyper-parameters and tensors."""
        if not IS_ALONE:
            check_new_lion_group(param_group)
        super().add_param_group(param_group)
        try:
            settle_groups(self.param_groups, self._saved_settings())
            check_group(self.param_groups[-1])
            if self.cautious and self.sum_agreement is None and any(map(is_sharded, self.param_groups[-1]["params"])):
                raise ValueError(
                    "cautious = True with DTensor parameters: needs sum_agreement, because φ belongs to a whole parameter"
                )
            self.layout.check_group(self.param_groups[-1])
        except Exception:  # of any check: a refused group must not stay
            self.param_groups.pop()
            raise

    def init_state(self) -> None:
        """Creates the state of every parameter that has none; otherwise `step` creates it at the first gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param)

    @torch._disable_dynamo  # a traced step would lose the state that it creates
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
            grad_multiplier: one or two float32 elements on the parameters' device; every gradient is multiplied by them
                in turn as it is read (1 / count, clip coefficient, inverse loss scale), and each product is rounded. The
                gradients themselves are not changed.
            found_inf: one element on the parameters' device; if it is not 0, parameters, momentum and `step`
                keep their bits. Triton reads it on the device, the others on the host.

        Returns:
            The closure's value, or None without a closure.

        Raises:
            ValueError: `grad_multiplier` has more than two elements or none; other errors are those of a first step.
        """
        if grad_multiplier is not None and grad_multiplier.numel() not in (1, 2):
            raise ValueError(f"grad_multiplier of {grad_multiplier.numel()} elements: needs one or two")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settle_groups(self.param_groups, self._saved_settings())
        begin = self.init_exp_avg == "first_gradient"
        has_no_state = not self.state
        if self._fleet is not None and self._fleet.still_holds(self):
            self._fleet.step(begin, grad_multiplier, found_inf)
            return loss
        slots = self._slots()
        if has_no_state and asks_for_state(self.param_groups, slots):
            if self.cautious:  # sum_agreement may be a collective, and another rank may have a gradient
                from .cautious import count_agreement, with_caution

                with_caution(slots, count_agreement(slots, self.layout, begin, None), self.sum_agreement)
            return loss
        implementation = "reference" if IS_ALONE else choose_implementation(self.implementation, slots)
        if implementation == "triton":
            from .kernel_launch import Fleet

            self._fleet = Fleet(self, slots, self._fleet)
            self._fleet.step(begin, grad_multiplier, found_inf)
        elif found_inf is None or not bool(found_inf):
            if IS_ALONE:
                reference_step(slots, self.layout, begin, grad_multiplier)
            else:
                step_without_tables(self, implementation, slots, begin, grad_multiplier)
            if self.count_steps and slots:
                torch._foreach_add_([slot.state["step"] for slot in slots], 1.0)
        return loss

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """Returns the state `name` of a parameter as true float32, whatever its stored form; `step` is not converted."""
        value = self._state_of(param)[name]
        if name == "step" or value.dtype in (torch.float32, torch.float64):
            return value
        from .precision import decode_state

        return decode_state(param, value)

    @torch.no_grad()
    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Stores a float32 value, or one already in the stored form, as the state `name` of a parameter.

        A master weight also sets the parameter to its 16-bit value.

        Raises:
            ValueError: the value has another shape than the parameter, and is not flat.
        """
        state = self._state_of(param)
        if name in ("exp_avg", "master_param"):
            if value.shape != param.shape and value.dim() != 1:
                raise ValueError(
                    f"{name} of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}: load the state of "
                    "the same model and layout"
                )
            if self.layout.is_plain and (not value.is_floating_point() or value.numel() != param.numel()):
                if IS_ALONE:
                    raise ValueError(
                        f"{name} is packed, {value.dtype}: needs the saving optimizer's unscaled_state_dict()"
                    )
                from .precision import decode_state  # the value comes from an optimizer that packs its state

                value = decode_state(param, value)
            self.layout.encode(param, state, name, value)
        elif name in state:
            state[name].copy_(value)

    def unscaled_state_dict(self) -> dict[str, Any]:
        """Returns `state_dict` with every state as true float32: larger, and readable without this class."""
        packed = self.state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        for number, state in packed["state"].items():
            packed["state"][number] = {name: self.get_unscaled_state(params[number], name) for name in state}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and state, packed or unscaled, and stores the state in this optimizer's forms.

        torch's own method casts every state tensor to its parameter's dtype, which would destroy a float32 momentum
        of bfloat16 parameters. Registered hooks run as usual. A load that fails, also in a hook, changes nothing.

        Raises:
            ValueError: a setting is impossible for LION or its layout, or the state is of another optimizer or model.
        """
        saved: dict[Any, dict[str, torch.Tensor]] = {}
        numbers: list[Any] = []
        overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []

        def set_aside(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            saved.update(loaded["state"])
            numbers.extend(number for group in loaded["param_groups"] for number in group["params"])
            check_saved_state(saved, numbers)
            groups = fit_saved_groups(self.param_groups, loaded["param_groups"], self._saved_settings(), self.layout)
            return {**loaded, "state": {}, "param_groups": groups}  # without state, so that torch casts none

        def put_in(_: torch.optim.Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            for number, param in zip(numbers, params, strict=True):
                # torch has dropped the old state: a master weight that is not loaded is made from the parameter.
                for name, value in saved.get(number, {}).items():
                    if name == "master_param":
                        overwritten.append((param, param.detach().clone()))
                    self.set_scaled_state(param, name, value)

        old = self.state, self.param_groups
        before = self.register_load_state_dict_pre_hook(set_aside)
        after = self.register_load_state_dict_post_hook(put_in, prepend=True)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = old
            with torch.no_grad():
                for param, value in overwritten:
                    param.copy_(value)
            raise
        finally:
            before.remove()
            after.remove()

    def _saved_settings(self) -> dict[str, Any]:
        maximize = self.defaults.get("maximize", False)  # of a group without its own value
        return {"init_exp_avg": self.init_exp_avg, "cautious": self.cautious, "maximize": maximize}

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = cast(dict[str, torch.Tensor], self.state[param])
        if "exp_avg" not in state:
            start = float("nan") if self.init_exp_avg == "first_gradient" else 0.0
            state.update(self.layout.new_state(param, start))
        if self.count_steps and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state

    def _slots(self) -> list[Slot]:
        slots = []
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                grad = getattr(param, "decoupled_grad", None)  # from Megatron, if its dtype is not the parameter's
                if (grad := param.grad if grad is None else grad) is not None:
                    local, own = local_of(param), self._state_of(param)
                    grad = fit_gradient(local, local_of(grad))
                    check_forms(local, own, self.layout.forms(local), (number, index))
                    self.layout.fit(param, own)
                    slots.append(Slot(local, grad, {key: local_of(value) for key, value in own.items()}, group))
        return slots


def _one_momentum(momentum: Any, momentum_dtype: Any) -> tuple[str, Any]:
    """Returns the name and value of the momentum's form; raises ValueError if both of its names are given and differ."""
    if momentum is not None and momentum_dtype is not None and momentum != momentum_dtype:
        raise ValueError(
            f"momentum = {momentum!r}, momentum_dtype = {momentum_dtype!r}: two names of one setting; give one of them"
        )
    if momentum_dtype is not None:
        return "momentum_dtype", momentum_dtype
    return "momentum", "fp32" if momentum is None else momentum
