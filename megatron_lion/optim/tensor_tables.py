"""One line of addresses for each tensor and one of hyper-parameters for each group: how the fused loops find their work.

The Triton kernel (`kernels.py`) and the C++ loop (`lion.cpp`) read the same tables.
"""

from __future__ import annotations

from typing import Any

import torch

from .update import PlainLayout, Slot

Row = tuple[int, int, int, int, int, int, int]
"""Addresses of parameter, gradient, momentum and master weight (or 0); elements; group; tensor."""


def master_form(slot: Slot, layout: PlainLayout) -> str:
    """How the slot's master weight is kept; a float32 parameter is its own in every mode."""
    return "none" if slot.param.dtype == torch.float32 else layout.master_weights


def row_of(slot: Slot, layout: PlainLayout, group: int, number: int) -> Row:
    """The line of a tensor that belongs to the `group`-th group and is the `number`-th of the step."""
    param, grad, state = slot.param, slot.grad, slot.state
    master = state["master_param"].data_ptr() if master_form(slot, layout) != "none" else 0
    addresses = (param.data_ptr(), grad.data_ptr(), state["exp_avg"].data_ptr(), master)
    return (*addresses, param.numel(), group, number)


def hyper_parameters(group: dict[str, Any], lr: float) -> tuple[float, ...]:
    """The line of a group: decay, β1, 1-β1, β2, 1-β2, rate."""
    beta1, beta2 = group["betas"]
    return (group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, lr)
