"""Prints tables to stdout: the only place that does, so that all verbs keep their numbers whole in a narrow terminal.

A table that is wider than the terminal first gets its texts wrapped at blanks. If that is not enough, its columns are
divided among several tables, each of which begins with the columns that name a row. If there is no room for these and one
more column, each row becomes a list of names and values. Numbers are never cut or wrapped. Without a terminal, such as in
a pipe or a file, each table has its full width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from megatron_lion.compare.table import Table, parse_markdown_grid, to_csv, to_latex, to_markdown

FRAME = 3
"""Width of the border and the two blanks of each column of a table; the table has one more border at its end."""
MOST_WORD = 16
"""A longer word of a text, such as a path, is folded if the table would not fit otherwise."""
MOST_KEYS = 0.7
"""Largest share of the terminal that the columns which name a row may take in each of several tables."""


@dataclass(frozen=True)
class Column:
    """What the layout needs to know of a column.

    Attributes:
        natural: width without wrapping.
        least: smallest width that cuts no number and folds no word of up to `MOST_WORD`.
    """

    natural: int
    least: int


def print_tables(tables: Sequence[Table], form: str = "text") -> None:
    """Prints tables with their titles and notes to stdout.

    Args:
        tables: the tables.
        form: "text", "markdown", "csv" or "latex".
    """
    if form != "text":
        write = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}[form]
        sys.stdout.write("\n".join(map(write, tables)))
        return
    from rich.console import Console
    from rich.text import Text

    console, width = _console(Console)
    for table in tables:
        console.print(Text(table.title, "bold"), soft_wrap=width is None)
        write_table(console, table, width)
        for note in table.notes:
            console.print(Text(note, "italic"), soft_wrap=width is None)
        console.print()


def print_markdown(text: str) -> None:
    """Prints a Markdown text: unchanged without a terminal, otherwise with its tables laid out for the terminal's width."""
    if not sys.stdout.isatty():
        sys.stdout.write(text)
        return
    from rich.console import Console
    from rich.text import Text

    console, width = _console(Console)
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if not is_table:
            for line in lines:
                console.print(Text(line, "bold" if line.startswith("#") else ""))
            continue
        columns, rows, _ = parse_markdown_grid(list(lines))
        write_table(console, Table(slug="", title="", columns=columns, rows=[list(row) for row in rows]), width)


def _console(kind: Any) -> tuple[Any, int | None]:
    """A console on stdout and its width, or None if stdout is no terminal."""
    console = kind(file=sys.stdout)
    return console, console.width if sys.stdout.isatty() else None


def write_table(console: Any, table: Table, width: int | None) -> None:
    """Writes one table, without title and notes.

    Args:
        console: a rich console.
        table: the table.
        width: columns of the terminal, or None for the table's full width.
    """
    texts = [[table.shown(c, row[c]) for c in range(len(table.columns))] for row in table.rows]
    columns = [_measure(table, texts, c) for c in range(len(table.columns))]
    parts = _layout(columns, table.keys, width)
    if parts is None:
        _write_records(console, table, texts, width)
        return
    for part in parts:
        if width is None:  # a pipe has no width, and rich would take that of $COLUMNS or 80 for it
            console.width = _total(list(part.values()))
        console.print(_rich_table(table, texts, part))


def _measure(table: Table, texts: Sequence[Sequence[str]], column: int) -> Column:
    from rich.cells import cell_len

    def longest(words: Sequence[str]) -> int:
        return max(map(cell_len, words), default=0)

    head, cells = table.columns[column], [row[column] for row in texts]
    if table.is_text(column) and not all(map(_is_number, cells)):
        least = min(longest([word for text in (head, *cells) for word in text.split()]), MOST_WORD)
    else:
        least = longest([*head.split(), *cells])
    return Column(natural=longest([head, *cells]), least=max(least, 1))


def _is_number(text: str) -> bool:
    """Whether a text of a cell is a number or stands for one, so that it must not be wrapped.

    >>> [_is_number(text) for text in ("1,234.5", "9e+03", "25.0%", "–", "lion", "1 of 3")]
    [True, True, True, True, False, False]
    """
    try:
        float(text.strip("%–").replace(",", "") or 0)
    except ValueError:
        return False
    return True


def _layout(columns: Sequence[Column], keys: int, width: int | None) -> list[dict[int, int]] | None:
    """The tables that a table is printed as, each with the width of its columns by number; None if there is no room."""
    everything = range(len(columns))
    if width is None or _total([columns[c].natural for c in everything]) <= width:
        return [{c: columns[c].natural for c in everything}]
    if _total([columns[c].least for c in everything]) <= width:
        return [_widened(columns, list(everything), width)]
    names = list(range(keys))
    parts: list[list[int]] = []
    for column in everything[keys:]:
        wider = [*parts[-1], column] if parts else []
        if parts and _total([columns[c].least for c in wider]) <= width:
            parts[-1] = wider
        else:
            parts.append([*names, column])
    if not parts or _total([columns[c].least for c in names]) > MOST_KEYS * width:
        return None
    if any(_total([columns[c].least for c in part]) > width for part in parts):
        return None
    return [_widened(columns, part, width) for part in parts]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + FRAME * len(widths) + 1


def _widened(columns: Sequence[Column], part: list[int], width: int) -> dict[int, int]:
    """The least widths, and from left to right the room that is left."""
    found = {c: columns[c].least for c in part}
    left = width - _total(list(found.values()))
    for c in part:
        more = min(left, columns[c].natural - found[c])
        found[c] += more
        left -= more
    return found


def _rich_table(table: Table, texts: Sequence[Sequence[str]], part: dict[int, int]) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable()
    for c, width in part.items():
        side: Literal["left", "right"] = "left" if table.is_text(c) else "right"
        shown.add_column(Text(table.columns[c]), justify=side, width=width, overflow="fold")
    for r, row in enumerate(texts):
        shown.add_row(*(Text(row[c], "bold" if table.is_best(r, c) else "") for c in part))
    return shown


def _write_records(console: Any, table: Table, texts: Sequence[Sequence[str]], width: int | None) -> None:
    """Writes each row as a line that names it and one line for each other column."""
    from rich.table import Table as RichTable
    from rich.text import Text

    for r, row in enumerate(texts):
        names = ", ".join(f"{table.columns[c]} {row[c]}" for c in range(table.keys))
        console.print(Text(names, "bold"), overflow="fold")
        lines = RichTable.grid(padding=(0, 2, 0, 2))
        lines.add_column(overflow="fold", max_width=max((width or 0) // 2, 8))
        lines.add_column(overflow="fold")
        for c in range(table.keys, len(row)):
            lines.add_row(Text(table.columns[c]), Text(row[c], "bold" if table.is_best(r, c) else ""))
        console.print(lines)
