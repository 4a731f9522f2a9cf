"""The files of CI: workflows call .ci/run and existing make targets, and coverage is counted by folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_ci_on_github_is_the_script_and_nothing_else() -> None:
    assert commands(REPO / ".github" / "workflows" / "ci.yml") == ["bash .ci/run"]
    assert "make test-nightly" in commands(REPO / ".github" / "workflows" / "nightly.yml")


def test_make_has_the_targets_that_ci_names() -> None:
    script = (REPO / ".ci" / "run").read_text()
    lines = [script, *(line for workflow in WORKFLOWS for line in commands(workflow))]
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(lines)))
    assert {"setup", "lint", "types", "test", "test-ci", "test-nightly"} <= named
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def test_a_bug_report_asks_for_the_environment() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in FORMS}
    assert {"bug", "feature"} <= forms.keys()
    required = [
        field["attributes"]["label"] for field in forms["bug"]["body"] if field.get("validations", {}).get("required")
    ]
    assert any("megatron-lion env" in label for label in required)


def test_hooks_run_the_tools_of_the_environment() -> None:
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "a remote hook would use another version of the tool"
    # One of a key that is written twice is lost silently, so each entry of the file must be an entry that was read.
    written = re.findall(r"^\s+entry: (.*)$", (REPO / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert entries == written
    assert {hook["id"] for hook in hooks[0]["hooks"]} >= {"mypy", "imports", "words", "whitespace"}
    assert any("ruff check" in entry for entry in entries)
    assert any("ruff format" in entry for entry in entries)


def run_ci(tmp_path: Path, fails: str) -> subprocess.CompletedProcess[str]:
    """Runs .ci/run in a folder with a fake make, in which only the target `fails` fails."""
    for name in (".ci/run", "launch/find-python.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    scripts = {
        tools / "make": f'[ "$1" = "{fails}" ] && exit 2\necho "made $* with $EXTRA"; echo "7 passed in 1.00s"',
        **{tools / name: "exit 0" for name in ("chromium", "g++", "git")},
        tools / "apt-get": "echo 'nothing is installed in a test'; exit 1",
        python: "echo total 100.0%",
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_ci_ends_with_the_counts_and_the_outcome(tmp_path: Path) -> None:
    done = run_ci(tmp_path, fails="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made setup with ci" in done.stdout
    last = done.stdout.splitlines()[-4:]
    assert last[0] == ""
    assert last[1:] == ["7 passed in 1.00s", "7 passed in 1.00s", "== CI passed"]
    assert "total 100.0%" in done.stdout


@pytest.mark.parametrize(
    ("target", "step"),
    [
        ("setup", "environment"),
        ("lint", "lint"),
        ("types", "types"),
        ("demo-quick", "demo, shortened"),
        ("test", "tests"),
        ("test-ci", "slow tests"),
    ],
)
def test_ci_fails_if_a_step_fails(tmp_path: Path, target: str, step: str) -> None:
    done = run_ci(tmp_path, fails=target)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == f"== CI failed at: {step} (exit code 2)"
    assert "== CI passed" not in done.stdout


def test_coverage_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage = pytest.importorskip("coverage", reason="needs coverage (the ci extra has it)")
    spec = importlib.util.spec_from_file_location("coverage_by_folder", REPO / ".ci" / "coverage_by_folder.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.REPO = tmp_path
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for name in ("megatron_lion/one.py", "megatron_lion/sub/two.py", "benchmarks/three.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1\nb = 2\n\nc = 3\nd = 4\n")
    data = coverage.CoverageData(str(tmp_path / "data"))
    executed = {"megatron_lion/one.py": [1, 2, 4], "benchmarks/three.py": [1, 2, 4, 5]}
    data.add_lines({str(tmp_path / name): lines for name, lines in executed.items()})
    data.write()
    assert script.main(str(tmp_path / "data")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["megatron_lion", "4", "3", "75.0%"],
        ["megatron_lion/sub", "4", "0", "0.0%"],
        ["total", "8", "3", "37.5%"],
    ]
    assert script.main(str(tmp_path / "absent")) == 1
