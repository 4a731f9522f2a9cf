"""Triton kernels between the reduced gradient and the update: the squared norm, and the scalars that the update reads.

`square_sum_kernel` reads each gradient once and writes one partial sum a program. The number of programs is fixed, so
that all ranks can add up their partial sums elementwise, and each program's share of the elements, hence the order of
the additions, depends on the tables alone: the same gradient has the same norm, bit for bit. `scalars_kernel` adds the
partial sums up and computes all that the update needs, so nothing is read on the host and nothing else is launched.
`megatron_lion.optim.grad_norm` has the plain torch form of both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_memory import place

# Columns of `rows`: int64 address, number of elements, and 1 if the tensor counts, or 0 for a replica.
GRAD = tl.constexpr(0)
NUMEL = tl.constexpr(1)
COUNTS = tl.constexpr(2)
ROW = tl.constexpr(3)


@triton.jit
def inverse_of(divisor: tl.tensor) -> tl.tensor:
    """1 / max(count, 1) in float32, from a float64 count; the bits of megatron-core's division of the gradient buffer."""
    count = tl.load(divisor)
    rounded = tl.where(count > 1.0, count, 1.0).to(tl.float32)
    # A quotient of float32 numbers that is rounded to float64 and then to float32 is rounded correctly; the plain float32
    # division of a device may be approximate.
    return (1.0 / rounded.to(tl.float64)).to(tl.float32)


@triton.jit
def _squares(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    scale: tl.tensor,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Squares of the scaled elements, float32 [BLOCK]; of a replica 0, or NaN if the element is not finite."""
    # bfloat16 is read as its bits: Triton's interpreter misreads subnormal ones.
    STORED: tl.constexpr = tl.uint16 if tl.bfloat16 == GRAD_TYPE else GRAD_TYPE
    offsets = tl.arange(0, BLOCK)
    grads = place(tl.load(row + GRAD), STORED, start, ALIGNED) + offsets
    if MASKED:
        g = tl.load(grads, mask=offsets < numel - start, other=0)
    else:
        g = tl.load(grads)
    if tl.bfloat16 == GRAD_TYPE:
        g = (g.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    g = g.to(tl.float32) * scale
    return g * tl.load(row + COUNTS).to(tl.float32) * g


@triton.jit
def square_sum_kernel(
    rows: tl.tensor,
    chunks: tl.tensor,
    num_chunks: tl.tensor,
    divisor: tl.tensor,
    partials: tl.tensor,
    GRAD_TYPE: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes each program's sum of squares.

    Args:
        rows: int64 [R, ROW], the columns above.
        chunks: int32 [num_chunks, 2]: row, and index of the chunk of BLOCK elements in it.
        num_chunks: length of `chunks`, at least 0.
        divisor: float64 [1], read if HAS_DIVISOR: elements are divided by it first.
        partials: float64 [PROGRAMS], written.
        GRAD_TYPE: dtype of the gradients.
        HAS_DIVISOR: whether the gradients are sums over a count.
        ADD: whether the sums are added to those of another kind of gradient.
        ALIGNED: whether every address in `rows` is a multiple of 16.
        PROGRAMS: number of programs.
        BLOCK: elements a chunk.
    """
    program = tl.program_id(0)
    scale = 1.0
    if HAS_DIVISOR:
        scale = inverse_of(divisor)
    sums = tl.zeros([BLOCK], tl.float32)
    for chunk in range(program, num_chunks, PROGRAMS):
        place = chunks + 2 * tl.cast(chunk, tl.int64)
        row = rows + tl.load(place).to(tl.int64) * ROW
        start = tl.load(place + 1).to(tl.int64) * BLOCK  # 64 bits: in 32, it would wrap at 2^31 elements
        numel = tl.load(row + NUMEL)
        if start + BLOCK <= numel:
            sums += _squares(row, start, numel, scale, GRAD_TYPE, ALIGNED, BLOCK, False)
        else:
            sums += _squares(row, start, numel, scale, GRAD_TYPE, ALIGNED, BLOCK, True)
    total = tl.sum(sums.to(tl.float64))
    if ADD:
        total += tl.load(partials + program)
    tl.store(partials + program, total)


@triton.jit
def scalars_kernel(
    partials: tl.tensor,
    divisor: tl.tensor,
    counts: tl.tensor,
    norm: tl.tensor,
    multipliers: tl.tensor,
    found_inf: tl.tensor,
    clip_grad: tl.tensor,
    NUM_COUNTS: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    CLIPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Computes what the update reads; one program.

    Args:
        partials: float64 [PROGRAMS], summed over all ranks.
        divisor: as for `square_sum_kernel`.
        counts: float64 [NUM_COUNTS]: if one is not above 0, the loss is undefined and the step is skipped.
        norm: float64 [1], written: ℓ2 norm of the divided gradient.
        multipliers: float32 [2], written: 1 / divisor and the clip coefficient, 1 each if there is none.
        found_inf: float32 [1], written: 1 if the step must be skipped, else 0.
        clip_grad: largest norm, float64 [1], read if CLIPS.
        NUM_COUNTS, HAS_DIVISOR, CLIPS: which inputs there are.
        PROGRAMS: length of `partials`.
    """
    length = tl.sqrt(tl.sum(tl.load(partials + tl.arange(0, PROGRAMS))))
    tl.store(norm, length)
    scale = 1.0
    if HAS_DIVISOR:
        scale = inverse_of(divisor)
    tl.store(multipliers, scale)
    coefficient = length * 0.0 + 1.0
    if CLIPS:
        # In float64, then rounded: the bits of megatron-core's arithmetic in Python.
        coefficient = tl.load(clip_grad) / (length + 1.0e-6)
        coefficient = tl.where(coefficient < 1.0, coefficient, 1.0)
    tl.store(multipliers + 1, coefficient.to(tl.float32))
    skips = ~(length < float("inf"))  # also if it is NaN
    for number in tl.static_range(NUM_COUNTS):
        skips = skips | ~(tl.load(counts + number) > 0)
    tl.store(found_inf, skips.to(tl.float32))
