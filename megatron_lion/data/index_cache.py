"""Index files of a run's samples: built beside their place, listed with their SHA-256, compared before each use.

Which token of which document a step reads is decided by index files that Megatron computes and keeps in a cache. It
writes them in place and reads them without a check; after a full disk, a kill or a power loss, zeros in such a file
train on other samples. Here a folder of index files appears by one rename, after every file and the listing, with sizes
and SHA-256, is on the disk. A folder that differs from its listing is built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from megatron_lion.errors import BusyError, StorageError
from megatron_lion.files import file_lock, read_own, sha256_file, storage_errors, sync_file, write_whole
from megatron_lion.folder_swap import put_back, replace_folder
from megatron_lion.jobs import place_from_env
from megatron_lion.logs import warn
from megatron_lion.parallel import agree, broadcast_object

LISTING = "index.json"
"""File with the size and SHA-256 of each index file, and the key of what they were built from."""

Content = npt.NDArray[Any] | str
"""Content of an index file: an array, or the text of a description."""

_FORMAT = 1
_LONGEST_WAIT_S = 24 * 3600.0
_logger = logging.getLogger(__name__)


def index_folder(cache: Path, digest: str, key: dict[str, Any], build: Callable[[Path], Sequence[Content]]) -> Path:
    """Returns the folder with the verified index files of `key`; rank 0 builds them if needed. A collective call.

    Args:
        cache: folder of the folders of index files; the same on all nodes.
        digest: content digest of the data, in hexadecimal.
        key: everything that the index files depend on, as JSON values.
        build: writes the index files into an empty folder, and returns their contents as they were in memory.

    Raises:
        StorageError: the file system refused, or another rank does not see the files of rank 0.
        BusyError: another job has been building the same files for a day.
    """
    key = json.loads(json.dumps({"format": _FORMAT, **key}))  # as it is read back: tuples become lists
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{digest[:16]}-{name[:16]}"
    rank = dist.get_rank() if dist.is_initialized() else 0
    listing = ""
    with agree("building the index files"):
        if rank == 0:
            _verify_or_build(folder, key, build)
            with storage_errors(folder, "read"):
                listing = sha256_file(folder / LISTING)
    listing = broadcast_object(listing)
    with agree("checking the index files"):
        if rank != 0:
            _verify_elsewhere(folder, key, listing, rank)
    return folder


def _verify_or_build(folder: Path, key: dict[str, Any], build: Callable[[Path], Sequence[Content]]) -> None:
    if find_fault(folder, key) is None:
        return
    with _building(folder):
        fault = find_fault(folder, key)  # again: another job may have built them in the meantime
        if fault is None:
            return
        if os.path.lexists(folder):
            warn(_logger, f"{folder}: these index files are not used: {fault}; building them again")
        elif _is_first_after_update(folder):
            warn(
                _logger,
                f"{folder.parent}: index files of an earlier version, without digests, are not used and may be deleted; building "
                "them again",
            )
        _build(folder, key, build)


def _is_first_after_update(folder: Path) -> bool:
    """Whether the cache holds only index files of an earlier version for this data: CACHE/DIGEST/*.npy."""
    digest = folder.name.split("-")[0]
    ours = any(path.is_dir() for path in folder.parent.glob(f"{digest}-*"))
    return not ours and next((folder.parent / digest).glob("*.npy"), None) is not None


def find_fault(folder: Path, key: dict[str, Any], *, contents: bool = True) -> str | None:
    """Compares the index files of a folder with their listing.

    Args:
        folder: folder of index files.
        key: what the files must have been built from.
        contents: whether to read and hash the files (about 1.9 GB/s); otherwise only their sizes are compared.

    Returns:
        What is wrong, or None.

    Raises:
        StorageError: a file cannot be read.
    """
    try:
        listing = json.loads(read_own(folder / LISTING))
        if listing["key"] != key:
            return "they were built from other data or settings"
        if not listing["files"]:
            return f"{LISTING} is damaged"
        for name, stated in listing["files"].items():
            path = folder / Path(name).name
            found = path.lstat()
            if path.name != name or not stat.S_ISREG(found.st_mode):
                return f"{name} is not a plain file of this folder"
            if found.st_size != stated["bytes"]:
                return f"{name} has {found.st_size:,} bytes, {LISTING} lists {stated['bytes']:,}"
            if contents and sha256_file(path) != stated["sha256"]:
                return f"the SHA-256 of {name} is not the one in {LISTING}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{LISTING} is damaged"
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOTDIR):
            return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
        with storage_errors(folder, "read"):
            raise
    return None


def _verify_elsewhere(folder: Path, key: dict[str, Any], listing: str, rank: int) -> None:
    """Checks that another rank sees the files of rank 0; one rank of each node reads them whole."""
    where = f"rank {rank} on {socket.gethostname()}"
    fault = find_fault(folder, key, contents=place_from_env().local_rank == 0)
    if fault is None:
        with storage_errors(folder, "read"):
            if sha256_file(folder / LISTING) == listing:
                return
        fault = f"its {LISTING} differs"
    raise StorageError(
        f"{folder}: {where} does not see the index files that rank 0 has checked there ({fault}); set data.cache to a folder "
        "that all nodes share"
    )


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Holds the lock on a folder of index files while they are built; waits with a warning if another job holds it."""
    path, remedy = folder.with_name(f"{folder.name}.lock"), "wait for it, or set another data.cache"
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path, str(folder), remedy, by="another job"))
        except BusyError as error:
            warn(_logger, f"{str(error).removesuffix(f'; {remedy}')}, which builds its index files; waiting for it")
            lock = file_lock(path, str(folder), remedy, by="another job", wait_s=_LONGEST_WAIT_S)
            stack.enter_context(lock)
        yield


def _build(folder: Path, key: dict[str, Any], build: Callable[[Path], Sequence[Content]]) -> None:
    """Builds the files in a folder beside `folder` and renames it; a killed call leaves no folder that is read."""
    new = folder.with_name(f".{folder.name}.building")
    put_back(folder)
    with storage_errors(folder):
        if os.path.lexists(new):  # of a killed job: this one holds the lock
            shutil.rmtree(new)
        try:
            new.mkdir()
            try:
                contents = build(new)
            except OSError as error:
                if error.errno is None:  # numpy writes an array with fwrite and reports only that it was cut short
                    raise OSError(errno.ENOSPC, f"a short write ({error})", str(folder)) from error
                raise
            _list_files(new, key, contents)
            replace_folder(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _list_files(folder: Path, key: dict[str, Any], contents: Sequence[Content]) -> None:
    """Writes the listing, last, after every file is on the disk and equals what was in memory."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    # Megatron chooses the names, so the two sides are compared as sets.
    if {facts["sha256"] for facts in files.values()} != {_sha256(content) for content in contents}:
        raise StorageError(
            f"{folder.parent}: index files do not hold what was just written to them; check the disk, "
            "the limit on file sizes (ulimit -f) and the memory of this machine, then give the same command again"
        )
    write_whole(folder / LISTING, json.dumps({"key": key, "files": files}, indent=1).encode())


class _Hash:
    """A file to write to that keeps only the SHA-256."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data)


def _sha256(content: Content) -> str:
    """SHA-256 of the file that holds a content: text, or an array in numpy's format."""
    sink = _Hash()
    if isinstance(content, str):
        sink.write(content.encode())
    else:
        np.lib.format.write_array(sink, content)
    return sink.digest.hexdigest()
