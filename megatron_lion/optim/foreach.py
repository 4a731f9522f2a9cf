"""LION in torch's foreach operations: a handful of launches for all tensors of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .lion import PlainLayout, Slot


def foreach_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """The operations of `lion_update` in the same order, each over all the tensors of a group at once.

    The arguments are those of `megatron_lion.optim.lion.reference_step`.
    """
    by_group: dict[tuple[int, torch.dtype, torch.device], list[Slot]] = {}
    for slot in slots:
        key = (id(slot.group), slot.param.dtype, slot.param.device)
        by_group.setdefault(key, []).append(slot)
    for members in by_group.values():
        _foreach_group(members, layout, begin, multiplier)


def _foreach_group(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    group = slots[0].group
    (beta1, beta2), lr = group["betas"], group["lr"]
    read = [layout.read(slot) for slot in slots]
    params, exp_avgs = [param for param, _ in read], [exp_avg for _, exp_avg in read]
    grads = [slot.grad.to(params[0].dtype) for slot in slots]
    if multiplier is not None:
        grads = list(torch._foreach_mul(grads, multiplier.to(params[0].dtype).view(())))
    if begin:
        for exp_avg, grad in zip(exp_avgs, grads, strict=True):
            exp_avg.copy_(torch.where(exp_avg.isnan(), grad, exp_avg))
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
    for slot, param, exp_avg in zip(slots, params, exp_avgs, strict=True):
        layout.write(slot, param, exp_avg)
