"""Files on disk: hashing, writing whole or not at all, and what an operating system's refusal means."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lion.errors import StorageError

_BLOCK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def storage_errors(path: str | Path, doing: str = "written") -> Iterator[None]:
    """Turns an OSError of the block into a StorageError that names the path and what to do about it.

    Args:
        path: what is being written or read.
        doing: what it could not be, for the message: "written", "read", "made".
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            remedy = "make room there or choose a folder on another disk, then give the same command again"
        else:
            remedy = "check its permissions and the disk, then give the same command again"
        raise StorageError(f"{where}: cannot be {doing}: {reason}; {remedy}") from error


def sha256_file(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Args:
        path: the file.
        on_bytes: called with the number of bytes of each block read, for progress bars.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file by temporary name, fsync and rename: a reader sees the old content or the new.

    Raises:
        StorageError: the file system refused.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes renames inside a folder durable, where the file system offers that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some network file systems do not open folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
