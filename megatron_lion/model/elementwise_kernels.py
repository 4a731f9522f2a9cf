"""The element-wise work of a transformer layer in Triton, with the gradients of biases summed in the same pass.

A bias's gradient is the sum of a [rows, width] gradient over its rows. The kernel that writes that gradient has it in
registers, so it adds it up on the way: each program takes ROWS rows of COLUMNS columns in steps of STEP rows and writes
one row of partial sums, float32 [programs, width]. `column_sums_kernel` adds these in a fixed order. There are no
atomics, so every run has the same bits.

Dropout's mask is not stored. Philox (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3) gives it again from
the seed. One call gives 128 bits, 16 for each of 8 neighbouring elements: an element is dropped with the probability
threshold / 65,536, and the others are multiplied by the inverse of the exact rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lion.model.loss_kernels import round_to, to_float32

GROUP = tl.constexpr(8)  # elements of one call of Philox
ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
HALF_ROOT = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _gelu(x: tl.tensor, ERF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """GELU and its derivative; x * sigmoid(2 z) is the tanh form, x / 2 * (1 + tanh z)."""
    if ERF:
        share = 0.5 * (1.0 + tl.erf(x * HALF_ROOT))
        slope = share + x * DENSITY * tl.exp(x * x * -0.5)
    else:
        square = x * x
        share = 1.0 / (1.0 + tl.exp(x * (square * CUBIC + 1.0) * (-2.0 * ROOT)))
        slope = share + x * share * (1.0 - share) * (square * (3.0 * CUBIC) + 1.0) * (2.0 * ROOT)
    return x * share, slope


@triton.jit
def _kept(seed: tl.tensor, rows: tl.tensor, first: tl.tensor, threshold: tl.tensor, width: tl.tensor,
          COLUMNS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Whether dropout keeps the elements of `rows` [R, 1] and the COLUMNS columns from `first`."""
    groups = first // GROUP + tl.arange(0, COLUMNS // GROUP)[None, :]
    a, b, c, d = tl.randint4x(seed, rows * ((width + GROUP - 1) // GROUP) + groups)
    # Each thread has the 8 draws of its group, and 8 elements in a row: no exchange between threads.
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32)
    draws = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(draws, (rows.shape[0], COLUMNS)) >= threshold


@triton.jit
def bias_gelu_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ERF: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes y = GELU(x + bias), rounded once.

    Args:
        x, y: [rows, width], float32, float16, bfloat16, or bfloat16 as int16.
        bias: [width], the same dtype.
        rows, width: the shape.
        ERF: whether the exact form is computed, else the tanh form.
        STEP, COLUMNS: rows and columns of a program.
    """
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)[:, None]
    mask = (row < rows) & (columns < width)
    places = row.to(tl.int64) * width + columns
    shift = to_float32(tl.load(bias + columns, mask=columns < width, other=0))
    value, _ = _gelu(to_float32(tl.load(x + places, mask=mask, other=0)) + shift, ERF)
    tl.store(y + places, round_to(value, y.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ERF: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes the gradient of x, and partial sums of the bias's gradient, float32 [programs, width]; else as the forward pass."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shift = to_float32(tl.load(bias + columns, mask=columns < width, other=0))
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, STEP)[:, None]
        mask = (row < rows) & (columns < width)
        places = row.to(tl.int64) * width + columns
        _, slope = _gelu(to_float32(tl.load(x + places, mask=mask, other=0)) + shift, ERF)
        gradient = to_float32(tl.load(dy + places, mask=mask, other=0)) * slope
        tl.store(dx + places, round_to(gradient, dx.dtype.element_ty), mask=mask)
        sums += tl.where(mask, gradient, 0.0)  # 0 * slope of a NaN bias is no part of a row that is not there
    _store_sums(partials, sums, columns, width)


@triton.jit
def _store_sums(partials: tl.tensor, sums: tl.tensor, columns: tl.tensor, width: tl.tensor) -> None:
    places = partials + tl.program_id(0).to(tl.int64) * width + columns
    tl.store(places, tl.sum(sums, axis=0)[None, :], mask=columns < width)


@triton.jit
def bias_dropout_add_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    seed: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    DROPOUT: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes out = residual + dropout(x + bias), rounded once.

    Args:
        x, residual, out: [rows, width], float32, float16, bfloat16, or bfloat16 as int16.
        bias: [width], the same dtype.
        seed: int64 [1], read if DROPOUT.
        rows, width: the shape.
        threshold: an element is dropped with the probability threshold / 65,536.
        scale: factor of the elements that are kept.
        DROPOUT: whether elements are dropped.
        STEP, COLUMNS: rows and columns of a program.
    """
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0) * STEP + tl.arange(0, STEP)[:, None]
    mask = (row < rows) & (columns < width)
    places = row.to(tl.int64) * width + columns
    value = to_float32(tl.load(bias + columns, mask=columns < width, other=0))
    value = to_float32(tl.load(x + places, mask=mask, other=0)) + value
    if DROPOUT:
        value = tl.where(_kept(tl.load(seed), row, first, threshold, width, COLUMNS), value * scale, 0.0)
    value += to_float32(tl.load(residual + places, mask=mask, other=0))
    tl.store(out + places, round_to(value, out.dtype.element_ty), mask=mask)


