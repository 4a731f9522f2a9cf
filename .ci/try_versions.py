"""Installs the built package into a new environment with chosen versions of its packages, and tries it from an empty folder.

    python .ci/try_versions.py pinned|floors|newest [--python PATH] [--folder DIR] [--tests] [--without-demo]

pinned: the versions of constraints.txt, without extras. floors: the lowest versions that pyproject.toml allows, with the
extras that a user's data may need. newest: the highest ones, with the same extras. The interpreter that runs this script
needs the package `build`. Exit code: that of the first command that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
EXTRAS = ("data", "tensorboard")
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
TESTS = ("tests/interop", "tests/evaluate", "tests/optim")


def lowest(requirements: Iterable[str]) -> list[str]:
    """Returns a pip constraint NAME==FLOOR for each requirement that has a floor (NAME>=FLOOR) or an exact version.

    Raises:
        ValueError: a requirement has neither; its lowest version is not known.

    Example:
        >>> lowest(["jsonargparse[signatures]>=4.49,<5", "megatron-core==0.19.2"])
        ['jsonargparse==4.49', 'megatron-core==0.19.2']
    """
    found = []
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?\s*(?:>=|==)\s*([0-9][0-9.]*)", requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement}: give a lowest version, as in {requirement}>=1.0")
        found.append(f"{match[1]}=={match[2]}")
    return found


def floors(text: str) -> list[str]:
    """Returns the lowest versions of the dependencies and of EXTRAS in the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return lowest([*project["dependencies"], *extras])


class Trial:
    """Runs commands with time stamps; the first that fails ends the script with its exit code."""

    def __init__(self) -> None:
        # A checkout on the path, or a place in another job, would hide what the installed package lacks. pip compiles
        # nothing here, so each start would compile torch again if Python may not keep bytecode.
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "PYTHONDONTWRITEBYTECODE")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}

    def run(self, words: list[str | Path], cwd: Path, *, read: bool = False, **variables: str) -> str:
        """Runs a command in a folder, and returns its stdout if `read`."""
        line = [str(word) for word in words]
        started = time.monotonic()
        print("$", " ".join(line), flush=True)
        done = subprocess.run(
            line, cwd=cwd, env={**self.environment, **variables}, stdout=subprocess.PIPE if read else None, text=True,
            check=False,
        )  # fmt: skip
        print(f"  ({time.monotonic() - started:.0f} s, exit code {done.returncode})", flush=True)
        if done.returncode:
            print(done.stdout or "", end="", flush=True)
            sys.exit(done.returncode)
        return done.stdout or ""


def interpreter(trial: Trial, python: str) -> str:
    """Returns the path of the interpreter itself.

    A version manager's python3.12 is a script that reads the .python-version of the current folder, so it works in the
    repository and not in the trial's folder.
    """
    return trial.run([python, "-c", "import sys; print(sys.executable)"], REPO, read=True).strip()


def install(trial: Trial, options: argparse.Namespace, folder: Path) -> Path:
    """Builds sdist and wheel, makes an environment, installs the wheel, and returns the environment's bin folder."""
    dist = folder / "dist"
    # The wheel is built from the unpacked sdist, so a file that the sdist lacks fails here.
    trial.run([sys.executable, "-m", "build", "--outdir", dist, REPO], folder, read=True)
    (wheel,) = dist.glob("*.whl")
    trial.run([interpreter(trial, options.python), "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    words: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    if options.versions == "pinned":
        words += ["--constraint", REPO / "constraints.txt", wheel]
    else:
        if options.versions == "floors":
            path = folder / "floors.txt"
            path.write_text("\n".join(floors((REPO / "pyproject.toml").read_text())) + "\n")
            print(path.read_text(), end="", flush=True)
            words += ["--constraint", path]
        words += [f"{wheel}[{','.join(EXTRAS)}]", *(TOOLS if options.tests else ())]
        # A floor without a built distribution for this Python is no floor; compiling it here would hide that.
        words.insert(4, "--only-binary=:all:")
    trial.run(words, folder, read=True)  # printed if it fails: --quiet would hide which requirements are in conflict
    return python.parent


def try_it(trial: Trial, options: argparse.Namespace, folder: Path, binaries: Path) -> None:
    """Runs verbs in an empty folder: env, demo, export, and evaluate of the exported folder; then the tests."""
    empty = folder / "empty"
    empty.mkdir()
    lion = binaries / "megatron-lion"
    facts = trial.run([lion, "env"], empty, read=True)
    print(facts, flush=True)
    if json.loads(facts)["missing"]:
        sys.exit(f"packages are missing: {', '.join(json.loads(facts)['missing'])}")
    if not options.without_demo:
        trial.run([lion, "demo", "--quick"], empty)
    if not options.without_demo and options.versions != "pinned":  # make test runs these with the pinned versions
        trial.run([lion, "export", "demo/runs/lion", "--output", "exported"], empty)
        text = ["--text", "demo/text/held_out.txt", "--max-tokens", "2000", "--stride", "full"]
        trial.run([lion, "evaluate", "exported", *text], empty)
    if options.tests:
        # Without CI: an optional package that is not installed here skips its tests. Other versions warn of other things.
        words = [binaries / "python", "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-m", "not slow and not full"]
        words += ["-W", "default::DeprecationWarning"]
        trial.run(words, REPO, CI="", OMP_NUM_THREADS="1")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", choices=["pinned", "floors", "newest"])
    parser.add_argument("--python", default=sys.executable, help="interpreter of the new environment")
    parser.add_argument(
        "--folder", type=Path, help="new folder for everything; default: a temporary one, removed at the end"
    )
    parser.add_argument("--tests", action="store_true", help=f"also run {', '.join(TESTS)}, except the slow ones")
    parser.add_argument("--without-demo", action="store_true", help="run env, and the tests if requested, only")
    options = parser.parse_args(words)
    if options.tests and options.versions == "pinned":
        parser.error("--tests: the pinned versions are those that make test runs with")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        if options.folder:
            folder.mkdir(parents=True)
        trial = Trial()
        try_it(trial, options, folder, install(trial, options, folder))


if __name__ == "__main__":
    main()
