"""Triton version of bit_sums.reference_sum: the same integers in one pass, with the count of NaN and infinities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .bit_sums import Placement

BLOCK = 2048
NUM_WARPS = 8
MIX = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15 as int64
MIX2 = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9 as int64


@triton.jit(do_not_specialize=["numel", "start", "columns", "whole_columns", "first", "salt", "exponent"])
def bit_sum_kernel(
    bits: tl.tensor,
    result: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    whole_columns: tl.tensor,
    first: tl.tensor,
    salt: tl.tensor,
    exponent: tl.tensor,
    IS_PART: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds to `result`, int64 [2], the sum of a block of `bits`, int16 or int32, and its number of non-finite elements.

    IS_PART: whether the tensor is a part of the columns of a whole one; otherwise `columns` is not read.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    stored = tl.load(bits + offsets, mask=mask, other=0).to(tl.int64)
    whole = offsets + start
    if IS_PART:
        whole = (whole // columns) * whole_columns + whole % columns
    mixed = (stored ^ salt.to(tl.int64)) * MIX
    mixed = (mixed ^ (mixed >> 31)) * MIX2
    terms = (mixed ^ (mixed >> 29)) * (2 * (whole + first) + 1)
    # Programs add in any order; addition modulo 2^64 does not depend on it.
    tl.atomic_add(result, tl.sum(tl.where(mask, terms, 0)))
    bad = tl.sum(((stored & exponent) == exponent).to(tl.int64))  # masked lanes load 0, which is finite
    if bad > 0:
        tl.atomic_add(result + 1, bad)


def kernel_sum(flat: torch.Tensor, start: int, place: Placement, salt: int, exponent: int) -> torch.Tensor:
    """Returns what `bit_sums.bit_sum` returns, for a contiguous tensor; `exponent` has the bits of the exponent."""
    result = torch.zeros(2, dtype=torch.int64, device=flat.device)
    bits = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    numbers = (flat.numel(), start, place.columns, place.whole_columns, place.first, salt, exponent)
    if flat.numel():
        grid = (triton.cdiv(flat.numel(), BLOCK),)
        is_part = place.columns != place.whole_columns
        bit_sum_kernel[grid](bits, result, *numbers, IS_PART=is_part, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return result
