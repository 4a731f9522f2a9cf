"""The short forms in which the kernels round, join and pack, against integer arithmetic and numpy, over all floats that matter.

Interpreted on a CPU, compiled on CUDA. Every upper half of a float is tried, each with the lower halves around all ties.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from lion_cases import DEVICE

from megatron_lion.optim.kernel_formats import float_of, join_master, pack_int8, split_master
from megatron_lion.optim.kernel_memory import chunk_offsets
from megatron_lion.optim.kernels import sign_or_nan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
PART = 65536 if DEVICE.type == "cpu" else 1024  # elements a program
LOWER = np.array(
    [0, 1, 0x55, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF, 0x100, 0x17F, 0x180, 0x1234, 0x7F00, 0x7F7F, 0x7F80, 0x7F81, 0x7FFE,
     0x7FFF, 0x8000, 0x8001, 0x807F, 0x8080, 0x8081, 0x80FF, 0xABCD, 0xFE80, 0xFF00, 0xFF7F, 0xFF80, 0xFFFE, 0xFFFF],
    np.uint32,
)  # fmt: skip
ALL = (np.arange(65536, dtype=np.uint32)[:, None] << np.uint32(16) | LOWER).ravel()
IS_NAN = (ALL & np.uint32(0x7FFFFFFF)) > 0x7F800000


@triton.jit
def _sign_kernel(bits, signs, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    c = float_of(tl.load(bits + at).to(tl.uint32, bitcast=True))
    m = tl.full([N], -0.0, tl.float32)  # -0 · 1 + c · 1 is c, also if c is -0
    tl.store(signs + at, sign_or_nan(c, m, 1.0, 1.0))


@triton.jit
def _split_kernel(bits, his, los, MASTER_WEIGHTS: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    hi, lo = split_master(float_of(tl.load(bits + at).to(tl.uint32, bitcast=True)), MASTER_WEIGHTS)
    tl.store(his + at, hi.to(tl.int32))
    tl.store(los + at, lo.to(tl.int32))


@triton.jit
def _join_kernel(his, los, bits, MASTER_WEIGHTS: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    upper = tl.load(his + at).to(tl.uint32, bitcast=True) << 16
    tl.store(bits + at, join_master(upper, tl.load(los + at), MASTER_WEIGHTS).to(tl.int32, bitcast=True))


@triton.jit
def _pack_kernel(values, quantised, scales, N: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * N + chunk_offsets("int8", N, WIDTH)
    q, scale_bits, has_scale = pack_int8(tl.load(values + at))
    tl.store(quantised + at, tl.where(has_scale[:, None, None], q, 0))
    tl.store(scales + tl.program_id(0) * (N // 32) + tl.arange(0, N // 32), scale_bits.to(tl.int32))


def given(values):
    return torch.from_numpy(np.ascontiguousarray(values)).to(DEVICE)


def empty(numel, dtype=torch.int32):
    return torch.empty(numel, dtype=dtype, device=DEVICE)


def test_the_sign_of_every_float():
    signs = empty(len(ALL), torch.float32)
    _sign_kernel[(len(ALL) // PART,)](given(ALL.view(np.int32)), signs, N=PART, enable_fp_fusion=False)
    found = signs.cpu().numpy().view(np.uint32)
    is_finite = (ALL & np.uint32(0x7F800000)) != 0x7F800000
    is_zero = (ALL & np.uint32(0x7FFFFFFF)) == 0
    expected = np.where(is_zero, 0, np.where(ALL >> 31, 0xBF800000, 0x3F800000))
    assert np.array_equal(found[is_finite], expected[is_finite])
    assert np.isnan(found.view(np.float32)[~is_finite]).all()


@pytest.mark.parametrize(("master_weights", "unit"), [("split32", 1), ("split24", 256)])
def test_every_float_is_split_as_the_definition_says(master_weights, unit):
    his, los = empty(len(ALL)), empty(len(ALL))
    _split_kernel[(len(ALL) // PART,)](given(ALL.view(np.int32)), his, los, MASTER_WEIGHTS=master_weights, N=PART)
    bits = np.where(IS_NAN, 0x7FC00000, ALL).astype(np.int64)
    bits = (bits + unit // 2) // unit * unit
    hi = (bits + 0x8000) // 65536
    assert np.array_equal(his.cpu().numpy(), hi % 65536)
    assert np.array_equal(los.cpu().numpy(), (bits - hi * 65536) // unit)


@pytest.mark.parametrize(
    ("master_weights", "unit", "remainders"),
    [
        ("split32", 1, LOWER.astype(np.uint16).view(np.int16)),
        ("split24", 256, np.array([-128, -127, -1, 0, 1, 63, 126, 127, *range(-120, 120, 10)], np.int8)),
    ],
)
def test_every_upper_half_is_joined_with_its_remainder(master_weights, unit, remainders):
    his, los = (part.ravel() for part in np.meshgrid(np.arange(65536, dtype=np.int32), remainders, indexing="ij"))
    bits = empty(len(his))
    _join_kernel[(len(his) // PART,)](given(his), given(los), bits, MASTER_WEIGHTS=master_weights, N=PART)
    expected = (his.astype(np.int64) * 65536 + los.astype(np.int64) * unit) % 2**32
    assert np.array_equal(bits.cpu().numpy().view(np.uint32), expected)


def bf16_of_scaled(largest):
    """Upper halves of fl(largest · fl(1/127)) rounded to bfloat16, by integers; `largest` is finite and not negative."""
    bits = (largest * np.float32(1 / 127)).view(np.uint32).astype(np.int64)
    below, rest = bits // 65536, bits % 65536
    return below + ((rest > 32768) | ((rest == 32768) & (below % 2 == 1)))


def packed_by_numpy(blocks):
    """(q [blocks, 32], scale bits [blocks]) without a clamp; asserts that none is needed."""
    with np.errstate(all="ignore"):
        largest = np.abs(blocks).max(axis=1)  # NaN if there is one
        is_finite = np.isfinite(largest)
        bits = np.where(is_finite, bf16_of_scaled(np.where(is_finite, largest, np.float32(0))), 0x7FC0)
        bits = np.where(bits < 0x80, 0, bits)
        scales = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        has_scale = is_finite & (bits > 0)
        inverse = np.where(has_scale, np.float32(1) / scales, np.float32(0)).astype(np.float32)
        q = np.rint(blocks * inverse[:, None])
    q = np.where(has_scale[:, None], q, 0)
    assert np.abs(q).max() <= 127
    return q.astype(np.int8), bits


def largest_of_scale(wanted):
    """Smallest and largest float32 whose block has the scale bits `wanted`, by bisection over the floats' order."""
    ends = []
    for bound in (wanted, wanted + 1):
        low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), 0x7F7FFFFF, np.int64)
        while (low < high).any():
            middle = (low + high) // 2
            reached = bf16_of_scaled(middle.astype(np.uint32).view(np.float32)) >= bound
            low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
        ends.append(low)
    last = np.where(
        bf16_of_scaled(np.full(len(wanted), 0x7F7FFFFF, np.uint32).view(np.float32)) <= wanted, 0x7F7FFFFF, ends[1] - 1
    )
    return ends[0].astype(np.uint32).view(np.float32), last.astype(np.uint32).view(np.float32)


