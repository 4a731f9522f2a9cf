"""Writes docs/scorecard.md from the rows of a full run; `python -m faults.page` writes it again from the stored rows."""

from __future__ import annotations

import json
import sys
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
HEAD = """# Fault scorecard

`make test-full` injects every fault of `tests/faults/` and writes this page (about 90 minutes on two cores), and
`make test-full FAMILY=signals` one part of it. `make chaos` lists the cases, and `make chaos CASE=name` runs one.

A fault is *recovered* if the same command, given again, ends with exactly the tensors, random states and losses of an
undisturbed run, or if wrong input was refused with the wanted code. It is *silent* if a command ended with 0 and another
result, and *stuck* if the same command fails again. *Open* counts the known gaps apart. *Steps lost* is the most that one
fault cost. *Ends after* is the longest time from a fault to the end of all processes. The runs are small (2 layers,
width 32), on one to four CPU processes with gloo.
"""
EMPTY = "\nNo full run is recorded yet.\n"


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells, in the order of COLUMNS."""
    codes = ", ".join(f"{code} ({count})" for code, count in row["codes"].items())
    ends = f"{row['detect_s']:.1f} s" if row["detect_s"] else "–"
    counts = [f"{row[name]:,}" for name in ("injected", "recovered", "silent", "stuck", "open", "lost")]
    return [row["fault"], *counts, ends, codes or "–", row["wanted"]]


def text_table(found: list[dict[str, Any]]) -> str:
    """The rows for the terminal."""
    return markdown_grid(["case", *COLUMNS], [[row["case"], *cells(row)] for row in found])


def page(found: list[dict[str, Any]]) -> str:
    """The page's text for the rows of one run."""
    if not found:
        return HEAD + EMPTY
    dates = sorted({row["date"] for row in found})
    total = {name: sum(row[name] for row in found) for name in ("injected", "recovered", "silent", "stuck", "open")}
    parts = [
        HEAD,
        f"Run of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {total['injected']:,} faults, "
        f"{total['recovered']:,} recovered, {total['silent']:,} silent, {total['stuck']:,} stuck, {total['open']:,} open; "
        f"{sum(row['passed'] for row in found)} of {len(found)} cases as wanted, in "
        f"{sum(row['seconds'] for row in found) / 60:.0f} minutes of one core.",
    ]
    for family in dict.fromkeys(row["family"] for row in found):
        chosen = [row for row in found if row["family"] == family]
        parts += [
            f"## {family[0].upper()}{family[1:]}",
            f"{chosen[-1]['date']}, commit {', '.join(dict.fromkeys(row['commit'] for row in chosen))}.",
            markdown_grid(COLUMNS, [cells(row) for row in chosen], "lrrrrrrrll"),
        ]
        notes = [f"- {row['fault']}: {note}" for row in chosen for note in row["notes"]]
        notes += [f"- Not as wanted: {row['fault']}: {text}" for row in chosen for text in row["failures"]]
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
