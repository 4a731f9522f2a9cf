"""LION as one Triton launch for any number of tensors, in every precision mode.

The kernel reads its work from tables in device memory instead of from its arguments. `rows` holds one line of
pointers for each tensor, `chunks` one (row, chunk) pair for each program, and `groups` the hyper-parameters of each
parameter group. The rate is read through a pointer. So one launch covers all tensors of a kind, each with its own
group's rate and decay. `megatron_lion.optim.kernel_launch` makes the tables.

A program updates BLOCK neighbouring elements. Whole chunks load and store without masks, so that the compiler
can move 16 bytes an instruction; a tensor's last chunk is masked. There is no autotuning: it would apply the
update once for every configuration it tries. Addresses are computed in 64 bits.

The operations and their order are those of `megatron_lion.optim.lion.Lion` and `megatron_lion.optim.precision`,
bit for bit. That needs `enable_fp_fusion=False` at launch: otherwise the compiler may fuse a multiplication into an
addition, which rounds once instead of twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of `rows`: int64 addresses, then the number of elements, the group's index and the tensor's.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
MASTER = tl.constexpr(3)
NUMEL = tl.constexpr(4)
GROUP = tl.constexpr(5)
SLOT = tl.constexpr(6)
ROW = tl.constexpr(7)
# Columns of `groups`, float32. Column LR is used if the rate is a number, not a tensor on the device.
WEIGHT_DECAY = tl.constexpr(0)
BETA1 = tl.constexpr(1)
ONE_MINUS_BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
ONE_MINUS_BETA2 = tl.constexpr(4)
LR = tl.constexpr(5)
SIGN = tl.constexpr(6)  # of the gradient: -1 to maximize; read only if a group does
GROUP_ROW = tl.constexpr(7)

INT8_BLOCK = tl.constexpr(32)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
ONE_127TH = tl.constexpr(1 / 127)
ROUNDING = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds |x| < 2^22 to an integer, ties to even


@triton.jit
def add_one_kernel(source: tl.tensor, target: tl.tensor) -> None:
    """target[0] = source[0] + 1: the smallest kernel, for `megatron_lion.optim.triton_check`."""
    tl.store(target, tl.load(source) + 1.0)


@triton.jit
def _bits(values: tl.tensor) -> tl.tensor:
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bf16_bits(values: tl.tensor) -> tl.tensor:
    """Upper halves, as uint32, of float32 values rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = _bits(values)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # would carry NaN 0x7FFFFFFF into the sign: -0
    return tl.where(values == values, nearest, 0x7FC0)


