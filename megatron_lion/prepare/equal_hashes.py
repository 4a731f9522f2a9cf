"""Finds equal 128-bit hashes among those of many documents, in ranges, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

_RANGE_DOCUMENTS = 1 << 19

Halves = npt.NDArray[np.uint64]
"""(2, D): halves of D hashes."""


def equal_hashes(
    read: Callable[[], Iterable[Halves]], count: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """Yields the documents of one range of hashes after the other, equal hashes beside each other.

    A range has about half a million documents, and takes about 50 bytes of memory for each.

    Args:
        read: yields the hashes of all documents in blocks; called once for each range.
        count: number of documents.

    Returns:
        Pairs of (places of the documents (K,), whether each has the hash of the one before (K,)). Documents with equal
        hashes come in the order of their places.
    """
    # A power of two of ranges of the first half's leading bits.
    bits = max(0, (count // _RANGE_DOCUMENTS).bit_length())
    for number in range(1 << bits):
        hashes, places = _of_range(read(), bits, number)
        order = np.lexsort((places, hashes[1], hashes[0]))
        hashes = hashes[:, order]
        equal = np.zeros(places.size, dtype=np.bool_)
        equal[1:] = np.all(hashes[:, 1:] == hashes[:, :-1], axis=0)
        yield places[order], equal


def _of_range(blocks: Iterable[Halves], bits: int, number: int) -> tuple[Halves, npt.NDArray[np.int64]]:
    """Returns (hashes (2, K), places (K,)) of the documents whose hash begins with the bits of `number`."""
    hashes, places, first = [np.zeros((2, 0), dtype=np.uint64)], [np.zeros(0, dtype=np.int64)], 0
    for block in blocks:
        # In two shifts, because a shift by all 64 bits is undefined.
        chosen = np.flatnonzero(block[0] >> np.uint64(1) >> np.uint64(63 - bits) == number)
        hashes.append(block[:, chosen])
        places.append(chosen + first)
        first += block.shape[1]
    return np.concatenate(hashes, axis=1), np.concatenate(places)
