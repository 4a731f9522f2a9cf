"""Reads and checks the three arrays of an index file in blocks: memory does not grow with the number of sequences.

OpenWebText has about 380 million sentences, an index of 4.6 GB, and each rank of a node opens it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 18
"""Sequences or documents that are in memory at a time: about 8 MB of arrays."""


@dataclass(frozen=True)
class IndexArrays:
    """The arrays of an open index file whose size fits its header.

    A part is read when it is asked for. A memory map would save the copy, but a file that is cut short or a failing disk
    would then end the process with a signal instead of an error.

    Attributes:
        descriptor: of the index file, open for reading.
        num_sequences: S.
        num_boundaries: D, the number of documents + 1.
    """

    descriptor: int
    num_sequences: int
    num_boundaries: int

    def lengths(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Lengths of the sequences [start, stop) in tokens."""
        return self._read("<i4", HEADER.size + 4 * start, stop - start)

    def pointers(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Byte offsets of the sequences [start, stop) in the token file."""
        return self._read("<i8", HEADER.size + 4 * self.num_sequences + 8 * start, stop - start)

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Entries [start, stop) of the document boundaries."""
        return self._read("<i8", HEADER.size + 12 * self.num_sequences + 8 * start, stop - start)

    def _read(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        found = np.empty(count, dtype)
        rest = memoryview(found.view(np.uint8))
        while rest:
            done = os.preadv(self.descriptor, [rest], offset)
            if done == 0:
                raise OSError(errno.EIO, "it was cut short while it was read")
            offset, rest = offset + done, rest[done:]
        return found


@contextmanager
def open_arrays(path: Path, num_sequences: int, num_boundaries: int) -> Iterator[IndexArrays]:
    """Opens an index file that `check_indexed` has accepted.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as stream:
        yield IndexArrays(stream.fileno(), num_sequences, num_boundaries)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields [start, stop) in ranges of at most `BLOCK`."""
    for first in range(start, stop, BLOCK):
        yield first, min(first + BLOCK, stop)


def find_fault(arrays: IndexArrays, itemsize: int) -> tuple[int, str | None]:
    """Checks the arrays against each other.

    Args:
        arrays: of at least one sequence and two boundaries.
        itemsize: bytes of a token.

    Returns:
        (number of tokens, what is wrong or None). Of several faults a negative length comes first, then a pointer, then the
        boundaries.

    Raises:
        OSError: the file cannot be read.
    """
    least, shortest, wrong = 0, -1, -1
    end = np.int64(0)
    for start, stop in blocks(0, arrays.num_sequences):
        lengths = arrays.lengths(start, stop)
        low = int(lengths.argmin())
        if lengths[low] < least:
            least, shortest = int(lengths[low]), start + low
        # int64: the byte offsets of more than 2³¹ bytes of tokens overflow the int32 of the lengths.
        sizes = lengths.astype(np.int64) * itemsize
        ends = np.cumsum(sizes) + end
        end = ends[-1]
        differs = arrays.pointers(start, stop) != ends - sizes
        if wrong < 0 and differs.any():
            wrong = start + int(differs.argmax())
    if shortest >= 0:
        return 0, f"sequence {shortest} has length {least}"
    if wrong >= 0:
        return 0, f"sequence {wrong} does not begin where the one before ends"
    if not _ascend(arrays):
        return 0, f"document boundaries do not run from 0 to {arrays.num_sequences}"
    return int(end) // itemsize, None


def _ascend(arrays: IndexArrays) -> bool:
    """Whether the document boundaries begin with 0, never fall and end with the number of sequences."""
    before = 0
    for start, stop in blocks(0, arrays.num_boundaries):
        part = arrays.boundaries(start, stop)
        if (start == 0 and part[0] != 0) or part[0] < before or np.any(part[1:] < part[:-1]):
            return False
        before = int(part[-1])
    return before == arrays.num_sequences


def unusable_documents(arrays: IndexArrays, first: int, last: int, longest: int) -> tuple[int, int] | None:
    """Looks for a document of at least two sequences, none of them longer than `longest` tokens; stops at the first block with one.

    Args:
        arrays: checked arrays.
        first, last: range of the documents.
        longest: most tokens of a sequence.

    Returns:
        None if there is one, else (number of documents of one sequence, number of documents with a longer one).

    Raises:
        OSError: the file cannot be read.
    """
    single = long = 0
    for start, stop in blocks(first, last):
        boundaries = arrays.boundaries(start, stop + 1)
        is_long = np.zeros(stop - start, bool)
        for begin, end in blocks(int(boundaries[0]), int(boundaries[-1])):
            places = np.flatnonzero(arrays.lengths(begin, end) > longest) + begin
            # The last boundary at or before a sequence is its document's: empty documents before it have the same one.
            is_long[np.searchsorted(boundaries, places, side="right") - 1] = True
        counts = np.diff(boundaries)
        if np.any((counts >= 2) & ~is_long):
            return None
        single, long = single + int((counts == 1).sum()), long + int(is_long.sum())
    return single, long
