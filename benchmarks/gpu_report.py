"""Compares the results of the GPU check with the goals; each goal is 'met', 'missed by x' or 'not measured'.

    python benchmarks/gpu_report.py DIR             # DIR of gpu.py; writes benchmarks/results/gpu-DATE-CARD.md and .jsonl
    python benchmarks/gpu_report.py --docs          # rewrites the table in docs/performance.md from those files

The figures of a rehearsal are not about a GPU, so its report is printed but not written.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu_stages.stage import SAME, read_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from megatron_lion.compare.table import markdown_grid

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"
DOCUMENT = BENCHMARKS.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: gpu_report.py --docs -->\n", "<!-- end: gpu_report.py --docs -->\n"
NOT_MEASURED = "not measured"
LIMITS = ("what", "goal", "stretch", "set for")
"""Headings of the cells that `limits` returns."""

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="output folder of benchmarks/gpu.py")
    parser.add_argument("--docs", action="store_true", help="rewrite the table in docs/performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where reports are written and read")
    args = parser.parse_args()
    if args.folder is None and not args.docs:
        parser.error("give the output folder of benchmarks/gpu.py, or --docs")
    try:
        if args.folder is not None:
            report_folder(args.folder, args.results)
        if args.docs:
            write_docs(args.results)
    except ValueError as error:
        sys.stderr.write(f"gpu_report.py: {error}\n")
        return 2
    return 0


def report_folder(folder: Path, results: Path) -> None:
    """Prints the report of a folder and, unless it is a rehearsal, writes it with its rows."""
    source = folder / "results.jsonl"
    rows = read(source)
    text = report(rows)
    sys.stdout.write(text)
    if rows[-1]["rehearsal"]:
        sys.stdout.write("\nA rehearsal: nothing was written.\n")
        return
    results.mkdir(parents=True, exist_ok=True)
    name = free_name(results, f"gpu-{rows[-1]['time'][:10]}-{slug(rows[-1]['card'])}", source)
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.copyfile(source, results / f"{name}.jsonl")
    sys.stdout.write(f"\nwrote {results / name}.md and .jsonl\n")


def free_name(results: Path, name: str, source: Path) -> str:
    """The name, with -2, -3 … if a file of another run has it; a file whose rows are the first of these is replaced."""
    for number in range(1, 1000):
        found = results / f"{name}{f'-{number}' if number > 1 else ''}.jsonl"
        if not found.exists() or source.read_bytes().startswith(found.read_bytes()):
            return found.stem
    raise ValueError(f"{results}: {name}-2 to -999 exist; move them away")


def read(path: Path) -> list[Row]:
    """The rows of one machine and commit.

    Raises:
        ValueError: the file does not exist, a line is not a row, or the rows are of several machines or commits.
    """
    if not path.exists():
        raise ValueError(f"{path}: does not exist; run benchmarks/gpu.py --output {path.parent} first")
    try:
        rows = read_rows(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove the line") from error
    if not rows:
        raise ValueError(f"{path}: no rows; run benchmarks/gpu.py --output {path.parent} again")
    for key in SAME:
        if len(values := {row[key] for row in rows}) > 1:
            found = ", ".join(sorted(map(str, values)))
            raise ValueError(f"{path}: rows with several values of {key} ({found}); keep the lines of one of them")
    return rows


def goals() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((BENCHMARKS / "goals.json").read_text(encoding="utf-8"))["goals"]
    return found


def measured(goal: dict[str, Any], rows: list[Row]) -> tuple[Any, str]:
    """(value of a goal, remark): the largest figure among the newest rows of its parts.

    A check of several parts passes if all pass. If a part has no value, the goal is not measured unless another part
    failed.
    """
    newest = {row["part"]: row for row in rows if row["stage"] == goal["stage"] and row["part"] in goal["parts"]}
    values = [row[goal["field"]] for row in newest.values() if row.get(goal["field"]) is not None]
    lacking = [part for part in goal["parts"] if part not in newest or newest[part].get(goal["field"]) is None]
    if goal["must"] is True:
        if False in values:
            return False, ""
        return (True, "") if values and not lacking else (None, _why(lacking, newest))
    if not values:
        return None, _why(lacking, newest)
    best = max(values)
    if not lacking:
        return best, ""
    # A missing part can only raise the largest figure: a figure above the limit is decided, one below it is not.
    decided = (best > goal["must"]) if goal["better"] == "lower" else (best >= goal["must"])
    some = f"{len(values)} of {len(goal['parts'])} measured"
    return (best, some) if decided else (None, f"{some}, {shown(best)}")


def _why(lacking: list[str], newest: dict[str, Row]) -> str:
    row = newest.get(lacking[0], {})
    return str(row.get("error") or row.get("skipped") or "")


def verdict(goal: dict[str, Any], value: Any) -> str:
    """'met', 'missed by x' (in units of the goal's figure), 'failed' for a check, or 'not measured'."""
    if value is None:
        return NOT_MEASURED
    if goal["must"] is True:
        return "met" if value else "failed"
    lower = goal["better"] == "lower"
    beyond = value - goal["must"] if lower else goal["must"] - value
    if beyond > 0:
        return f"missed by {beyond:.3g}"
    stretch = goal.get("stretch")
    return "met, stretch too" if stretch is not None and (value <= stretch if lower else value >= stretch) else "met"


def report(rows: list[Row]) -> str:
    """The report of one machine as Markdown: facts, goals, every row."""
    last = rows[-1]
    rehearsal = last["rehearsal"]
    title = f"{last['card']}, {last['time'][:10]}"
    facts = (
        f"{last['card']} ({last['memory_gib']} GiB), driver {last['driver']}, torch {last['torch']}, triton {last['triton']}, "
        f"megatron-core {last['megatron_core']}, Python {last['python']}, commit {last['commit']}."
    )
    lines = [f"# GPU check: {title}", ""]
    lines += ["**Rehearsal on a CPU: no figure here is about a GPU.**", ""] if rehearsal else []
    lines += [
        facts,
        "",
        "## Goals",
        "",
    ]
    judged_goals = []
    for goal in goals():
        value, why = (None, "a rehearsal") if rehearsal else measured(goal, rows)
        judged = verdict(goal, value) + (f": {why}" if why else "")
        judged_goals.append([*limits(goal), shown(value), judged])
    lines += [
        markdown_grid([*LIMITS, "measured", "verdict"], judged_goals, "lrrlrl"),
        "",
        "## Rows",
        "",
        markdown_grid(
            ["stage", "part", "outcome", "figures"], [[row["stage"], row["part"], *outcome(row)] for row in rows]
        ),
    ]
    return "\n".join(lines) + "\n"


def outcome(row: Row) -> tuple[str, str]:
    """(outcome, figures) of a row."""
    for word in ("error", "skipped"):
        if row.get(word):
            return word, str(row[word])
    passed = {True: "passed", False: "failed", None: "measured"}[row.get("passed")]
    left_out = {"stage", "part", "time", "passed", "python", "memory_gib", "trace", *SAME}
    return passed, ", ".join(f"{key} {shown(value)}" for key, value in row.items() if key not in left_out)


def write_docs(results: Path, document: Path = DOCUMENT) -> None:
    """Rewrites the generated part of a document.

    Raises:
        ValueError: the document lacks the marks, or the folder of results does not exist.
    """
    if not results.is_dir():
        raise ValueError(f"--results {results}: no such folder; the table is made from its files")
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document}: no lines {BEGIN.strip()} and {END.strip()}; put them where the table belongs")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(before + BEGIN + docs_table(results) + END + after, encoding="utf-8")


