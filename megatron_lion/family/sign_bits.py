"""Small numbers as packed bits, eight a byte, for what workers send each other."""

from __future__ import annotations

import torch


def pack_bits(bits_N: torch.Tensor) -> torch.Tensor:
    """Returns uint8 [..., N/8] of 0 and 1, [..., N] with N a multiple of 8; the first of eight is the lowest bit.

    Example:
        >>> pack_bits(torch.tensor([1, 0, 1, 0, 0, 0, 0, 1]))
        tensor([133], dtype=torch.uint8)
    """
    weights_8 = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits_N.device)
    return (bits_N.to(torch.uint8).unflatten(-1, (-1, 8)) * weights_8).sum(-1, dtype=torch.uint8)


def unpack_bits(bytes_N: torch.Tensor) -> torch.Tensor:
    """Returns uint8 [..., 8N] of 0 and 1 from uint8 [..., N]: the inverse of `pack_bits`."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bytes_N.device)
    return ((bytes_N.unsqueeze(-1) >> shifts_8) & 1).flatten(-2)


def pack_codes(codes_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns uint8 [bits · N/8] of whole numbers below 2^bits, [N] with N a multiple of 8: one plane for each bit."""
    return torch.cat([pack_bits((codes_N >> bit) & 1) for bit in range(bits)])


def unpack_codes(bytes_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns int32 [..., N] from uint8 [..., bits · N/8]: the inverse of `pack_codes`."""
    planes_BN = unpack_bits(bytes_N.unflatten(-1, (bits, -1))).to(torch.int32)
    shifts_B1 = torch.arange(bits, dtype=torch.int32, device=bytes_N.device).unsqueeze(-1)
    return (planes_BN << shifts_B1).sum(-2, dtype=torch.int32)
