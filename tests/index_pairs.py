"""Pairs of token files that no writer makes, for the tests of their checks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

CODES = {"<u2": 8, "<i4": 4}


def index_bytes(lengths: list[int], boundaries: list[int], dtype: str = "<u2") -> bytes:
    """Builds an index with the layout documented in indexed_check.py, using Python integers."""
    size = {"<u2": 2, "<i4": 4}[dtype]
    pointers = [size * sum(lengths[:number]) for number in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(boundaries))
    parts = struct.pack(f"<{len(lengths)}i", *lengths), struct.pack(f"<{len(pointers)}q", *pointers)
    return head + b"".join(parts) + struct.pack(f"<{len(boundaries)}q", *boundaries)


def write_pair(prefix: Path, lengths: list[int], boundaries: list[int], tokens: Any = None, dtype: str = "<u2") -> None:
    """Writes an index and a token file with the given tokens (zeros if none are given)."""
    Path(f"{prefix}.idx").write_bytes(index_bytes(lengths, boundaries, dtype))
    values = np.zeros(sum(lengths)) if tokens is None else tokens
    Path(f"{prefix}.bin").write_bytes(np.asarray(values, dtype).tobytes())
