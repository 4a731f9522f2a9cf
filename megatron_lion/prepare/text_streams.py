"""Reads documents from streams: JSON lines, a text that is one document, and a text whose blank lines divide documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from megatron_lion.errors import DataError
from megatron_lion.prepare.lines import BOM, BadLine, Skip, checked_text, decode_utf8, text_of_line

_BLOCK_BYTES = 1 << 16
Found = str | Skip | BadLine
Candidate = tuple[int, Found]
"""Number of a line, row or value, from 1, with its text or why there is none."""


def line_blocks(
    stream: IO[bytes], block_bytes: int, max_line_bytes: int, where: str | Path
) -> Iterator[tuple[bytes, bool]]:
    """Yields (whole lines of about `block_bytes` together, whether these are the last ones).

    Args:
        stream: the decompressed bytes.
        block_bytes: number of bytes that are read at once.
        max_line_bytes: limit for a line.
        where: what is read, for messages.

    Raises:
        DataError: a line is too long.
    """
    start = held = 0
    begun: list[bytes] = []  # parts of a line that has not ended, `held` bytes; joined once, since a line may be long
    while True:
        block = stream.read(block_bytes)
        # Whole lines only; the rest of the last line begins the next block.
        cut = block.rfind(b"\n") + 1
        if cut or not block:
            data = b"".join([*begun, block[:cut]])
            if data:
                yield data, not block
                start += len(data)
            begun, held = [], 0
        if not block:
            return
        begun.append(block[cut:])
        held += len(begun[-1])
        if held > max_line_bytes:
            raise too_long_line(where, start, max_line_bytes)


def too_long_line(where: str | Path, offset: int, max_line_bytes: int) -> DataError:
    """Returns the error for a line that is too long, which begins at byte `offset`."""
    return DataError(
        f"{where}: the line that begins at byte {offset} is longer than {max_line_bytes >> 20} MiB; "
        "JSON lines with one document on each line are needed"
    )


def json_texts(lines: Iterable[bytes], key: str) -> Iterator[Candidate]:
    """Yields what each JSON line gives.

    Args:
        lines: the lines.
        key: as for `text_of_line`.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield number, text_of_line(line, key)
        except (BadLine, Skip) as reason:
            yield number, reason


def whole_text(stream: IO[bytes], max_bytes: int, where: str | Path) -> Found:
    """Returns what a text gives that is one document.

    Raises:
        DataError: the text is too long.
    """
    blocks: list[bytes] = []
    size = 0
    while block := stream.read(_BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            raise DataError(
                f"{where}: is longer than {max_bytes >> 20} MiB and would be one document; give --txt-documents blank-line"
            )
    return _found(b"".join(blocks).removeprefix(BOM), "the file")


def paragraphs(stream: IO[bytes], max_bytes: int, where: str | Path) -> Iterator[Candidate]:
    """Yields (number of its first line, what it gives) for each paragraph of a text.

    Raises:
        DataError: a paragraph is too long.
    """
    paragraph: list[bytes] = []
    begin = number = size = 0
    for number, line in enumerate(iter(lambda: stream.readline(max_bytes + 1), b""), start=1):
        size = len(line) + (size if paragraph else 0)
        if size > max_bytes:
            raise DataError(
                f"{where}:{begin if paragraph else number}: the paragraph that begins here is longer than "
                f"{max_bytes >> 20} MiB; blank lines must divide the documents"
            )
        content = line.removeprefix(BOM) if number == 1 else line
        if content.strip():
            begin = begin if paragraph else number
            paragraph.append(content)
        elif paragraph:
            yield begin, _paragraph(paragraph)
            paragraph = []
    if paragraph:
        yield begin, _paragraph(paragraph)


def _paragraph(lines: list[bytes]) -> Found:
    return _found(b"".join(lines).rstrip(b"\r\n"), "the paragraph")


def _found(data: bytes, what: str) -> Found:
    try:
        return checked_text(decode_utf8(data), what)
    except (BadLine, Skip) as reason:
        return reason
