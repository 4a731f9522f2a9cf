"""Writes a file and hashes it on the way, with several threads for large files."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_lion.files import storage_errors

# Blocks that are not hashed yet; they may be views of mapped files, whose pages count as memory of the process.
_PENDING_BYTES = 1 << 25

Blocks = Sequence[bytes | memoryview]


class HashedFile:
    """A new file with the SHA-256 of its content.

    With more than one thread, blocks are made and written by `threads - 1` of them, each at its place, and hashed in order
    by another. numpy, hashlib and the system calls leave Python's lock to the others meanwhile. The content is the same
    at every number of threads.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = HashedFile(Path(folder) / "a", threads=2)
    ...     file.write(lambda: [b"one", b" "], 4)
    ...     file.write(lambda: [b"two"], 3)
    ...     digest = file.finish()
    ...     (Path(folder) / "a").read_bytes(), digest == hashlib.sha256(b"one two").hexdigest()
    (b'one two', True)
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Creates the file, or empties the one that exists.

        Raises:
            StorageError: the file cannot be created.
        """
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        with storage_errors(path):
            self._stream = open(path, "wb")  # noqa: SIM115 - closed by finish or discard
        self._writers = ThreadPoolExecutor(threads - 1, "write") if threads > 1 else None
        self._hasher = ThreadPoolExecutor(1, "hash") if threads > 1 else None

    def write(self, make: Callable[[], Blocks], size: int) -> None:
        """Appends some blocks.

        Args:
            make: returns the blocks, whose content does not change afterwards; its errors are raised here, or by a later
                call.
            size: their number of bytes together.

        Raises:
            StorageError: the file system refused these blocks or earlier ones.
        """
        place, self._size = self._size, self._size + size
        if self._writers is None or self._hasher is None:
            for block in make():
                with storage_errors(self._path):
                    self._stream.write(block)
                self._digest.update(block)
            return
        written = self._writers.submit(self._write_at, place, make)
        self._pending.append((self._hasher.submit(self._hash, written), size))
        self._pending_bytes += size
        self._wait(_PENDING_BYTES)

    def finish(self) -> str:
        """Syncs the file to disk and closes it; returns its SHA-256 in hexadecimal.

        Raises:
            StorageError: the file system refused.
        """
        self._wait(0)
        with storage_errors(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.discard()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Ends the threads and closes the file, without an error if the disk is full."""
        for pool in (self._writers, self._hasher):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        with suppress(OSError):  # close fails to flush the last buffer of a full disk
            self._stream.close()

    def _write_at(self, place: int, make: Callable[[], Blocks]) -> Blocks:
        blocks = make()
        with storage_errors(self._path):
            for block in blocks:
                left = memoryview(block)
                while left:  # the system may write less, for instance before the disk is full
                    done = os.pwrite(self._stream.fileno(), left, place)
                    left, place = left[done:], place + done
        return blocks

    def _hash(self, written: Future[Blocks]) -> None:
        for block in written.result():
            self._digest.update(block)

    def _wait(self, most: int) -> None:
        """Waits until at most `most` bytes are not hashed yet."""
        while self._pending and self._pending_bytes > most:
            hashed, size = self._pending.popleft()
            hashed.result()
            self._pending_bytes -= size
