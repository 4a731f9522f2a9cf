"""LION's equations in plain torch, the plain form of its state, and what is asked of tensors and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Slot(NamedTuple):
    """One parameter's part in one step: everything flat-addressable and on one device."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]
    caution: torch.Tensor | None = None


class PlainLayout:
    """How state is kept when nothing is packed: the parameter is its own master, `exp_avg` full precision."""

    is_plain = True
    master_weights = "none"
    momentum = "fp32"

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where this layout cannot keep the group's state."""

    def new_state(self, param: torch.Tensor, start: float) -> dict[str, torch.Tensor]:
        """State of a parameter that has none; every momentum element is `start`."""
        return {"exp_avg": torch.full_like(param, start, dtype=compute_dtype(param), requires_grad=False)}

    def fit(self, param: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Lays state out in memory as its parameter is now: a model may go to channels_last between two steps."""
        for name, value in state.items():
            if not is_sharded(value) and value.shape == param.shape and strides_of(value) != strides_of(param):
                state[name] = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)

    def read(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """Master weight and momentum in the compute dtype: the stored tensors themselves where they fit."""
        return slot.param.to(compute_dtype(slot.param)), slot.state["exp_avg"]

    def write(self, slot: Slot, param_N: torch.Tensor, exp_avg_N: torch.Tensor) -> None:
        """Stores what was read and updated."""
        for stored, updated in ((slot.param, param_N), (slot.state["exp_avg"], exp_avg_N)):
            if stored is not updated:
                stored.copy_(updated)

    def encode(self, param: torch.Tensor, state: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        """Stores a floating-point value of the parameter's size; a master weight goes into the parameter."""
        (param if name == "master_param" else state[name]).copy_(value.view(param.shape))


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
    caution: torch.Tensor | None = None,
) -> None:
    """The equations themselves, in place on `param_N` and `exp_avg_N`; all three of one compute dtype.

    Every line is a chain of torch operations that round once each: no `alpha=`, no `lerp`, no `addcmul`,
    which fuse or do not fuse depending on an element's place in the tensor.
    """
    beta1, beta2 = betas
    interpolation_N = exp_avg_N * beta1 + grad_N * (1 - beta1)
    nan_if_not_finite_N = interpolation_N - interpolation_N  # else 0: torch.sign alone calls NaN 0 and inf 1
    direction_N = interpolation_N.sign() + nan_if_not_finite_N
    if caution is not None:
        direction_N = direction_N * torch.where(direction_N * grad_N > 0, caution, 0.0)
    param_N.sub_((direction_N + param_N * weight_decay) * lr)
    exp_avg_N.copy_(exp_avg_N * beta2 + grad_N * (1 - beta2))


def reference_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """Applies `lion_update` to one parameter after the other.

    Args:
        slots: parameters with gradient, state and group.
        layout: how the state is kept.
        begin: whether a momentum that is NaN has not begun and takes the gradient (m_0 = g_1).
        multiplier: one element that every gradient is multiplied by, or None.
    """
    for slot in slots:
        param_N, exp_avg_N = layout.read(slot)
        grad_N = slot.grad.to(param_N.dtype)
        if multiplier is not None:
            grad_N = grad_N * multiplier.view(())
        if begin:
            exp_avg_N.copy_(torch.where(exp_avg_N.isnan(), grad_N, exp_avg_N))
        group = slot.group
        lion_update(param_N, grad_N, exp_avg_N, group["lr"], group["betas"], group["weight_decay"], slot.caution)
        layout.write(slot, param_N, exp_avg_N)


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Where a tensor's elements lie: the strides of the dimensions that have more than one."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def is_sharded(param: torch.Tensor) -> bool:
    return hasattr(param, "to_local")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of this rank, for a DTensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} = {given!r}: needs one of {', '.join(allowed)}")


def check_group(group: dict[str, Any]) -> None:
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


def check_gradient(param: torch.Tensor, grad: torch.Tensor) -> None:
    strided = grad.layout == torch.strided and grad.dtype in SUPPORTED_DTYPES and grad.shape == param.shape
    if not strided or not any(
        param.is_contiguous(memory_format=form) and grad.is_contiguous(memory_format=form) for form in MEMORY_FORMATS
    ):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)}, strides {param.stride()}, has a gradient of "
            f"{grad.dtype}, {grad.layout}, shape {tuple(grad.shape)}: needs a dense real one of that shape, both "
            "contiguous or both channels_last; call .contiguous(), or turn off `sparse=True`"
        )
