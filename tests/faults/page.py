"""Writes docs/scorecard.md from the rows of a full run; `python -m faults.page` writes it again from the stored rows."""

from __future__ import annotations

import json
import sys
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

`make test-full` injects every fault of `tests/faults/` and writes this page (at most 90 minutes on two cores). `make chaos`
lists the cases, and `make chaos CASE=name` runs one.

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
    dates, commits = sorted({row["date"] for row in found}), sorted({row["commit"] for row in found})
    total = {name: sum(row[name] for row in found) for name in ("injected", "recovered", "silent", "stuck", "open")}
    parts = [
        HEAD,
        f"Run of {' to '.join(dict.fromkeys((dates[0], dates[-1])))} at commit {', '.join(commits)}: {total['injected']:,} faults, "
        f"{total['recovered']:,} recovered, {total['silent']:,} silent, {total['stuck']:,} stuck, {total['open']:,} open; "
        f"{sum(row['passed'] for row in found)} of {len(found)} cases as wanted, in "
        f"{sum(row['seconds'] for row in found) / 60:.0f} minutes of one core.",
    ]
    for family in dict.fromkeys(row["family"] for row in found):
        chosen = [row for row in found if row["family"] == family]
        parts += [
            f"## {family[0].upper()}{family[1:]}",
            markdown_grid(COLUMNS, [cells(row) for row in chosen], "lrrrrrrrll"),
        ]
        notes = [f"- {row['fault']}: {note}" for row in chosen for note in row["notes"]]
        notes += [f"- Not as wanted: {row['fault']}: {text}" for row in chosen for text in row["failures"]]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def publish(results: Path, commit: str, names: list[str]) -> None:
    """Stores the rows of a finished full run in benchmarks/results/ and writes the page.

    Rows of other commits, or a run in which a case has no row, are refused: the page shows one tree.
    """
    found = rows.read(results)
    missing = [name for name in names if found.get(name, {}).get("commit") != commit]
    if missing:
        sys.exit(
            f"not published: {len(missing)} cases have no row of {commit}, first {missing[0]}; run make test-full again"
        )
    if "+changes" in commit:
        sys.exit("not published: the tree has changes that are not committed")
    STORED.write_text("".join(json.dumps(found[name]) + "\n" for name in names), encoding="utf-8")
    PAGE.write_text(page(list(rows.read(STORED).values())), encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page(list(rows.read(STORED).values())), encoding="utf-8")
