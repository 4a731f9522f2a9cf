"""What a dataset holds: lengths of its documents, and documents spread evenly over it, read from the token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_check import HEADER, IndexedInfo, sequence_lengths

_BLOCK_DOCUMENTS = 1 << 18


@dataclass(frozen=True)
class Lengths:
    """Lengths of the documents of some token files, in tokens with the end-of-document token.

    Attributes:
        documents: number of documents whose length has k bits, by k: 1 token, 2 to 3, 4 to 7, …; entry 0 counts empty ones.
        tokens: number of tokens of these documents.
        shortest, longest: length of the shortest and the longest document.
    """

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    shortest: int
    longest: int


@dataclass(frozen=True)
class Sample:
    """One document.

    Attributes:
        number: its number in the token files, from 0.
        ids: its token ids, (N,).
    """

    number: int
    ids: npt.NDArray[np.int64]


def boundaries_of(info: IndexedInfo) -> npt.NDArray[np.int64]:
    """Returns the first sequence of each of the D documents, and the number of sequences; (D + 1,), mapped from the index."""
    start = HEADER.size + 12 * info.num_sequences
    return np.memmap(info.idx_path, dtype="<i8", mode="r", offset=start, shape=(info.num_documents + 1,))


def document_lengths(info: IndexedInfo) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the lengths in tokens of all documents in blocks; at most a block is in memory.

    Args:
        info: from `check_indexed`.
    """
    sequences, boundaries = sequence_lengths(info), boundaries_of(info)
    for first in range(0, info.num_documents, _BLOCK_DOCUMENTS):
        edges = np.asarray(boundaries[first : first + _BLOCK_DOCUMENTS + 1])
        ends = np.cumsum(sequences[edges[0] : edges[-1]], dtype=np.int64)
        before = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        yield np.diff(before[edges - edges[0]])


def lengths_of(infos: Sequence[IndexedInfo]) -> Lengths:
    """Returns the lengths of the documents of some pairs of token files.

    Args:
        infos: from `check_indexed`, at least one.
    """
    documents, tokens = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in (block for info in infos for block in document_lengths(info)):
        bits = np.frexp(lengths.astype(np.float64))[1]  # of a whole number below 2^53, its number of bits
        documents += np.bincount(bits, minlength=64)
        # A sum of float64 weights is exact below 2^53.
        tokens += np.bincount(bits, weights=lengths, minlength=64).astype(np.int64)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    used = int(np.flatnonzero(documents)[-1]) + 1
    return Lengths(tuple(documents[:used].tolist()), tuple(tokens[:used].tolist()), shortest, longest)


def spread_samples(info: IndexedInfo, count: int) -> list[Sample]:
    """Returns up to `count` documents, spread evenly over the token files.

    Args:
        info: from `check_indexed`.
        count: number of documents.

    Raises:
        OSError: the tokens cannot be read.
    """
    wanted = sorted({(2 * place + 1) * info.num_documents // (2 * count) for place in range(count)}) if count else []
    sequences, boundaries = sequence_lengths(info), boundaries_of(info)
    start = HEADER.size + 4 * info.num_sequences
    pointers = np.memmap(info.idx_path, dtype="<i8", mode="r", offset=start, shape=(info.num_sequences,))
    found = []
    for number in wanted:
        first, end = int(boundaries[number]), int(boundaries[number + 1])
        size = int(sequences[first:end].sum(dtype=np.int64))
        at = int(pointers[first]) if size else 0
        found.append(Sample(number, np.fromfile(info.bin_path, info.dtype, size, offset=at).astype(np.int64)))
    return found


def prefix_of(path: str | Path) -> Path:
    """Returns the prefix of a pair of token files, without .bin or .idx."""
    text = str(path)
    return Path(text[:-4] if text.endswith((".bin", ".idx")) else text)