@triton.jit
def pointers(
    address: tl.tensor, kind: tl.constexpr, start: tl.tensor, offsets: tl.tensor, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Addresses of the elements `start` + `offsets` of an array of dtype `kind` that begins at `address`."""
    base = address.to(tl.pointer_type(kind))
    if ALIGNED:  # without this hint the compiler cannot prove that 16-byte accesses are allowed
        base = tl.multiple_of(base, 16)
    return base + start + offsets


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    if MASKED:
        # 0 beyond the end: it raises no maximum of an int8 block and counts as no agreement.
        values = tl.load(pointers, mask=mask, other=0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _store(pointers: tl.tensor, values: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> None:
    if MASKED:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values)


@triton.jit
def _join_master(param: tl.tensor, remainder: tl.tensor, MASTER_WEIGHTS: tl.constexpr) -> tl.tensor:
    """float32 from upper halves (uint16) and remainders, as `megatron_lion.optim.precision.join_master`."""
    lo = remainder.to(tl.int32)
    if MASTER_WEIGHTS == "split24":
        lo = lo << 8
    return _float((param.to(tl.uint32) << 16) + lo.to(tl.uint32, bitcast=True))


@triton.jit
def _split_master(values: tl.tensor, MASTER_WEIGHTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(uint16 upper halves, remainders) of float32 values, as `megatron_lion.optim.precision.split_master`."""
    bits = tl.where(values == values, _bits(values), 0x7FC00000)
    if MASTER_WEIGHTS == "split24":
        bits = (bits + 0x80) & 0xFFFFFF00
    hi = (bits + 0x8000) >> 16
    lo = (bits - (hi << 16)).to(tl.int32, bitcast=True)
    if MASTER_WEIGHTS == "split24":
        remainder = (lo >> 8).to(tl.int8)
    else:
        remainder = lo.to(tl.int16)
    return hi.to(tl.uint16), remainder


@triton.jit
def _pack_int8(values: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """([blocks, 32] int8, [blocks] uint16 scales), as `megatron_lion.optim.precision.pack_int8`."""
    # Compared as integers, magnitudes have the order of the floats and NaN is the largest, so no maximum loses a NaN.
    largest_bits = tl.max((_bits(values) & 0x7FFFFFFF).to(tl.int32, bitcast=True), axis=1)
    finite = largest_bits < 0x7F800000
    largest = tl.where(finite, largest_bits, 0).to(tl.float32, bitcast=True)
    scale_bits = _bf16_bits(largest * ONE_127TH)
    scale = _float(scale_bits << 16)
    useful = scale >= SMALLEST_SCALE
    # div_rn rounds to nearest as torch does; the plain division may be approximate on a device.
    inverse = tl.where(useful, tl.div_rn(1.0, tl.where(useful, scale, 1.0)), 0.0)
    quantised = tl.where(finite[:, None], values, 0.0) * inverse[:, None]
    quantised = (quantised + ROUNDING) - ROUNDING
    quantised = tl.minimum(tl.maximum(quantised, -127.0), 127.0)
    scale_bits = tl.where(finite, tl.where(useful, scale_bits, 0), 0x7FC0)
    return quantised.to(tl.int8), scale_bits.to(tl.uint16)


@triton.jit
def sign_or_nan(g: tl.tensor, m: tl.tensor, group: tl.tensor) -> tl.tensor:
    """Sign of the interpolation c, 0 at ±0; NaN if c is NaN or ±inf."""
    c = m * tl.load(group + BETA1) + g * tl.load(group + ONE_MINUS_BETA1)
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
    return tl.where(tl.abs(c) < float("inf"), sign, float("nan"))


@triton.jit
def load_grad_and_momentum(
    grads: tl.tensor,
    exp_avgs: tl.tensor,
    scales: tl.tensor,
    mask: tl.tensor,
    scale_mask: tl.tensor,
    multiplier: tl.tensor,
    second: tl.tensor,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradient, times `multiplier` and then `second`, and momentum, both in float32; if BEGIN, a NaN momentum becomes the gradient."""
    g = _load(grads, mask, MASKED)
    if grads.dtype.element_ty == tl.uint16:  # bfloat16 as its bits: Triton's interpreter misreads subnormal ones
        g = _float(g.to(tl.uint32) << 16)
    g = g.to(tl.float32) * multiplier * second
    if MOMENTUM == "int8":
        m = _load(exp_avgs, mask, MASKED).to(tl.float32)
        m = m * _float(_load(scales, scale_mask, MASKED).to(tl.uint32) << 16)[:, None]
    elif MOMENTUM == "bf16":
        m = _float(_load(exp_avgs, mask, MASKED).to(tl.uint32) << 16)
    else:
        m = _load(exp_avgs, mask, MASKED)
    if BEGIN:
        m = tl.where(m == m, m, g)
    return g, m


@triton.jit
def momentum_places(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(offsets, mask) of a chunk's elements, addresses of its momentum, (addresses, mask) of the scales of int8 momentum."""
    MOMENTUM_TYPE: tl.constexpr = tl.int8 if MOMENTUM == "int8" else tl.uint16 if MOMENTUM == "bf16" else tl.float32
    address = tl.load(row + EXP_AVG)
    if MOMENTUM == "int8":
        blocks = tl.arange(0, BLOCK // INT8_BLOCK)
        # Two-dimensional, so that the maximum over a block is a reduction along axis 1.
        offsets = blocks[:, None] * INT8_BLOCK + tl.arange(0, INT8_BLOCK)[None, :]
        first_scale = address + (numel + INT8_BLOCK - 1) // INT8_BLOCK * INT8_BLOCK
        scales = pointers(first_scale, tl.uint16, start // INT8_BLOCK, blocks, False)
        scale_mask = blocks * INT8_BLOCK < numel - start
        exp_avgs = pointers(address, MOMENTUM_TYPE, start, offsets, ALIGNED)
    else:
        offsets = tl.arange(0, BLOCK)
        exp_avgs = pointers(address, MOMENTUM_TYPE, start, offsets, ALIGNED)
        scales, scale_mask = exp_avgs, offsets < numel - start  # not read: there are no scales
    return offsets, offsets < numel - start, exp_avgs, scales, scale_mask


@triton.jit
def _lion(
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    group: tl.tensor,
    lr: tl.tensor,
    caution: tl.tensor,
    CAUTIOUS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The equations; returns parameter and momentum after the step."""
    sign = sign_or_nan(g, m, group)
    if CAUTIOUS:
        sign = sign * tl.where(sign * g > 0, caution, 0.0)
    u = sign + p * tl.load(group + WEIGHT_DECAY)
    p = p - u * lr
    m = m * tl.load(group + BETA2) + g * tl.load(group + ONE_MINUS_BETA2)
    return p, m


@triton.jit
def _update_chunk(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    group: tl.tensor,
    lr: tl.tensor,
    multiplier: tl.tensor,
    second: tl.tensor,
    caution: tl.tensor,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MASTER_WEIGHTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """Reads, updates and writes the BLOCK elements from `start`; if MASKED, only those below `numel`."""
    SPLIT: tl.constexpr = MASTER_WEIGHTS == "split32" or MASTER_WEIGHTS == "split24"
    MASTER_TYPE: tl.constexpr = (
        tl.int16 if MASTER_WEIGHTS == "split32" else tl.int8 if MASTER_WEIGHTS == "split24" else tl.float32
    )
    # bfloat16 is read and written as its 16 bits: Triton's interpreter rounds to it in another way than devices do.
    STORED_GRAD: tl.constexpr = tl.uint16 if tl.bfloat16 == GRAD_TYPE else GRAD_TYPE
    STORED_TYPE: tl.constexpr = tl.uint16 if tl.bfloat16 == PARAM_TYPE else PARAM_TYPE
    offsets, mask, exp_avgs, scales, scale_mask = momentum_places(row, start, numel, MOMENTUM, ALIGNED, BLOCK)
    params = pointers(tl.load(row + PARAM), STORED_TYPE, start, offsets, ALIGNED)
    grads = pointers(tl.load(row + GRAD), STORED_GRAD, start, offsets, ALIGNED)

    g, m = load_grad_and_momentum(
        grads, exp_avgs, scales, mask, scale_mask, multiplier, second, MOMENTUM, BEGIN, MASKED
    )
    if MASTER_WEIGHTS == "none":
        p = _load(params, mask, MASKED)
        if tl.bfloat16 == PARAM_TYPE:
            p = _float(p.to(tl.uint32) << 16)
        p = p.to(tl.float32)
    else:
        masters = pointers(tl.load(row + MASTER), MASTER_TYPE, start, offsets, ALIGNED)
        p = _load(masters, mask, MASKED)
        if SPLIT:
            p = _join_master(_load(params, mask, MASKED), p, MASTER_WEIGHTS)

    p, m = _lion(p, g, m, group, lr, caution, CAUTIOUS)

    if SPLIT:
        hi, remainder = _split_master(p, MASTER_WEIGHTS)
        _store(params, hi, mask, MASKED)
        _store(masters, remainder, mask, MASKED)
    else:
        if MASTER_WEIGHTS == "fp32":
            _store(masters, p, mask, MASKED)
        if tl.bfloat16 == PARAM_TYPE:
            _store(params, _bf16_bits(p).to(tl.uint16), mask, MASKED)
        else:
            _store(params, p.to(PARAM_TYPE), mask, MASKED)
    if MOMENTUM == "int8":
        quantised, scale_bits = _pack_int8(m)
        _store(exp_avgs, quantised, mask, MASKED)
        _store(scales, scale_bits, scale_mask, MASKED)
    elif MOMENTUM == "bf16":
        _store(exp_avgs, _bf16_bits(m).to(tl.uint16), mask, MASKED)
    else:
        _store(exp_avgs, m, mask, MASKED)


@triton.jit
def lion_kernel(
    rows: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    lr_addresses: tl.tensor,
    multiplier: tl.tensor,
    found_inf: tl.tensor,
    cautions: tl.tensor,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MASTER_WEIGHTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NUM_MULTIPLIERS: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Takes one LION step for every element that `rows` and `chunks` list.

    Args:
        rows: int64 [R, ROW], the columns above.
        chunks: int32 [programs, 2]: row, and index of the chunk of BLOCK elements in it.
        groups: float32 [G, GROUP_ROW], the columns above.
        lr_addresses: int64 [G]: address of each group's rate, float32.
        multiplier: float32 [NUM_MULTIPLIERS], 0 to 2: every gradient is multiplied by them in turn, each product rounded.
        found_inf: float32 [1], read if HAS_FOUND_INF: if it is not 0, nothing is written.
        cautions: float32 [tensors], read if CAUTIOUS: φ of each tensor.
        PARAM_TYPE: dtype of the parameters; likewise GRAD_TYPE.
        MASTER_WEIGHTS: form of the master weights; likewise MOMENTUM.
        BEGIN: whether a momentum that is NaN takes the gradient.
        CAUTIOUS: whether an element moves only if its update has the sign of the gradient.
        MAXIMIZE: whether a group negates its gradients. Without it the int8 kernel needs 32 registers instead of 39.
        ALIGNED: whether every address in `rows` is a multiple of 16.
        BLOCK: elements a program, a multiple of 32.
    """
    # 64 bits: in 32, start would wrap at 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * ROW
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    numel = tl.load(row + NUMEL)
    group_index = tl.load(row + GROUP)
    group = groups + group_index * GROUP_ROW
    lr = tl.load(tl.load(lr_addresses + group_index).to(tl.pointer_type(tl.float32)))
    factor = 1.0  # g · 1 is exactly g
    second = 1.0
    if NUM_MULTIPLIERS > 0:
        factor = tl.load(multiplier)
    if NUM_MULTIPLIERS > 1:
        second = tl.load(multiplier + 1)
    if MAXIMIZE:
        factor = factor * tl.load(group + SIGN)
    caution = 1.0
    if CAUTIOUS:
        caution = tl.load(cautions + tl.load(row + SLOT))
    # Read on the device: the host would have to wait for the gradient norm.
    if HAS_FOUND_INF:
        skip = tl.load(found_inf) != 0
    else:
        skip = False
    if not skip:
        if start + BLOCK <= numel:
            _update_chunk(row, start, numel, group, lr, factor, second, caution, PARAM_TYPE, GRAD_TYPE, MASTER_WEIGHTS, MOMENTUM, BEGIN, CAUTIOUS, ALIGNED, BLOCK, False)  # fmt: skip # noqa: E501
        else:
            _update_chunk(row, start, numel, group, lr, factor, second, caution, PARAM_TYPE, GRAD_TYPE, MASTER_WEIGHTS, MOMENTUM, BEGIN, CAUTIOUS, ALIGNED, BLOCK, True)  # fmt: skip # noqa: E501