@triton.jit
def dropout_backward_kernel(
    dy: tl.tensor,
    seed: tl.tensor,
    dx: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes the gradient of x, dropout's mask times dy, and partial sums of the bias's gradient; without DROPOUT the sums only.

    Args:
        dy: gradient of the output, [rows, width].
        seed, threshold, scale: as in the forward pass.
        dx: [rows, width], written if DROPOUT.
        partials: float32 [programs, width].
        rows, width: the shape.
        DROPOUT: whether elements are dropped.
        ROWS, STEP, COLUMNS: a program takes ROWS rows of COLUMNS columns, STEP rows at a time.
    """
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, STEP)[:, None]
        mask = (row < rows) & (columns < width)
        places = row.to(tl.int64) * width + columns
        gradient = to_float32(tl.load(dy + places, mask=mask, other=0))
        if DROPOUT:
            kept = _kept(tl.load(seed), row, first, threshold, width, COLUMNS)
            gradient = tl.where(kept, gradient * scale, 0.0)
            tl.store(dx + places, round_to(gradient, dx.dtype.element_ty), mask=mask)
        sums += gradient
    _store_sums(partials, sums, columns, width)


@triton.jit
def join_qkv_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    joined: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    batch: tl.tensor,
    query_s: tl.tensor,
    query_b: tl.tensor,
    query_n: tl.tensor,
    key_s: tl.tensor,
    key_b: tl.tensor,
    key_n: tl.tensor,
    value_s: tl.tensor,
    value_b: tl.tensor,
    value_n: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Copies three [S, B, N, D] gradients side by side, [S, B, N, 3, D], and adds up the columns.

    Args:
        query, key, value: the gradients, with stride 1 along D.
        joined: contiguous.
        partials: float32 [programs, 3 * N * D].
        rows: S * B.
        batch: B.
        query_s, query_b, query_n: strides of `query` along S, B and N, in elements; likewise of key and value.
        channels: D.
        ROWS, STEP: rows of a program, and of one step of it.
        COLUMNS: at least D, a power of two.
    """
    part = tl.program_id(1) % 3
    head = (tl.program_id(1) // 3).to(tl.int64)
    width = tl.num_programs(1) * channels
    columns = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, STEP)[:, None]
        mask = (row < rows) & (columns < channels)
        s = (row // batch).to(tl.int64)
        b = (row % batch).to(tl.int64)
        if part == 0:
            gradient = tl.load(query + s * query_s + b * query_b + head * query_n + columns, mask=mask, other=0)
        elif part == 1:
            gradient = tl.load(key + s * key_s + b * key_b + head * key_n + columns, mask=mask, other=0)
        else:
            gradient = tl.load(value + s * value_s + b * value_b + head * value_n + columns, mask=mask, other=0)
        places = row.to(tl.int64) * width + tl.program_id(1) * channels + columns
        tl.store(joined + places, gradient, mask=mask)
        sums += to_float32(gradient)
    place = partials + tl.program_id(0).to(tl.int64) * width + tl.program_id(1) * channels + columns
    tl.store(place, tl.sum(sums, axis=0)[None, :], mask=columns < channels)


@triton.jit
def column_sums_kernel(
    partials: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    ADD: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Adds up partial sums in a fixed order.

    Args:
        partials: float32 [K, count, width], K = 1 or 2.
        first, second: [width], where the sums of each k go, rounded once; `second` is used if K = 2.
        count: rows of partial sums.
        width: columns.
        ADD: whether the sums are added to what `first` and `second` hold.
        STEP, COLUMNS: a program takes COLUMNS columns, STEP rows at a time.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < width
    base = partials + tl.program_id(1).to(tl.int64) * count * width
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, count, STEP):
        row = start + tl.arange(0, STEP)[:, None]
        mask = (row < count) & (columns < width)
        total += tl.load(base + row.to(tl.int64) * width + columns, mask=mask, other=0.0)
    place = tl.where(tl.program_id(1) == 0, first, second) + columns
    result = tl.sum(total, axis=0)[None, :]
    if ADD:
        result += to_float32(tl.load(place, mask=inside, other=0))
    tl.store(place, round_to(result, first.dtype.element_ty), mask=inside)
