"""Printed tables keep their numbers and the columns that name a row, however narrow the terminal is."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.commands.evaluate import _print_outcomes
from megatron_lion.commands.probe import probe_table
from megatron_lion.compare.best import best_table, choose_best
from megatron_lion.compare.print_tables import print_markdown, print_tables
from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.table import Table, markdown_grid, parse_markdown_grid, to_markdown
from megatron_lion.evaluate.evaluate_steps import Outcome

REPO = Path(__file__).resolve().parents[2]
WIDTHS = [60, 80, 110, 120, None]
NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]\d+)?%?")
LONG_NAME = "gpt2-medium-with-a-name-that-somebody-chose"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch: pytest.MonkeyPatch, width: int | None, call: Any) -> str:
    """What a call prints to a terminal of a width, or to a pipe (None), without colours."""
    stream = io.StringIO() if width is None else Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width or 40))
    call()
    monkeypatch.undo()
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def check(table: Table, text: str, width: int | None) -> None:
    """Every number of the cells is whole, every row has its names, and no line is too long."""
    assert "…" not in text, table.title
    words = set(text.split())
    for row in table.rows:
        for column, cell in enumerate(row):
            for word in table.shown(column, cell).split():
                # A word of more than 16 characters, such as a path, may be folded; a number may not.
                whole = column < table.keys or NUMBER.fullmatch(word.strip("(),%±–"))
                wanted = [word] if len(word) <= 16 else [word[:4]] if column < table.keys else []
                for part in wanted if whole else NUMBER.findall(word if len(word) <= 16 else ""):
                    assert any(part in found for found in words), (table.title, width, table.columns[column], part)
    if width is not None:
        assert max(map(len, text.splitlines())) <= width, (table.title, width)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    root = tmp_path_factory.mktemp("tables")
    folders = [
        write_run(root / f"{len(model)}-{name}-{seed}", optimizer=name, seed=seed, model=model)
        for model in ("gpt2-small", LONG_NAME)
        for name in ("lion", "sgd", "adamw")
        for seed in (1, 2)
    ]
    runs = read_runs(folders)
    return [
        *build_tables(runs), *build_tables(read_runs(folders[:4])), best_table(choose_best(runs)), probes(), *evaluations(),
    ]  # fmt: skip


def probes() -> Table:
    norms = {"grad_l1": 12345.678912, "grad_l2": 10.5, "norm_ratio": 1175.5, "norm_ratio_over_sqrt_d": 0.43,
             "kkt_residual": None, "num_parameters": 7_248_640}  # fmt: skip
    noise = {"norm_ratio_low": 1000.0, "norm_ratio_high": 1300.0, "noise_share": 0.123}
    content = {"loss": 10.82345, "all": norms, "noise": noise, "ladder": [{"norm_ratio_standard_error": 12.5}]}
    items = [SimpleNamespace(step=step, content=content, path=Path("RUN/probe"), is_new=True) for step in (0, 10_000)]
    return probe_table(items)


def outcomes() -> list[Outcome]:
    common = {"step": 10_000, "text_version": "WikiText-103 tokens test", "text_path": "a", "stride": 32, "loss": 3.456789,
              "log_word_ppl": 3.456789, "log_token_ppl": 3.456789, "token_ppl": 31.7, "word_ppl": None,
              "adjusted_ppl": 1.2345e30, "bits_per_byte": 0.9769, "accuracy": 0.3256, "last_token_accuracy": 0.4667,
              "max_tokens": 5000}  # fmt: skip
    kinds = ("wikitext103", "wikitext103_pages", "lambada")
    return [Outcome(record={**common, "kind": kind}, path=Path("x"), is_new=True) for kind in kinds]


def evaluations() -> list[Table]:
    """The tables that `evaluate` prints."""
    found: list[Table] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_lion.compare.print_tables.print_tables", found.extend)
        patch.setattr(sys, "stdout", io.StringIO())
        _print_outcomes(outcomes(), Path("runs/lion"), "fp32")
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_and_names_survive_every_width(
    tables: list[Table], width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"norm-ratio", "seeds", "settings", "probe", "evaluation", "best"} <= {table.slug for table in tables}
    for table in tables:
        check(table, printed(monkeypatch, width, lambda table=table: print_tables([table])), width)


def test_each_part_of_a_divided_table_names_its_rows(tables: list[Table], monkeypatch: pytest.MonkeyPatch) -> None:
    table = next(
        table for table in tables if table.slug == "norm-ratio" and LONG_NAME not in {r[0] for r in table.rows}
    )
    text = printed(monkeypatch, 80, lambda: print_tables([table]))
    parts = text.count("┏")
    assert parts > 1
    for row in table.rows:
        for part in text.split("┏")[1:]:
            assert sum(str(row[0]) in line and str(row[1]).split()[-1] in line for line in part.splitlines()) >= 1
    assert printed(monkeypatch, None, lambda: print_tables([table])).count("┏") == 1


def test_without_a_terminal_nothing_is_wrapped(tables: list[Table], monkeypatch: pytest.MonkeyPatch) -> None:
    for table in tables:
        lines = printed(monkeypatch, None, lambda table=table: print_tables([table])).splitlines()
        assert lines[0] == table.title
        assert len(lines) == 1 + 4 + len(table.rows) + len(table.notes) + 1, table.title
        for note in table.notes:
            assert note in lines


def test_a_row_without_room_becomes_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(
        slug="t", title="T", columns=["model", "text", "number"], rows=[["m" * 12, "n" * 14, 1234567.25]],
        formats={"number": ",.2f"},
    )  # fmt: skip
    text = printed(monkeypatch, 30, lambda: print_tables([table]))
    assert "┏" not in text
    assert "number" in text
    assert "1,234,567.25" in text


@examples(60)
@given(
    st.lists(
        st.tuples(st.text("ab cd", max_size=40), st.floats(0, 1e9), st.integers(0, 10**9)), min_size=1, max_size=4
    ),
    st.integers(40, 130),
    st.integers(1, 9),
)
def test_any_table_at_any_width(rows: list[tuple[str, float, int]], width: int, copies: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        columns = ["name", *(f"number {n}" for n in range(2 * copies))]
        table = Table(slug="t", title="T", columns=columns, rows=[[row[0], *(row[1:] * copies)] for row in rows])
        check(table, printed(patch, width, lambda: print_tables([table])), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_markdown_results_are_laid_out_in_a_terminal_only(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["scenario", *(f"L × {n}, |z|" for n in range(10))]
    rows = [[f"row {n}", *(f"{n + m / 7:.5g}" for m in range(10))] for n in range(3)]
    text = f"## Title\n\n{markdown_grid(columns, rows)}\n\nA sentence.\n"
    shown = printed(monkeypatch, width, lambda: print_markdown(text))
    if width is None:
        assert shown == text
        return
    assert "|---" not in shown
    check(Table(slug="t", title="T", columns=columns, rows=[list(row) for row in rows]), shown, width)
    assert "A sentence." in shown


@pytest.mark.slow
def test_theory_and_toy_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 60
    given = ["--steps", "1000", "--smoothness", "7", "--noise-variance", "2", "--gap", "120", "--dimension", "1000000"]
    toy = [
        "toy",
        "--steps",
        "20",
        "--starts",
        "2",
        "--repeats",
        "2",
        "--lr",
        "0.02",
        "--no-figures",
        "--output",
        str(tmp_path / "toy"),
    ]
    for words in (["theory", *given], toy):
        shown = printed(monkeypatch, width, lambda words=words: main(words))
        assert "|---" not in shown
        assert max(len(line) for line in shown.splitlines()) <= width
        whole = printed(monkeypatch, None, lambda words=words: main(words))
        assert "|---" in whole
        cells = [cell for line in whole.splitlines() if line.startswith("| ") for cell in line.strip("| ").split(" | ")]
        found = set(shown.split())
        for number in (number for cell in cells for number in NUMBER.findall(cell)):
            assert any(number in word for word in found), (words[0], number)


@given(
    grid=st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.text("|\\ab ", max_size=6).map(str.strip), min_size=n, max_size=n), min_size=1, max_size=4
        )
    )
)
@examples(200)
def test_a_grid_is_parsed_back(grid: list[list[str]]) -> None:
    columns, rows, alignment = parse_markdown_grid(markdown_grid(grid[0], grid[1:]).split("\n"))
    assert [columns, *rows] == grid
    assert alignment == "l" * len(columns)


def test_wide_markdown_tables_are_divided(tables: list[Table]) -> None:
    table = next(
        table for table in tables if table.slug == "norm-ratio" and LONG_NAME not in {r[0] for r in table.rows}
    )
    assert len(table.columns) == 19
    text = to_markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 120
    heads = [line for line in lines if "| model | optimizer |" in line]
    assert len(heads) > 1
    assert [head for line in heads for head in line.strip("| ").split(" | ")[2:]] == table.columns[2:]
    assert sum(f"| {table.rows[0][0]} | {table.rows[0][1]} |" in line for line in lines) == len(heads)


def test_tables_are_printed_in_one_place() -> None:
    found = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "megatron_lion").rglob("*.py")
        if "rich.table import Table" in path.read_text(encoding="utf-8")
    }
    assert found == {"megatron_lion/compare/print_tables.py"}
