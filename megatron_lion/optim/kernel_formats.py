"""Numbers in the forms that the Triton kernels store: bfloat16 as its bits, split master weights, int8 blocks.

The definitions are those of `megatron_lion.optim.precision`, bit for bit. The functions take fewer instructions than those
definitions say; each comment gives the reason why the bits are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_BLOCK = tl.constexpr(32)
ONE_127TH = tl.constexpr(1 / 127)
# Adding it rounds |x| < 2^22 to an integer, ties to even, and leaves that integer in the low bits of the sum.
ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def bits_of(values: tl.tensor) -> tl.tensor:
    """uint32 bits of float32 values."""
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """float32 values of 32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(values: tl.tensor) -> tl.tensor:
    """Upper halves, as uint32, of float32 values rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = bits_of(values)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # would carry NaN 0x7FFFFFFF into the sign: -0
    return tl.where(values == values, nearest, 0x7FC0)


@triton.jit
def join_master(upper: tl.tensor, remainder: tl.tensor, MASTER_WEIGHTS: tl.constexpr) -> tl.tensor:
    """float32 from upper halves (uint32, shifted up) and remainders, as `megatron_lion.optim.precision.join_master`."""
    lo = remainder.to(tl.int32)
    if MASTER_WEIGHTS == "split24":
        lo = lo << 8
    return float_of(upper + lo.to(tl.uint32, bitcast=True))


@triton.jit
def split_master(values: tl.tensor, MASTER_WEIGHTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(uint16 upper halves, remainders) of float32 values, as `megatron_lion.optim.precision.split_master`."""
    bits = tl.where(values == values, bits_of(values), 0x7FC00000)
    # Subtracting the upper half leaves the lower one as it is, read as a signed number.
    if MASTER_WEIGHTS == "split24":
        hi = (bits + 0x8080) >> 16  # + 0x80, then + 0x8000; the low byte, dropped between them, does not carry
        remainder = ((bits + 0x80) >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        hi = (bits + 0x8000) >> 16
        remainder = bits.to(tl.uint16).to(tl.int16, bitcast=True)
    return hi.to(tl.uint16), remainder


@triton.jit
def _halve(magnitudes: tl.tensor) -> tl.tensor:
    """Larger of each two neighbours along the last axis of [blocks, lanes, values]; NaN if one of them is."""
    pairs = tl.reshape(magnitudes, [magnitudes.shape[0], magnitudes.shape[1], magnitudes.shape[2] // 2, 2])
    left, right = tl.split(pairs)
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_bits(values: tl.tensor) -> tl.tensor:
    """Bits without sign, as int32 [blocks], of the largest magnitude of each block; those of a NaN if it holds one."""
    magnitudes = tl.abs(values)
    if values.shape[2] == 8:
        four = _halve(magnitudes)
    else:
        four = magnitudes
    lanes = tl.reshape(_halve(_halve(four)), [values.shape[0], values.shape[1]])
    # Compared as integers, magnitudes have the order of the floats and NaN is the largest, so no maximum loses a NaN.
    return tl.max(lanes.to(tl.int32, bitcast=True), axis=1)


@triton.jit
def pack_int8(values: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """int8 blocks of float32 values, as `megatron_lion.optim.precision.pack_int8`.

    Args:
        values: float32 [blocks, lanes, 4 or 8]; a lane is one thread's neighbouring elements.

    Returns:
        (int8 of the shape of `values`, uint16 scales [blocks], whether a block has a scale [blocks]). All int8 of a block
        without one are 0, whatever the first tensor holds: the caller stores zeros, which costs less than choosing here.
    """
    largest_bits = _largest_bits(values)
    finite = largest_bits < 0x7F800000
    scale_bits = bits_of(float_of(largest_bits) * ONE_127TH)
    scale_bits = scale_bits + 0x7FFF + ((scale_bits >> 16) & 1)  # NaN may become anything: `finite` is False
    has_scale = finite & (scale_bits >= 0x800000)  # 2^-126, the smallest scale
    scale = tl.where(has_scale, float_of(scale_bits & 0xFFFF0000), 1.0)
    # div_rn rounds to nearest as torch does; the plain division may be approximate on a device.
    inverse = tl.div_rn(1.0, scale)
    # No quotient needs a clamp: a scale is at most half a unit of 8 bits too small, so |q| <= 127 (1 + 2^-8) < 127.5.
    quantised = bits_of(values * inverse[:, None, None] + ROUNDING).to(tl.uint8).to(tl.int8, bitcast=True)
    scale_bits = tl.where(has_scale, scale_bits >> 16, tl.where(finite, 0, 0x7FC0))
    return quantised, scale_bits.to(tl.uint16), has_scale
