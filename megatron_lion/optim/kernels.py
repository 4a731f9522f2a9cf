"""LION as one Triton launch for any number of tensors.

The kernel finds its work in tables in device memory instead of in its arguments: `rows` holds one line of
pointers for each tensor, `chunks` one (row, chunk) pair for each program, `groups` the hyper-parameters of
each parameter group. So one launch covers all tensors, each with its own group's rate and decay, and the
tables are rebuilt only when a pointer or a hyper-parameter changes. Nothing here waits for the device.

There is no autotuning: it would apply the update once for every configuration it tries. Addresses are
computed in 64 bits. The operations and their order are those of `megatron_lion.optim.lion.Lion`;
`enable_fp_fusion=False` keeps the compiler from fusing a multiplication into an addition, which would round
once instead of twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .lion import Slot

BLOCK = 2048  # elements a program; a multiple of every quantisation block
NUM_WARPS = 4
ROW = 8  # int64 entries: param, grad, exp_avg, step, numel, group, unused, unused
GROUP = 5  # float32 entries: weight_decay, beta1, 1 - beta1, beta2, 1 - beta2


@triton.jit
def _rounded(values: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """float32 values as `kind`, to nearest, ties to even; NaN stays NaN."""
    if kind == tl.bfloat16:
        # In integers, because Triton's interpreter does not round a bfloat16 as the device does.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where(values == values, nearest, (bits >> 16) | 0x40)
        result = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(kind)
    return result


@triton.jit
def _sign_or_nan(values: tl.tensor) -> tl.tensor:
    sign = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
    return tl.where(tl.abs(values) < float("inf"), sign, float("nan"))


@triton.jit
def _lion_kernel(
    rows: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    lr_pointers: tl.tensor,
    multiplier: tl.tensor,
    found_inf: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    FIRST_GRADIENT: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * ROW
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    numel = tl.load(row + 4)
    if HAS_FOUND_INF:
        numel = tl.where(tl.load(found_inf) == 0, numel, 0)  # every lane masked off: nothing is written
    offsets = start + tl.arange(0, BLOCK).to(tl.int64)
    mask = offsets < numel
    param = tl.load(row + 0).to(tl.pointer_type(param_type))
    grad = tl.load(row + 1).to(tl.pointer_type(grad_type))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)

    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0)
    p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)

    group_index = tl.load(row + 5)
    group = groups + group_index * GROUP
    lr = tl.load(tl.load(lr_pointers + group_index).to(tl.pointer_type(tl.float32)))
    if HAS_MULTIPLIER:
        g = g * tl.load(multiplier)
    if FIRST_GRADIENT:
        m = tl.where(tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32))) == 0, g, m)
    c = m * tl.load(group + 1) + g * tl.load(group + 2)
    u = _sign_or_nan(c) + p * tl.load(group)
    p = p - u * lr
    m = m * tl.load(group + 3) + g * tl.load(group + 4)
    tl.store(param + offsets, _rounded(p, param_type), mask=mask)
    tl.store(exp_avg + offsets, m, mask=mask)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class _Plan:
    """Tables of one launch on the device, and what they were made from."""

    addresses: tuple[tuple[int, ...], ...]
    hyper: tuple[tuple[float | int, ...], ...]
    rows: torch.Tensor
    chunks: torch.Tensor
    groups: torch.Tensor
    lrs: torch.Tensor
    lr_pointers: torch.Tensor
    aligned: bool


def lion_step(
    slots: Sequence[Slot],
    first_gradient: bool,
    multiplier: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    plans: dict[Any, Any],
) -> None:
    """Takes one LION step for all slots: one launch for each combination of device and dtypes.

    Args:
        slots: parameters with gradient, state and group.
        first_gradient: the momentum of a parameter whose `step` is 0 starts as its gradient.
        multiplier: one float32 element that every gradient is multiplied by, or None.
        found_inf: one element; unless it is 0, nothing is written. None: the step is taken.
        plans: kept by the caller between steps; holds the tables.

    Raises:
        ValueError: a dtype or device that the kernel does not do.
    """
    launches: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Slot]] = {}
    for slot in slots:
        launches.setdefault((slot.param.device, slot.param.dtype, slot.grad.dtype), []).append(slot)
    for (device, param_dtype, grad_dtype), members in launches.items():
        if param_dtype not in _TYPES or grad_dtype not in _TYPES:
            raise ValueError(
                f"implementation = 'triton' with a parameter of {param_dtype} and a gradient of "
                f"{grad_dtype}: needs float32, bfloat16 or float16; use implementation = 'foreach'"
            )
        key = (device, param_dtype, grad_dtype)
        plan = plans[key] = _make_plan(members, plans.get(key))
        if plan.chunks.numel() == 0:
            continue
        _lion_kernel[(plan.chunks.shape[0],)](
            plan.rows,
            plan.chunks,
            plan.groups,
            plan.lr_pointers,
            multiplier,
            found_inf,
            param_type=_TYPES[param_dtype],
            grad_type=_TYPES[grad_dtype],
            FIRST_GRADIENT=first_gradient,
            HAS_MULTIPLIER=multiplier is not None,
            HAS_FOUND_INF=found_inf is not None,
            ALIGNED=plan.aligned,
            BLOCK=BLOCK,
            ROW=ROW,
            GROUP=GROUP,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _make_plan(slots: Sequence[Slot], old: _Plan | None) -> _Plan:
    """The tables for these tensors; those of last time wherever nothing changed."""
    device = slots[0].param.device
    group_index = {id(group): i for i, group in enumerate({id(s.group): s.group for s in slots}.values())}
    addresses = tuple(
        (
            slot.param.data_ptr(),
            slot.grad.data_ptr(),
            slot.state["exp_avg"].data_ptr(),
            slot.state["step"].data_ptr() if "step" in slot.state else 0,
            slot.param.numel(),
            group_index[id(slot.group)],
            0,
            0,
        )
        for slot in slots
    )
    groups = list({id(slot.group): slot.group for slot in slots}.values())
    hyper = tuple(_hyper_parameters(group, device) for group in groups)
    if old is not None and old.addresses == addresses and old.hyper == hyper:
        return old
    if old is None or old.addresses != addresses:
        chunk_list = [(i, c) for i, entry in enumerate(addresses) for c in range(-(-entry[4] // BLOCK))]
        rows = _upload(torch.tensor(addresses, dtype=torch.int64), device)
        chunks = _upload(torch.tensor(chunk_list, dtype=torch.int32).view(-1, 2), device)
    else:
        rows, chunks = old.rows, old.chunks
    lrs = _upload(torch.tensor([h[1] for h in hyper], dtype=torch.float32), device)
    pointers = [int(h[0]) or lrs.data_ptr() + 4 * i for i, h in enumerate(hyper)]
    return _Plan(
        addresses,
        hyper,
        rows,
        chunks,
        _upload(torch.tensor([h[2:] for h in hyper], dtype=torch.float32), device),
        lrs,
        _upload(torch.tensor(pointers, dtype=torch.int64), device),
        all(pointer % 16 == 0 for entry in addresses for pointer in entry[:3]),
    )


def _hyper_parameters(group: dict[str, Any], device: torch.device) -> tuple[float | int, ...]:
    """(address of the rate or 0, rate if it is a number, decay, β1, 1-β1, β2, 1-β2)."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    address, value = 0, 0.0
    if isinstance(lr, torch.Tensor) and lr.device == device:
        address = lr.data_ptr()
    else:
        value = float(lr)  # a tensor in host memory: reading it waits for nothing
    return (address, value, group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2)


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a table to the device without waiting: pinned memory is held back until the copy is done."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
