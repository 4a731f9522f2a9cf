"""Writes Megatron's `.bin/.idx` token files (layout and checks: indexed_check.py)."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_lion.data.index_arrays import HEADER
from megatron_lion.data.indexed_check import (
    DTYPE_CODES,
    MAGIC,
    VERSION,
    IndexedInfo,
    check_indexed,
    token_dtype,
    with_ending,
)
from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors, sync_folder

__all__ = ["IndexedInfo", "IndexedWriter", "check_indexed", "token_dtype", "with_ending"]


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx, byte-identical to Megatron-Core's IndexedDatasetBuilder.

    Both files have temporary names until `finalize` renames them, the index last: if PREFIX.idx exists, the pair is
    complete. An exception in the `with` block removes the temporary files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, IndexedWriter(f"{folder}/a", vocab_size=300) as writer:
    ...     writer.add_document(np.array([1, 2, 299]))
    ...     info = writer.finalize()
    >>> info.num_documents, info.num_tokens, info.dtype.name
    (1, 3, 'uint16')
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        """Opens the temporary token file.

        Args:
            prefix: path without ending; its folder must exist.
            vocab_size: number of token ids; determines the dtype and bounds every id.

        Raises:
            StorageError: the file cannot be created.
        """
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._sequences_per_document: list[npt.NDArray[np.int64]] = []
        self._digest = hashlib.sha256()
        self._temporary = {ending: with_ending(prefix, f"{ending}.tmp") for ending in (".bin", ".idx")}
        with storage_errors(self._temporary[".bin"]):
            self._stream = open(self._temporary[".bin"], "wb")  # noqa: SIM115 - closed by finalize or __exit__

    def add_document(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Appends one document.

        Args:
            tokens: (N,) token ids.
            lengths: (S,) tokens of each of its sequences (sentences), summing to N; None stores one sequence.

        Raises:
            DataError: an id is beyond the vocabulary, or a sequence is longer than 2³¹ − 1 tokens.
            StorageError: the tokens cannot be written.
        """
        tokens = np.asarray(tokens)
        sequences = np.asarray([tokens.size] if lengths is None else lengths, dtype=np.int64)
        self._append(tokens, sequences, np.array([sequences.size], dtype=np.int64))

    def add_documents(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], sequences: npt.NDArray[Any] | None = None
    ) -> None:
        """Appends many documents.

        Args:
            tokens: (N,) token ids of all documents one after another.
            lengths: (S,) tokens of each sequence, summing to N.
            sequences: (D,) sequences (sentences) of each document, summing to S; None makes each sequence a document.

        Raises:
            DataError: an id is beyond the vocabulary, or a sequence is longer than 2³¹ − 1 tokens.
            StorageError: the tokens cannot be written.
        """
        counts = np.ones(len(lengths), dtype=np.int64) if sequences is None else np.asarray(sequences, dtype=np.int64)
        self._append(tokens, np.asarray(lengths, dtype=np.int64), counts)

    def _append(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
    ) -> None:
        assert int(lengths.sum()) == tokens.size, f"lengths sum to {lengths.sum()}, there are {tokens.size} tokens"
        assert int(sequences.sum()) == lengths.size, f"{sequences.sum()} sequences in documents, {lengths.size} lengths"
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: a document has {lengths.max()} tokens; at most {2**31 - 1} are possible")
        # Before the cast below: an id beyond uint16 would wrap to another token without an error.
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(
                f"{self.prefix}: token ids from {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
                f"{self.vocab_size}"
            )
        content = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B") if tokens.size else b""
        with storage_errors(self._temporary[".bin"]):
            self._stream.write(content)
        self._digest.update(content)
        self._lengths.append(lengths.astype(np.int32))
        self._sequences_per_document.append(sequences)

    def finalize(self) -> IndexedInfo:
        """Writes the index, syncs both files to disk, renames them to their final names and checks them.

        Raises:
            StorageError: the file system refused, for instance because the disk is full.
            DataError: no document was added.
        """
        none: npt.NDArray[Any] = np.zeros(0)
        lengths = np.concatenate([none.astype(np.int32), *self._lengths])
        sequences = np.concatenate([none.astype(np.int64), *self._sequences_per_document])
        ends = np.cumsum(lengths, dtype=np.int64)
        boundaries = np.concatenate([np.zeros(1, np.int64), np.cumsum(sequences, dtype=np.int64)])
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
        with storage_errors(self.prefix):
            self._stream.flush()
            os.fsync(self._stream.fileno())  # before the renames: after a power loss a name must not refer to lost data
            self._stream.close()
            with open(self._temporary[".idx"], "wb") as stream:
                stream.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, boundaries.size))
                stream.write(lengths.astype("<i4").tobytes())
                stream.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
                stream.write(boundaries.astype("<i8").tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            # A crash between the renames must not leave an older index beside newer tokens.
            with_ending(self.prefix, ".idx").unlink(missing_ok=True)
            for ending in (".bin", ".idx"):
                os.replace(self._temporary[ending], with_ending(self.prefix, ending))
        sync_folder(self.prefix.parent)
        info = check_indexed(self.prefix)
        info.__dict__["bin_sha256"] = self._digest.hexdigest()  # hashed while writing: saves reading the file again
        return info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk, close fails to flush the last buffer, which is discarded anyway
            self._stream.close()
        for path in self._temporary.values():
            with suppress(OSError):  # a leftover, which the next writer replaces, must not hide the block's own error
                path.unlink(missing_ok=True)
