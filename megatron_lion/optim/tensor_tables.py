"""Table rows that kernels.py and lion.cpp read: a tensor's addresses, and a group's hyper-parameters.

The Triton kernel (`kernels.py`) and the C++ loop (`lion.cpp`) read the same tables.
"""

from __future__ import annotations

from typing import Any

import torch

from .update import PlainLayout, Slot

Row = tuple[int, int, int, int, int, int, int]
"""Addresses of parameter, gradient, momentum and master weight (or 0); elements; group; tensor."""


def master_form(slot: Slot, layout: PlainLayout) -> str:
    """Returns the form of the slot's master weight; "none" for a float32 parameter, its own master in every mode."""
    return "none" if slot.param.dtype == torch.float32 else layout.master_weights


def row_of(slot: Slot, layout: PlainLayout, group: int, number: int) -> Row:
    """Returns the row of the `number`-th tensor of the step, which belongs to the `group`-th group."""
    param, grad, state = slot.param, slot.grad, slot.state
    master = state["master_param"].data_ptr() if master_form(slot, layout) != "none" else 0
    addresses = (param.data_ptr(), grad.data_ptr(), state["exp_avg"].data_ptr(), master)
    return (*addresses, param.numel(), group, number)


def hyper_parameters(group: dict[str, Any], lr: float) -> tuple[float, ...]:
    """Returns the row of a group: decay, β1, 1-β1, β2, 1-β2, rate, and the sign of the gradient (-1 if it maximizes).

    1-β is computed in double precision; the tables round to float32 afterwards, as the reference does.
    """
    beta1, beta2 = group["betas"]
    return (group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, lr, -1.0 if group.get("maximize") else 1.0)
