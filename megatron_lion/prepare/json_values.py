"""Converts JSON that is not JSON lines, such as an array over many lines, to lines of one value each."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_lion.errors import DataError
from megatron_lion.prepare.lines import BOM

HEAD_BYTES = 1 << 16
"""Number of bytes at the beginning of a file that `holds_values` needs."""
_BLOCK_BYTES = 1 << 22
_MAX_VALUE_CHARACTERS = 1 << 29
_DECODER = json.JSONDecoder(parse_int=float)  # Python refuses an int of over 4,300 digits
_BLANK = re.compile(r"[ \t\r\n]*")


def holds_values(head: bytes) -> bool:
    """Whether a file is an array of objects, or objects over several lines, and not JSON lines.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of it.

    >>> holds_values(b'[{"text": "a"},'), holds_values(b'{\\n  "text": "a"\\n}\\n'), holds_values(b'{"text": "a"}\\n')
    (True, True, False)
    >>> holds_values(b'[1, 2]\\n')
    False
    """
    text = head.removeprefix(BOM).decode("utf-8", errors="replace").lstrip(" \t\r\n")
    if text.startswith("["):
        return text[1:].lstrip(" \t\r\n")[:1] in ("{", "]", "")
    line, end, _ = text.partition("\n")
    if not text.startswith("{") or not end:
        return False
    try:
        _DECODER.decode(line)
    except (ValueError, RecursionError):
        # The first line is no complete value: either it is a bad line, or its value continues beyond the line.
        try:
            _, length = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return line.strip() == "{" and len(head) >= HEAD_BYTES
        return length > len(line)
    return False


def value_lines(path: str | Path, stream: IO[bytes], piece_bytes: int) -> Iterator[bytes]:
    """Yields the values of an array, or of a sequence of values, as JSON lines, in blocks of about `piece_bytes`.

    A line contains the value as in the file, with blanks in place of line breaks, which JSON strings cannot contain.

    Args:
        path: the file, or a name of it, for messages.
        stream: its decompressed bytes, at the beginning.
        piece_bytes: approximate size of a block.

    Raises:
        DataError: a value is not JSON, not UTF-8 or too long; nothing after it can be read.
    """
    lines: list[str] = []
    size = 0
    for value in _values(path, stream):
        lines.append(value.replace("\n", " ").replace("\r", " ") + "\n")
        size += len(lines[-1])
        if size >= piece_bytes:
            yield "".join(lines).encode()
            lines, size = [], 0
    if lines:
        yield "".join(lines).encode()


class _Text:
    """The text of a stream, one part of which is in memory."""

    def __init__(self, path: str | Path, stream: IO[bytes]) -> None:
        self.path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.held, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Reads one more block; returns False at the end of the stream."""
        if self.ended:
            return False
        block = self._stream.read(_BLOCK_BYTES)
        self.ended = not block
        try:
            self.held, self.at = self.held[self.at :] + self._decoder.decode(block, final=self.ended), 0
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 ({error.reason}); convert it to UTF-8") from None
        if len(self.held) > _MAX_VALUE_CHARACTERS:
            raise DataError(
                f"{self.path}: a value has more than {_MAX_VALUE_CHARACTERS:,} characters; JSON lines are needed"
            )
        return True

    def next(self) -> str:
        """Returns the next character that is not blank, without consuming it, or "" at the end."""
        while True:
            blank = _BLANK.match(self.held, self.at)
            assert blank is not None, "the pattern matches an empty text too"
            self.at = blank.end()
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""

    def value(self, number: int) -> str:
        """Consumes one value, the file's `number`-th, and returns its text."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.held, self.at)
            except RecursionError:
                raise DataError(f"{self.path}: value {number} is nested too deeply; fix the file") from None
            except json.JSONDecodeError as error:
                # If the block cuts a value, the error is at the block's end; for a string, at the string's start.
                cut = error.pos > len(self.held) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and self.more()):
                    raise DataError(f"{self.path}: value {number} is not JSON: {error.msg}; fix the file") from None
                continue
            if end == len(self.held) and self.held[self.at] not in '{["' and self.more():
                continue  # a number may continue in the next block
            found, self.at = self.held[self.at : end], end
            return found


def _values(path: str | Path, stream: IO[bytes]) -> Iterator[str]:
    """Yields the values of an array, or of a file that is a sequence of values."""
    text, number = _Text(path, stream), 0
    in_array = text.next() == "["
    text.at += in_array
    if in_array and text.next() == "]":
        text.at += 1
        closed = True
    else:
        closed = not in_array
        while text.next():
            number += 1
            yield text.value(number)
            if not in_array:
                continue
            after = text.next()
            if after not in (",", "]") or not after:
                found = repr(after) if after else "the end of the file"
                raise DataError(f"{path}: value {number} of the array is followed by {found}; fix the file")
            text.at += 1
            if after == "]":
                closed = True
                break
    if not closed:
        raise DataError(f"{path}: ends within its array; copy the file again")
    if in_array and text.next():
        raise DataError(f"{path}: continues after its array; JSON lines with one object each, or one array, are needed")
