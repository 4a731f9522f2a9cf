"""Folders that are made beside their final path and put there whole, also in the place of an older one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_lion.files import storage_errors, sync_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h on Linux


@contextmanager
def work_folder(final: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside a final path, for `replace_folder`; what is left of it is removed at the end.

    Beside it, because a rename is atomic within one file system only. Folders that killed processes left for the same path
    are removed first. A folder in use is locked, and the lock ends with its process.

    Raises:
        StorageError: the folder cannot be made.
    """
    prefix = f".{final.name}.tmp-"
    with ExitStack() as stack:
        with storage_errors(final, "made"):
            final.parent.mkdir(parents=True, exist_ok=True)
            put_back(final)
            folder, _ = stack.enter_context(locked_folder(final.parent, prefix))
        yield folder


@contextmanager
def locked_folder(parent: Path, prefix: str, mode: int = 0o777) -> Iterator[tuple[Path, list[int]]]:
    """Makes a new folder with a random name, locked; what is left of it is removed at the end.

    Folders with the same prefix that nobody has locked are of killed processes, and are removed first.

    Args:
        parent: folder to make it in.
        prefix: how its name begins.
        mode: its permissions, less the process's umask.

    Yields:
        The folder, and the descriptors that hold the lock, for processes to inherit; none if the file system has no locks.

    Raises:
        OSError: the folder cannot be made.
    """
    for entry in list(parent.iterdir()):
        if entry.name.startswith(prefix):
            with suppress(OSError), _lock(entry):  # locked, gone in the meantime, or another user's
                shutil.rmtree(entry, ignore_errors=True)
    with ExitStack() as stack:
        while True:
            folder = parent / f"{prefix}{os.getpid()}-{os.urandom(3).hex()}"
            folder.mkdir(mode)
            try:
                held = [stack.enter_context(_lock(folder))]
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took it, not locked yet, for an abandoned one
            except OSError:  # a file system without locks: nobody can lock it to remove it either
                held = []
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            break
        yield folder, held


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls its remover may have removed it and let go of the lock.
        if not os.path.samestat(os.fstat(handle), os.lstat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield handle
    finally:
        os.close(handle)


def replace_folder(new: Path, final: Path) -> None:
    """Renames a finished folder to its final path and then removes an older folder there.

    At every moment the path has the old folder or the new one, since Linux can exchange two names. If the file system
    cannot, the old one moves aside first; `put_back` brings it back if the process was killed in between.

    Raises:
        StorageError: the file system refused; the older folder is kept.
    """
    with storage_errors(final):
        if not os.path.lexists(final):
            os.replace(new, final)
        elif not _exchange(new, final):
            put_back(final)
            aside = _aside(final)
            os.rename(final, aside)
            try:
                os.rename(new, final)
            except OSError:
                os.rename(aside, final)
                raise
            new = aside
        sync_folder(final.absolute().parent)  # the renames are on disk before the old folder is deleted
    _remove(new)


def put_back(final: Path) -> bool:
    """Completes or undoes a `replace_folder` that was killed between its two renames; call it before the path is used.

    Returns:
        Whether the older folder has its name again.

    Raises:
        StorageError: the file system refused.
    """
    aside = _aside(final)
    if not os.path.lexists(aside):
        return False
    if os.path.lexists(final):
        _remove(aside)
        return False
    with storage_errors(final):
        os.rename(aside, final)
    return True


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:  # what stood in the place of a folder
        with suppress(OSError):
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False if the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))
