"""How a program of the Triton kernels finds, reads and writes its elements.

Whole chunks load and store without masks, so that the compiler can move 16 bytes an instruction; a tensor's last chunk is
masked. Every array has the same layout over the threads, so they exchange no data.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_formats import INT8_BLOCK


@triton.jit
def place(address: tl.tensor, kind: tl.constexpr, index: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """Pointer to element `index` of an array of dtype `kind` that begins at `address`."""
    base = address.to(tl.pointer_type(kind))
    if ALIGNED:  # without this hint the compiler cannot prove that 16-byte accesses are allowed
        base = tl.multiple_of(base, 16)
    return base + index


@triton.jit
def load(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Values at the pointers; if MASKED, 0 at those that the mask leaves out."""
    if MASKED:
        # 0 beyond the end: it raises no maximum of an int8 block and counts as no agreement.
        values = tl.load(pointers, mask=mask, other=0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def store(pointers: tl.tensor, values: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> None:
    """Writes the values; if MASKED, only those that the mask keeps."""
    if MASKED:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values)


@triton.jit
def lane_numbers(PART: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """0, 1, ... as int32 [blocks, lanes]: a number for each WIDTH neighbours of PART elements."""
    lanes: tl.constexpr = INT8_BLOCK // WIDTH
    return tl.arange(0, PART // INT8_BLOCK)[:, None] * lanes + tl.arange(0, lanes)[None, :]


@triton.jit
def chunk_offsets(MOMENTUM: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """0 to PART - 1 in the shape that they are computed in: [PART], or [blocks, lanes, WIDTH] for int8 momentum.

    WIDTH neighbours belong to one thread and the lanes of a block to one warp. So the largest of a block is found in registers
    and by shuffles, without shared memory.
    """
    if MOMENTUM == "int8":
        offsets = (lane_numbers(PART, WIDTH) * WIDTH)[:, :, None] + tl.arange(0, WIDTH)[None, None, :]
    else:
        offsets = tl.arange(0, PART)
    return offsets


@triton.jit
def load_upper(
    first: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """16 bits of each element from the pointer `first`, as the upper half of a uint32."""
    if MOMENTUM == "int8" and ALIGNED and not MASKED:
        # Two elements in a word: taking them apart here costs an instruction each; the compiler takes two.
        HALF: tl.constexpr = WIDTH // 2
        words = (lane_numbers(PART, WIDTH) * HALF)[:, :, None] + tl.arange(0, HALF)[None, None, :]
        word = tl.load(tl.multiple_of(first.to(tl.pointer_type(tl.uint32)), 16) + words)
        upper = tl.reshape(tl.join(word << 16, word & 0xFFFF0000), offsets.shape)
    else:
        upper = load(first + offsets, mask, MASKED).to(tl.uint32) << 16
    return upper
