"""Tables of numbers and their output as Markdown, CSV, LaTeX and HTML; `print_tables` prints them to a terminal."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lion.plain_text import plain

Cell = str | int | float | None
MISSING = "–"
MARKDOWN_WIDTH = 120
"""Longest line of a Markdown table, if its columns can be divided among several tables."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; cells keep full precision until they are shown.

    Its texts may come from the files of another person's run. Each becomes one line, and characters that a terminal or a
    page would interpret are escaped.

    Attributes:
        slug: name of the CSV file.
        title: title, one line.
        columns: headings; columns that hold text are left-aligned.
        rows: cells of each row; None for a missing value.
        formats: format specification of numbers by heading; ",.4g" by default.
        notes: sentences below the table.
        best: headings whose smallest value is marked among the rows that agree in the first column.
        unmarked: (first cell, heading) pairs of rows and a column in which no smallest value is marked, because the values
            are not comparable.
        num_keys: number of leading columns that name a row. They are repeated if the other columns are divided among several
            tables. By default the leading columns of text, or one if all columns are text.
    """

    slug: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: list[str] = field(default_factory=list)
    unmarked: list[tuple[str, str]] = field(default_factory=list)
    num_keys: int | None = None

    def __post_init__(self) -> None:
        tidy: dict[str, Any] = {
            "title": one_line(self.title),
            "columns": [one_line(name) for name in self.columns],
            "rows": [[one_line(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows],
            "formats": {one_line(name): form for name, form in self.formats.items()},
            "notes": [one_line(note) for note in self.notes],
            "best": [one_line(name) for name in self.best],
            "unmarked": [(one_line(group), one_line(name)) for group, name in self.unmarked],
        }
        for name, value in tidy.items():
            object.__setattr__(self, name, value)  # frozen outside of this method

    def shown(self, column: int, cell: Cell) -> str:
        """The text of a cell."""
        if cell is None:
            return MISSING
        if isinstance(cell, str):
            return cell
        if isinstance(cell, float) and cell in (float("inf"), float("-inf")):
            return str(cell)
        return format(cell, self.formats.get(self.columns[column], ",d" if isinstance(cell, int) else ",.4g"))

    @property
    def keys(self) -> int:
        """Number of leading columns that name a row, at least 1."""
        if self.num_keys is not None:
            return self.num_keys
        texts = [self.is_text(column) for column in range(len(self.columns))]
        return 1 if all(texts) else max(1, texts.index(False))

    def is_text(self, column: int) -> bool:
        """Whether a column holds text."""
        return any(isinstance(row[column], str) for row in self.rows)

    def is_best(self, row: int, column: int) -> bool:
        """Whether a cell is the smallest of its column in its group; False if the values are equal or not comparable."""
        heading = self.columns[column]
        if heading not in self.best or (self.rows[row][0], heading) in self.unmarked:
            return False
        group = [r[column] for r in self.rows if r[0] == self.rows[row][0]]
        numbers = [cell for cell in group if isinstance(cell, int | float)]
        return len(set(numbers)) > 1 and self.rows[row][column] == min(numbers)


def one_line(text: str) -> str:
    r"""Joins lines with spaces and escapes other control and invisible characters, see `plain`.

    >>> print(one_line("two\nlines\x1b[31m"))
    two lines\x1b[31m
    """
    return text if text.isprintable() else plain(" ".join(text.splitlines()))


def _markdown_text(text: str) -> str:
    r"""Escapes what begins a tag, a link or a picture in Markdown.

    >>> print(_markdown_text("<script>[x](javascript:1)"))
    &lt;script>\[x](javascript:1)
    """
    return text.replace("<", "&lt;").replace("[", r"\[")


def _markdown_cell(text: str) -> str:
    """Escapes what would end the cell's column or row; other Markdown keeps its meaning.

    Renderers disagree on whether a backslash before an escaped bar escapes the bar, so such backslashes are doubled.
    """
    one_line = " ".join(text.splitlines())
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line)


def markdown_grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "", *, num_keys: int | None = None
) -> str:
    r"""A GitHub Markdown table of text cells; bars and line breaks in cells are escaped.

    Args:
        columns: headings.
        rows: cells of each row, as many as there are headings.
        alignment: one letter per column, "l" or "r"; all left by default.
        num_keys: number of leading columns that name a row. If it is given and a line would be longer than `MARKDOWN_WIDTH`,
            the other columns are divided among several tables, each of which begins with these.

    Returns:
        The lines, without a line break at the end; a blank line between two tables.

    Raises:
        ValueError: a row or the alignment differs from the headings in length.

    Example:
        >>> print(markdown_grid(["what", "value"], [["|z|", "1.5"]], "lr"))
        | what | value |
        |---|---:|
        | \|z\| | 1.5 |
    """
    alignment = alignment or "l" * len(columns)
    lines = [list(columns), *map(list, rows)]
    if any(len(part) != len(columns) for part in (alignment, *lines)):
        raise ValueError(f"a table of {len(columns)} columns has a row or an alignment of another length")
    cells = [[_markdown_cell(text) for text in line] for line in lines]
    return "\n\n".join(
        "\n".join(
            [
                _markdown_line(cells[0], part),
                "|" + "|".join("---:" if alignment[c] == "r" else "---" for c in part) + "|",
                *(_markdown_line(line, part) for line in cells[1:]),
            ]
        )
        for part in _markdown_parts(cells, num_keys)
    )


def _markdown_line(cells: Sequence[str], part: Sequence[int]) -> str:
    return "| " + " | ".join(cells[column] for column in part) + " |"


def _markdown_parts(cells: Sequence[Sequence[str]], num_keys: int | None) -> list[list[int]]:
    """The columns of each table: as many after the keys as the longest line has room for, at least one."""
    columns = list(range(len(cells[0])))
    if num_keys is None or num_keys >= len(columns):
        return [columns]
    keys = columns[:num_keys]
    parts: list[list[int]] = []
    for column in columns[num_keys:]:
        wider = [*parts[-1], column] if parts else []
        if parts and max(len(_markdown_line(line, wider)) for line in cells) <= MARKDOWN_WIDTH:
            parts[-1] = wider
        else:
            parts.append([*keys, column])
    return parts


def parse_markdown_grid(lines: Sequence[str]) -> tuple[list[str], list[list[str]], str]:
    r"""The columns, rows and alignment of a table of `markdown_grid`.

    >>> parse_markdown_grid(markdown_grid(["what", "value"], [["|z|", "1.5"]], "lr").splitlines())
    (['what', 'value'], [['|z|', '1.5']], 'lr')
    """
    # A bar inside a cell has a backslash before it, so a bar between blanks is a border.
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in (lines[0], *lines[2:])]
    texts = [[re.sub(r"((?:\\\\)*)\\\|", lambda m: m[1][::2] + "|", cell) for cell in line] for line in cells]
    return texts[0], texts[1:], "".join("r" if side.endswith(":") else "l" for side in lines[1].strip("|").split("|"))


def to_markdown(table: Table) -> str:
    """A GitHub Markdown table with title and notes; the best value of a group is bold."""

    def cell(row: int, column: int) -> str:
        text = _markdown_text(table.shown(column, table.rows[row][column]))
        return f"**{text}**" if table.is_best(row, column) else text

    columns = range(len(table.columns))
    rows = [[cell(r, c) for c in columns] for r in range(len(table.rows))]
    alignment = "".join("l" if table.is_text(c) else "r" for c in columns)
    heads = [_markdown_text(name) for name in table.columns]
    lines = [f"### {_markdown_text(table.title)}", "", markdown_grid(heads, rows, alignment, num_keys=table.keys)]
    if table.notes:
        lines += ["", *(f"- {_markdown_text(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated values in full precision; a missing value is an empty field."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])
    return stream.getvalue()


_LATEX = str.maketrans({"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
                        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
                        "√": r"$\sqrt{}$", "–": "--", "→": r"$\to$", "≤": r"$\le$", "×": r"$\times$"})  # fmt: skip


def to_latex(table: Table) -> str:
    r"""A LaTeX `table` environment with \toprule, \midrule and \bottomrule (needs booktabs)."""
    columns = range(len(table.columns))

    def cell(row: int, column: int) -> str:
        text = table.shown(column, table.rows[row][column]).translate(_LATEX)
        return rf"\textbf{{{text}}}" if table.is_best(row, column) else text

    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{table.title.translate(_LATEX)}}}",
        rf"  \begin{{tabular}}{{{''.join('l' if table.is_text(c) else 'r' for c in columns)}}}",
        r"    \toprule",
        "    " + " & ".join(name.translate(_LATEX) for name in table.columns) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(cell(r, c) for c in columns) + r" \\" for r in range(len(table.rows))),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_html(table: Table) -> str:
    """A section with the table in a box that scrolls sideways on a narrow screen; the first column stays visible.

    A first column "model" becomes headings between the rows, or is omitted if there is one model: a phone needs the
    room for the values.
    """
    grouped = table.columns[0] == "model"
    several = len({row[0] for row in table.rows}) > 1
    columns = range(int(grouped), len(table.columns))

    def cell(row: int, column: int) -> str:
        kind = ["text" if table.is_text(column) else "number", "best" if table.is_best(row, column) else ""]
        text = html.escape(table.shown(column, table.rows[row][column]))
        return f'<td class="{" ".join(filter(None, kind))}">{text}</td>'

    heads = "".join(
        f'<th class="{"text" if table.is_text(c) else "number"}">{html.escape(table.columns[c])}</th>' for c in columns
    )
    body: list[str] = []
    for r, row in enumerate(table.rows):
        if grouped and several and (r == 0 or table.rows[r - 1][0] != row[0]):
            body.append(
                f'<tr class="group"><th colspan="{len(columns)}"><span>{html.escape(str(row[0]))}</span></th></tr>'
            )
        body.append("<tr>" + "".join(cell(r, c) for c in columns) + "</tr>")
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in table.notes)
    lines = "\n".join(body)
    return (
        f'<section id="{table.slug}"><h2>{html.escape(table.title)}</h2>\n<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>{notes}</section>\n"
    )
