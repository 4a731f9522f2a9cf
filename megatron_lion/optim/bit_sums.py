"""Sums over the bits of a tensor from which fingerprints are made, in torch, C++ (`bit_sum.cpp`) or Triton.

Every way gives the same integers. The C++ library is used if this machine has it already, or for large tensors; the
kernel on CUDA. Otherwise, and if neither works, torch does it.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass

import torch

from . import triton_check
from .cpp_compiler import Library
from .precision import REMAINDER_DTYPES, join_master, split_master

logger = logging.getLogger(__name__)

SOURCE = "bit_sum.cpp"
# torch takes 15 to 40 ns an element and thread, the library 1, and compiling it 0.6 s, once a machine.
CPP_PAYS = 2**22
CHUNK = 1 << 22  # elements that torch takes at once: bounds each int64 temporary to 32 MiB
MIX = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX2 = -4658895280553007687  # 0xBF58476D1CE4E5B9 as int64
EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of the exponent; NaN and infinities, and no other values, have all of them."""


@dataclass(frozen=True)
class Placement:
    """Position of a tensor-parallel part in its whole tensor.

    Local flat index i has global flat index first + (i // columns) · whole_columns + i % columns.
    """

    columns: int
    whole_columns: int
    first: int


class _Work(ctypes.Structure):
    """The argument of bit_sum.cpp's `bit_sum`; the fields must match its struct Work."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("lower", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("whole_columns", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("salt", ctypes.c_int64),
        ("result", ctypes.c_void_p),
        ("bytes", ctypes.c_int32),
        ("lower_bytes", ctypes.c_int32),
        ("exponent", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def bit_sum(
    flat: torch.Tensor,
    start: int,
    place: Placement,
    salt: int,
    *,
    remainder: torch.Tensor | None = None,
    whole_numel: int = 0,
) -> torch.Tensor:
    """Returns Σ mix(bits ^ salt) · (2 · global index + 1) mod 2^64, and the number of elements that are not finite.

    Args:
        flat: float32, bfloat16 or float16 [N]; its element i is flat element start + i of the local tensor.
        start: see `flat`.
        place: position of the local tensor in its whole tensor.
        salt: int64.
        remainder: int16 or int8 [N], if `flat` are the upper halves of split master weights; these are summed.
        whole_numel: elements of all tensors that the caller sums; decides whether compiling the library pays.

    Returns:
        int64 [2] on the tensor's device, without a wait for it.
    """
    flat = flat.detach()
    if flat.is_cuda and triton_check.why_no_triton() is None:
        from .bit_sum_kernel import kernel_sum

        flat = (flat if remainder is None else join_master(flat, remainder)).contiguous()
        return kernel_sum(flat, start, place, salt, EXPONENTS[flat.dtype])
    result = torch.zeros(2, dtype=torch.int64, device=flat.device)
    if flat.device.type == "cpu" and _cpp_pays(max(whole_numel, flat.numel())):
        _add_in_cpp(
            result, flat.contiguous(), start, place, salt, None if remainder is None else remainder.contiguous()
        )
        return result
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK].contiguous()
        if remainder is not None:
            part = join_master(part, remainder[first : first + CHUNK])
        result += reference_sum(part, start + first, place, salt)
    return result


def reference_sum(part: torch.Tensor, start: int, place: Placement, salt: int) -> torch.Tensor:
    """Returns what `bit_sum` returns for a contiguous tensor, in plain torch; needs 32 bytes an element."""
    # Bits, not values: they distinguish -0.0 from 0.0 and one NaN from another.
    bits = part.view(torch.int32 if part.element_size() == 4 else torch.int16).to(torch.int64)
    local = torch.arange(part.numel(), dtype=torch.int64, device=part.device) + start
    whole = (
        local
        if place.whole_columns == place.columns
        else (local // place.columns) * place.whole_columns + local % place.columns
    )
    # int64 arithmetic wraps modulo 2^64, so addition is exact and its order (chunks, shards, ranks) does not matter.
    mixed = (bits ^ salt) * MIX
    mixed = (mixed ^ (mixed >> 31)) * MIX2
    # The factor is odd, thus invertible modulo 2^64: it never cancels a difference between two mixed values. It
    # depends on the index, so swapped elements change the sum.
    total = ((mixed ^ (mixed >> 29)) * (2 * (whole + place.first) + 1)).sum()
    exponent = EXPONENTS[part.dtype]
    return torch.stack([total, ((bits & exponent) == exponent).sum()])


def _add_in_cpp(
    result: torch.Tensor,
    flat: torch.Tensor,
    start: int,
    place: Placement,
    salt: int,
    remainder: torch.Tensor | None = None,
    loop: ctypes.CDLL | None = None,
) -> None:
    """Adds to `result` what `bit_sum` returns for contiguous tensors on the CPU."""
    work = _Work(
        data=flat.data_ptr(),
        lower=None if remainder is None else remainder.data_ptr(),
        numel=flat.numel(),
        start=start,
        columns=place.columns,
        whole_columns=place.whole_columns,
        first=place.first,
        salt=salt,
        result=result.data_ptr(),
        bytes=flat.element_size(),
        lower_bytes=0 if remainder is None else remainder.element_size(),
        exponent=EXPONENTS[flat.dtype if remainder is None else torch.float32],
        threads=torch.get_num_threads(),
    )
    (loop or library.load()).bit_sum(ctypes.byref(work))


def _cpp_pays(numel: int) -> bool:
    return (numel >= CPP_PAYS or library.is_built()) and library.why_not() is None


def _differs(loop: ctypes.CDLL) -> str | None:
    """Returns "integers" if the compiled loop computes others than the reference, otherwise None."""
    values = torch.linspace(-3, 3, 999)
    values[::100] = float("inf")
    cases: list[tuple[torch.Tensor, torch.Tensor | None]] = [(values.to(dtype), None) for dtype in EXPONENTS]
    cases += [split_master(values, form) for form in REMAINDER_DTYPES]
    for flat, remainder in cases:
        for place in (Placement(7, 7, 0), Placement(7, 21, 14)):
            found = torch.zeros(2, dtype=torch.int64)
            _add_in_cpp(found, flat, 5, place, MIX2, remainder, loop)
            whole = flat if remainder is None else join_master(flat, remainder)
            if not torch.equal(found, reference_sum(whole, 5, place, MIX2)):
                return "integers"
    return None


library = Library(SOURCE, _differs, "fingerprints on the CPU are computed in torch, which is slower", logger)
