"""Cross-entropy over rows of logits in two Triton kernels: each logit is read twice and written once.

`statistics_kernel` (forward pass) reads a row once and returns three numbers of it. `gradient_kernel` (backward pass)
reads the row again and writes the gradient over it. Neither has a temporary of the logits' size. With two bytes a logit
that is 2 + 4 = 6 bytes moved a logit. `megatron_lion.model.fused_loss` launches them and combines the numbers of
tensor-parallel ranks.

One program takes one row. It keeps a maximum and a sum of exponentials for every LANE neighbouring logits, so that the
loop needs no exchange between threads and one exponential a logit; the lanes are joined after the loop (Milakov and
Gimelshein 2018, Online normalizer calculation for softmax). There is no autotuning: `gradient_kernel` overwrites its
input, and a second try would read the gradient.

Triton's interpreter rounds to bfloat16 in another way than devices do. In it, and only in it, the kernels take bfloat16
as its 16 bits (int16) and round by integer operations, with the result of the devices' instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One 16-byte access of 16-bit logits.
LANE = tl.constexpr(8)
# 256 threads with one lane each. A row of 50,304 logits takes 25 rounds and fills 98 % of them.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def to_float32(stored: tl.tensor) -> tl.tensor:
    if stored.dtype == tl.int16:
        values = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def round_to(values: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """float32 values rounded once, ties to even, to a logit's dtype; int16 stands for the bits of bfloat16."""
    if kind == tl.int16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # would carry NaN 0x7FFFFFFF into the sign: -0
        rounded = tl.where(values == values, nearest, 0x7FC0).to(tl.int16)
    else:
        rounded = values.to(kind)
    return rounded


@triton.jit
def _finite_or_zero(maximum: tl.tensor) -> tl.tensor:
    """A maximum to subtract: 0 instead of -inf, so that the exponentials of logits -inf are 0 and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _add(x: tl.tensor, lane_max: tl.tensor, lane_sum: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Maximum and sum of each lane with the logits x [lanes, LANE] added."""
    new_max = tl.maximum(lane_max, tl.max(x, axis=1))
    shift = _finite_or_zero(new_max)
    return new_max, lane_sum * tl.exp(lane_max - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@triton.jit
def statistics_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    statistics: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the maximum of each row, its sum of exp(logit - maximum), and its target's logit.

    A NaN or +inf in a row makes its sum NaN. A row of -inf only has the maximum -inf and the sum 0.

    Args:
        logits: [num_rows, width], float32, float16, bfloat16, or bfloat16 as int16.
        targets: int64 [num_rows], the target's column, or any number outside of [0, width) for none.
        statistics: float32 [3, num_rows]: maximum, sum, and the target's logit or 0.
        num_rows: number of rows, and of programs.
        width: columns of a row.
        BLOCK: logits that a program reads at once, a multiple of LANE.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * width may exceed 2^31
    places = logits + row * width
    offsets = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    lane_max = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK // LANE,), tl.float32)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # without masks, which would take an instruction a logit
        x = to_float32(tl.load(places + start + offsets))
        lane_max, lane_sum = _add(x, lane_max, lane_sum)
    if whole < width:
        mask = whole + offsets < width
        x = to_float32(tl.load(places + whole + offsets, mask=mask, other=0))
        lane_max, lane_sum = _add(tl.where(mask, x, float("-inf")), lane_max, lane_sum)
    row_max = tl.max(lane_max, axis=0)
    row_sum = tl.sum(lane_sum * tl.exp(lane_max - _finite_or_zero(row_max)), axis=0)
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < width)
    target_logit = to_float32(tl.load(places + tl.where(is_here, target, 0), mask=is_here, other=0))
    tl.store(statistics + row, row_max)
    tl.store(statistics + num_rows + row, row_sum)
    tl.store(statistics + 2 * num_rows + row, target_logit)


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    upstream: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Writes (softmax - onehot(target)) * upstream over the logits, rounded once.

    Args:
        logits: as for `statistics_kernel`; the gradient afterwards.
        targets: as for `statistics_kernel`.
        maxima, sums: float32 [num_rows], over the whole vocabulary.
        upstream: float32 [num_rows], gradient of each row's loss.
        width: columns of a row.
        BLOCK: logits that a program reads at once.
    """
    row = tl.program_id(0).to(tl.int64)
    places = logits + row * width
    target = tl.load(targets + row)
    # 32 bits: half the instructions of each comparison. No column is -1.
    target = tl.where((target >= 0) & (target < width), target, -1).to(tl.int32)
    maximum = tl.load(maxima + row)
    inverse = 1.0 / tl.load(sums + row)
    factor = tl.load(upstream + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        x = to_float32(tl.load(places + columns, mask=mask, other=0))
        p = tl.exp(x - maximum) * inverse
        p = tl.where(columns == target, p - 1.0, p)
        tl.store(places + columns, round_to(p * factor, places.dtype.element_ty), mask=mask)
