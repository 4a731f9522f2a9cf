"""Files on disk: hashing, atomic writes, locks, and StorageError messages for an OSError."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import resource
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_lion.errors import BusyError, StorageError

_BLOCK_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\..+\.tmp(-\d+-[0-9a-f]{6})?")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# EBADF: some network file systems report it for a descriptor that they cannot lock.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}


@contextmanager
def storage_errors(path: str | Path, doing: str = "written") -> Iterator[None]:
    """Converts an OSError of the block to a StorageError that names the path and the remedy.

    Args:
        path: the file or folder that is written or read.
        doing: participle for the message "cannot be ...": "written", "read", "made".
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        reason = error.strerror or str(error)
        if error.errno == errno.ELOOP:  # of O_NOFOLLOW: see open_own
            raise StorageError(
                f"{where}: cannot be {doing}: it is a symbolic link, and files of a run are not written through links; "
                "remove the link, then give the same command again"
            ) from error
        if error.errno == errno.EFBIG and (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) >= 0:
            remedy = f"this process may write {limit:,} bytes to a file: raise that limit (ulimit -f), then give the same command again"
        elif error.errno in _FULL:
            remedy = "make room there or choose a folder on another disk, then give the same command again"
        else:
            remedy = "check its permissions and the disk, then give the same command again"
        raise StorageError(f"{where}: cannot be {doing}: {reason}; {remedy}") from error


def sha256_file(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal; it is read in blocks of 1 MiB.

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

    A temporary file that a killed process left is used again, so none collects.

    Raises:
        StorageError: the file system refused.
    """
    path = Path(path)
    with storage_errors(path):
        handle, temporary = _open_temporary(path)
        try:
            with open(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                # Before the rename: otherwise a crash can leave the new name with an empty file.
                os.fsync(stream.fileno())
                os.replace(temporary, path)  # before the close, which ends the lock on the temporary file
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _open_temporary(path: Path) -> tuple[int, Path]:
    """Opens an empty temporary file beside `path`, alone, and returns its descriptor and path.

    Its name is fixed, so that the next writer removes what a killed one left. Two processes may write the same result at the
    same time (two `evaluate` of one run); the second one takes another name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    handle = open_own(temporary, os.O_WRONLY)
    try:
        if _is_alone(handle, temporary):
            os.ftruncate(handle, 0)
            return handle, temporary
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(3).hex()}")
    return open_own(temporary, os.O_WRONLY | os.O_EXCL), temporary


def _is_alone(handle: int, temporary: Path) -> bool:
    """Locks a temporary file that was just opened; returns whether it is this writer's alone and still has its name."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS  # without locks, the file is used as it is
    # Between open and flock the other writer may have renamed this very file to its final name. A second link
    # means that the file has another name too, and it must not be emptied either.
    found = os.fstat(handle)
    try:
        return found.st_nlink == 1 and os.path.samestat(found, os.lstat(temporary))
    except FileNotFoundError:
        return False


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files of `write_whole`, and folders named like them, that killed processes left in a folder.

    Call it only if no other process writes into the folder.
    """
    for entry in Path(folder).glob(".*.tmp*"):
        if _TEMPORARY.fullmatch(entry.name) is None:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):  # it is harmless, and the next start tries again
                entry.unlink()


def open_own(path: str | Path, flags: int) -> int:
    """Opens a file of ours for writing, creating it if needed, and returns its descriptor.

    A folder may come from elsewhere, with a link in place of a file: O_NOFOLLOW keeps us from writing to its target, and
    O_NONBLOCK from waiting for the reader of a named pipe.

    Raises:
        OSError: the file system refused; ELOOP for a symbolic link, EINVAL for a file that is not a regular one.
    """
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return handle


