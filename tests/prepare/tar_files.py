"""Archives for tests: written by Python's `tarfile`, or header by header if `tarfile` refuses to write them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_lion.prepare.find_files import input_file
from megatron_lion.prepare.pieces import ReadCount, ReadOptions, cut_pieces, read_piece

SKIP = ReadOptions(on_error="skip")
CUTTINGS = ("a worker reads it", "members in workers", "parts of members")
"""Ways in which an archive reaches the workers."""

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member; `fields` are set in its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(
    entries: Iterable[tuple[tarfile.TarInfo, bytes] | tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> bytes:
    """The bytes of an archive of entries, or of (name, content) pairs."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format) as archive:
        for name, data in entries:
            info = name if isinstance(name, tarfile.TarInfo) else entry(name, data)[0]
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def openwebtext(texts: list[str], per_inner: int, inner: str = ".xz") -> bytes:
    """The tar of OpenWebText: a folder of compressed tars, with one text file for each document."""
    parts = []
    for start in range(0, len(texts), per_inner):
        files = [
            (f"{i:07d}-{hash_of(text)}.txt", text.encode()) for i, text in enumerate(texts[start : start + per_inner])
        ]
        name = f"openwebtext/urlsf_subset00-{start // per_inner}_data{inner}"
        parts.append((name, COMPRESS[inner](tar(files))))
    return tar([entry("openwebtext", type=tarfile.DIRTYPE), *parts])


def hash_of(text: str) -> str:
    """A short name for a text, as in OpenWebText's file names."""
    return f"{sum(text.encode()) * 2654435761 % 2**64:016x}"


def with_field(archive: bytes, start: int, value: bytes) -> bytes:
    """The archive with other bytes in its first header, and that header's checksum made right."""
    header = bytearray(archive[:512])
    header[start : start + len(value)] = value
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[512:]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(path: Path, options: ReadOptions = SKIP, piece_bytes: int = 1 << 18) -> tuple[list[str], ReadCount]:
    """The documents of a file, cut into pieces, and the counts; the pieces' stored bytes must be the file's."""
    count, documents, stored = ReadCount(), [], 0
    for number, piece in enumerate(cut_pieces(input_file(path), piece_bytes)):
        part = ReadCount()
        documents += list(read_piece(piece, options, part))
        assert piece.number == number
        stored += piece.stored_bytes
        count.problems += part.problems
        count.lines += part.lines
        for kind, found in part.rejected.items():
            count.rejected[kind] = count.rejected.get(kind, 0) + found
        for kind, found in part.skipped.items():
            count.skipped[kind] = count.skipped.get(kind, 0) + found
    assert stored == (path.stat().st_size if count.lines or documents else stored)
    return documents, count
