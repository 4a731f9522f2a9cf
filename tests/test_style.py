"""Figures take colours, axes and file output from one module; files are atomic, and equal for equal figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lion import files
from megatron_lion.errors import StorageError
from megatron_lion.style import new_figure, reference_line, save_figure, style_axes

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_lion"


def draw(path: Path) -> Path:
    figure, (axes,) = new_figure(2.0, 1.5, 1, dpi=50)
    style_axes(axes)
    axes.plot([0, 1], [1, 2])
    reference_line(axes, 1.5, "half", "--")
    return save_figure(figure, path)


def test_equal_pictures_are_equal_files_of_the_asked_size(tmp_path: Path) -> None:
    first = draw(tmp_path / "a.png").read_bytes()
    assert first == draw(tmp_path / "b.png").read_bytes()
    assert (int.from_bytes(first[16:20]), int.from_bytes(first[20:24])) == (100, 75), "inches × dpi, in the header"
    assert b"tEXt" not in first, "a text chunk holds matplotlib's version, so another one writes another file"


def test_a_refused_write_keeps_the_older_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"older")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.png: cannot be written: No space left on device"):
        draw(path)
    assert path.read_bytes() == b"older"
    assert [found.name for found in tmp_path.iterdir()] == ["a.png"]


def test_a_panel_has_no_box_unless_asked() -> None:
    _, row = new_figure(4.0, 1.5, 2, dpi=50, width_ratios=[3, 1])
    style_axes(row[0])
    style_axes(row[1], box=True)
    sides = ("left", "bottom", "top", "right")
    assert [row[0].spines[side].get_visible() for side in sides] == [True, True, False, False]
    assert [row[1].spines[side].get_visible() for side in sides] == [True] * 4
    assert row[0].get_gridspec().get_width_ratios() == [3, 1]


def test_colours_are_there_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None\nfrom megatron_lion.style import OPTIMIZER_COLOURS"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_colours_axes_and_files_of_figures_are_in_one_place() -> None:
    own = re.compile(r"\"#[0-9A-Fa-f]{6}\"|\.savefig\(|\bFigure\(|FigureCanvas|\.spines\b")
    found = {
        str(path.relative_to(PACKAGE)): own.findall(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert {'"#0072B2"', ".savefig(", "Figure(", ".spines"} <= set(found.pop("style.py")), "the search finds them"
    assert {path: marks for path, marks in found.items() if marks} == {}
