"""Reads texts from columns of Parquet files and of Arrow files such as Hugging Face's `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.prepare.decompression import optional_package
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import reading

STREAMED_BYTES = 1 << 16
"""A row group of Parquet up to this size is one piece, however small the pieces are."""
_BATCH_BYTES = 1 << 20
_MAX_BATCH_ROWS = 1 << 16

TablePart = tuple[int, int, int, bytes | None]
"""First part of a file, end, size in bytes of the stored file, and the rows themselves if they are a part of a row group."""


def cut_table(file: InputFile, piece_bytes: int, key: str) -> Iterator[TablePart]:
    """Yields the pieces of a file; parts are row groups of Parquet, record batches of Arrow.

    A row group whose column is larger than two pieces is read here, a few rows at a time, because workers that began
    inside it would have to decode what is before.

    Args:
        file: a Parquet or Arrow file.
        piece_bytes: approximate size of a piece in bytes of text.
        key: name of the column, as for `table_texts`.

    Raises:
        DataError: the file is damaged, or a large row group does not have exactly one string column of this name.
    """
    if file.format == "parquet":
        with _parquet_file(file.path) as table:
            for number in range(table.num_row_groups):
                stored = file.bytes // table.num_row_groups
                size = _column_bytes(table.metadata.row_group(number), key)
                if size > max(2 * piece_bytes, STREAMED_BYTES):
                    yield from _cut_row_group(table, file.path, number, (stored, size, piece_bytes), key)
                else:
                    yield number, number + 1, stored, None
        return
    start = size = end = 0
    for end, batch in enumerate(_arrow_batches(file.path), start=1):  # maps the file, reads only its headers
        size += batch.nbytes
        if size >= piece_bytes:
            yield start, end, size, None
            start, size = end, 0
    if end > start:
        yield start, end, size, None


def column_bytes(file: InputFile, key: str) -> int:
    """Returns the size of a column's text in bytes as the metadata of a Parquet file has it; 0 if there is none.

    Args:
        file: a Parquet file.
        key: name of the column, as for `table_texts`.

    Raises:
        DataError: the file is damaged.
    """
    with reading(file.path), _parquet_file(file.path) as table:
        return sum(_column_bytes(table.metadata.row_group(number), key) for number in range(table.num_row_groups))


def _parquet_file(path: Path) -> Any:
    # Without pre_buffer, which would hold the column of a whole row group.
    return optional_package("pyarrow.parquet", path).ParquetFile(path, pre_buffer=False, buffer_size=_BATCH_BYTES)


def _column_bytes(group: Any, key: str) -> int:
    """Returns the decompressed size of a column in a row group; a dictionary counts once."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == key)


def _cut_row_group(table: Any, path: Path, number: int, sizes: tuple[int, int, int], key: str) -> Iterator[TablePart]:
    """Yields a row group in parts of at least `piece_bytes` of text; they do not depend on how pyarrow divides it."""
    import numpy as np  # here, because `tokenizer train` needs it for tables only

    compute = optional_package("pyarrow.compute", path)
    stored, size, piece_bytes = sizes
    num_rows = table.metadata.row_group(number).num_rows
    held: list[Any] = []
    held_bytes = rows = counted = 0
    for column in _row_group_columns(table, path, number, key, size):
        start = 0
        sizes_of_rows = compute.fill_null(compute.binary_length(column), 0).to_numpy()
        while start < len(column):
            ends = held_bytes + np.cumsum(sizes_of_rows[start:])
            end = start + min(int(np.searchsorted(ends, piece_bytes)) + 1, len(column) - start)
            held.append(column[start:end])
            held_bytes = int(ends[end - start - 1])
            rows += end - start
            start = end
            if held_bytes >= piece_bytes or rows == num_rows:
                done = stored * rows // num_rows
                yield number, number + 1, done - counted, _to_stream(path, held)
                held, held_bytes, counted = [], 0, done


def _row_group_columns(table: Any, path: Path, number: int, key: str, size: int) -> Iterator[Any]:
    """Yields the column of a row group as arrays of large_binary, of about `_BATCH_BYTES` each."""
    pyarrow = optional_package("pyarrow", path)
    names = _column(path, table.schema_arrow, key)
    num_rows = table.metadata.row_group(number).num_rows
    batch_rows = min(max(num_rows * _BATCH_BYTES // max(size, 1), 1), _MAX_BATCH_ROWS)
    for batch in table.iter_batches(batch_rows, row_groups=[number], columns=[key], use_threads=False):
        # By name, because for a column named 'a.b', pyarrow also reads a structure a with a field b.
        yield _strings(pyarrow, batch.column(batch.schema.get_field_index(names[0])), names[1:])


def _to_stream(path: Path, arrays: list[Any]) -> bytes:
    """Returns arrays as an Arrow stream of one column, for `table_texts`."""
    pyarrow = optional_package("pyarrow", path)
    sink = pyarrow.BufferOutputStream()
    schema = pyarrow.schema([("", pyarrow.large_binary())])
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        for array in arrays:
            writer.write_batch(pyarrow.record_batch([array], schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def table_texts(file: InputFile, start: int, end: int, key: str, rows: bytes | None = None) -> Iterator[bytes | None]:
    """Yields the UTF-8 bytes of a column's strings in parts `start` to `end` of a file, None for a null.

    Args:
        file: a Parquet or Arrow file.
        start, end, rows: from `cut_table`.
        key: name of the column, or names of a structure and its fields with dots between them.

    Raises:
        DataError: the file is damaged, or does not have exactly one string column of this name.
    """
    with reading(file.path):
        for column in _columns(file, start, end, key, rows):
            for chunk in getattr(column, "chunks", [column]):
                yield from chunk.to_pylist()


def _columns(file: InputFile, start: int, end: int, key: str, rows: bytes | None) -> Iterator[Any]:
    pyarrow = optional_package("pyarrow", file.path)
    if rows is not None:
        yield from (batch.column(0) for batch in pyarrow.ipc.open_stream(rows))
    elif file.format == "parquet":
        with _parquet_file(file.path) as table:
            for number in range(start, end):
                size = _column_bytes(table.metadata.row_group(number), key)
                yield from _row_group_columns(table, file.path, number, key, size)
    else:
        for number, batch in enumerate(_arrow_batches(file.path)):
            if start <= number < end:
                names = _column(file.path, batch.schema, key)
                yield _strings(pyarrow, batch.column(batch.schema.get_field_index(names[0])), names[1:])


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
