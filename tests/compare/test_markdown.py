"""Markdown tables: renderers find the same columns for any cell text, and one function writes all tables."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from properties import examples

from megatron_lion.compare.table import Table, markdown_grid, to_markdown

REPO = Path(__file__).resolve().parents[2]
RENDERER = MarkdownIt("commonmark").enable("table")

cells = st.text(st.sampled_from("|\\\n\r`* a\u2028"), max_size=8)
widths = st.integers(1, 4)


def grids() -> st.SearchStrategy[list[list[str]]]:
    """A heading and up to three rows of equal width; the last column has a known text, by which a test finds it."""
    lines = widths.flatmap(
        lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=4)
    )
    return lines.map(lambda grid: [[*line, "end"] for line in grid])


def rendered(text: str) -> list[list[str]]:
    """The cells of a document's only table, parsed by markdown-it."""
    tokens = RENDERER.parse(text)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"], text
    lines: list[list[str]] = []
    for before, token in pairwise(tokens):
        if before.type == "tr_open":
            lines.append([])
        if token.type == "inline" and before.type in ("th_open", "td_open"):
            lines[-1].append(token.content)
    return lines


def split_with_escapes(line: str) -> list[str]:
    """Cells under micromark's rule: a backslash escapes the bar or backslash that follows it."""
    inside = line.removeprefix("|").removesuffix("|")
    return re.findall(r"(?:^|(?<=\|))((?:\\[\\|]|[^|])*)(?:\||$)", inside)


@given(grid=grids())
@examples(300)
def test_cells_of_any_content_keep_their_columns(grid: list[list[str]]) -> None:
    text = markdown_grid(grid[0], grid[1:])
    found = rendered(text)
    assert [len(line) for line in found] == [len(line) for line in grid]
    assert [line[-1] for line in found] == ["end"] * len(grid)
    for line, source in zip(found, grid, strict=True):
        for shown, cell in zip(line, source, strict=True):
            assert shown.count("|") == cell.count("|"), "a bar was lost or has moved to another cell"
    lines = text.split("\n")
    assert len(lines) == len(grid) + 1
    for text_line in (lines[0], *lines[2:]):
        split = split_with_escapes(text_line)
        assert len(split) == len(grid[0]), text_line
        assert split[-1].strip() == "end"


def test_a_table_escapes_headings_and_cells_alike() -> None:
    table = Table(
        slug="t", title="T", columns=["a|b", "n\nm"], rows=[["x|y\\|z", 1.5], ["two\nlines", 2.5]], best=["n\nm"]
    )
    body = to_markdown(table).removeprefix("### T\n\n")
    assert rendered(body) == [["a|b", "n m"], ["x|y\\\\|z", "1.5"], ["two lines", "2.5"]]
    assert "|---|---:|" in body


def test_rows_of_another_length_are_refused() -> None:
    for rows, alignment in (([["1"]], ""), ([["1", "2", "3"]], ""), ([], "lrl")):
        with pytest.raises(ValueError, match="a table of 2 columns has a row or an alignment of another length"):
            markdown_grid(["a", "b"], rows, alignment)


def hand_built(source: str) -> list[int]:
    """Lines of the text constants, other than docstrings, that are part of a Markdown table."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if re.search(r"^\| |\|:?---", node.value, re.MULTILINE):
            found.append(node.lineno)
    joins = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return found + [
        join.lineno
        for join in joins
        if isinstance(join, ast.Attribute) and join.attr == "join"
        and isinstance(join.value, ast.Constant) and str(join.value.value).strip() == "|"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('x = "| a | b |"', [1]),
        ('x = f"| {1} | {2} |"', [1]),
        ('x = "|---|"', [1]),
        ('y = 1\nx = "a" + " | ".join("bc")', [2]),
        ('"""A docstring\n\n| a |\n|---|\n"""', []),
        ('x = "a | b"', []),
    ],
)
def test_the_search_for_hand_built_tables_finds_them(source: str, lines: list[int]) -> None:
    assert hand_built(source) == lines


def test_markdown_tables_are_built_in_one_place() -> None:
    paths = sorted([*(REPO / "megatron_lion").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")])
    table = REPO / "megatron_lion" / "compare" / "table.py"
    found = {path: hand_built(path.read_text(encoding="utf-8")) for path in paths}
    assert found.pop(table), "the search must find the known table"
    assert {str(path.relative_to(REPO)): lines for path, lines in found.items() if lines} == {}
