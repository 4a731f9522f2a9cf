"""Import rules between folders, modules that must not load torch, and rules for files.

The contracts in pyproject.toml state the allowed imports; `make lint` checks them with import-linter.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lion.cli import VERBS

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "megatron_lion"

MEGATRON_ROOMS = {"device", "parallel", "optim", "model", "data", "train", "gradient", "evaluate"}
NO_TORCH_ROOMS = {
    "errors",
    "config",
    "config_checks",
    "configfile",
    "jobs",
    "signals",
    "logs",
    "style",
    "files",
    "folder_swap",
    "plain_text",
    "runs",
    "compare",
    "theory",
    "toy",
    "sweep",
    "scaling",
    "cli",
    "__main__",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Yields the imported names of a file with their lines; with `at_import`, only imports outside functions."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                yield child.module, child.lineno
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(REPO)))
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for name, line in imports(path):
        if name.startswith("megatron.core"):
            assert room in MEGATRON_ROOMS, f"line {line}: {room} must not import {name}"
    for name, line in imports(path, at_import=True):
        if name.split(".")[0] == "torch" and room in NO_TORCH_ROOMS:
            pytest.fail(f"line {line}: {room} must not import torch")
    if room == "commands":
        heavy = [
            name
            for name, _ in imports(path, at_import=True)
            if name.split(".")[0] in ("torch", "megatron", "matplotlib")
        ]
        assert not heavy, f"commands import {heavy} before their arguments are parsed"


def run_python(*words: str) -> tuple[str, float]:
    started = time.process_time()
    clock = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPO, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.process_time() >= started
    return done.stdout, time.monotonic() - clock


BROKEN = {
    "a relative import of a higher room": ("optim/lion.py", "from ..commands import env as _env", "Imports point down"),
    "a higher room inside a function": (
        "optim/update.py",
        "def later():\n    from ..train.schedule import lr_at",
        "Imports point down",
    ),
    "two files of a room that import each other": ("optim/update.py", "from . import lion as _lion", "No circles"),
}


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the package and its contracts."""
    for path in modules():
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copyfile(REPO / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # A script's sys.path begins with its folder, so the copy is read and not the installed package.
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("change", [None, *BROKEN])
def test_contracts_find_an_import_that_points_up(copied_package: Path, change: str | None) -> None:
    contract = ""
    if change is not None:
        name, line, contract = BROKEN[change]
        with open(copied_package / "megatron_lion" / name, "a", encoding="utf-8") as stream:
            stream.write(f"\n\n{line}\n")
    done = lint_imports(copied_package)
    assert (done.returncode != 0) == (change is not None), done.stdout + done.stderr
    assert contract in done.stdout
    if change is not None:
        assert any(contract in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout


def test_lion_works_alone(tmp_path: Path) -> None:
    """lion.py and update.py take a step without the rest of the package, with the expected result."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("lion.py", "update.py"):
        shutil.copyfile(PACKAGE / "optim" / name, folder / name)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from copied.lion import Lion\n"
        "weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))\n"
        "optimizer = Lion([weight], lr=0.1, weight_decay=0.5)\n"
        "weight.grad = torch.tensor([3.0, -4.0, 0.0])\n"
        "optimizer.step()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "print(weight.tolist(), [name for name in sys.modules if name.startswith('megatron_lion')])\n"
    )
    out, _ = run_python("-I", "-c", code, str(tmp_path))
    weights, ours = out.rsplit("[", 1)
    assert ours.strip() == "]"
    assert json.loads(weights) == pytest.approx([0.85, -1.8, 0.475])


def test_torch_free_rooms_load_no_torch() -> None:
    """Neither directly nor through other modules."""
    names = [
        ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        for path in modules()
        if room_of(path) in NO_TORCH_ROOMS - {"__main__"}
    ]
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        "    assert not {'torch', 'megatron.core'} & set(sys.modules), name\n"
    )
    run_python("-c", code)


def test_importing_the_package_is_light() -> None:
    out, _ = run_python("-c", "import sys, megatron_lion; print('torch' in sys.modules, 'megatron' in sys.modules)")
    assert out.split() == ["False", "False"]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_needs_no_torch(verb: str) -> None:
    """--help takes a second if it loads neither torch, megatron-core, matplotlib nor transformers."""
    code = (
        "import sys\n"
        "from megatron_lion.cli import main\n"
        f"try:\n    main(['{verb}', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'megatron', 'matplotlib', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.stderr.write(' '.join(sorted(loaded)))\n"
        "sys.exit(bool(loaded - {'numpy'}))\n"
    )
    out, _ = run_python("-c", code)
    assert verb in out
    assert "--help" in out


def test_design_page_lists_every_file() -> None:
    """One line for each file, from its docstring; `python docs/update_design.py` writes them."""
    done = subprocess.run(
        [sys.executable, "docs/update_design.py", "--check"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_no_two_modules_share_a_name() -> None:
    """A unique name identifies a file in a list; `build.py` or `figures.py` in three folders does not."""
    found: dict[str, list[str]] = {}
    for folder in ("megatron_lion", "benchmarks"):
        for path in (REPO / folder).rglob("*.py"):
            if path.name != "__init__.py":
                found.setdefault(path.name, []).append(str(path.relative_to(REPO)))
    assert not {name: places for name, places in found.items() if len(places) > 1}


def test_no_file_is_longer_than_400_lines() -> None:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.cpp", "*.sh"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    long = {
        name: lines
        for name in names
        if (REPO / name).is_file() and (lines := len((REPO / name).read_text().splitlines())) > 400
    }
    assert not long
