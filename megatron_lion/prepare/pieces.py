"""Cuts input files into pieces of work and reads the documents of a piece.

Pieces depend on the content and size of the files, not on the number of workers, so the result does not either. Lines
end at LF only: a carriage return, U+2028 or U+0085 inside a text is no line end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from megatron_lion.errors import DataError
from megatron_lion.prepare.archives import Member, archive_texts, cut_archive, is_one_piece
from megatron_lion.prepare.find_files import TABLES, InputFile, find_inputs
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.json_values import HEAD_BYTES, holds_values, value_lines
from megatron_lion.prepare.lines import BOM, BadLine, Skip, checked_text, decode_utf8
from megatron_lion.prepare.tables import cut_table, table_texts
from megatron_lion.prepare.text_streams import Candidate, json_texts, line_blocks, paragraphs, too_long_line, whole_text

MAX_LINE_BYTES = 1 << 29
KEPT_PROBLEMS = 5
OnError = Literal["stop", "skip"]
TxtDocuments = Literal["file", "blank-line"]


@dataclass(frozen=True)
class Piece:
    """A part of an input file that one worker encodes.

    Attributes:
        file: input file of the piece.
        number: number of the piece in the file, from 0.
        start, end: range of (decompressed) bytes in which the piece's lines begin; of row groups for Parquet, of record
            batches for Arrow.
        data: the piece's lines if the file can only be read from its beginning, such as a compressed one, or its rows if they
            are a part of a row group (see `tables`); else None.
        stored_bytes: size of the piece in the stored file, for progress.
        unit: what line numbers count: "line", "row" of a table, "value" of JSON that is not JSON lines, or "member": the
            lines and members of an archive, whose descriptions name them.
        members: of an archive, the members of the piece; None if the piece is the whole archive.
    """

    file: InputFile
    number: int
    start: int
    end: int
    data: bytes | None
    stored_bytes: int
    unit: Literal["line", "row", "value", "member"] = "line"
    members: tuple[Member, ...] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """Settings for reading documents from files.

    Attributes:
        json_key: key (JSON) or column (Parquet, Arrow) of the text; `a.b` is the key b inside a.
        txt_documents: "file" if a text file is one document, "blank-line" if blank lines divide it.
        on_error: "stop" ends the reading at the first bad line, "skip" skips and counts bad lines.
    """

    json_key: str = "text"
    txt_documents: TxtDocuments = "file"
    on_error: OnError = "stop"


@dataclass
class ReadCount:
    """Counts of lines while reading.

    Attributes:
        lines: number of lines, rows or values read.
        skipped: number of lines skipped without an error, by kind.
        rejected: number of bad lines, by kind.
        problems: (line in the piece from 1, kind, description) of the first few bad lines.
    """

    lines: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[int, str, str]] = field(default_factory=list)

    def skip(self, kind: str) -> None:
        """Counts a line that is skipped without an error."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1

    def reject(self, line: int, bad: BadLine) -> None:
        """Counts a bad line and keeps the first few for messages."""
        self.rejected[bad.kind] = self.rejected.get(bad.kind, 0) + 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append((line, bad.kind, bad.what))


