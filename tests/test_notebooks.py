"""The notebooks of examples/ run from top to bottom, and their stored outputs come from the code that is there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "examples").glob("*.ipynb"))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["lion_and_the_norm_ratio", "read_a_run"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_and_name_no_machine(path: Path) -> None:
    """`make notebooks` stores them; a page of the site shows them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 1
    stored = "".join(map(text, cells))
    # Colours are shown by Jupyter and removed on the site; control characters of a progress bar would stay.
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", stored)
    assert "Traceback" not in stored
    assert not re.search(r"(?:^|[\s'\"(=])/\w+/", stored), "the path of a file on the machine that stored it"
    # Only the kernel: the version of Python and the time of each cell would change at every run.
    assert set(notebook.metadata) == {"kernelspec"}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    stored = [text(cell).count("\n") for cell in code(notebook)]
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    # Losses differ between machines; the lines that are printed do not.
    printed = [text(cell).count("\n") for cell in code(notebook)]
    training = [number for number, cell in enumerate(code(notebook)) if cell.source.startswith("%%bash")]
    assert [lines for number, lines in enumerate(printed) if number not in training] == [
        lines for number, lines in enumerate(stored) if number not in training
    ]
    assert all(printed[number] >= 5 for number in training)
