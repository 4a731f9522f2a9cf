"""LION in torch's foreach operations: a few launches for all tensors of a group.

On a CPU launches are cheap and memory traffic is not. There the operations run block by block, and a block is small
enough to stay in the cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .update import PlainLayout, Slot, rate_of

# Elements a thread: torch gives no thread fewer than 32768, and five float32 arrays of 256 KiB stay in a cache.
CPU_BLOCK = 65536


def foreach_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """Runs the operations of `lion_update` in the same order, each over all tensors of a group at once.

    The arguments are those of `megatron_lion.optim.update.reference_step`.
    """
    by_group: dict[tuple[int, torch.dtype, torch.device], list[Slot]] = {}
    for slot in slots:
        key = (id(slot.group), slot.param.dtype, slot.param.device)
        by_group.setdefault(key, []).append(slot)
    for (_, _, device), members in by_group.items():
        if device.type == "cpu":
            for block in _blocks(members):
                _update_block(block, layout, begin, multiplier)
        else:
            _foreach_group(members, layout, begin, multiplier)


def _blocks(slots: Sequence[Slot]) -> Iterator[Slot]:
    """Yields the same elements, in memory order, as slots of at most one block."""
    size = CPU_BLOCK * torch.get_num_threads()
    for slot in slots:
        numel = slot.param.numel()
        # Not `step`, and not what other software keeps beside the state: it may have any size.
        state = {name: value for name, value in slot.state.items() if name in ("exp_avg", "master_param")}
        if numel <= size or slot.state["exp_avg"].dtype == torch.uint8:
            yield slot  # packed int8 momentum has its scales after all elements and cannot be cut
            continue
        # Dense tensors with equal strides (fit_gradient, fit): position i of each is the same element.
        flat = [tensor.as_strided((numel,), (1,)) for tensor in (slot.param, slot.grad, *state.values())]
        for parts in zip(*(tensor.split(size) for tensor in flat), strict=True):
            yield Slot(parts[0], parts[1], dict(zip(state, parts[2:], strict=True)), slot.group, slot.caution)


def _update_block(slot: Slot, layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """`lion_update` with two scratch arrays instead of a new one for every operation."""
    param, exp_avg = layout.read(slot)
    grad = slot.grad.to(param.dtype)
    for factor in () if multiplier is None else multiplier.view(-1):
        grad = grad * factor
    if slot.group.get("maximize"):
        grad = -grad
    if begin:
        exp_avg.copy_(torch.where(exp_avg.isnan(), grad, exp_avg))
    (beta1, beta2), lr = slot.group["betas"], rate_of(slot.group)
    direction, scratch = torch.empty_like(param), torch.empty_like(param)
    torch.mul(exp_avg, beta1, out=direction)
    direction.add_(torch.mul(grad, 1 - beta1, out=scratch))
    torch.sub(direction, direction, out=scratch)  # 0, or NaN if the interpolation is not finite
    direction.sign_().add_(scratch)
    if slot.caution is not None:
        direction.mul_(torch.where(direction * grad > 0, slot.caution, 0.0))
    direction.add_(torch.mul(param, slot.group["weight_decay"], out=scratch))
    param.sub_(direction.mul_(lr))
    exp_avg.mul_(beta2).add_(torch.mul(grad, 1 - beta2, out=scratch))
    layout.write(slot, param, exp_avg)


def _foreach_group(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    group = slots[0].group
    (beta1, beta2), lr = group["betas"], rate_of(group)
    read = [layout.read(slot) for slot in slots]
    params, exp_avgs = [param for param, _ in read], [exp_avg for _, exp_avg in read]
    grads = [slot.grad.to(params[0].dtype) for slot in slots]
    for factor in () if multiplier is None else multiplier.to(params[0].dtype).view(-1):
        grads = list(torch._foreach_mul(grads, factor))
    if group.get("maximize"):
        grads = list(torch._foreach_neg(grads))
    if begin:
        for exp_avg, grad in zip(exp_avgs, grads, strict=True):
            exp_avg.copy_(torch.where(exp_avg.isnan(), grad, exp_avg))
    interpolations = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(interpolations, torch._foreach_mul(grads, 1 - beta1))
    directions = torch._foreach_sign(interpolations)
    # 0, or NaN if not finite: sign alone turns NaN into 0 and ±inf into ±1.
    torch._foreach_sub_(interpolations, interpolations)
    torch._foreach_add_(directions, interpolations)
    for slot, direction, grad in zip(slots, directions, grads, strict=True):
        if slot.caution is not None:
            direction.mul_(torch.where(direction * grad > 0, slot.caution, 0.0))
    torch._foreach_add_(directions, torch._foreach_mul(params, group["weight_decay"]))
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(params, directions)
    torch._foreach_mul_(exp_avgs, beta2)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, 1 - beta2))
    for slot, param, exp_avg in zip(slots, params, exp_avgs, strict=True):
        layout.write(slot, param, exp_avg)
