"""docs/scorecard.md is what its result file gives; rows count what they should; only a complete run is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import page, rows, runner
from faults.rows import Case, Tally

NOTHING: Any = None  # these cases start no process


def row_of(work: Callable[[Any, Tally], None]) -> dict[str, Any]:
    return rows.run_case(Case("name", "family", "a fault | with a bar", "8", work), NOTHING)


def recovered(lab: Any, tally: Tally) -> None:
    tally.injected += 1
    tally.code("first", 8, (8,), "megatron-lion: rank 1 is lost")
    tally.verdict("first", "recovered")


def test_the_page_is_made_from_its_results() -> None:
    expected = page.page(list(rows.read(page.STORED).values()))
    assert page.PAGE.read_text() == expected, "run: PYTHONPATH=tests:. python -m faults.page"
    assert max(map(len, expected.splitlines())) <= page.WIDTH


def test_a_case_as_wanted_passes() -> None:
    row = row_of(recovered)
    assert row["passed"]
    assert (row["injected"], row["recovered"], row["codes"], row["wrong"]) == (1, 1, {"8": 1}, 0)


@pytest.mark.parametrize(
    ("outcome", "code", "errors"),
    [
        ("silent", 8, ""),
        ("stuck", 8, ""),
        ("recovered", 1, ""),
        ("recovered", 8, "Traceback (most recent call last):\nError: x"),
    ],
)
def test_any_unwanted_outcome_fails_the_case(outcome: str, code: int, errors: str) -> None:
    def work(lab: Any, tally: Tally) -> None:
        tally.injected += 1
        tally.code("first", code, (8,), errors)
        tally.verdict("first", outcome, "other tensors")

    row = row_of(work)
    assert not row["passed"]
    assert row["failures"]


def test_a_case_that_injects_nothing_or_fails_itself_does_not_pass() -> None:
    def broken(lab: Any, tally: Tally) -> None:
        recovered(lab, tally)
        raise ValueError("in the case")

    assert not row_of(lambda lab, tally: None)["passed"]
    row = row_of(broken)
    assert not row["passed"]
    assert "in the case" in row["failures"][0]


def test_the_page_shows_rows_and_failures() -> None:
    row = {**row_of(recovered), "open": 3, "detect_s": 1.25, "notes": ["a note"], "failures": ["first: stuck"]}
    text = page.page([row])
    assert "1. a fault | with a bar. Wanted: 8." in text
    assert "| 1 | 1 | 1 | 0 | 0 | 3 | 0 | 1.2 s | 8 (1) |" in text
    assert "- a fault | with a bar: a note" in text
    assert "Not as wanted: a fault | with a bar: first: stuck" in text
    assert row["commit"] in text


def test_rows_survive_a_torn_line_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows.append(path, {"case": "a", "n": 1})
    rows.append(path, {"case": "a", "n": 2})
    with open(path, "a") as stream:
        stream.write('{"case": "b", ')
    assert rows.read(path) == {"a": {"case": "a", "n": 2}}


def cases(**families: str) -> list[Case]:
    return [Case(name, family, "a fault", "8", recovered) for name, family in families.items()]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "PAGE", tmp_path / "scorecard.md")
    monkeypatch.setattr(page, "STORED", tmp_path / "faults.jsonl")
    return tmp_path / "results.jsonl"


def add(path: Path, name: str, family: str, commit: str) -> None:
    rows.append(path, {**row_of(recovered), "case": name, "family": family, "commit": commit})


@pytest.mark.parametrize("fault", ["missing case", "other commit", "changed tree", "family that never ran"])
def test_only_whole_families_of_one_commit_are_published(results: Path, fault: str) -> None:
    add(results, "a", "one", "abc+changes" if fault == "changed tree" else "abc")
    if fault != "missing case":
        add(results, "b", "one", {"other commit": "old", "changed tree": "abc+changes"}.get(fault, "abc"))
    if fault != "family that never ran":
        add(page.STORED, "c", "two", "abc")
    stored = page.STORED.read_bytes() if page.STORED.exists() else b""
    with pytest.raises(SystemExit, match="not published"):
        page.publish(results, cases(a="one", b="one", c="two"), {"one"})
    assert not page.PAGE.exists()
    assert (page.STORED.read_bytes() if page.STORED.exists() else b"") == stored


def test_a_complete_run_is_published(results: Path) -> None:
    add(results, "a", "one", "abc")
    add(results, "gone", "one", "abc")
    page.publish(results, cases(a="one"), {"one"})
    assert [json.loads(line)["case"] for line in page.STORED.read_text().splitlines()] == ["a"]
    assert "1 of 1 cases as wanted" in page.PAGE.read_text()


def test_a_family_that_ran_again_is_shown_with_its_own_commit(results: Path) -> None:
    for name, family in (("a", "one"), ("b", "two")):
        add(page.STORED, name, family, "abc")
        add(results, name, family, "def")
    page.publish(results, cases(a="one", b="two"), {"two"})
    text = page.PAGE.read_text()
    one, two = text.split("### ")[1:]
    assert ("commit abc." in one, "commit def." in one) == (True, False)
    assert ("commit abc." in two, "commit def." in two) == (False, True)


def test_the_names_of_cases_are_words_for_make() -> None:
    cases = rows.all_cases()
    assert all(name.replace("-", "").isalnum() for name in cases)
    assert {case.family for case in cases.values()} >= {"starts", "saves", "power cuts", "peers", "signals"}


def test_no_ordinary_command_runs_the_full_cases() -> None:
    """A later -m replaces an earlier one, so each target of make leaves them out itself."""
    import tomllib

    lines = (rows.REPO / "Makefile").read_text().splitlines()
    chosen = [line for line in lines if "$(PYTEST)" in line and "-m hypothesis" not in line]
    assert len(chosen) >= 2
    assert all("not full" in line for line in chosen)
    settings = tomllib.loads((rows.REPO / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-m 'not full'" in settings["addopts"]


def test_a_full_run_is_continued_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases with a row of this commit are left out, but for --force and in a changed tree."""
    results = tmp_path / "results.jsonl"
    names = list(rows.all_cases())
    for name in names[1:]:
        rows.append(results, {**row_of(recovered), "case": name, "commit": "abc"})
    started: list[list[str]] = []
    monkeypatch.setattr(runner, "_run", lambda chosen, jobs, path: started.append(chosen) or {})
    for commit, options in (("abc", []), ("abc", ["--force"]), ("abc+changes", []), ("other", [])):
        monkeypatch.setattr(rows, "commit", lambda commit=commit: commit)
        monkeypatch.setattr("sys.argv", ["faults", "--all", "--results", str(results), *options])
        assert runner.main() == 0
    assert started == [names[:1], names, names, names]
    rows.append(results, {**row_of(lambda lab, tally: None), "case": names[1], "commit": "abc"})
    monkeypatch.setattr(rows, "commit", lambda: "abc")
    assert runner.main() == 1, "a failed row of the run that is continued counts"
