"""Writes Megatron's `.bin/.idx` token files (layout and checks: indexed_check.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_lion.data.hashed_file import HashedFile
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

_ENDINGS = (".bin", ".idx", ".lengths", ".sequences")
_BLOCK_BYTES = 1 << 20


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx, byte-identical to Megatron-Core's IndexedDatasetBuilder.

    Both files have temporary names until `finalize` renames them, the index last: if PREFIX.idx exists, the pair is
    complete. An exception in the `with` block removes the temporary files. Lengths wait in files too, so memory does not
    grow with the number of documents.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, IndexedWriter(f"{folder}/a", vocab_size=300) as writer:
    ...     writer.add_document(np.array([1, 2, 299]))
    ...     info = writer.finalize()
    >>> info.num_documents, info.num_tokens, info.dtype.name
    (1, 3, 'uint16')
    """

    def __init__(self, prefix: str | Path, vocab_size: int, threads: int = 1) -> None:
        """Opens the temporary files.

        Args:
            prefix: path without ending; its folder must exist.
            vocab_size: number of token ids; determines the dtype and bounds every id.
            threads: threads that check, write and hash tokens (`HashedFile`). With more than one, tokens must not change
                after they are added, and an error can be raised by a later call.

        Raises:
            StorageError: the file cannot be created.
        """
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self._num_sequences = self._num_documents = 0
        self._temporary = {ending: with_ending(prefix, f"{ending}.tmp") for ending in _ENDINGS}
        self._files = ExitStack()
        with ExitStack() as opened, storage_errors(self.prefix):
            opened.callback(self._remove_temporary)
            self._tokens = HashedFile(self._temporary[".bin"], threads)
            opened.callback(self._tokens.discard)
            # int32 lengths of the sequences, and int64 numbers of sequences of the documents
            self._lengths = opened.enter_context(open(self._temporary[".lengths"], "wb"))
            self._sequences = opened.enter_context(open(self._temporary[".sequences"], "wb"))
            self._files = opened.pop_all()  # without an error, they stay open

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
        self._append([tokens], sequences, np.array([sequences.size], dtype=np.int64))

    def add_documents(
        self, runs: Sequence[npt.NDArray[Any]], lengths: npt.NDArray[Any], sequences: npt.NDArray[Any] | None = None
    ) -> None:
        """Appends many documents.

        Args:
            runs: arrays that joined hold the (N,) token ids of all documents.
            lengths: (S,) tokens of each sequence, summing to N.
            sequences: (D,) sequences (sentences) of each document, summing to S; None makes each sequence a document.

        Raises:
            DataError: an id is beyond the vocabulary, or a sequence is longer than 2³¹ − 1 tokens.
            StorageError: the tokens cannot be written.
        """
        counts = np.ones(len(lengths), dtype=np.int64) if sequences is None else np.asarray(sequences, dtype=np.int64)
        self._append(runs, np.asarray(lengths, dtype=np.int64), counts)

    def _append(
        self, runs: Sequence[npt.NDArray[Any]], lengths: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
    ) -> None:
        size = sum(run.size for run in runs)
        assert int(lengths.sum()) == size, f"lengths sum to {lengths.sum()}, there are {size} tokens"
        assert int(sequences.sum()) == lengths.size, f"{sequences.sum()} sequences in documents, {lengths.size} lengths"
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: a document has {lengths.max()} tokens; at most {2**31 - 1} are possible")
        if size:
            self._tokens.write(lambda: [self._content(run) for run in runs if run.size], size * self.dtype.itemsize)
        with storage_errors(self.prefix):
            self._lengths.write(lengths.astype("<i4").tobytes())
            self._sequences.write(sequences.astype("<i8").tobytes())
        self._num_sequences += lengths.size
        self._num_documents += sequences.size

    def _content(self, tokens: npt.NDArray[Any]) -> memoryview:
        """Returns the bytes of tokens, at least one, in the dtype of the file."""
        # Before the cast below: an id beyond uint16 would wrap to another token without an error.
        least = 0 if tokens.dtype.kind == "u" else int(tokens.min())
        if not 0 <= least <= int(tokens.max()) < self.vocab_size:
            raise DataError(
                f"{self.prefix}: token ids from {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
                f"{self.vocab_size}"
            )
        return np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")

    def finalize(self) -> IndexedInfo:
        """Writes the index, syncs both files to disk, renames them to their final names and checks them.

        Raises:
            StorageError: the file system refused, for instance because the disk is full.
            DataError: no document was added.
        """
        # Synced before the renames: after a power loss a name must not refer to lost data.
        bin_sha256 = self._tokens.finish()
        with storage_errors(self.prefix):
            self._lengths.close()
            self._sequences.close()
            with open(self._temporary[".idx"], "wb") as stream:
                self._write_index(stream)
                stream.flush()
                os.fsync(stream.fileno())
            # A crash between the renames must not leave an older index beside newer tokens.
            with_ending(self.prefix, ".idx").unlink(missing_ok=True)
            for ending in _ENDINGS[:2]:
                os.replace(self._temporary[ending], with_ending(self.prefix, ending))
            for ending in _ENDINGS[2:]:
                self._temporary[ending].unlink()
        sync_folder(self.prefix.parent)
        info = check_indexed(self.prefix)
        info.__dict__["bin_sha256"] = bin_sha256  # hashed while writing: saves reading the file again
        return info

    def _write_index(self, stream: IO[bytes]) -> None:
        """Writes the index: header, lengths, positions in bytes, and first sequences of the documents."""
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
        stream.write(HEADER.pack(MAGIC, VERSION, code, self._num_sequences, self._num_documents + 1))
        with open(self._temporary[".lengths"], "rb") as lengths:
            shutil.copyfileobj(lengths, stream, _BLOCK_BYTES)
        for starts in _sums(self._temporary[".lengths"], "<i4"):
            stream.write((starts * self.dtype.itemsize).astype("<i8").tobytes())
        for starts in _sums(self._temporary[".sequences"], "<i8"):
            stream.write(starts.astype("<i8").tobytes())
        stream.write(np.array([self._num_sequences], dtype="<i8").tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk, close fails to flush the last buffer, which is discarded anyway
            self._files.close()

    def _remove_temporary(self) -> None:
        for path in self._temporary.values():
            with suppress(OSError):  # a leftover, which the next writer replaces, must not hide the block's own error
                path.unlink(missing_ok=True)


def _sums(path: Path, dtype: str) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the sum of all numbers before each number, for each block of a file of numbers."""
    total = 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            numbers = np.frombuffer(block, dtype).astype(np.int64)
            ends = total + np.cumsum(numbers)
            total = int(ends[-1])
            yield ends - numbers
