"""LION as one Triton launch for any number of tensors, in every precision mode.

The kernel reads its work from tables in device memory instead of from its arguments. `rows` holds one line of
pointers for each tensor, `chunks` one (row, chunk) pair for each program, and `groups` the hyper-parameters of each
parameter group. The rate is read through a pointer. So one launch covers all tensors of a kind, each with its own
group's rate and decay. `megatron_lion.optim.kernel_launch` makes the tables.

A program updates BLOCK neighbouring elements, PART at a time. `megatron_lion.optim.kernel_memory` loads and stores
them, and `megatron_lion.optim.kernel_formats` has the reduced forms. There is no autotuning: it would apply the update
once for every configuration it tries. Addresses are computed in 64 bits.

The operations and their order are those of `megatron_lion.optim.lion.Lion` and `megatron_lion.optim.precision`,
bit for bit. That needs `enable_fp_fusion=False` at launch: otherwise the compiler may fuse a multiplication into an
addition, which rounds once instead of twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_formats import INT8_BLOCK, bf16_bits, bits_of, float_of, join_master, pack_int8, split_master
from .kernel_memory import chunk_offsets, lane_numbers, load, load_upper, place, store

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


@triton.jit
def add_one_kernel(source: tl.tensor, target: tl.tensor) -> None:
    """target[0] = source[0] + 1: the smallest kernel, for `megatron_lion.optim.triton_check`."""
    tl.store(target, tl.load(source) + 1.0)


@triton.jit
def sign_or_nan(g: tl.tensor, m: tl.tensor, beta1: tl.tensor, one_minus_beta1: tl.tensor) -> tl.tensor:
    """Sign of the interpolation c, 0 at ±0; NaN if c is NaN or ±inf."""
    c = m * beta1 + g * one_minus_beta1
    zero = c - c  # NaN if c is NaN or ±inf, and then no comparison with it holds
    return tl.where(tl.abs(c) > zero, float_of((bits_of(c) & 0x80000000) | 0x3F800000), zero)


@triton.jit
def scale_place(address: tl.tensor, numel: tl.tensor, start: tl.tensor) -> tl.tensor:
    """Pointer to the scale of element `start`, a multiple of 32, of a packed momentum of `numel` elements at `address`."""
    # Shifts and masks: a signed division would also correct negative numbers.
    return place(address + ((numel + (INT8_BLOCK - 1)) & -INT8_BLOCK), tl.uint16, start >> 5, False)


@triton.jit
def grad_and_momentum_places(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tuple:
    """Pointers to element `start` of gradient and momentum, and to its scale if the momentum is int8."""
    STORED_GRAD: tl.constexpr = tl.uint16 if tl.bfloat16 == GRAD_TYPE else GRAD_TYPE
    MOMENTUM_TYPE: tl.constexpr = tl.int8 if MOMENTUM == "int8" else tl.uint16 if MOMENTUM == "bf16" else tl.float32
    momentum = tl.load(row + EXP_AVG)
    exp_avg = place(momentum, MOMENTUM_TYPE, start, ALIGNED)
    scale = exp_avg  # not read: there are no scales
    if MOMENTUM == "int8":
        scale = scale_place(momentum, numel, start)
    return place(tl.load(row + GRAD), STORED_GRAD, start, ALIGNED), exp_avg, scale


@triton.jit
def load_grad_and_momentum(
    grad: tl.tensor,
    exp_avg: tl.tensor,
    scale: tl.tensor,
    left: tl.tensor,
    multiplier: tl.tensor,
    second: tl.tensor,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradient, times `multiplier` and then `second`, and momentum of the next PART elements, in float32.

    The three pointers are those of `grad_and_momentum_places`. If MASKED, only the first `left` elements are read. If BEGIN, a
    NaN momentum becomes the gradient.
    """
    offsets = chunk_offsets(MOMENTUM, PART, WIDTH)
    mask = offsets < left
    if grad.dtype.element_ty == tl.uint16:  # bfloat16 as its bits: Triton's interpreter misreads subnormal ones
        g = float_of(load_upper(grad, offsets, mask, MOMENTUM, ALIGNED, PART, WIDTH, MASKED))
    else:
        g = load(grad + offsets, mask, MASKED)
    g = g.to(tl.float32) * multiplier * second
    if MOMENTUM == "int8":
        blocks = tl.arange(0, PART // INT8_BLOCK)
        scales = load(scale + blocks, blocks * INT8_BLOCK < left, MASKED)
        m = load(exp_avg + offsets, mask, MASKED).to(tl.float32)
        m = m * float_of(scales.to(tl.uint32) << 16)[:, None, None]
    elif MOMENTUM == "bf16":
        m = float_of(load(exp_avg + offsets, mask, MASKED).to(tl.uint32) << 16)
    else:
        m = load(exp_avg + offsets, mask, MASKED)
    if BEGIN:
        m = tl.where(m == m, m, g)
    return g, m


@triton.jit
def _update_part(
    places: tl.tuple,
    left: tl.tensor,
    hyper: tl.tuple,
    multiplier: tl.tensor,
    second: tl.tensor,
    caution: tl.tensor,
    FIRST: tl.constexpr,
    MASTER_WEIGHTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEGIN: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """Reads, updates and writes PART elements from element FIRST of the chunk; if MASKED, only the first `left` of them."""
    param, grad, exp_avg, scale, master = places
    weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr = hyper
    param, grad, exp_avg, scale, master = (
        param + FIRST, grad + FIRST, exp_avg + FIRST, scale + FIRST // INT8_BLOCK, master + FIRST
    )  # fmt: skip
    SPLIT: tl.constexpr = MASTER_WEIGHTS == "split32" or MASTER_WEIGHTS == "split24"
    offsets = chunk_offsets(MOMENTUM, PART, WIDTH)
    mask = offsets < left
    params, exp_avgs, masters = param + offsets, exp_avg + offsets, master + offsets

    g, m = load_grad_and_momentum(
        grad, exp_avg, scale, left, multiplier, second, MOMENTUM, BEGIN, ALIGNED, PART, WIDTH, MASKED
    )
    if SPLIT:
        p = load(masters, mask, MASKED)
        p = join_master(load_upper(param, offsets, mask, MOMENTUM, ALIGNED, PART, WIDTH, MASKED), p, MASTER_WEIGHTS)
    elif MASTER_WEIGHTS == "fp32":
        p = load(masters, mask, MASKED)
    elif param.dtype.element_ty == tl.uint16:
        p = float_of(load_upper(param, offsets, mask, MOMENTUM, ALIGNED, PART, WIDTH, MASKED))
    else:
        p = load(params, mask, MASKED).to(tl.float32)

    sign = sign_or_nan(g, m, beta1, one_minus_beta1)
    if CAUTIOUS:
        sign = sign * tl.where(sign * g > 0, caution, 0.0)
    u = sign + p * weight_decay
    p = p - u * lr
    m = m * beta2 + g * one_minus_beta2

    if SPLIT:
        hi, remainder = split_master(p, MASTER_WEIGHTS)
        store(params, hi, mask, MASKED)
        store(masters, remainder, mask, MASKED)
    else:
        if MASTER_WEIGHTS == "fp32":
            store(masters, p, mask, MASKED)
        if param.dtype.element_ty == tl.uint16:
            store(params, bf16_bits(p).to(tl.uint16), mask, MASKED)
        else:
            store(params, p.to(param.dtype.element_ty), mask, MASKED)
    if MOMENTUM == "int8":
        quantised, scale_bits, has_scale = pack_int8(m)
        has_scale = tl.broadcast_to(has_scale[:, None, None], offsets.shape)
        if MASKED:
            tl.store(exp_avgs, quantised, mask=has_scale & mask)
            tl.store(exp_avgs, tl.zeros_like(quantised), mask=(has_scale == 0) & mask)
        else:
            tl.store(exp_avgs, quantised, mask=has_scale)
            tl.store(exp_avgs, tl.zeros_like(quantised), mask=has_scale == 0)
        # In the lanes' layout, and by a block's first lane: as a plain [blocks] the scales would go through shared memory.
        elements = lane_numbers(PART, WIDTH) * WIDTH
        is_first = elements % INT8_BLOCK == 0
        if MASKED:
            is_first = is_first & (elements < left)
        tl.store(scale + elements // INT8_BLOCK, tl.broadcast_to(scale_bits[:, None], elements.shape), mask=is_first)
    elif MOMENTUM == "bf16":
        store(exp_avgs, bf16_bits(m).to(tl.uint16), mask, MASKED)
    else:
        store(exp_avgs, m, mask, MASKED)


@triton.jit
def _places(
    row: tl.tensor,
    start: tl.tensor,
    numel: tl.tensor,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MASTER_WEIGHTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tuple:
    """Pointers to element `start` of parameter, gradient, momentum, its scales and the master weight."""
    # bfloat16 is read and written as its 16 bits: Triton's interpreter rounds to it in another way than devices do.
    STORED_TYPE: tl.constexpr = tl.uint16 if tl.bfloat16 == PARAM_TYPE else PARAM_TYPE
    MASTER_TYPE: tl.constexpr = (
        tl.int16 if MASTER_WEIGHTS == "split32" else tl.int8 if MASTER_WEIGHTS == "split24" else tl.float32
    )
    grad, exp_avg, scale = grad_and_momentum_places(row, start, numel, GRAD_TYPE, MOMENTUM, ALIGNED)
    param = place(tl.load(row + PARAM), STORED_TYPE, start, ALIGNED)
    master = param  # not read if there is none
    if MASTER_WEIGHTS != "none":
        master = place(tl.load(row + MASTER), MASTER_TYPE, start, ALIGNED)
    return param, grad, exp_avg, scale, master


@triton.jit
def _hyper(group: tl.tensor, lr: tl.tensor) -> tl.tuple:
    """Decay, β1, 1-β1, β2, 1-β2 and rate."""
    weight_decay = tl.load(group + WEIGHT_DECAY)
    beta1 = tl.load(group + BETA1)
    one_minus_beta1 = tl.load(group + ONE_MINUS_BETA1)
    beta2 = tl.load(group + BETA2)
    one_minus_beta2 = tl.load(group + ONE_MINUS_BETA2)
    return weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr


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
    PART: tl.constexpr,
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
        MAXIMIZE: whether a group negates its gradients.
        ALIGNED: whether every address in `rows` is a multiple of 16.
        BLOCK: elements a program, a multiple of PART.
        PART: elements that a program reads, updates and writes at a time.
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
    # Of int8 momentum: eight neighbours a thread, or four if there are float32 values to write, 16 bytes a store.
    WIDTH: tl.constexpr = 4 if MASTER_WEIGHTS == "fp32" or tl.float32 == PARAM_TYPE else 8
    # Masks take registers and instructions for each element: the end of an int8 tensor is updated four elements a thread.
    SMALL: tl.constexpr = PART if MOMENTUM != "int8" else PART // 2
    # Read on the device: the host would have to wait for the gradient norm.
    if HAS_FOUND_INF:
        skip = tl.load(found_inf) != 0
    else:
        skip = False
    if not skip:
        if start + BLOCK <= numel:
            places = _places(row, start, numel, PARAM_TYPE, GRAD_TYPE, MASTER_WEIGHTS, MOMENTUM, ALIGNED)
            hyper = _hyper(group, lr)
            for first in tl.static_range(0, BLOCK, PART):
                _update_part(places, numel - start, hyper, factor, second, caution, first,
                             MASTER_WEIGHTS, MOMENTUM, BEGIN, CAUTIOUS, ALIGNED, PART, WIDTH, False)  # fmt: skip
        elif SMALL == BLOCK:
            places = _places(row, start, numel, PARAM_TYPE, GRAD_TYPE, MASTER_WEIGHTS, MOMENTUM, ALIGNED)
            hyper = _hyper(group, lr)
            _update_part(places, numel - start, hyper, factor, second, caution, 0,
                         MASTER_WEIGHTS, MOMENTUM, BEGIN, CAUTIOUS, ALIGNED, PART, WIDTH, True)  # fmt: skip
        else:
            hyper = _hyper(group, lr)
            while start < numel:
                places = _places(row, start, numel, PARAM_TYPE, GRAD_TYPE, MASTER_WEIGHTS, MOMENTUM, ALIGNED)
                _update_part(places, numel - start, hyper, factor, second, caution, 0,
                             MASTER_WEIGHTS, MOMENTUM, BEGIN, CAUTIOUS, ALIGNED, SMALL, 4, True)  # fmt: skip
                start += SMALL
