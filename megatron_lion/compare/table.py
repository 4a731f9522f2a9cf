"""Tables of numbers and their output as terminal text, Markdown, CSV, LaTeX and HTML."""

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
    """

    slug: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tidy: dict[str, Any] = {
            "title": one_line(self.title),
            "columns": [one_line(name) for name in self.columns],
            "rows": [[one_line(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows],
            "formats": {one_line(name): form for name, form in self.formats.items()},
            "notes": [one_line(note) for note in self.notes],
            "best": [one_line(name) for name in self.best],
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

    def is_text(self, column: int) -> bool:
        """Whether a column holds text."""
        return any(isinstance(row[column], str) for row in self.rows)

    def is_best(self, row: int, column: int) -> bool:
        """Whether a cell is the smallest of its column in its group; False if the group's values are all equal."""
        if self.columns[column] not in self.best:
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


def markdown_grid(columns: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "") -> str:
    r"""A GitHub Markdown table of text cells; bars and line breaks in cells are escaped.

    Args:
        columns: headings.
        rows: cells of each row, as many as there are headings.
        alignment: one letter per column, "l" or "r"; all left by default.

    Returns:
        The lines, without a line break at the end.

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
    head, *body = ("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
    return "\n".join([head, "|" + "|".join("---:" if side == "r" else "---" for side in alignment) + "|", *body])


def to_markdown(table: Table) -> str:
    """A GitHub Markdown table with title and notes; the best value of a group is bold."""

    def cell(row: int, column: int) -> str:
        text = _markdown_text(table.shown(column, table.rows[row][column]))
        return f"**{text}**" if table.is_best(row, column) else text

    columns = range(len(table.columns))
    rows = [[cell(r, c) for c in columns] for r in range(len(table.rows))]
    alignment = "".join("l" if table.is_text(c) else "r" for c in columns)
    heads = [_markdown_text(name) for name in table.columns]
    lines = [f"### {_markdown_text(table.title)}", "", markdown_grid(heads, rows, alignment)]
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


def to_rich(table: Table) -> Any:
    """A rich table for the terminal, without title and notes, which may be wider than the table."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable()
    columns = range(len(table.columns))
    for c in columns:
        shown.add_column(Text(table.columns[c]), justify="left" if table.is_text(c) else "right", no_wrap=True)
    for r in range(len(table.rows)):
        cells = (table.shown(c, table.rows[r][c]) for c in columns)
        shown.add_row(*(Text(text, "bold" if table.is_best(r, c) else "") for c, text in enumerate(cells)))
    return shown
