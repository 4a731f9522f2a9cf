"""Reads the documents of tar archives, also inside one another, as OpenWebText is published.

The process that cuts an archive reads it once, from its beginning, and passes its members on as they are stored, so that
the workers decompress the inner archives. Nothing is written to the disk. A member that is large is read here and passed
on in parts: the lines of JSON, or the members of an inner archive.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_lion.errors import DataError
from megatron_lion.prepare.decompression import decompressed
from megatron_lion.prepare.find_files import (
    COMPRESSIONS,
    HIDDEN,
    OF_DATASETS,
    TABLES,
    InputFile,
    ending_of,
    is_tar,
    kind_of,
)
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.json_values import HEAD_BYTES, holds_values, value_lines
from megatron_lion.prepare.lines import BOM, BadLine, Skip
from megatron_lion.prepare.tar_entries import Entry, shown, tar_entries
from megatron_lion.prepare.text_streams import Found, json_texts, line_blocks, paragraphs, whole_text

MAX_DEPTH = 4
"""Number of archives inside one another, the input file included."""
MAX_DOCUMENT_BYTES = 1 << 29
WHOLE_BYTES = 1 << 22
"""A member, or an input file, up to this size as stored (or that of a piece) is read by one worker."""
_BLOCK_BYTES = 1 << 16
_MEMBER_BYTES = 256  # of memory, for a member without data too
_USUAL_RATIO = 4  # of compressed English text
_UNKNOWN, _COUNTED = "unknown", "counted"
_LINES, _VALUES, _VALUE_LINES = "lines", "values", "value lines"
_NOT_READ = "member not read ({})"
_BAD = {
    "link": "is a link, which is not followed",
    "special_file": "is no file, but a device, a pipe or something unknown",
    "sparse_file": "is stored with its holes left out, which is not read; archive it again without --sparse",
    "unsafe_name": "has a name that leads out of the archive",
    "too_deep": f"is more than {MAX_DEPTH} archives deep",
}


@dataclass(frozen=True)
class Member:
    """A member of an archive, or a part of one, that a worker reads.

    Attributes:
        names: names of the archives inside the file that contain it, the outermost first, and its own.
        format: "jsonl", "txt", "tar"; "lines" for a part of JSON lines; "value lines" for a part of other JSON, with one value
            on each line; "unknown" for compressed data whose content decides; "counted" for a member that is not read.
        compression: as in `InputFile`, of `data`.
        data: its stored bytes, or lines of it.
        before: number of its lines or values before `data`.
        reason: (kind, description) of a counted member; the description is empty if it is no error.
    """

    names: tuple[str, ...]
    format: str
    compression: str = ""
    data: bytes = b""
    before: int = 0
    reason: tuple[str, str] = ("", "")


def is_one_piece(file: InputFile, piece_bytes: int) -> bool:
    """Whether one worker reads a whole archive, because it is small."""
    return file.bytes <= max(WHOLE_BYTES, piece_bytes)


def cut_archive(file: InputFile, piece_bytes: int) -> Iterator[tuple[tuple[Member, ...], int]]:
    """Yields (members of a piece, its share of the stored bytes) in the order of the archive.

    Args:
        file: an archive.
        piece_bytes: approximate size of a piece in bytes of text.

    Raises:
        DataError: the archive is damaged or cut short, or a document in it is too long.
    """
    held: list[Member] = []
    size = counted = 0
    with opened(file) as (stream, stored):
        for member in _Cutter(file.path, piece_bytes).members((), stream):
            if size >= piece_bytes:
                yield tuple(held), stored.tell() - counted
                held, size, counted = [], 0, stored.tell()
            held.append(member)
            size += _MEMBER_BYTES + len(member.data) * (_USUAL_RATIO if member.compression else 1)
    if held:
        yield tuple(held), file.bytes - counted


class _Cutter:
    """Passes the members of an archive on."""

    def __init__(self, path: Path, piece_bytes: int) -> None:
        self._path, self._piece_bytes = path, piece_bytes

    def members(self, names: tuple[str, ...], stream: IO[bytes]) -> Iterator[Member]:
        for entry in tar_entries(stream):
            inner = (*names, shown(entry.name))
            format, compression, reason = _classify(entry, len(inner))
            if format == _COUNTED:
                yield Member(inner, format, reason=reason)
            elif format == "txt" or (format and entry.size <= max(WHOLE_BYTES, self._piece_bytes)):
                _check_size(format, entry, _where(self._path, inner))
                yield Member(inner, format, compression, entry.body.read())
            elif format:
                yield from self._parts(inner, format, compression, entry)

    def _parts(self, names: tuple[str, ...], format: str, compression: str, entry: Entry) -> Iterator[Member]:
        where = _where(self._path, names)
        with reading(where):
            format, stream = _opened(format, compression, entry.body, where)
            if format == "tar":
                yield from self.members(names, stream)
                return
            if format == _COUNTED:
                yield Member(names, _COUNTED, reason=_unread(names[-1]))
                return
            before = 0
            if format == _VALUES:
                format, blocks = _VALUE_LINES, value_lines(where, stream, self._piece_bytes)
            else:
                blocks = (block for block, _ in line_blocks(stream, self._piece_bytes, MAX_DOCUMENT_BYTES, where))
            for block in blocks:
                yield Member(names, format, "", block, before)
                before += block.count(b"\n")


def archive_texts(file: InputFile, members: tuple[Member, ...] | None, key: str, by_paragraph: bool) -> Iterator[Found]:
    """Yields what each line or member of an archive gives; of a bad one, the description names the member.

    Args:
        file: the archive.
        members: those to read; None for all.
        key: as for `text_of_line`.
        by_paragraph: whether blank lines divide text files.

    Raises:
        DataError: the archive or a member is damaged or cut short, or a document is too long.
    """
    reader = _Reader(file.path, key, by_paragraph)
    if members is None:
        with reading(file.path), opened(file) as (stream, _):
            yield from reader.archive((), stream)
        return
    for member in members:
        if member.format == _COUNTED:
            yield _counted(member.names, member.reason)
        else:
            yield from reader.texts(
                member.names, member.format, member.compression, io.BytesIO(member.data), member.before
            )


class _Reader:
    """Reads documents from members."""

    def __init__(self, path: Path, key: str, by_paragraph: bool) -> None:
        self._path, self._key, self._by_paragraph = path, key, by_paragraph

    def archive(self, names: tuple[str, ...], stream: IO[bytes]) -> Iterator[Found]:
        for entry in tar_entries(stream):
            inner = (*names, shown(entry.name))
            format, compression, reason = _classify(entry, len(inner))
            if format == _COUNTED:
                yield _counted(inner, reason)
            elif format:
                _check_size(format, entry, _where(self._path, inner))
                yield from self.texts(inner, format, compression, entry.body)

    def texts(
        self, names: tuple[str, ...], format: str, compression: str, stored: Any, before: int = 0
    ) -> Iterator[Found]:
        where = _where(self._path, names)
        with reading(where):
            format, stream = _opened(format, compression, stored, where)
            if format == "tar":
                yield from self.archive(names, stream)
            elif format == _COUNTED:
                yield _counted(names, _unread(names[-1]))
            elif format == "txt" and not self._by_paragraph:
                yield _named(names, "", whole_text(stream, MAX_DOCUMENT_BYTES, where))
            elif format == "txt":
                for line, found in paragraphs(stream, MAX_DOCUMENT_BYTES, where):
                    yield _named(names, f":{line}", found)
            elif format == _LINES:
                for number, found in json_texts(_lines(stream, where, first=before == 0), self._key):
                    yield _named(names, f":{before + number}", found)
            else:
                if format == _VALUES:
                    blocks = value_lines(where, stream, _BLOCK_BYTES)
                    lines: Iterator[bytes] = (
                        line for block in blocks for line in block.removesuffix(b"\n").split(b"\n")
                    )
                else:
                    lines = _lines(stream, where, first=False)
                for number, found in json_texts(lines, self._key):
                    yield _named(names, f": value {before + number}", found)


def _classify(entry: Entry, depth: int) -> tuple[str, str, tuple[str, str]]:
    """Returns (format, compression, reason) as in `Member`; the format of a folder is empty."""
    parts = entry.name.split("/")
    path = Path(parts[-1])
    if entry.kind == "folder":
        return "", "", ("", "")
    if entry.kind != "file":
        return _bad(entry.kind)
    if entry.name.startswith("/") or ".." in parts:
        return _bad("unsafe_name")
    if any(part.startswith(".") and part != "." for part in parts):
        return _COUNTED, "", (_NOT_READ.format(HIDDEN), "")
    if path.name in OF_DATASETS:
        return _COUNTED, "", (_NOT_READ.format(path.name), "")
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    kind = kind_of(path)
    if kind is None and compression and kind_of(Path(path.stem)) is None:
        kind = _UNKNOWN, compression
    if kind is None or kind[0] in TABLES:
        return _COUNTED, "", _unread(entry.name)
    if kind[0] in ("tar", _UNKNOWN) and depth >= MAX_DEPTH:
        return _bad("too_deep")
    return *kind, ("", "")


def _bad(kind: str) -> tuple[str, str, tuple[str, str]]:
    return _COUNTED, "", (kind, _BAD[kind])


def _unread(name: str) -> tuple[str, str]:
    return _NOT_READ.format(ending_of(Path(name.rpartition("/")[2]))), ""


def _check_size(format: str, entry: Entry, where: str) -> None:
    if format == "txt" and entry.size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{where}: has {entry.size:,} bytes; a text file inside an archive may have {MAX_DOCUMENT_BYTES >> 20} MiB; unpack it, "
            "and give it beside the archive"
        )


def _opened(format: str, compression: str, stored: Any, where: str) -> tuple[str, IO[bytes]]:
    """Returns (what the content is, its decompressed stream): "jsonl" becomes "lines" or "values"."""
    if format in (_LINES, _VALUE_LINES):
        return format, stored
    stream = decompressed(compression, stored, where)
    head = b""
    if format == "jsonl":
        head = stream.read(HEAD_BYTES)
        format = _VALUES if holds_values(head) else _LINES
    elif format == _UNKNOWN:
        head = stream.read(512)
        format = "tar" if is_tar(head) else _COUNTED
    return format, io.BufferedReader(_Joined(head, stream), _BLOCK_BYTES)


class _Joined(io.RawIOBase):
    """The first bytes of a stream, which were read from it, and the rest."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._head[: len(view)] or self._stream.read(len(view))
        self._head = self._head[len(data) :]
        view[: len(data)] = data
        return len(data)


def _lines(stream: IO[bytes], where: str, first: bool) -> Iterator[bytes]:
    """Yields the lines of a stream; of the first line of a member, a byte-order mark is dropped."""
    for block, _ in line_blocks(stream, _BLOCK_BYTES, MAX_DOCUMENT_BYTES, where):
        lines = (block.removeprefix(BOM) if first else block).removesuffix(b"\n")
        first = False
        yield from lines.split(b"\n")


def _where(path: Path, names: tuple[str, ...]) -> str:
    return ": ".join([str(path), *(f"member {name}" for name in names)])


def _counted(names: tuple[str, ...], reason: tuple[str, str]) -> Found:
    kind, what = reason
    return _named(names, "", BadLine(kind, what)) if what else Skip(kind)


def _named(names: tuple[str, ...], place: str, found: Found) -> Found:
    """Adds the member's name to the description of a bad line."""
    if not isinstance(found, BadLine):
        return found
    return BadLine(found.kind, ": ".join(f"member {name}" for name in names) + f"{place}: {found.what}")
