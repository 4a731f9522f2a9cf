"""LION's equations in plain torch, the plain form of its state, and the checks of tensors and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Slot(NamedTuple):
    """One parameter with all that its step needs; dense tensors on one device."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]
    caution: torch.Tensor | None = None


class PlainLayout:
    """The form of unpacked state: the parameter is its own master, and `exp_avg` has full precision."""

    is_plain = True
    master_weights = "none"
    momentum = "fp32"

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError if this layout cannot hold the group's state."""

    def new_state(self, param: torch.Tensor, start: float) -> dict[str, torch.Tensor]:
        """Returns the first state of a parameter; every momentum element is `start`."""
        return {"exp_avg": torch.full_like(param, start, dtype=compute_dtype(param), requires_grad=False)}

    def fit(self, param: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Gives state the memory format of its parameter: a model may change to channels_last between two steps."""
        for name, value in state.items():
            if not is_sharded(value) and value.shape == param.shape and strides_of(value) != strides_of(param):
                state[name] = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)

    def read(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns master weight and momentum in the compute dtype: the stored tensors themselves if they have it."""
        return slot.param.to(compute_dtype(slot.param)), slot.state["exp_avg"]

    def write(self, slot: Slot, param_N: torch.Tensor, exp_avg_N: torch.Tensor) -> None:
        """Stores the updated tensors that `read` returned."""
        for stored, updated in ((slot.param, param_N), (slot.state["exp_avg"], exp_avg_N)):
            if stored is not updated:
                stored.copy_(updated)

    def encode(self, param: torch.Tensor, state: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        """Stores a floating-point value of the parameter's size; a master weight goes into the parameter."""
        (param if name == "master_param" else state[name]).copy_(value.view(param.shape))


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's update and momentum: float64 for a float64 parameter, else float32."""
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
    """Applies LION's equations in place to `param_N` and `exp_avg_N`.

    Every operation rounds once. `alpha=`, `lerp` and `addcmul` are not used: whether they fuse a multiplication into an
    addition depends on an element's place in the tensor.

    Args:
        param_N: θ (the master weight), in the compute dtype, any shape.
        grad_N: g, same shape and dtype; not changed.
        exp_avg_N: m, same shape and dtype.
        lr: η; a float or a tensor of one element.
        betas: (β1, β2).
        weight_decay: λ.
        caution: φ of Cautious LION, one element, or None.

    Source: Chen et al. 2023; Dong, Li and Lin, arXiv 2411.07724, Algorithm 1.
    """
    beta1, beta2 = betas
    interpolation_N = exp_avg_N * beta1 + grad_N * (1 - beta1)
    nan_if_not_finite_N = interpolation_N - interpolation_N  # else 0; sign alone turns NaN into 0, inf into 1
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
    """Returns the strides of the dimensions with more than one element; the others do not affect the memory order."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def is_sharded(param: torch.Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    return hasattr(param, "to_local")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a DTensor, or any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if a setting is not one of the allowed values."""
    if given not in allowed:
        raise ValueError(f"{name} = {given!r}: needs one of {', '.join(allowed)}")


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError if a group's rate, betas, decay or a parameter's dtype or layout is not supported."""
    lr, betas, weight_decay = group["lr"], group["betas"], group["weight_decay"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or lr.dtype != torch.float32:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements, {lr.dtype}: needs one element, torch.float32")
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
    """Raises ValueError if the gradient is not dense, of the parameter's shape and in its memory format."""
    # The fused loops address parameter, gradient and state by one flat offset.
    strided = grad.layout == torch.strided and grad.dtype in SUPPORTED_DTYPES and grad.shape == param.shape
    if not strided or not any(
        param.is_contiguous(memory_format=form) and grad.is_contiguous(memory_format=form) for form in MEMORY_FORMATS
    ):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)}, strides {param.stride()}, has a gradient of "
            f"{grad.dtype}, {grad.layout}, shape {tuple(grad.shape)}: needs a dense real gradient of "
            "that shape, both contiguous or both channels_last; call .contiguous(), or turn off `sparse=True`"
        )
