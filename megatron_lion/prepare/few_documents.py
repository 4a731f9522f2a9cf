"""Decides whether the documents of a corpus are divided by position, because there are fewer of them than splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from megatron_lion.data.manifest import SourceInfo
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.pieces import ReadCount, ReadOptions, cut_pieces, read_piece
from megatron_lion.prepare.positions import MIN_BYTES, text_size
from megatron_lion.prepare.splits import document_hash

_PIECE_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16


def few_documents(
    files: Sequence[InputFile], sources: Sequence[SourceInfo], read: ReadOptions, wanted: int
) -> int | None:
    """Returns the number of distinct documents if it is below `wanted` and they are divided, or None.

    Reading ends at the `wanted`-th distinct document, so a corpus of many documents costs nothing. Of text files that
    are one document each, only the beginning is read.

    Args:
        files: input files.
        sources: their hashes, in the same order.
        read: how documents are read from files.
        wanted: number of splits.

    Returns:
        The number of distinct documents, or None. None too if no document is long enough, or if a line is bad, so that the
        preparation reports it.
    """
    found: set[tuple[str, int]] = set()
    longest = 0
    for file, source in zip(files, sources, strict=True):
        for identity, size in _documents(file, source, read):
            if identity is None:
                return None
            found.add((identity, size))
            longest = max(longest, size)
            if len(found) >= wanted:
                return None
    return len(found) if longest >= MIN_BYTES else None


def total_text_bytes(files: Sequence[InputFile], read: ReadOptions) -> int:
    """Returns the size of the text of all documents in bytes of UTF-8; bad lines are left out."""
    total = 0
    for file in files:
        if file.format == "txt":
            total += text_size(file)
        else:
            for piece in cut_pieces(file, _PIECE_BYTES, read.json_key):
                total += sum(len(text.encode("utf-8")) for text in read_piece(piece, _lenient(read), ReadCount()))
    return total


def _documents(file: InputFile, source: SourceInfo, read: ReadOptions) -> Iterator[tuple[str | None, int]]:
    """Yields (hash, size in bytes) of each document of a file; the hash is None for a bad line that ends the run."""
    if file.format == "txt" and read.txt_documents == "file":
        with reading(file.path), opened(file) as (stream, _):
            head = stream.read(_HEAD_BYTES)
        if head.strip() or len(head) == _HEAD_BYTES:
            yield source.sha256, text_size(file)
        return
    for piece in cut_pieces(file, _PIECE_BYTES, read.json_key):
        count = ReadCount()
        for text in read_piece(piece, read, count):
            utf8 = text.encode("utf-8")
            yield f"{document_hash(utf8, 0):x}", len(utf8)
        if read.on_error == "stop" and count.problems:
            yield None, 0


def _lenient(read: ReadOptions) -> ReadOptions:
    return dataclasses.replace(read, on_error="skip")