def every_scale():
    """Two blocks for each possible scale: its smallest and its largest maximum, with ties and their neighbours."""
    top = int(bf16_of_scaled(np.array([0x7F7FFFFF], np.uint32).view(np.float32))[0])
    wanted = np.arange(1, top + 1)  # below 0x80 the block becomes zero
    rng = np.random.default_rng(0)
    blocks = []
    for largest in largest_of_scale(wanted):
        assert np.array_equal(bf16_of_scaled(largest), wanted)
        scale = (wanted.astype(np.uint32) << np.uint32(16)).view(np.float32)
        block = rng.uniform(-1, 1, (len(wanted), 32)).astype(np.float32) * largest[:, None]
        ties = (rng.integers(-127, 126, (len(wanted), 15)) + 0.5).astype(np.float32) * scale[:, None]
        block[:, :15] = np.where(np.abs(ties) < largest[:, None], ties, 0)
        block[:, 15:20] = np.nextafter(block[:, :5], np.float32(0))
        block[:, 20:25] = np.nextafter(block[:, 5:10], np.copysign(np.float32(np.inf), block[:, 5:10]))
        block[:, 25:27] = [-0.0, 1e-45]
        place = np.arange(len(wanted)) % 32
        block[np.arange(len(wanted)), place] = np.where(wanted % 2 == 0, largest, -largest)
        blocks.append(block)
    return np.concatenate(blocks)


def unusual():
    """Blocks of zeros, and blocks with NaN of both signs and several payloads or ±inf in every place."""
    bits = np.array(
        [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000], np.uint32
    )
    blocks = np.zeros((len(bits) * 32 * 2 + 2, 32), np.float32)
    blocks[1] = -0.0
    for number, pattern in enumerate(bits.view(np.float32)):
        for place in range(32):
            row = 2 + 2 * (32 * number + place)
            blocks[row, place] = pattern
            blocks[row + 1] = np.linspace(-3e38, 3e38, 32, dtype=np.float32)
            blocks[row + 1, [place, (place + 7) % 32]] = pattern, np.float32(np.inf)
    return blocks


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("make", [every_scale, unusual])
def test_every_scale_is_packed_as_the_definition_says(make, width):
    blocks = make()
    size = PART if len(blocks) * 32 > PART else 1024
    short = -len(blocks) % (size // 32)
    blocks = np.concatenate([blocks, np.ones((short, 32), np.float32)])
    quantised, scales = empty(blocks.size, torch.int8), empty(len(blocks))
    _pack_kernel[(blocks.size // size,)](
        given(blocks.ravel()), quantised, scales, N=size, WIDTH=width, enable_fp_fusion=False
    )
    q, bits = packed_by_numpy(blocks)
    assert np.array_equal(scales.cpu().numpy(), bits)
    assert np.array_equal(quantised.cpu().numpy().reshape(-1, 32), q)
