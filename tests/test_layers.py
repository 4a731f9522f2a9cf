"""Rooms import one way only, megatron-core stays where it is a room's business, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lion.cli import VERBS

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "megatron_lion"

# A file may import from its own level's earlier entries and from every level above.
LEVELS = [
    {"errors"},
    {"config", "config_checks", "configfile", "parallel_env", "jobs", "lastresort", "style", "files", "runs"},
    {"device", "determinism", "parallel"},
    {"optim", "data", "prepare", "gradient"},
    {"model", "train"},
    {"evaluate", "compare", "theory", "toy", "interop", "sweep"},
    {"reproduce"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
MEGATRON_ROOMS = {"device", "parallel", "optim", "model", "data", "train", "gradient", "evaluate"}
NO_TORCH_ROOMS = {
    "errors",
    "config",
    "config_checks",
    "configfile",
    "parallel_env",
    "jobs",
    "lastresort",
    "style",
    "compare",
    "sweep",
    "cli",
    "__main__",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


def room_of_name(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Names a file imports, with their lines; with `at_import` only those that run when it is imported."""

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
def test_imports_point_upwards(path: Path) -> None:
    room = room_of(path)
    if not room:
        return
    wrong = []
    for name, line in imports(path):
        if name.split(".")[0] != "megatron_lion":
            continue
        other = room_of_name(name)
        if other and other != room and LEVEL[other] > LEVEL[room]:
            wrong.append(f"line {line}: {name}")
    assert not wrong, f"{room} reaches down into {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(REPO)))
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for name, line in imports(path):
        if name.startswith("megatron.core"):
            assert room in MEGATRON_ROOMS, f"line {line}: {room} has no business with {name}"
        if name.split(".")[0] == "torch" and room in NO_TORCH_ROOMS:
            pytest.fail(f"line {line}: {room} must not need torch")
    if room == "commands":
        heavy = [
            name
            for name, _ in imports(path, at_import=True)
            if name.split(".")[0] in ("torch", "megatron", "matplotlib")
        ]
        assert not heavy, f"commands import {heavy} before their arguments are understood"


def test_lion_stands_alone() -> None:
    ours = [
        name
        for name, _ in imports(PACKAGE / "optim" / "lion.py", at_import=True)
        if name.split(".")[0] in ("megatron_lion", "megatron")
    ]
    assert set(ours) <= {"megatron_lion.errors"}


def run_python(*words: str) -> tuple[str, float]:
    started = time.process_time()
    clock = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPO, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.process_time() >= started
    return done.stdout, time.monotonic() - clock


def test_importing_the_package_is_light() -> None:
    out, _ = run_python("-c", "import sys, megatron_lion; print('torch' in sys.modules, 'megatron' in sys.modules)")
    assert out.split() == ["False", "False"]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_needs_no_torch(verb: str) -> None:
    """A second on an idle machine; counted here as: neither torch nor megatron-core nor matplotlib was loaded."""
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


def test_no_unsafe_calls() -> None:
    """Nothing that runs code from data: pickles are only replayed by the allow-list in train/checkpoint.py."""
    forbidden = {"eval", "exec"}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            where = f"{path.relative_to(REPO)}:{node.lineno}"
            assert not (isinstance(node.func, ast.Name) and text in forbidden), f"{where}: {text}"
            assert text not in ("pickle.load", "pickle.loads", "os.system", "tarfile.extractall"), f"{where}: {text}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if text == "torch.load":
                assert keywords.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
            assert keywords.get("shell") != "True", f"{where}: shell=True"
            assert keywords.get("allow_pickle") != "True", f"{where}: allow_pickle=True"
            assert keywords.get("trust_remote_code") != "True", f"{where}: trust_remote_code=True"
