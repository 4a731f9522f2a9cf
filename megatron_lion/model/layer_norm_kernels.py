"""LayerNorm and its backward pass in Triton, with the residual connection's gradient added in the same pass.

A program takes ROWS rows in turn, with gain and bias in registers. The gradients of gain and bias are sums over all rows:
each program adds up its own rows in float32 and writes one row of partial sums, which `column_sums_kernel` of
`megatron_lion.model.elementwise_kernels` adds in a fixed order. There are no atomics, so every run has the same bits.

Elements are read and written in their dtype, each once, and all arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lion.model.loss_kernels import round_to, to_float32


@triton.jit
def layer_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    means: tl.tensor,
    inverses: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes y = (x - mean) / sqrt(variance + eps) * weight + bias, rounded once.

    Args:
        x, y: [rows, width], float32, float16, bfloat16, or bfloat16 as int16.
        weight, bias: [width], the same dtype.
        means, inverses: float32 [rows]: mean, and 1 / sqrt(variance + eps).
        rows: number of rows.
        width: columns of a row, at most BLOCK.
        eps: added to the variance.
        ROWS: rows of a program.
        BLOCK: a power of two.
    """
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    gain = to_float32(tl.load(weight + columns, mask=mask, other=0))
    shift = to_float32(tl.load(bias + columns, mask=mask, other=0))
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        exists = row < rows
        inside = mask & exists
        start = row.to(tl.int64) * width  # 64 bits: rows * width may exceed 2^31
        values = to_float32(tl.load(x + start + columns, mask=inside, other=0))
        mean = tl.sum(values, axis=0) / width
        centred = tl.where(mask, values - mean, 0.0)  # twice through the registers: E x² - (E x)² cancels
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        tl.store(y + start + columns, round_to(centred * inverse * gain + shift, y.dtype.element_ty), mask=inside)
        tl.store(means + row, mean, mask=exists)
        tl.store(inverses + row, inverse, mask=exists)


@triton.jit
def layer_norm_backward_kernel(
    dy: tl.tensor,
    residual_gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    means: tl.tensor,
    inverses: tl.tensor,
    dx: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gradient of x, and partial sums of the gradients of weight and bias.

    Args:
        dy: gradient of y, [rows, width].
        residual_gradient: gradient of x as the residual, [rows, width], read if HAS_RESIDUAL.
        x, weight: as for `layer_norm_kernel`.
        means, inverses: float32 [rows], from `layer_norm_kernel`.
        dx: [rows, width], rounded once.
        partials: float32 [2, programs, width]: of the weight, of the bias.
        rows: number of rows.
        width: columns of a row, at most BLOCK.
        HAS_RESIDUAL: whether to add `residual_gradient`.
        ROWS: rows of a program.
        BLOCK: a power of two.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    gain = to_float32(tl.load(weight + columns, mask=mask, other=0))
    weight_sums = tl.zeros((BLOCK,), tl.float32)
    bias_sums = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS):
        row = program * ROWS + index
        exists = row < rows
        start = row.to(tl.int64) * width
        inside = mask & exists  # outside, dy is 0, and so is all that is added
        upstream = to_float32(tl.load(dy + start + columns, mask=inside, other=0))
        inverse = tl.load(inverses + row, mask=exists, other=0.0)
        normed = to_float32(tl.load(x + start + columns, mask=inside, other=0))
        normed = (normed - tl.load(means + row, mask=exists, other=0.0)) * inverse
        scaled = upstream * gain
        along, total = tl.split(
            tl.sum(tl.join(scaled * normed, scaled), axis=0)
        )  # one exchange between threads for both
        gradient = (scaled - (normed * (along / width) + total / width)) * inverse
        if HAS_RESIDUAL:
            gradient += to_float32(tl.load(residual_gradient + start + columns, mask=inside, other=0))
        tl.store(dx + start + columns, round_to(gradient, dx.dtype.element_ty), mask=inside)
        weight_sums += upstream * normed
        bias_sums += upstream
    place = partials + program.to(tl.int64) * width + columns
    tl.store(place, weight_sums, mask=mask)
    tl.store(place + tl.num_programs(0).to(tl.int64) * width, bias_sums, mask=mask)
