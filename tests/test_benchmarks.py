"""Every benchmark starts, so that scripts which are run rarely do not break unnoticed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = [
    path for path in sorted((REPO / "benchmarks").glob("*.py")) if "__main__" in path.read_text()
]  # not what they share


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: " in done.stdout


def test_growth_writes_each_row_as_it_is_measured(tmp_path: Path) -> None:
    words = [sys.executable, str(REPO / "benchmarks" / "growth.py"), "--quick", "--only", "compare"]
    done = subprocess.run(
        [*words, "--output", str(tmp_path / "growth")], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "growth.md").read_text() == done.stdout
    facts, *rows, fitted = map(json.loads, (tmp_path / "growth.jsonl").read_text().splitlines())
    assert "commit" in facts
    assert fitted["exponent over"] == "metrics_mb"
    assert [(row["subject"], row["runs"], row["lines a run"]) for row in rows] == [
        ("compare", 2, 200),
        ("compare", 2, 400),
    ]
    assert all(row["cpu_s"] > 0 and row["peak_mb"] > 20 for row in rows)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        pytest.param("parameters", {"section_s", "save_s", "restore_s"}, marks=pytest.mark.slow),  # the code of ranks
        pytest.param("documents", {"open_s", "index_s"}, marks=pytest.mark.slow),
        pytest.param(
            "checkpoints", {"list_s", "verify_all_s", "pretrain_cpu_s", "compare_cpu_s"}, marks=pytest.mark.slow
        ),
        pytest.param("ranks", {"build_s", "save_s"}, marks=pytest.mark.slow),
    ],
)
def test_growth_measures_a_subject(name: str, parts: set[str], tmp_path: Path) -> None:
    words = [sys.executable, str(REPO / "benchmarks" / "growth.py"), "--quick", "--output", str(tmp_path / "growth")]
    done = subprocess.run([*words, "--only", name], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *measured, fitted = map(json.loads, (tmp_path / "growth.jsonl").read_text().splitlines())
    assert [row["subject"] for row in measured] == [name, name]
    assert measured[0][name] < measured[1][name]
    for row in measured:
        assert parts <= row.keys()
        assert row["cpu_s"] > 0
        assert row["peak_mb"] > 20
    assert fitted["exponent over"] == name


def test_exponents_of_costs_that_are_powers_of_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    costs = importlib.import_module("growth_subjects.costs")
    rows = [
        {"size": size, "square": 3.0 * size**2, "flat": 7, "bent": 1 + size**3, "none": None}
        for size in (100, 10, 1000)
    ]
    found = costs.exponents(rows)
    assert found["exponent over"] == "size"
    assert (found["square"], found["flat"]) == ("2.00 (2.00)", "0.00 (0.00)")
    assert found["bent"].endswith("(3.00)")
    assert "none" not in found


@pytest.mark.parametrize("lines", [200, 1000])
def test_a_synthetic_run_of_growth_has_the_lines_it_is_named_after(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    growth = importlib.import_module("growth")
    run = growth.write_run(tmp_path / "run", lines, 1)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == lines
