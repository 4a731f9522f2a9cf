"""LION in torch's foreach operations: a handful of launches for all tensors of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .lion import Slot, compute_dtype


def foreach_step(slots: Sequence[Slot], first_gradient: bool, multiplier: torch.Tensor | None) -> None:
    """The same operations in the same order, each over all the tensors of a group at once."""
    by_group: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[Slot]] = {}
    for slot in slots:
        key = (id(slot.group), slot.param.dtype, slot.grad.dtype, slot.param.device)
        by_group.setdefault(key, []).append(slot)
    for members in by_group.values():
        _foreach_group(members, first_gradient, multiplier)


def _foreach_group(slots: Sequence[Slot], first_gradient: bool, multiplier: torch.Tensor | None) -> None:
    group, dtype = slots[0].group, compute_dtype(slots[0].param)
    (beta1, beta2), lr = group["betas"], group["lr"]
    stored = [slot.param for slot in slots]
    params = [param.to(dtype) for param in stored]
    grads = [slot.grad.to(dtype) for slot in slots]
    if multiplier is not None:
        grads = list(torch._foreach_mul(grads, multiplier.to(dtype).view(())))
    exp_avgs = [slot.state["exp_avg"] for slot in slots]
    if first_gradient:
        for slot, grad, exp_avg in zip(slots, grads, exp_avgs, strict=True):
            exp_avg.copy_(torch.where(slot.state["step"] == 0, grad, exp_avg))
    interpolations = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(interpolations, torch._foreach_mul(grads, 1 - beta1))
    directions = torch._foreach_sign(interpolations)
    torch._foreach_sub_(interpolations, interpolations)
    torch._foreach_add_(directions, interpolations)
    torch._foreach_add_(directions, torch._foreach_mul(params, group["weight_decay"]))
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(params, directions)
    torch._foreach_mul_(exp_avgs, beta2)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, 1 - beta2))
    if params[0] is not stored[0]:
        torch._foreach_copy_(stored, params)
