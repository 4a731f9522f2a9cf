"""Remembers what a start has read of a plain token file, so that the next start of a job need not read it again.

A plain PREFIX.bin has no manifest: its SHA-256 (the identity of the data, for checkpoints and index files) and the range of
its ids follow from its bytes alone. They are kept in CACHE/tokens-….json, with a stamp of the file: size, time of the last
change of content and of any attribute, inode, the SHA-256 of PREFIX.idx, which is read at each start, and the SHA-256 of a
sample of its blocks. With any other stamp the file is read again.

What the stamp can miss, and what follows then:

- Writing to a file or putting another in its place changes the time of its attributes (ctime), which no program can set
  back, or the inode. So `cp -p`, `rsync --times` and `touch` do not make another file look like the one that was read. A
  time stamp has the resolution of the file system; a file that changed in the last `_SETTLED_S` seconds is not remembered.
- A file system may report such times wrongly. Another text then still differs in the sample. Only a change of a few bytes
  could be missed. Prepared datasets, whose tokens are not read at a start, are in the same position.
- If it is missed, the data count as unchanged: a run resumes on them instead of being refused. The samples are cut at the
  right places, because they depend on PREFIX.idx. An id beyond the vocabulary is refused when a batch holds it
  (`batches.micro_batches`), so it reaches no embedding.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lion.data.indexed_check import IndexedInfo, TokenContent
from megatron_lion.errors import StorageError
from megatron_lion.files import make_folder
from megatron_lion.runs.sealed_json import read_sealed, write_sealed

_FORMAT = 1
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_SETTLED_S = 10.0  # longer than the resolution of any file system's times
_logger = logging.getLogger(__name__)


def known_content(info: IndexedInfo, cache: Path) -> TokenContent:
    """Returns hash and range of the ids of PREFIX.bin, from memory if the file has not changed since they were read.

    A remembered file that is damaged, or of other data, is replaced. One that cannot be written costs the next start a reading
    and nothing else. Files of less than 4 MiB are always read.

    Args:
        info: from `check_indexed`.
        cache: folder of what is remembered.

    Raises:
        DataError: PREFIX.bin cannot be read, or changes while it is read.
    """
    if info.bin_bytes <= _BLOCKS * _BLOCK_BYTES:
        return info.content
    path = info.bin_path.resolve()
    memory = cache / f"tokens-{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    try:
        before = _stamp(info)
    except OSError:
        return info.content  # which reports it
    if (known := _remembered(memory, before)) is not None:
        return known
    began = time.time()
    content = info.content
    try:
        changed = max(before["mtime_ns"], before["ctime_ns"]) / 1e9
        if began - changed > _SETTLED_S and _stamp(info) == before:
            make_folder(cache)
            write_sealed(memory, {"format": _FORMAT, "path": str(path), "stamp": before, "tokens": asdict(content)})
    except (OSError, ValueError, StorageError) as error:
        _logger.info("%s: not remembered: %s", path, error)
    return content


def _stamp(info: IndexedInfo) -> dict[str, Any]:
    """What a token file must have in common with one that was read before."""
    digest, last = hashlib.sha256(), info.bin_bytes - _BLOCK_BYTES
    with open(info.bin_path, "rb", buffering=0) as stream:
        found = os.fstat(stream.fileno())
        for number in range(_BLOCKS):
            digest.update(os.pread(stream.fileno(), _BLOCK_BYTES, last * number // (_BLOCKS - 1)))
    return {
        "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino,
        "dtype": info.dtype.name, "idx_sha256": info.idx_sha256, "sample_sha256": digest.hexdigest(),
    }  # fmt: skip


def _remembered(memory: Path, stamp: dict[str, Any]) -> TokenContent | None:
    try:
        found = read_sealed(memory)
        return TokenContent(**found["tokens"]) if (found["format"], found["stamp"]) == (_FORMAT, stamp) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
