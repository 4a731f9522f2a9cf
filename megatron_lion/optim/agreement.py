"""Triton kernel for Cautious LION: counts the elements where the update and the gradient have the same sign."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    BETA1,
    GROUP,
    GROUP_ROW,
    NUMEL,
    ONE_MINUS_BETA1,
    ROW,
    SIGN,
    SLOT,
    grad_and_momentum_places,
    load_grad_and_momentum,
    sign_or_nan,
)


@triton.jit
def _count_chunk(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    group: tl.tensor,
    multiplier: tl.tensor,
    second: tl.tensor,
    counts: tl.tensor,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    grad, exp_avg, scale = grad_and_momentum_places(row, start, numel, GRAD_TYPE, MOMENTUM, ALIGNED)
    g, m = load_grad_and_momentum(
        grad, exp_avg, scale, numel - start, multiplier, second, MOMENTUM, BEGIN, ALIGNED, BLOCK, 8, MASKED
    )
    sign = sign_or_nan(g, m, tl.load(group + BETA1), tl.load(group + ONE_MINUS_BETA1))
    agrees = sign * g > 0  # masked lanes load g = 0, so they never count
    # Programs add in any order. The sum is an integer, so the order does not change φ; a float sum would.
    tl.atomic_add(counts + tl.load(row + SLOT), tl.sum(agrees.to(tl.int64)))


@triton.jit
def agreement_kernel(
    rows: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    multiplier: tl.tensor,
    counts: tl.tensor,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NUM_MULTIPLIERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds to `counts`, int64 [tensors], the number of elements where update and gradient have the same sign.

    The other arguments are those of `lion_kernel`.
    """
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * ROW
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    numel = tl.load(row + NUMEL)
    group = groups + tl.load(row + GROUP) * GROUP_ROW
    factor = 1.0
    second = 1.0
    if NUM_MULTIPLIERS > 0:
        factor = tl.load(multiplier)
    if NUM_MULTIPLIERS > 1:
        second = tl.load(multiplier + 1)
    if MAXIMIZE:
        factor = factor * tl.load(group + SIGN)
    if start + BLOCK <= numel:
        _count_chunk(
            row, start, numel, group, factor, second, counts, GRAD_TYPE, MOMENTUM, BEGIN, ALIGNED, BLOCK, False
        )
    else:
        _count_chunk(row, start, numel, group, factor, second, counts, GRAD_TYPE, MOMENTUM, BEGIN, ALIGNED, BLOCK, True)
