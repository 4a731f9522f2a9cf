"""Divides one document by position: its beginning goes to train, the next part to valid, its end to test.

A corpus with fewer documents than splits, such as a book in one .txt file, is divided like this. The parts together are
the document, byte for byte.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from megatron_lion.data.manifest import SPLITS
from megatron_lion.errors import DataError
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import opened, reading

MIN_BYTES = 256
"""A shorter document is not divided; it goes to the split with the largest share."""

_MIN_PART_BYTES = 64
_WINDOW_BYTES = 1 << 15
_BLOCK_BYTES = 1 << 20
# Places for a cut, the best kind first. Each match ends at the cut: after line breaks, but before a blank, since a
# byte-level BPE has the blank before a word in the word's token.
_PLACES = (
    re.compile(rb"\n(?:[ \t\r]*\n)+"),
    re.compile(rb"\n"),
    re.compile(rb"[.!?][\"')\]]*(?=[ \t])|\xe3\x80\x82"),
    re.compile(rb"(?=[ \t])"),
)


@dataclass(frozen=True)
class Part:
    """A range of a document's bytes, [start, end), and its split: 0 train, 1 valid, 2 test."""

    start: int
    end: int
    split: int


WHOLE = Part(0, 1 << 62, 0)
"""A document that is not divided."""


def parts_of(size: int, read: Callable[[int, int], bytes], split: tuple[float, float, float]) -> list[Part]:
    """Returns the parts of a document, one for each split with a share above zero, in order.

    Each part has about its share of the bytes, at least 64. Around each ideal position, up to a quarter of the shorter
    neighbour and 32 KiB away, the cut is at the nearest blank line, or else the nearest line break, sentence end, blank
    or character.

    Args:
        size: length of the document in bytes of UTF-8.
        read: returns the bytes of a range; ranges ascend and do not overlap.
        split: shares of train, valid and test in percent.
    """
    wanted = [index for index in range(3) if split[index] > 0]
    largest = max(wanted, key=lambda index: split[index])
    if size < MIN_BYTES:
        return [Part(0, size, largest)]
    lengths = {index: max(round(split[index] / 100 * size), _MIN_PART_BYTES) for index in wanted}
    lengths[largest] = size - sum(length for index, length in lengths.items() if index != largest)
    parts: list[Part] = []
    start = ideal = 0
    for index, following in itertools.pairwise(wanted):
        ideal += lengths[index]
        reach = min(_WINDOW_BYTES, lengths[index] // 4, lengths[following] // 4)
        end = ideal - reach + _nearest_cut(read(ideal - reach, ideal + reach), reach)
        parts.append(Part(start, end, index))
        start = end
    return [*parts, Part(start, size, wanted[-1])]


def _nearest_cut(window: bytes, middle: int) -> int:
    """Returns the position of the best cut in a window; it is never 0 and never at the window's end."""
    for place in _PLACES:
        cuts = [match.end() for match in place.finditer(window) if 0 < match.end() < len(window)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - middle))
    while window[middle] & 0xC0 == 0x80 and middle < len(window) - 1:  # inside a character
        middle += 1
    return middle


def divide_text(text: str, split: tuple[float, float, float]) -> list[tuple[str, int]]:
    """Returns the parts of a text with their splits, as `parts_of`.

    >>> text = "".join(f"Line {i} of some text.\\n" for i in range(100))
    >>> [(part[:7], index) for part, index in divide_text(text, (80.0, 10.0, 10.0))]
    [('Line 0 ', 0), ('Line 80', 1), ('Line 90', 2)]
    """
    utf8 = text.encode("utf-8")
    parts = parts_of(len(utf8), lambda start, end: utf8[start:end], split)
    return [(utf8[part.start : part.end].decode("utf-8"), part.split) for part in parts]


def parts_of_file(file: InputFile, split: tuple[float, float, float]) -> list[Part]:
    """Returns the parts of a text file that is one document, as `parts_of`; one window of it is in memory at a time.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    size = text_size(file)
    with reading(file.path), opened(file) as (stream, _):
        place = 0

        def read(start: int, end: int) -> bytes:
            nonlocal place
            while place < start and (skipped := len(stream.read(min(_BLOCK_BYTES, start - place)))):
                place += skipped
            window = stream.read(end - start)
            place += len(window)
            if place < end:
                raise DataError(f"{file.path}: changed while it was read; run the same command again")
            return window

        return parts_of(size, read, split)


def text_size(file: InputFile) -> int:
    """Returns the decompressed size of a text file in bytes.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    if not file.compression:
        return file.bytes
    with reading(file.path), opened(file) as (stream, _):
        return sum(map(len, iter(lambda: stream.read(_BLOCK_BYTES), b"")))


class PartStream:
    """Reads the next `size` bytes of a stream as a stream that ends there."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int, /) -> bytes:
        """Returns up to `size` bytes, or none at the end of the part."""
        block = self._stream.read(min(size, self._left))
        self._left -= len(block)
        return block


def shares_text(split: tuple[float, float, float]) -> str:
    """Returns the shares as text.

    >>> shares_text((90.0, 5.0, 5.0)), shares_text((90.0, 10.0, 0.0))
    ('90 % train, 5 % valid, 5 % test', '90 % train, 10 % valid')
    """
    return ", ".join(f"{share:g} % {name}" for name, share in zip(SPLITS, split, strict=True) if share > 0)
