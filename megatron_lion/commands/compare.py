"""`megatron-lion compare`: tables and figures over several runs, from their folders alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.compare.table import Table

HELP = (
    "Compare runs by their folders alone: perplexity by step, losses, norm ratio, cost, settings; figures and a report"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("runs", type=str, nargs="+", metavar="RUN", help="run folders")
    add("--output", type=str, default="./comparison", metavar="DIR", help="folder for report.html, tables and figures")
    add(
        "--format",
        type=str,
        default="text",
        choices=["text", "markdown", "csv", "latex"],
        help="how the tables are printed; all forms are written to the output folder in any case",
    )
    add("--target-loss", type=float, default=None, help="test loss (nats per token) for the table of steps to a target")
    add("--no-figures", action="store_true", help="write no PNG figures (the report has its own charts)")


def run(args: Any) -> None:
    """Prints the tables on stdout and writes the output folder."""
    from megatron_lion.compare.report import write_report
    from megatron_lion.compare.runs import read_runs
    from megatron_lion.compare.tables import build_tables
    from megatron_lion.data.files import storage_errors

    runs = read_runs(args.runs)
    tables = build_tables(runs, args.target_loss)
    print_tables(tables, args.format)
    folder = Path(args.output)
    with storage_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    _write_tables(tables, folder)
    report = write_report(runs, tables, folder / "report.html")
    figures: list[Path] = []
    if not args.no_figures:
        from megatron_lion.compare.figures import write_figures

        figures = write_figures(runs, folder)
    sys.stderr.write(
        f"report:  {report}\ntables:  {folder}/tables.md, tables.tex, one CSV a table\n"
        + (f"figures: {len(figures)} PNG files, {figures[0]} first\n" if figures else "")
    )


def print_tables(tables: list[Table], form: str) -> None:
    """All tables on stdout, in the form asked for."""
    from megatron_lion.compare.table import to_csv, to_latex, to_markdown, to_rich

    if form != "text":
        write = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}[form]
        sys.stdout.write("\n".join(map(write, tables)))
        return
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not sys.stdout.isatty():
        console.width = 200  # a pipe has no width of its own; the tables must not be cut for it
    for table in tables:
        console.print(to_rich(table))
        console.print()


def _write_tables(tables: list[Table], folder: Path) -> None:
    """Markdown and LaTeX with all tables, and a CSV file for each."""
    from megatron_lion.compare.table import to_csv, to_latex, to_markdown
    from megatron_lion.data.files import write_whole

    write_whole(folder / "tables.md", "\n".join(map(to_markdown, tables)).encode())
    write_whole(folder / "tables.tex", "\n".join(map(to_latex, tables)).encode())
    for table in tables:
        write_whole(folder / f"{table.slug}.csv", to_csv(table).encode())