def cut_pieces(file: InputFile, piece_bytes: int, key: str = "text") -> Iterator[Piece]:
    """Yields the pieces of one file, in order.

    Plain JSON lines are cut at byte offsets and read by the workers. Compressed ones are decompressed here, once, and
    passed on as bytes. A text file is one piece. Parquet is cut at its row groups, and inside large ones; Arrow at its
    record batches. JSON that is an array, or objects over several lines, is passed on as one line for each value. An
    archive is cut between its members.

    Args:
        file: input file.
        piece_bytes: approximate size of a piece in bytes of text.
        key: key or column of the text.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    with reading(file.path):
        if file.format in TABLES:
            for number, (start, end, stored, rows) in enumerate(cut_table(file, piece_bytes, key)):
                yield Piece(file, number, start, end, rows, stored, "row")
        elif file.format == "tar":
            yield from _cut_archive(file, piece_bytes)
        elif file.format == "txt":
            yield Piece(file, 0, 0, file.bytes, None, file.bytes)
        elif _holds_values(file):
            yield from _cut_values(file, piece_bytes)
        elif not file.compression:
            for number, start in enumerate(range(0, file.bytes, piece_bytes)):
                end = min(start + piece_bytes, file.bytes)
                yield Piece(file, number, start, end, None, end - start)
        else:
            yield from _cut_stream(file, piece_bytes)


def _holds_values(file: InputFile) -> bool:
    with opened(file) as (stream, _):
        return holds_values(stream.read(HEAD_BYTES))


def _cut_values(file: InputFile, piece_bytes: int) -> Iterator[Piece]:
    start = counted = 0
    with opened(file) as (stream, stored):
        for number, data in enumerate(value_lines(file.path, stream, piece_bytes)):
            read = stored.tell()
            yield Piece(file, number, start, start + len(data), data, read - counted, "value")
            start, counted = start + len(data), read


def _cut_stream(file: InputFile, piece_bytes: int) -> Iterator[Piece]:
    start = counted = 0
    with opened(file) as (stream, stored):
        for number, (data, last) in enumerate(line_blocks(stream, piece_bytes, MAX_LINE_BYTES, file.path)):
            read = file.bytes if last else stored.tell()
            yield Piece(file, number, start, start + len(data), data, read - counted)
            start, counted = start + len(data), read


def _cut_archive(file: InputFile, piece_bytes: int) -> Iterator[Piece]:
    if is_one_piece(file, piece_bytes):
        yield Piece(file, 0, 0, 0, None, file.bytes, "member")
        return
    start = 0
    for number, (members, stored) in enumerate(cut_archive(file, piece_bytes)):
        yield Piece(file, number, start, start + len(members), None, stored, "member", members)
        start += len(members)


def read_piece(piece: Piece, options: ReadOptions, count: ReadCount) -> Iterator[str]:
    """Yields the documents of a piece, in order.

    With `options.on_error` "stop", the first bad line ends the piece and is recorded in `count.problems`.

    Args:
        piece: from `cut_pieces`.
        options: settings for reading.
        count: counts of lines; updated while reading.

    Raises:
        DataError: the file is damaged, has a line of more than 512 MiB or, in a table, no string column of that name.
        EnvironmentFault: a package for the format is not installed.
    """
    if piece.file.format in TABLES:
        candidates = _table_texts(piece, options)
    elif piece.file.format == "tar":
        by_paragraph = options.txt_documents == "blank-line"
        candidates = enumerate(archive_texts(piece.file, piece.members, options.json_key, by_paragraph), start=1)
    elif piece.file.format == "txt":
        candidates = _txt_texts(piece, options)
    else:
        candidates = json_texts(_lines_of(piece), options.json_key)
    for line, result in candidates:
        count.lines = line
        if isinstance(result, str):
            yield result
        elif isinstance(result, Skip):
            count.skip(result.kind)
        else:
            count.reject(line, result)
            if options.on_error == "stop":
                return


def _lines_of(piece: Piece) -> Iterator[bytes]:
    """Yields the lines that begin in the piece; the last one may end beyond it."""
    first_of_file = piece.start == 0
    if piece.data is not None:
        lines: Iterator[bytes] = (line + b"\n" for line in piece.data.removesuffix(b"\n").split(b"\n"))
    else:
        lines = _lines_of_range(piece)
    for line in lines:
        yield line.removeprefix(BOM) if first_of_file else line
        first_of_file = False


def _lines_of_range(piece: Piece) -> Iterator[bytes]:
    with reading(piece.file.path), open(piece.file.path, "rb", buffering=1 << 20) as stream:
        # From one byte before the piece: if that byte is LF, the first line of the piece begins exactly at its start.
        position = max(piece.start - 1, 0)
        stream.seek(position)
        if piece.start > 0:
            position += _skip_line(stream)
        while position < piece.end:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise too_long_line(piece.file.path, position, MAX_LINE_BYTES)
            position += len(line)
            yield line


def _skip_line(stream: IO[bytes]) -> int:
    skipped = 0
    while part := stream.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _txt_texts(piece: Piece, options: ReadOptions) -> Iterator[Candidate]:
    with reading(piece.file.path), opened(piece.file) as (stream, _):
        if options.txt_documents == "file":
            yield 1, whole_text(stream, MAX_LINE_BYTES, piece.file.path)
        else:
            yield from paragraphs(stream, MAX_LINE_BYTES, piece.file.path)


def _table_texts(piece: Piece, options: ReadOptions) -> Iterator[Candidate]:
    values = table_texts(piece.file, piece.start, piece.end, options.json_key, piece.data)
    for number, data in enumerate(values, start=1):
        try:
            yield number, checked_text(None if data is None else decode_utf8(data), options.json_key)
        except (BadLine, Skip) as reason:
            yield number, reason


SKIP_ADVICE = ", or skip such {unit}s with --on-error skip"
"""The part of a message that names a flag of `prepare`, which `pretrain --text` does not have."""


def problem_message(path: Path, line: int, what: str, unit: str = "line") -> str:
    """Returns the message for a bad line: FILE:LINE, the error, and what to do.

    Args:
        path: input file.
        line: number of the line, row or value in the file, from 1.
        what: description of the error.
        unit: `Piece.unit` of the piece.
    """
    return f"{place(path, line, unit)}: {what}; fix it{SKIP_ADVICE.format(unit=unit)}"


def place(path: Path, number: int, unit: str) -> str:
    """Returns the name of a line, row or value in a message; for a member of an archive, what follows names it.

    >>> place(Path("a.jsonl"), 3, "line"), place(Path("a.parquet"), 3, "row"), place(Path("a.tar"), 3, "member")
    ('a.jsonl:3', 'a.parquet: row 3', 'a.tar')
    """
    if unit == "member":
        return str(path)
    return f"{path}:{number}" if unit == "line" else f"{path}: {unit} {number}"


def read_documents(
    inputs: Sequence[str | Path], options: ReadOptions | None = None, count: ReadCount | None = None
) -> Iterator[str]:
    """Yields all documents of a corpus in order, without worker processes.

    Args:
        inputs: files, folders and patterns, as for `find_inputs`.
        options: settings for reading; the default stops at the first bad line.
        count: receives the totals if given; its line numbers count from the beginning of the file.

    Raises:
        DataError: a line is bad and `on_error` is "stop" (the message begins with FILE:LINE), or a file is damaged.
    """
    yield from read_files(find_inputs(inputs), options or ReadOptions(), count or ReadCount())


def read_files(
    files: Sequence[InputFile],
    options: ReadOptions,
    count: ReadCount,
    on_piece: Callable[[Piece], None] | None = None,
    piece_bytes: int = 1 << 24,
) -> Iterator[str]:
    """Yields all documents of some files in order, as `read_documents`.

    Args:
        files: input files.
        options, count: as for `read_documents`.
        on_piece: called for each piece after its last document, for progress.
        piece_bytes: approximate size of a piece in bytes of text.
    """
    for file in files:
        lines_before = 0
        for piece in cut_pieces(file, piece_bytes, options.json_key):
            part = ReadCount()
            yield from read_piece(piece, options, part)
            if on_piece is not None:
                on_piece(piece)
            for line, kind, what in part.problems:
                if options.on_error == "stop":
                    raise DataError(problem_message(file.path, lines_before + line, what, piece.unit))
                if len(count.problems) < KEPT_PROBLEMS:
                    count.problems.append((lines_before + line, kind, what))
            lines_before += part.lines
            count.lines += part.lines
            for total, new in ((count.skipped, part.skipped), (count.rejected, part.rejected)):
                for kind, number in new.items():
                    total[kind] = total.get(kind, 0) + number
