"""The files of CI: workflows call .ci/run and existing make targets, and coverage is counted by folder.

The versions that are tried come from pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

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
        python: f'echo "total 100.0%"; case "$*" in *{fails or "nothing"}*) exit 2;; esac',
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
        ("try_versions.py pinned", "demo from an installed wheel"),
        ("test", "tests"),
        ("test-ci", "slow tests"),
    ],
)
def test_ci_fails_if_a_step_fails(tmp_path: Path, target: str, step: str) -> None:
    done = run_ci(tmp_path, fails=target)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == f"== CI failed at: {step} (exit code 2)"
    assert "== CI passed" not in done.stdout


def script(name: str) -> Any:
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_tried_on_each_python_that_the_package_names() -> None:
    jobs = yaml.safe_load((REPO / ".github" / "workflows" / "versions.yml").read_text())["jobs"]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    (job,) = jobs.values()
    assert named
    # The workflow may try a Python before the package names it.
    assert set(named) <= set(job["strategy"]["matrix"]["python"])
    assert set(job["strategy"]["matrix"]["versions"]) == {"floors", "newest"}
    assert any(".ci/try_versions.py ${{ matrix.versions }} --tests" in step.get("run", "") for step in job["steps"])
    assert ".ci/try_versions.py pinned" in (REPO / ".ci" / "run").read_text()


def test_floors_are_read_from_the_project() -> None:
    module = script("try_versions")
    found = module.floors((REPO / "pyproject.toml").read_text())
    # The oracle is pip's own reading of the same lines: the floor fits, and nothing lower than it does.
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [line for name in module.EXTRAS for line in project["optional-dependencies"][name]]
    requirements = [Requirement(line) for line in [*project["dependencies"], *extras]]
    assert len(found) == len(requirements) >= 18
    for line, requirement in zip(found, requirements, strict=True):
        name, _, version = line.partition("==")
        assert name == requirement.name
        assert requirement.specifier.contains(version)
        *rest, last = (int(part) for part in version.split("."))
        below = [*rest, last - 1] if last else [rest[0] - 1, 99]
        assert not requirement.specifier.contains(".".join(map(str, below))), f"{requirement} has a lower version"


@pytest.mark.parametrize("line", ["numpy", "numpy<3", "numpy!=2.0"])
def test_a_dependency_without_a_floor_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=f"{line}: give a lowest version"):
        script("try_versions").lowest([line])


def test_the_files_of_ci_name_no_registry() -> None:
    """A mirror or a company's index is pip's configuration; a host in these files would override it."""
    files = [
        *WORKFLOWS,
        *(path for path in (REPO / ".ci").iterdir() if path.is_file()),
        REPO / "Makefile",
        REPO / "pyproject.toml",
    ]
    for path in files:
        assert not re.search(r"index-url|pypi\.|pythonhosted|download\.pytorch", path.read_text()), path


def trial(tmp_path: Path, *words: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    """Runs .ci/try_versions.py with a fake interpreter that writes its command lines to a file; `fails` is a part of one."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.replace("FAILS", fails or "nothing").replace("LOG", str(tmp_path / "log")))
    fake.chmod(0o755)
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.executable = {str(fake)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(REPO / ".ci" / "try_versions.py"), *words, "--folder", str(tmp_path / "new")],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


# `python -m build` makes a wheel, `-m venv` copies this script into the new environment, and `env` finds all packages.
FAKE = """#!/bin/sh
echo "$0 $*" >> LOG
case "$0 $*" in *"FAILS"*) exit 3;; esac
case "$*" in
    "-m build"*) mkdir -p "$4"; : > "$4/megatron_lion-1-py3-none-any.whl";;
    "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/megatron-lion";;
    env) echo '{"missing": []}';;
    "-c import sys"*) echo "$0";;
esac
"""


@pytest.mark.parametrize(
    ("versions", "verbs"),
    [("pinned", ["env", "demo"]), ("floors", ["env", "demo", "export", "evaluate"]), ("newest", ["env", "demo", "export", "evaluate"])],
)  # fmt: skip
def test_the_wheel_is_installed_and_tried_in_an_empty_folder(tmp_path: Path, versions: str, verbs: list[str]) -> None:
    done = trial(tmp_path, versions)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    (install,) = (line for line in lines if "pip install" in line)
    assert "megatron_lion-1-py3-none-any.whl" in install
    assert ("constraints.txt" in install) == (versions == "pinned")
    assert ("floors.txt" in install) == (versions == "floors")
    tried = [line.split()[1] for line in lines if line.split()[0].endswith("bin/megatron-lion")]
    assert tried == verbs


@pytest.mark.parametrize("fails", ["-m build", "-m venv", "pip install", "megatron-lion env", "demo --quick"])
def test_a_step_that_fails_ends_the_trial(tmp_path: Path, fails: str) -> None:
    done = trial(tmp_path, "pinned", fails=fails)
    assert done.returncode == 3, done.stdout + done.stderr
    assert fails in (tmp_path / "log").read_text().splitlines()[-1]


def test_coverage_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage = pytest.importorskip("coverage", reason="needs coverage (the ci extra has it)")
    module = script("coverage_by_folder")
    module.REPO = tmp_path
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for name in ("megatron_lion/one.py", "megatron_lion/sub/two.py", "benchmarks/three.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1\nb = 2\n\nc = 3\nd = 4\n")
    data = coverage.CoverageData(str(tmp_path / "data"))
    executed = {"megatron_lion/one.py": [1, 2, 4], "benchmarks/three.py": [1, 2, 4, 5]}
    data.add_lines({str(tmp_path / name): lines for name, lines in executed.items()})
    data.write()
    assert module.main(str(tmp_path / "data")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["megatron_lion", "4", "3", "75.0%"],
        ["megatron_lion/sub", "4", "0", "0.0%"],
        ["total", "8", "3", "37.5%"],
    ]
    assert module.main(str(tmp_path / "absent")) == 1


@pytest.mark.parametrize(("ending", "last"), [
    ("true", "== CI passed"),
    ("exit 3", "== CI failed at: a step (exit code 3)"),
    ("kill -TERM $$", "== CI failed at: a step (exit code 143)"),
    ("kill -INT $$", "== CI failed at: a step (exit code 130)"),
])  # fmt: skip
def test_the_last_line_of_ci_names_the_failed_step(ending: str, last: str, tmp_path: Path) -> None:
    """The beginning of the script, with one step that ends in each way."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text(
        (REPO / ".ci" / "run").read_text().partition('step "system packages"')[0] + f'step "a step"\n{ending}\n'
    )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == last
    assert (done.returncode == 0) == (ending == "true")


def test_the_interpreter_is_found_where_a_version_manager_finds_it(tmp_path: Path) -> None:
    """Its script refuses folders without .python-version."""
    shim = tmp_path / "python3.12"
    shim.write_text(
        f'#!/bin/sh\n[ -f .python-version ] || {{ echo "command not found" >&2; exit 127; }}\nexec "{sys.executable}" "$@"\n'
    )
    shim.chmod(0o755)
    module = script("try_versions")
    found = module.interpreter(module.Trial(), str(shim))
    done = subprocess.run([found, "-c", "print(1)"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
