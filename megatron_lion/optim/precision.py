"""LION's state in fewer bits: split master weights and packed momentum, in plain torch.

These are the definitions that the Triton kernel and the C++ loop must reproduce bit for bit.

**Master weights.** A float32 number is a bfloat16 number (its upper 16 bits, rounded) and a remainder:

    hi = (bits + 0x8000) >> 16        the bfloat16 parameter: rounded to nearest, halves away from zero
    lo = bits - (hi << 16)            in [-2^15, 2^15), kept as int16
    bits = (hi << 16) + lo            exact

Halves must go up: with "nearest even" both neighbours of an even hi would leave lo = -2^15, and the split could not be
undone. So the parameter differs from torch's own cast at exact ties, one value in 65,536; the master never differs.
"split24" first rounds the bits to a multiple of 2^8 and keeps 8 bits of lo. It resolves 2^-16 of a weight: a step
below 2^-17 |θ| is lost, so keep η above 8e-6 times the largest weight.

**Momentum.** "bf16" is torch's cast, to nearest even. "int8" keeps 32 neighbours as q·s with one bfloat16 scale:

    s = bfloat16(max|m| · fl(1/127)),   q = round_half_even(m · fl(1/s)) in [-127, 127]

A block whose s is below 2^-126 becomes zero; a block that holds NaN or ±inf becomes NaN. In every other block max|q| is
127, so decoding and encoding again gives the same bytes: a checkpoint in float32 restores packed state exactly. One uint8
tensor holds all q, then all s: ceil(N/32) · 34 bytes for N elements.
"""

from __future__ import annotations

import torch

INT8_BLOCK = 32
INT8_BLOCK_BYTES = INT8_BLOCK + 2
SMALLEST_SCALE = 2.0**-126
NAN_BITS = 0x7FC00000
REMAINDER_DTYPES = {"split32": torch.int16, "split24": torch.int8}


def split_master(master_N: torch.Tensor, master_weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits float32 values into bfloat16 values and remainders.

    Args:
        master_N: float32, any shape.
        master_weights: "split32" (exact) or "split24" (rounded to 24 bits).

    Returns:
        (bfloat16 values, remainders in int16 or int8), of the same shape. Every NaN becomes 0x7FC0.

    Example:
        >>> hi, lo = split_master(torch.tensor([1.0 + 2**-8, -3.3]), "split32")
        >>> hi, lo
        (tensor([ 1.0078, -3.2969], dtype=torch.bfloat16), tensor([-32768,  13107], dtype=torch.int16))
        >>> join_master(hi, lo)
        tensor([ 1.0039, -3.3000])
    """
    # NaN has many bit patterns, and rounding the largest up would carry into the sign and give -0.
    bits_N = torch.where(master_N.isnan(), NAN_BITS, master_N.view(torch.int32))
    if master_weights == "split24":
        bits_N = (bits_N + 0x80) & -0x100
    hi_N = (bits_N + 0x8000) >> 16  # arithmetic: the sign stays
    lo_N = bits_N - (hi_N << 16)
    if master_weights == "split24":
        lo_N = lo_N >> 8
    return hi_N.to(torch.int16).view(torch.bfloat16), lo_N.to(REMAINDER_DTYPES[master_weights])


def join_master(param_N: torch.Tensor, remainder_N: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values that `split_master` split.

    Args:
        param_N: bfloat16, any shape.
        remainder_N: same shape; int16 from "split32", int8 from "split24".
    """
    hi_N = param_N.view(torch.int16).to(torch.int32) << 16
    lo_N = remainder_N.to(torch.int32)
    return (hi_N + (lo_N << 8 if remainder_N.dtype == torch.int8 else lo_N)).view(torch.float32)


def int8_bytes(numel: int) -> int:
    """Returns the bytes of the packed momentum of `numel` elements."""
    return -(-numel // INT8_BLOCK) * INT8_BLOCK_BYTES


def pack_int8(values: torch.Tensor) -> torch.Tensor:
    """Packs float32 values, any shape, into uint8 [int8_bytes(numel)], as defined at the top of this file."""
    numel = values.numel()
    blocks_BK = torch.zeros(-(-numel // INT8_BLOCK), INT8_BLOCK, dtype=torch.float32, device=values.device)
    blocks_BK.view(-1)[:numel] = values.reshape(-1)
    if numel == 0:
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    largest_B = blocks_BK.abs().amax(dim=1)
    scale_B = (largest_B * (1 / 127)).to(torch.bfloat16).to(torch.float32)
    scale_B = torch.where(scale_B < SMALLEST_SCALE, 0.0, scale_B)
    inverse_B = torch.where(scale_B > 0, 1.0 / scale_B, 0.0)
    finite_B = largest_B < float("inf")
    quantised_BK = torch.round(blocks_BK * inverse_B[:, None]).clamp(-127, 127)
    quantised_BK = torch.where(finite_B[:, None], quantised_BK, 0.0).to(torch.int8)
    # Fixed bits for NaN: a cast of NaN gives other bits on other processors, and packed bytes are compared and hashed.
    scale_bits_B = torch.where(finite_B, scale_B.to(torch.bfloat16).view(torch.int16), NAN_BITS >> 16)
    return torch.cat([quantised_BK.view(-1).view(torch.uint8), scale_bits_B.to(torch.int16).view(torch.uint8)])


def unpack_int8(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Returns the float32 values [numel] that `pack_int8` packed."""
    blocks = packed.numel() // INT8_BLOCK_BYTES
    quantised_BK = packed[: blocks * INT8_BLOCK].view(torch.int8).view(blocks, INT8_BLOCK)
    scale_B = packed[blocks * INT8_BLOCK :].view(torch.bfloat16).to(torch.float32)
    return (quantised_BK.to(torch.float32) * scale_B[:, None]).view(-1)[:numel]


def decode_state(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns a state in any of the stored forms as float32 in the shape of its parameter.

    Args:
        param: the parameter; if `value` is a remainder, the upper half of the master weight.
        value: float32, bfloat16 or float16 values, int16 or int8 remainders, or uint8 packed momentum.

    Raises:
        ValueError: the number of elements is not that of the parameter, or the value is packed and the parameter a DTensor.
    """
    if value.dtype == torch.uint8 and hasattr(param, "to_local"):
        raise ValueError(
            "packed int8 momentum for a DTensor parameter: its bytes have no rows to share; load the saving optimizer's "
            "unscaled_state_dict()"
        )
    numel = int8_bytes(param.numel()) if value.dtype == torch.uint8 else param.numel()
    if value.numel() != numel:
        raise ValueError(
            f"state of {value.numel()} elements, {value.dtype}, for a parameter of shape {tuple(param.shape)}: "
            "load the state of the same model and layout"
        )
    if value.dtype == torch.uint8:
        value = unpack_int8(value, param.numel())
    elif not value.is_floating_point():
        value = join_master(param.detach().to(torch.bfloat16), value.view(param.shape))
    value = value.to(torch.float32)
    # A float32 state in the parameter's shape is returned itself: a view may have other strides, and no step may copy
    # a tensor onto a view of itself.
    return value if value.shape == param.shape else value.view(param.shape)
