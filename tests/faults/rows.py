"""What a case counts, the register of cases, and the file with one line of JSON for each finished case."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults.lab import Lab

REPO = Path(__file__).resolve().parents[2]
SHOWN = 12
"""Failures of a case that its row lists; the number of all is counted."""


@dataclass
class Tally:
    """Counts of one case.

    Attributes:
        injected: faults that took place.
        recovered: the same command again ended with the undisturbed twin's tensors, or the fault was refused as wanted.
        silent: exit 0 and another result.
        stuck: the same command again failed, or did not end.
        open: outcomes that are known gaps, counted apart.
        lost: most steps lost by one fault: last logged step less the newest checkpoint's.
        detect_s: longest time from the fault to the end of all processes.
        codes: exit codes of the disturbed command, each with its count.
        wrong: exit codes, tracebacks and other outcomes that are not as wanted, as text.
    """

    injected: int = 0
    recovered: int = 0
    silent: int = 0
    stuck: int = 0
    open: int = 0
    lost: int = 0
    detect_s: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def code(self, what: str, code: int, wanted: tuple[int, ...], errors: str = "") -> None:
        """Counts the exit code of a disturbed command; one that is not wanted, or a traceback, is noted as wrong."""
        name = "traceback" if "Traceback (most recent call last)" in errors else str(code)
        self.codes[name] += 1
        if name == "traceback" or code not in wanted:
            last = errors.strip().splitlines()[-1][:200] if errors.strip() else ""
            self.wrong.append(
                f"{what}: {name if name == str(code) else f'{code} with a traceback'}, wanted {wanted}: {last}"
            )

    def verdict(self, what: str, outcome: str, detail: str = "") -> None:
        """Counts the final outcome of a fault: "recovered", "silent", "stuck" or "open"."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome in ("silent", "stuck"):
            self.wrong.append(f"{what}: {outcome}: {detail}"[:300])

    @property
    def passed(self) -> bool:
        """Whether faults were injected and every outcome is as wanted."""
        return self.injected > 0 and not (self.silent or self.stuck or self.wrong)


@dataclass(frozen=True)
class Case:
    """A named case: one row of the scorecard.

    Attributes:
        name: for `make chaos CASE=name`.
        family: heading of the scorecard.
        fault: what is injected, in a few words.
        wanted: the wanted exit codes or outcome, in a few words.
        work: injects the faults and counts.
    """

    name: str
    family: str
    fault: str
    wanted: str
    work: Callable[[Lab, Tally], None]


MODULES = (
    "disk",
    "verbs",
    "power",
    "peers",
    "signals",
    "locks",
    "checkpoints",
    "numbers",
    "data",
    "hostile",
    "layouts",
    "long",
    "launcher",
    "hosts",
)
CASES: dict[str, Case] = {}


def case(name: str, family: str, fault: str, wanted: str) -> Callable[[Callable[[Lab, Tally], None]], Any]:
    """Registers a function (lab, tally) as a case."""

    def register(work: Callable[[Lab, Tally], None]) -> Callable[[Lab, Tally], None]:
        assert name not in CASES, name
        CASES[name] = Case(name, family, fault, wanted, work)
        return work

    return register


def all_cases() -> dict[str, Case]:
    """The cases of all families, by name."""
    for module in MODULES:
        importlib.import_module(f"faults.cases_{module}")
    return CASES


def commit() -> str:
    """The commit of the tree, with "+changes" if tracked files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + "+changes" * bool(
        git("status", "--porcelain", "-uno")
    )


def run_case(chosen: Case, lab: Lab) -> dict[str, Any]:
    """Runs a case and returns its row."""
    tally = Tally()
    started = time.monotonic()
    try:
        chosen.work(lab, tally)
    except Exception:  # the other cases still run; the row reports that this one did not end
        tally.wrong.append(f"the case itself failed: {traceback.format_exc()[-1500:]}")
    return {
        "case": chosen.name, "family": chosen.family, "fault": chosen.fault, "wanted": chosen.wanted,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit(), "seconds": round(time.monotonic() - started, 1),
        "injected": tally.injected, "recovered": tally.recovered, "silent": tally.silent, "stuck": tally.stuck,
        "open": tally.open, "lost": tally.lost, "detect_s": round(tally.detect_s, 1), "codes": dict(sorted(tally.codes.items())),
        "wrong": len(tally.wrong), "failures": tally.wrong[:SHOWN], "notes": tally.notes, "passed": tally.passed,
    }  # fmt: skip


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to the file of results, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each case in a file of results; a torn last line is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["case"]] = row
    return rows
