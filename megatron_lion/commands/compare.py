"""`megatron-lion compare`: tables, figures and a report over several runs, from their folders alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.compare.print_tables import print_tables
from megatron_lion.streams import next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.compare.best import Choice, Confirmations
    from megatron_lion.compare.table import Table
    from megatron_lion.runs.record import RunRecord

HELP = (
    "Compare runs by the files in their folders: tables of perplexity by step, losses, norm ratio, cost and settings; figures; "
    "an HTML report"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add(
        "runs",
        type=str,
        nargs="+",
        metavar="RUN",
        help="run folders; a sweep folder means all its runs; a Hugging Face folder with results is a reference",
    )
    add("--output", type=str, default="./comparison", metavar="DIR", help="folder for report.html, tables and figures")
    add(
        "--format",
        type=str,
        default="text",
        choices=["text", "markdown", "csv", "latex"],
        help="format of the printed tables; Markdown, CSV and LaTeX files are always written to DIR",
    )
    add(
        "--best",
        action="store_true",
        help="compare only the best setting of each optimizer: the one with the lowest final validation loss, with all its seeds, or "
        "with its confirmation runs only if `sweep --confirm` made them",
    )
    add(
        "--x-axis",
        type=str,
        default="step",
        choices=["step", "tokens", "time"],
        help="x-axis of the PNG figures, and initial x-axis of the report's charts; time counts training steps only",
    )
    add(
        "--target-loss",
        type=float,
        default=None,
        help="target of the table of steps to a test loss (nats per token); default: a loss that every finished run of a model reaches",
    )
    add("--no-figures", action="store_true", help="write no PNG figures; the report still has its charts")


def run(args: Any) -> None:
    """Writes the output folder and prints the tables to stdout."""
    from megatron_lion.compare.best import best_table, run_folders, without_verdicts
    from megatron_lion.compare.html_report import write_report
    from megatron_lion.compare.run_tables import build_tables
    from megatron_lion.compare.selection import read_runs
    from megatron_lion.evaluate.stored_results import with_current_results
    from megatron_lion.files import storage_errors
    from megatron_lion.sweep.summary import confirmations, sweep_tables

    folders = run_folders(args.runs)
    runs = read_runs(folders, with_current_results)
    known = confirmations(folders)
    tried = [run for run in runs if not run.is_reference]
    references = [run for run in runs if run.is_reference]
    tables = sweep_tables(args.runs, judged=not args.best)
    if args.best:
        choices = _best(tried, known)
        runs = [*read_runs([run.folder for choice in choices for run in choice.compared]), *references]
        tables.append(best_table(choices))
        tables += [
            without_verdicts(table, choices) if table.slug == "seeds" else table
            for table in build_tables(runs, args.target_loss)
        ]
    else:
        tables += [_with_selected_seeds(table, known) for table in build_tables(runs, args.target_loss)]
    trained = [run for run in runs if not run.is_reference]
    tried = [run for run in tried if run.folder not in known]  # for the curve over the learning rates
    folder = Path(args.output)
    with storage_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    _write_tables(tables, folder)
    report = write_report(trained or runs, tables, folder / "report.html", args.x_axis, tried)
    figures: list[Path] = []
    if not args.no_figures:
        from megatron_lion.compare.png_figures import write_figures

        figures = write_figures(trained, folder, args.x_axis, tried)
    print_tables(tables, args.format)
    say(
        f"report:  {report}\ntables:  {folder}/tables.md, tables.tex, one CSV a table"
        + (f"\nfigures: {len(figures)} PNG files, {figures[0]} first" if figures else "")
    )
    next_steps(f"open {report.resolve().as_uri()} in a browser")


def _best(tried: list[RunRecord], known: Confirmations) -> list[Choice]:
    """Returns the choice of each optimizer.

    Raises:
        CheckpointError: no run is finished and has a validation loss, or the validation losses of an optimizer's settings are
            not comparable.
    """
    from megatron_lion.compare.best import NOT_COMPARABLE, choose_best
    from megatron_lion.errors import CheckpointError

    choices = choose_best(tried, known)
    if tried and not choices:
        raise CheckpointError(
            "--best: all runs are confirmation runs, which take no part in a choice; give the sweep's folder"
        )
    incomparable = [
        f"{choice.name}: {note}" for choice in choices for note in choice.notes if note.startswith(NOT_COMPARABLE)
    ]
    if incomparable:
        raise CheckpointError(f"--best: {incomparable[0]}; compare such runs without --best, or train them alike")
    if not any(choice.runs for choice in choices):
        raise CheckpointError(
            f"--best: none of the {len(tried)} runs is finished and has a validation loss; finish their training"
        )
    return choices


def _with_selected_seeds(table: Table, known: Confirmations) -> Table:
    """The table; that of seeds with a note if a setting's mean holds both the seeds of its selection and fresh ones."""
    if table.slug != "seeds" or not known:
        return table
    note = (
        "a setting's seeds include those that it was chosen by and its confirmation runs; the first make its mean too low "
        "by luck: compare the choices with --best, which uses their confirmation runs only"
    )
    return replace(table, notes=[*table.notes, note])


def _write_tables(tables: list[Table], folder: Path) -> None:
    """Writes one Markdown and one LaTeX file with all tables, and a CSV file for each table."""
    from megatron_lion.compare.table import to_csv, to_latex, to_markdown
    from megatron_lion.files import write_whole

    write_whole(folder / "tables.md", "\n".join(map(to_markdown, tables)).encode())
    write_whole(folder / "tables.tex", "\n".join(map(to_latex, tables)).encode())
    for table in tables:
        write_whole(folder / f"{table.slug}.csv", to_csv(table).encode())
