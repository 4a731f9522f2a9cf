"""Packed bits against numpy's packing."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.family.sign_bits import pack_bits, pack_codes, unpack_bits, unpack_codes


@given(bits=st.lists(st.booleans(), max_size=40).map(lambda bits: bits[: len(bits) // 8 * 8]))
@examples(50)
def test_bits_are_packed_as_numpy_packs_them(bits):
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    np.testing.assert_array_equal(packed.numpy(), np.packbits(np.array(bits, bool), bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(packed).numpy(), np.array(bits, np.uint8))


@given(bits=st.integers(1, 10), seed=st.integers(0, 99))
@examples(50)
def test_codes_are_planes_of_bits(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 16), dtype=np.int32)
    packed = torch.stack([pack_codes(torch.from_numpy(row), bits) for row in codes])
    assert packed.shape == (3, 2 * bits)
    planes = [[np.packbits(row >> bit & 1, bitorder="little") for bit in range(bits)] for row in codes]
    np.testing.assert_array_equal(packed.numpy(), np.array(planes).reshape(3, -1))
    np.testing.assert_array_equal(unpack_codes(packed, bits).numpy(), codes)
