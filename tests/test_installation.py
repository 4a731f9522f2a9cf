"""Another Python: one line that names the Python, the package and the remedy, exit code 9; `env` lists what is missing."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from megatron_lion import installation
from megatron_lion.errors import EnvironmentFault

REPO = Path(__file__).resolve().parent.parent
FIRST = ("__init__.py", "__main__.py", "installation.py")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
# Reports another version to the modules that are imported after it; the file named first runs as `python -m` would run it.
OLD = """
import runpy, sys
sys.version_info = (3, 11, 2, "final", 0)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def without_packages(*words: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """Runs this Python without its site-packages: -S leaves them out."""
    return subprocess.run(
        [sys.executable, "-S", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package alone, as in a wheel: no checkout around it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(REPO / "megatron_lion", folder / "megatron_lion", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("module", ["megatron_lion", "megatron_lion.launcher"])
@pytest.mark.parametrize("words", [["pretrain", "--name", "a b"], ["compare", "x"], ["--traceback", "toy"]])
def test_missing_packages_give_one_line(module: str, words: list[str]) -> None:
    done = without_packages("-m", module, *words)
    assert done.returncode == EnvironmentFault.exit_code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"torch and {len(PROJECT['dependencies']) - 1} more packages are not installed" in line
    assert sys.executable in line
    assert "make setup" in line or f".venv/bin/python -m {module} {shlex.join(words)}" in line


def test_env_lists_missing_packages_and_the_command(copy: Path) -> None:
    done = without_packages("-m", "megatron_lion", "env", cwd=copy)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    declared = {re.split(r"[\[>=<]", line)[0] for line in PROJECT["dependencies"]}
    assert set(facts["missing"]) == declared
    assert all(facts["packages"][name] is None for name in declared)
    assert facts["device"] is None
    assert facts["interpreter"] == sys.executable
    words = shlex.split(facts["install"])
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert set(words[4:]) == declared


def test_a_checkout_recommends_the_pinned_packages() -> None:
    facts = json.loads(without_packages("-m", "megatron_lion", "env").stdout)
    assert facts["install"].endswith(
        f"-m pip install -c {shlex.quote(str(REPO / 'constraints.txt'))} -e {shlex.quote(str(REPO))}"
    )


def test_an_installed_package_recommends_pip(copy: Path) -> None:
    done = without_packages("-m", "megatron_lion", "toy", cwd=copy)
    assert done.returncode == EnvironmentFault.exit_code
    assert f"run {sys.executable} -m pip install torch " in done.stderr
    assert "make setup" not in done.stderr


def test_help_and_version_need_no_packages() -> None:
    for flag in ("--help", "--version"):
        done = without_packages("-m", "megatron_lion", flag)
        assert done.returncode == 0, done.stderr
        assert "megatron-lion" in done.stdout


@pytest.mark.parametrize("module", ["megatron_lion", "megatron_lion.launcher"])
@pytest.mark.parametrize("words", [[], ["env"], ["--help"], ["pretrain", "--config", "x.yaml"]])
def test_an_old_python_gives_one_line(module: str, words: list[str]) -> None:
    command = [sys.executable, "-c", OLD, module, *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == EnvironmentFault.exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-lion: Python 3.12 or newer is needed, and ")
    assert sys.executable in line
    assert done.stdout == ""


@pytest.mark.parametrize("name", [*FIRST, "launcher.py"])
def test_what_runs_before_the_check_parses_on_python_3_8(name: str) -> None:
    ast.parse((REPO / "megatron_lion" / name).read_text(), feature_version=(3, 8))


def test_names_agree_with_pyproject() -> None:
    declared = [re.split(r"[\[>=<]", line)[0] for line in PROJECT["dependencies"]]
    assert list(installation.REQUIRED) == declared
    assert PROJECT["requires-python"] == f">={installation.OLDEST[0]}.{installation.OLDEST[1]}"
    assert EnvironmentFault.exit_code == installation.EXIT_CODE
    assert set(installation.OPTIONAL_EXTRAS) < PROJECT["optional-dependencies"].keys()
    assert installation.missing() == []


def test_a_part_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"rich"}
    monkeypatch.setattr(installation, "_has", lambda module: module not in absent)
    with pytest.raises(SystemExit) as one:
        installation.check(["toy"])
    assert one.value.code == EnvironmentFault.exit_code
    assert installation.missing() == ["rich"]
    absent.add("numpy")
    assert installation.missing() == ["numpy", "rich"]


@pytest.mark.parametrize(("absent", "text"), [(["rich"], "rich is not"), (["yaml", "rich"], "PyYAML and rich are not")])
def test_the_line_names_what_is_missing(
    absent: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation, "_has", lambda module: module not in absent)
    with pytest.raises(SystemExit):
        installation.check(["toy"])
    assert f"{text} installed for {sys.executable}; run " in capsys.readouterr().err


def test_unsuitable_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "rich>=13",
        "transformers>=4.56",
        'pyarrow>=18; extra == "data"',
        'pytest>=900; extra == "dev"',
        "no-such-name>=1",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: required)
    found = {"rich": "13.0.1", "transformers": "4.50.3", "pyarrow": "17.0.0", "pytest": "9.2.0"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    assert installation.unsuitable() == ["transformers 4.50.3, needs >=4.56", "pyarrow 17.0.0, needs >=18"]
    monkeypatch.setattr(metadata, "requires", lambda _: None)
    assert installation.unsuitable() == []
