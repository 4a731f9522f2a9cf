"""Hashes the input files of a preparation, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_lion.data.manifest import SourceInfo
from megatron_lion.files import sha256_file
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import reading
from megatron_lion.prepare.progress import Progress


class _Stopped(Exception):
    """Ends a thread after an error in another one, or an interrupt."""


def hash_sources(files: Sequence[InputFile], work: Path, threads: int, progress: Progress) -> list[SourceInfo]:
    """Returns the manifest's entries of the input files, without the number of their documents.

    Args:
        files: input files.
        work: the work folder; a file in it is named without its folder, which is removed at the end.
        threads: number of files that are read at a time.
        progress: receives the number of bytes read.

    Raises:
        DataError: a file cannot be read; the first of these in the order of `files`.
    """
    progress.stage("hashing the input", sum(file.bytes for file in files))
    lock, stopped = threading.Lock(), threading.Event()

    def advance(size: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with lock:
            progress.advance(size)

    def source(file: InputFile) -> SourceInfo:
        with reading(file.path):
            digest = sha256_file(file.path, advance)
        path = file.path.name if file.path.parent == work else str(file.path)
        return SourceInfo(path=path, bytes=file.bytes, sha256=digest, documents=0)

    with ThreadPoolExecutor(min(threads, max(len(files), 1)), "hash") as pool:
        try:
            return list(pool.map(source, files))
        except (
            BaseException
        ):  # an interrupt too: the threads would read their files to the end before this one continues
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
