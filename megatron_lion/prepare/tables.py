"""Reads texts from columns of Parquet files and of Arrow files such as Hugging Face's `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import optional_package, reading


def cut_table(file: InputFile, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first part, end, size in bytes) of each piece; parts are row groups of Parquet, record batches of Arrow.

    Args:
        file: a Parquet or Arrow file.
        piece_bytes: approximate size of a piece of an Arrow file in bytes; a row group of Parquet is a piece.
    """
    if file.format == "parquet":
        groups = optional_package("pyarrow.parquet", file.path).ParquetFile(file.path).num_row_groups
        for number in range(groups):
            yield number, number + 1, file.bytes // groups
        return
    start = size = end = 0
    for end, batch in enumerate(_arrow_batches(file.path), start=1):  # maps the file, reads only its headers
        size += batch.nbytes
        if size >= piece_bytes:
            yield start, end, size
            start, size = end, 0
    if end > start:
        yield start, end, size


def table_texts(file: InputFile, start: int, end: int, key: str) -> Iterator[bytes | None]:
    """Yields the UTF-8 bytes of a column's strings in parts `start` to `end` of a file, None for a null.

    Args:
        file: a Parquet or Arrow file.
        start, end: from `cut_table`.
        key: name of the column, or names of a structure and its fields with dots between them.

    Raises:
        DataError: the file is damaged, or does not have exactly one string column of this name.
    """
    pyarrow = optional_package("pyarrow", file.path)
    with reading(file.path):
        if file.format == "parquet":
            table = optional_package("pyarrow.parquet", file.path).ParquetFile(file.path)
            names = _column(file.path, table.schema_arrow, key)
            # select, because for a column named 'a.b', pyarrow also reads a structure a with a field b.
            part = table.read_row_group(start, columns=[key]).select([names[0]])
            columns = [part.column(0)]
        else:
            chosen = [batch for number, batch in enumerate(_arrow_batches(file.path)) if start <= number < end]
            names = _column(file.path, chosen[0].schema, key)
            columns = [batch.column(batch.schema.get_field_index(names[0])) for batch in chosen]
        values = [_strings(pyarrow, column, names[1:]) for column in columns]
    for column in values:
        for chunk in getattr(column, "chunks", [column]):
            yield from chunk.to_pylist()


def _strings(pyarrow: Any, column: Any, fields: list[str]) -> Any:
    """Returns a column, or a field inside it, as bytes, because pyarrow does not check that strings are UTF-8."""
    compute = optional_package("pyarrow.compute", Path())
    for name in fields:
        column = compute.struct_field(column, name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pyarrow.large_binary())


def _column(path: Path, schema: Any, key: str) -> list[str]:
    """Returns the names that lead to a column of strings: [key], or those of a structure and its fields.

    Raises:
        DataError: there is no such column, there are two, or it holds something else.
    """
    pyarrow = optional_package("pyarrow", path)
    names = [key] if key in schema.names else key.split(".")
    if names[0] not in schema.names:
        raise DataError(f"{path}: no column {key!r} (its columns: {', '.join(schema.names)}); give --json-key")
    if schema.names.count(names[0]) > 1:
        raise DataError(f"{path}: two columns are named {names[0]!r}; write the file again with different names")
    kind = schema.field(names[0]).type
    for name in names[1:]:
        inner = [kind.field(number).name for number in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
        if inner.count(name) != 1:
            raise DataError(
                f"{path}: no column {key!r} ({names[0]!r} has: {', '.join(inner) or 'no fields'}); give --json-key"
            )
        kind = kind.field(inner.index(name)).type
    held = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(pyarrow.types, test)(held) for test in tests if hasattr(pyarrow.types, test)):
        raise DataError(f"{path}: column {key!r} holds {kind}, strings are needed; give another --json-key")
    return names


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Yields the record batches of a file in Arrow's stream format, which `datasets` writes, or in its file format.

    Raises:
        DataError: something follows the stream, such as a second one, which pyarrow does not read.
    """
    pyarrow = optional_package("pyarrow", path)
    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        mapped.seek(0)
        yield from pyarrow.ipc.open_stream(mapped)
        if mapped.tell() < mapped.size():
            raise DataError(
                f"{path}: its Arrow stream ends at byte {mapped.tell():,} of {mapped.size():,}; write what follows to a file of its own"
            )
