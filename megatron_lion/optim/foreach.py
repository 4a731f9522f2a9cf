"""LION in torch's foreach operations: a handful of launches for all tensors of a group.

On a CPU launches cost nothing and memory everything: there the operations run over one block after the other, small
enough to stay in the cache between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .lion import PlainLayout, Slot

CPU_BLOCK = 32768  # elements a thread: torch gives no thread fewer, and 128 KiB an array stay in a core's cache


def foreach_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """The operations of `lion_update` in the same order, each over all the tensors of a group at once.

    The arguments are those of `megatron_lion.optim.lion.reference_step`.
    """
    by_group: dict[tuple[int, torch.dtype, torch.device], list[Slot]] = {}
    for slot in slots:
        key = (id(slot.group), slot.param.dtype, slot.param.device)
        by_group.setdefault(key, []).append(slot)
    for (_, _, device), members in by_group.items():
        if device.type == "cpu":
            for block in _blocks(members):
                _foreach_group([block], layout, begin, multiplier)
        else:
            _foreach_group(members, layout, begin, multiplier)


def _blocks(slots: Sequence[Slot]) -> Iterator[Slot]:
    """The same elements, in their order in memory, as slots of one block each."""
    size = CPU_BLOCK * torch.get_num_threads()
    for slot in slots:
        numel = slot.param.numel()
        state = {name: value for name, value in slot.state.items() if name != "step"}
        if numel <= size or slot.state["exp_avg"].dtype == torch.uint8:
            yield slot
            continue
        flat = [tensor.as_strided((numel,), (1,)) for tensor in (slot.param, slot.grad, *state.values())]
        for parts in zip(*(tensor.split(size) for tensor in flat), strict=True):
            yield Slot(parts[0], parts[1], dict(zip(state, parts[2:], strict=True)), slot.group)


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
