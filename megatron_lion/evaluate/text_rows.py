"""Reads the documents or rows of JSON, Parquet and Arrow files for evaluation; messages name the line, row or value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.prepare.find_files import TABLES, InputFile
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.json_values import HEAD_BYTES, holds_values, value_lines
from megatron_lion.prepare.lines import BOM, BadLine, Skip, checked_text, decode_utf8, text_of_line
from megatron_lion.prepare.pieces import ReadCount, ReadOptions, cut_pieces, place, read_piece
from megatron_lion.prepare.tables import cut_table, table_texts

_BLOCK_BYTES = 1 << 24


def read_all_documents(file: InputFile, key: str) -> Iterator[str]:
    """Yields the documents of a file as `prepare` reads them: empty ones are skipped.

    Unlike `prepare`, evaluation cannot skip bad lines: a perplexity is of a whole text.

    Args:
        file: a JSON, Parquet or Arrow file, or an archive.
        key: key or column of the text.

    Raises:
        DataError: a line is bad; the message names it. Or the file is damaged.
    """
    before = 0
    for piece in cut_pieces(file, _BLOCK_BYTES, key):
        count = ReadCount()
        yield from read_piece(piece, ReadOptions(json_key=key), count)
        for line, kind, what in count.problems:
            raise _refusal(place(file.path, before + line, piece.unit), kind, what)
        before += count.lines


def read_rows(file: InputFile, key: str) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of every row, including empty ones.

    A row is a line of JSON lines, a value of an array, or a row of a table. A blank line is no row.

    Args:
        file: a JSON, Parquet or Arrow file.
        key: key or column of the text.

    Raises:
        DataError: a row has no text, such as a null; the message names it. Or the file is damaged.
    """
    if file.format == "tar":
        raise DataError(f"{file.path}: is an archive; give a JSON, Parquet or Arrow file of its rows")
    unit, values = ("row", _of_table(file, key)) if file.format in TABLES else _of_json(file)
    for number, value in enumerate(values, start=1):
        try:
            text = _text_of_cell(value, key) if unit == "row" else _text_of_json(value or b"", key)
        except BadLine as bad:
            raise _refusal(place(file.path, number, unit), bad.kind, bad.what) from None
        if text is not None:
            yield place(file.path, number, unit), text


def _refusal(where: str, kind: str, what: str) -> DataError:
    return DataError(f"{where}: {what}" + ("" if kind == "missing_key" else "; fix it"))  # that one names --json-key


def _of_table(file: InputFile, key: str) -> Iterator[bytes | None]:
    with reading(file.path):
        for start, end, _, rows in cut_table(file, _BLOCK_BYTES, key):
            yield from table_texts(file, start, end, key, rows)


def _of_json(file: InputFile) -> tuple[str, Iterator[bytes]]:
    """Returns the unit, "line" or "value", and the JSON texts of the values."""
    with reading(file.path), opened(file) as (stream, _):
        is_values = holds_values(stream.read(HEAD_BYTES))
    return ("value", _values(file)) if is_values else ("line", _lines(file))


def _values(file: InputFile) -> Iterator[bytes]:
    with reading(file.path), opened(file) as (stream, _):
        for block in value_lines(file.path, stream, _BLOCK_BYTES):
            yield from block.removesuffix(b"\n").split(b"\n")


def _lines(file: InputFile) -> Iterator[bytes]:
    with reading(file.path), opened(file) as (stream, _):
        for number, line in enumerate(stream):
            yield line if number else line.removeprefix(BOM)


def _text_of_cell(data: bytes | None, key: str) -> str:
    text = None if data is None else decode_utf8(data)
    try:
        return checked_text(text, key)
    except Skip:  # empty or white space only
        return text or ""


def _text_of_json(line: bytes, key: str) -> str | None:
    """Returns the text of a line, or None if the line is blank."""
    try:
        return text_of_line(line, key)
    except Skip as reason:
        if reason.kind == "blank_line":
            return None
    # The text is empty or white space only, so `text_of_line` does not return it.
    found: Any = json.loads(line, parse_int=float)
    for name in [key] if key in found else key.split("."):
        found = found[name]
    return str(found)