def docs_table(results: Path) -> str:
    """The table of goals with one column per result file; only the goals and these files are read."""
    files = sorted(results.glob("gpu-*.jsonl"))
    columns = [read(path) for path in files]
    heads = [f"[{rows[-1]['card']}, {rows[-1]['time'][:10]}](../benchmarks/results/{path.stem}.md)"
             for path, rows in zip(files, columns, strict=True)]  # fmt: skip
    cells_of_goals = []
    for goal in goals():
        cells = []
        for rows in columns:
            value, remark = measured(goal, rows)
            figure = "" if value is None or goal["must"] is True else f"{shown(value)}, "
            cells.append(figure + verdict(goal, value) + (f": {remark}" if remark else ""))
        cells_of_goals.append([*limits(goal), *(cells or [NOT_MEASURED])])
    heads = heads or ["measured"]
    return markdown_grid([*LIMITS, *heads], cells_of_goals, "lrrl" + "l" * len(heads)) + "\n"


def limits(goal: dict[str, Any]) -> list[str]:
    """The cells of a goal's limits, with the headings `LIMITS`."""
    return [goal["what"], limit(goal, "must"), limit(goal, "stretch"), goal.get("card", "any")]


def limit(goal: dict[str, Any], which: str) -> str:
    """A goal's figure with its direction."""
    value = goal.get(which)
    if value is None:
        return ""
    return "yes" if value is True else f"{'≤' if goal['better'] == 'lower' else '≥'} {shown(value)}"


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def slug(card: str) -> str:
    """A card's name as part of a file name: "NVIDIA H100 80GB HBM3" is "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    sys.exit(main())
