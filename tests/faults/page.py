"""Writes docs/scorecard.md from the rows of a full run; `python -m faults.page` writes it again from the stored rows."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from faults import rows
from megatron_lion.compare.table import markdown_grid

PAGE = rows.REPO / "docs" / "scorecard.md"
STORED = rows.REPO / "benchmarks" / "results" / "faults.jsonl"
COLUMNS = [
    "fault",
    "injected",
    "recovered",
    "silent",
    "stuck",
    "open",
    "steps lost",
    "ends after",
    "codes seen",
    "wanted",
]
WIDTH = 120
HEAD = """# Fault scorecard

## In short

The tests inject faults into the commands of this project: killed processes, full disks, power cuts, damaged files and
others. This page counts the outcomes. This command runs one case:

    make chaos CASE=lock-two-writers
"""
EMPTY = "No full run is recorded yet."
TEXT = """## How to

- `make chaos` lists the cases, and `make chaos CASE=name` runs one.
- `make test-full` injects every fault of `tests/faults/` and writes this page (about 90 minutes on two cores).
- `make test-full FAMILY=signals` runs one part of it.

Below, each family of faults has a numbered list. It names each fault and the wanted exit code or outcome. The table
below the list has one row for each number:

- *Injected* counts the faults that took place.
- *Recovered*: the same command, given again, ends with exactly the tensors, random states and losses of an undisturbed
  run. If the input was wrong, it was refused with the wanted code.
- *Silent*: a command ended with 0 and another result.
- *Stuck*: the same command fails again.
- *Open* counts the known gaps apart.
- *Steps lost* is the most that one fault cost.
- *Ends after* is the longest time from a fault to the end of all processes.
- *Codes seen* are the [exit codes](exit-codes.md) of the disturbed commands, with their counts. SIGKILL gives -9.

## Background

- The runs are small (2 layers, width 32), on one to four CPU processes with [gloo](glossary.md#gloo).
- A *twin* is an undisturbed run with the same settings.
- DP2 and TP2 are two [data-parallel](glossary.md#data-parallel) and [tensor-parallel](glossary.md#tensor-parallel)
  processes.
- ENOSPC is the error of a full disk, EDQUOT of an exhausted quota, EIO of a failed device and EROFS of a read-only file
  system.
- Each family is measured at one commit, which its section names.

## Results
"""


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells, in the order of COLUMNS."""
    codes = ", ".join(f"{code} ({count})" for code, count in row["codes"].items())
    ends = f"{row['detect_s']:.1f} s" if row["detect_s"] else "–"
    counts = [f"{row[name]:,}" for name in ("injected", "recovered", "silent", "stuck", "open", "lost")]
    return [row["fault"], *counts, ends, codes or "–", row["wanted"]]


def item(mark: str, text: str) -> str:
    """An entry of a list, wrapped."""
    lines = textwrap.wrap(text, WIDTH - len(mark), break_long_words=False, break_on_hyphens=False)
    return mark + f"\n{' ' * len(mark)}".join(lines)


def text_table(found: list[dict[str, Any]]) -> str:
    """The rows for the terminal."""
    return markdown_grid(["case", *COLUMNS], [[row["case"], *cells(row)] for row in found])


def totals(found: list[dict[str, Any]]) -> str:
    """The counts of all rows together, as a sentence."""
    if not found:
        return EMPTY
    dates = sorted({row["date"] for row in found})
    total = {name: sum(row[name] for row in found) for name in ("injected", "recovered", "silent", "stuck", "open")}
    return (
        f"Run of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {total['injected']:,} faults, "
        f"{total['recovered']:,} recovered, {total['silent']:,} silent, {total['stuck']:,} stuck, {total['open']:,} open;\n"
        f"{sum(row['passed'] for row in found)} of {len(found)} cases as wanted, in "
        f"{sum(row['seconds'] for row in found) / 60:.0f} minutes of one core."
    )


def page(found: list[dict[str, Any]]) -> str:
    """The page's text for the rows of one run.

    The table of a family names its faults by number: with their texts its lines would be up to 155 characters long.
    """
    parts = [HEAD, totals(found), TEXT]
    for family in dict.fromkeys(row["family"] for row in found):
        chosen = [row for row in found if row["family"] == family]
        parts += [
            f"### {family[0].upper()}{family[1:]}",
            f"{chosen[-1]['date']}, commit {', '.join(dict.fromkeys(row['commit'] for row in chosen))}.",
            "\n".join(
                item(f"{number}. ", f"{row['fault']}. Wanted: {row['wanted']}.") for number, row in enumerate(chosen, 1)
            ),
            markdown_grid(
                COLUMNS[:-1], [[str(number), *cells(row)[1:-1]] for number, row in enumerate(chosen, 1)], "rrrrrrrrl"
            ),
        ]
        notes = [item("- ", f"{row['fault']}: {note}") for row in chosen for note in row["notes"]]
        notes += [item("- ", f"Not as wanted: {row['fault']}: {text}") for row in chosen for text in row["failures"]]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def publish(results: Path, cases: Iterable[rows.Case], families: Collection[str]) -> None:
    """Stores the rows of families that have run whole in benchmarks/results/ and writes the page.

    A family is measured at one commit. Families may be of several commits, each shown with its own: a change in the
    launcher does not ask for the bit flips again.

    Args:
        results: file with the rows of the run.
        cases: all cases.
        families: those that ran; the others keep the rows that are stored.
    """
    fresh, kept = rows.read(results), rows.read(STORED)
    chosen: list[dict[str, Any]] = []
    for one in cases:
        row = (fresh if one.family in families else kept).get(one.name)
        if row is None:
            sys.exit(f"not published: {one.name} has no row; run make test-full FAMILY='{one.family}'")
        chosen.append({**row, "family": one.family, "fault": one.fault, "wanted": one.wanted})
    for family in dict.fromkeys(row["family"] for row in chosen):
        commits = {row["commit"] for row in chosen if row["family"] == family}
        if len(commits) > 1:
            sys.exit(f"not published: rows of the family '{family}' are of several commits; run make test-full again")
        if any("+changes" in commit for commit in commits):
            sys.exit(f"not published: '{family}' ran in a tree with changes that are not committed")
    STORED.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    PAGE.write_text(page(list(rows.read(STORED).values())), encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page(list(rows.read(STORED).values())), encoding="utf-8")
