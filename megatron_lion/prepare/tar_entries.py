"""Reads the entries of a tar archive from a stream, one after another, without a file on the disk.

The formats are v7, ustar, GNU's and pax (POSIX.1-2001). Python's `tarfile` ends without an error at a damaged header or
at the end of a file that was cut short; here both are errors, because documents would be missing.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_lion.plain_text import plain
from megatron_lion.prepare.decompression import Readable

_BLOCK = 512
_MAX_EXTRA_BYTES = 1 << 20
"""Limit for a pax header and for a long name, which are held in memory."""
_SKIPPED_BYTES = 1 << 20

EntryKind = Literal["file", "folder", "link", "special_file", "sparse_file"]
# Types of headers. Entries of the types in _NO_DATA have no data, whatever size their header has.
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = (b"x", b"X"), b"g", b"L", b"K"
_KINDS: dict[bytes, EntryKind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "link", b"2": "link", b"3": "special_file", b"4": "special_file",
    b"5": "folder", b"6": "special_file", b"S": "sparse_file", b"D": "folder", b"V": "folder",
}  # fmt: skip
_NO_DATA = b"123456"


class Body(io.RawIOBase):
    """The data of an entry."""

    def __init__(self, stream: Readable, size: int, owner: str) -> None:
        self._stream, self._owner = stream, owner
        self.left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        wanted = self.left if size < 0 else min(size, self.left)
        data = self._stream.read(wanted)
        self.left -= len(data)
        if len(data) < wanted:
            raise EOFError(f"the archive ends {self.left:,} bytes before the end of {self._owner}")
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class Entry:
    """An entry of an archive.

    Attributes:
        name: its name; bytes that are not UTF-8 are half surrogates.
        kind: what it is.
        size: size of its data in bytes.
        body: its data, which can be read until the next entry is requested.
    """

    name: str
    kind: EntryKind
    size: int
    body: Body


@dataclass
class _Extras:
    """What headers before an entry say about it: pax records, and GNU's long name."""

    records: dict[str, bytes]
    name: bytes | None = None


def tar_entries(stream: Readable) -> Iterator[Entry]:
    """Yields the entries of an archive, in order. At the end, the stream has been read to its end.

    Args:
        stream: the archive, decompressed; `read(n)` returns fewer than n bytes only at the end.

    Raises:
        EOFError: the archive is cut short, so that an entry or the mark at its end is missing.
        ValueError: a header is damaged, or something follows the mark at the end.
    """
    shared: dict[str, bytes] = {}
    extras: _Extras | None = None
    last = "at its beginning"
    while True:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            what = "within a header" if block else "without the mark at its end"
            raise EOFError(f"the archive ends {what} {last}")
        if not block.strip(b"\0"):
            break
        kind, size = _header(block, last)
        if kind in _PAX or kind in (_PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            if size > _MAX_EXTRA_BYTES:
                raise ValueError(f"a header {last} has {size:,} bytes; the limit is {_MAX_EXTRA_BYTES:,}")
            data = _padded(stream, size)
            if kind == _PAX_GLOBAL:
                shared |= _pax_records(data, last)
                continue
            extras = extras or _Extras({})
            if kind in _PAX:
                extras.records |= _pax_records(data, last)
            elif kind == _LONG_NAME:
                extras.name = data
            continue
        entry = _entry(
            stream, block, (kind, size), _Extras(shared | extras.records, extras.name) if extras else _Extras(shared)
        )
        extras = None
        last = f"after member {shown(entry.name)}"
        yield entry
        while entry.body.left:
            entry.body.read(_SKIPPED_BYTES)
        _skip_padding(stream, entry.size)
    if extras is not None:
        raise EOFError(f"the archive ends after a header that belongs to a further entry, {last}")
    while data := stream.read(_SKIPPED_BYTES):
        if data.strip(b"\0"):
            raise ValueError("it continues after the mark at its end, as archives do that were joined without tar -A")


def shown(name: str) -> str:
    """Returns a name for a message: without control characters, and at most 200 characters of it."""
    text = plain(name)
    return text if len(text) <= 200 else text[:100] + "…" + text[-99:]


def _header(block: bytes, last: str) -> tuple[bytes, int]:
    """Returns (type, size) of a header whose checksum is right."""
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"the header {last} is damaged ({error})") from None
    if size < 0:
        raise ValueError(f"the header {last} has the size {size:,}")
    return block[156:157], size


def _entry(stream: Readable, block: bytes, header: tuple[bytes, int], extras: _Extras) -> Entry:
    type_, size = header
    records = extras.records
    name = records.get("GNU.sparse.name") or records.get("path") or extras.name or _short_name(block)
    kind = _KINDS.get(type_, "special_file")
    if "size" in records:
        try:
            size = int(records["size"])
        except ValueError:
            size = -1
        if size < 0:
            raise ValueError(f"the pax header of {shown(_decode(name))} has the size {_decode(records['size'][:30])!r}")
    if kind == "file" and name.endswith(b"/"):  # of v7, which has no type for folders
        if size:
            raise ValueError(f"the folder {shown(_decode(name))} has {size:,} bytes of data")
        kind = "folder"
    if any(key.startswith("GNU.sparse.") for key in records):
        kind = "sparse_file"
    if type_ == b"S":
        more = block[482]
        while more:  # further headers with the map of a sparse file
            following = stream.read(_BLOCK)
            if len(following) < _BLOCK:
                raise EOFError(f"the archive ends within the header of {shown(_decode(name))}")
            more = following[504]
    if type_ in _NO_DATA:
        size = 0
    return Entry(_decode(name), kind, size, Body(stream, size, f"member {shown(_decode(name))}"))


def _short_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""  # GNU's format has times there
    return prefix + b"/" + name if prefix else name


def _pax_records(data: bytes, last: str) -> dict[str, bytes]:
    """Returns the records of a pax header: each is "LENGTH KEY=VALUE\\n", of LENGTH bytes in all."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        digits, blank, _ = data[at : at + 20].partition(b" ")
        end = at + int(digits) if blank and digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError(f"the pax header {last} is damaged")
        records[_decode(key)] = value[:-1]
        at = end
    return records


def _padded(stream: Readable, size: int) -> bytes:
    """Returns the data of a header, and skips the padding after them."""
    data = Body(stream, size, "a header").read()
    _skip_padding(stream, size)
    return data.rstrip(b"\0")


def _skip_padding(stream: Readable, size: int) -> None:
    padding = -size % _BLOCK
    if len(stream.read(padding)) < padding:
        raise EOFError("the archive ends within the last block of a member")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", errors="surrogateescape")