def read_own(path: str | Path) -> bytes:
    """Reads a file of ours whole. A folder may come from elsewhere: a named pipe in its place is refused, not waited for.

    Raises:
        OSError: the file system refused; EINVAL for something that is not a regular file.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return stream.read()


def append_line(path: str | Path, line: str) -> None:
    """Appends a line to a file in one write; a killed process loses no line that it has written.

    Raises:
        StorageError: the file system refused; part of the line may have been written.
    """
    with storage_errors(path):
        handle = open_own(path, os.O_WRONLY | os.O_APPEND)
        try:
            rest = memoryview(f"{line}\n".encode())
            while rest:  # a disk that is nearly full takes a part, and refuses the rest
                rest = rest[os.write(handle, rest) :]
        finally:
            os.close(handle)


def make_folder(folder: str | Path) -> None:
    """Makes a folder and those above it, if they do not exist.

    Raises:
        StorageError: the file system refused.
    """
    folder = Path(folder)
    with storage_errors(folder, "made"):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    for path in new:  # else a power cut may lose the entry, and with it everything that is flushed below it
        sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes renames inside a folder durable with fsync, if the file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some network file systems do not open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some file systems reject fsync on a folder: the file is complete, only the rename may be lost
        pass
    finally:
        os.close(handle)


def sync_file(path: str | Path) -> None:
    """Flushes a file that another library wrote to the disk.

    Raises:
        OSError: the disk refused it.
    """
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def file_lock(
    path: str | Path, subject: str, remedy: str, *, by: str = "another process", wait_s: float = 0.0
) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is created if needed, until the block ends.

    The kernel holds the lock (flock) and releases it when the process ends, by whatever cause. The file stays; it
    contains "pid N on HOST" of its last holder. A symbolic link at `path` is refused.

    flock belongs to the open file, which a forked child shares: a loader worker that outlives a killed run would hold
    its lock, although Python opens files with O_CLOEXEC, because a plain fork executes nothing. filelock therefore
    closes the file in the child, through `os.register_at_fork`. It does this for its own descriptors alone, so nothing
    here duplicates one.

    Args:
        path: the lock file; its folder is created if needed.
        subject: what is locked, for the message: a run folder, an output.
        remedy: what to do if another process holds the lock, for the message.
        by: who that is, for the message.
        wait_s: seconds to wait for the lock; 0 makes one attempt.

    Raises:
        BusyError: another process holds the lock; the message names its pid and host.
        StorageError: the file system cannot lock, or refuses the file.
    """
    import filelock  # here: it takes 20 ms, and few subcommands lock

    path = Path(path)
    make_folder(path.parent)
    # fallback_to_soft=False: never a lock that is a file, which a killed holder would leave behind.
    lock = filelock.FileLock(
        path, timeout=wait_s, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder
    )
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BusyError(f"{subject}: in use by {by}{_holder(path)}; {remedy}") from None
    except OSError as error:
        if isinstance(error, PermissionError) and _is_held(path):
            raise BusyError(f"{subject}: in use by {by}{_holder(path)}; {remedy}") from None
        raise StorageError(_lock_refusal(path, error)) from error
    try:
        yield
    finally:
        lock.release()


def _write_holder(handle: int) -> None:
    """Puts this process's pid and host into a lock file; a full disk must not prevent the lock."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        pass


def _holder(path: Path) -> str:
    """' (pid N on HOST)' of a lock file, or '' if it cannot be read or holds something else."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            text = os.read(handle, 300).decode(errors="replace").strip()
        finally:
            os.close(handle)
    except OSError:
        return ""
    return f" ({text})" if re.fullmatch(r"pid \d+ on [\w.-]+", text) else ""


def _is_held(path: Path) -> bool:
    """Whether a lock file that this user may only read is locked now."""
    import filelock

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return not filelock.lock_descriptor(handle, blocking=False)
        finally:
            os.close(handle)
    except OSError:
        return False


def _lock_refusal(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if path.is_symlink():
        return f"{path}: cannot be locked: it is a symbolic link; remove the link, then give the same command again"
    if error.errno in _NO_LOCKS:
        return (
            f"{path}: cannot be locked: its file system offers no locks ({reason}); choose a folder on another disk, or "
            "mount this one with locks (Lustre: -o flock; NFS: without nolock)"
        )
    remedy = "make room there" if error.errno in _FULL else "check its permissions and the disk"
    return f"{path}: cannot be locked: {reason}; {remedy}, then give the same command again"
