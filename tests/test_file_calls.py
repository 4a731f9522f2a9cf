"""Every call that changes files stands where an OSError becomes a StorageError, so that no full disk is a traceback."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_lion"

CHANGES = {
    "os.mkdir", "os.makedirs", "os.replace", "os.rename", "os.renames", "os.unlink", "os.remove", "os.rmdir", "os.removedirs",
    "os.link", "os.symlink", "os.truncate", "os.ftruncate", "os.write", "os.pwrite", "os.fsync", "os.mkfifo",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.rmtree",
    "tempfile.mkstemp", "tempfile.mkdtemp", "tempfile.TemporaryDirectory", "tempfile.NamedTemporaryFile",
    "np.save", "np.savez", "torch.save", "save_file", "SummaryWriter", "open_own",
}  # fmt: skip
"""Calls by their full name."""
METHODS = {"write_text", "write_bytes", "mkdir", "rename", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "tofile",
           "savefig", "add_scalar"}  # fmt: skip
"""Calls of these methods, of whatever object: paths, arrays, figures, sinks."""
READS = {"r", "rb", "rt"}

# (file, function): why a call there needs no storage_errors.
ALLOWED = {
    ("files.py", "_open_temporary"): "called inside storage_errors",
    ("files.py", "sync_folder"): "a file system that cannot flush folders is no error",
    ("files.py", "sync_file"): "documented to raise OSError; callers convert it",
    ("files.py", "_write_holder"): "a full disk must not prevent the lock",
    ("files.py", "open_own"): "documented to raise OSError; callers convert it",
    ("rendezvous.py", "stopped_also_in_cpp"): "a pipe within this process",
    ("folder_swap.py", "locked_folder"): "called inside storage_errors",
    ("logs.py", "_open"): "the caller converts it; later, messages are left out",
    ("optim/cpp_compiler.py", "build_library"): "a cache: without room it compiles elsewhere, and then does without",
    ("jobs.py", "record_exit_code"): "the caller goes on without the file: a full disk must not hide the error",
    ("streams.py", "guard_streams"): "/dev/null",
    ("streams.py", "_tolerant"): "a descriptor of the process",
    ("runs/folder.py", "_move_aside"): "called inside storage_errors",
    ("runs/folder.py", "_make"): "called inside storage_errors",
    ("runs/folder.py", "_move"): "called inside storage_errors",
    ("style.py", "save_figure"): "into memory",
    ("interop/hf_export.py", "_write"): "safetensors raises its own error, which is converted there",
    ("train/checkpoint.py", "_commit"): "called inside storage_errors",
}


def is_converted(ancestors: list[ast.AST]) -> bool:
    """Whether a call is inside `with storage_errors(…)`, or where an OSError is of no consequence."""
    blocks = [ast.unparse(item) for node in ancestors if isinstance(node, ast.With) for item in node.items]
    return any(
        block.startswith(("storage_errors(", "suppress(OSError)", "contextlib.suppress(OSError)")) for block in blocks
    )


def changes_files(node: ast.Call) -> bool:
    """Whether a call creates, changes or removes files."""
    name = ast.unparse(node.func)
    if name in ("open", "io.open", "os.fdopen"):
        given = node.args[1] if len(node.args) > 1 else next((k.value for k in node.keywords if k.arg == "mode"), None)
        return given is not None and not (isinstance(given, ast.Constant) and given.value in READS)
    if name == "os.open":
        return any(flag in ast.unparse(node.args[1]) for flag in ("WRONLY", "RDWR", "CREAT", "flags"))
    if name == "shutil.rmtree":
        return not any(k.arg == "ignore_errors" for k in node.keywords)
    if name in CHANGES:
        return True
    if isinstance(node.func, ast.Attribute):
        is_wandb = "wandb" in ast.unparse(node.func.value) and node.func.attr in ("init", "log", "finish")
        return node.func.attr in METHODS or is_wandb
    return False


def bare_calls(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (file, function, call with its line) of each call without a conversion."""

    def visit(node: ast.AST, ancestors: list[ast.AST], function: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and changes_files(node) and not is_converted(ancestors):
            place = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
            yield place, function, f"{node.lineno}: {ast.unparse(node.func)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, [*ancestors, node], function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), [], "")


def test_no_call_can_end_in_a_traceback_of_a_full_disk() -> None:
    found = [call for path in sorted(PACKAGE.rglob("*.py")) for call in bare_calls(path)]
    bare = [f"{file}, {function}, line {call}" for file, function, call in found if (file, function) not in ALLOWED]
    assert not bare, (
        "put it into `with storage_errors(path)`, or use write_whole, append_line or make_folder:\n" + "\n".join(bare)
    )


def test_no_exception_is_left_over() -> None:
    found = {(file, function) for path in PACKAGE.rglob("*.py") for file, function, _ in bare_calls(path)}
    assert set(ALLOWED) <= found


@pytest.mark.parametrize(
    "line",
    ["open(path, 'w')", "open(path, mode)", "open(path, mode='ab')", "path.write_text('')", "os.replace(a, b)", "path.mkdir()",
     "np.save(path, array)", "SummaryWriter(path)", "wandb.init(project='p')", "self._wandb.log(line)", "shutil.rmtree(path)",
     "os.open(path, os.O_RDONLY | os.O_CREAT)", "array.tofile(path)", "with open(path, 'wb') as stream:\n  pass"],
)  # fmt: skip
def test_a_bare_call_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "it.py"
    path.write_text(f"def work():\n  {line.replace(chr(10), chr(10) + '  ')}\n")
    assert [function for _, function, _ in bare_calls(path)] == ["work"]
    path.write_text(f"with storage_errors(path):\n  {line.replace(chr(10), chr(10) + '  ')}\n")
    assert list(bare_calls(path)) == []


@pytest.mark.parametrize("line", ["open(path)", "open(path, 'rb')", "text.replace('a', 'b')", "os.open(path, os.O_RDONLY)",
                                  "shutil.rmtree(path, ignore_errors=True)", "replace(config, steps=1)"])  # fmt: skip
def test_reading_is_free(line: str, tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(f"{line}\n")
    assert list(bare_calls(tmp_path / "it.py")) == []
