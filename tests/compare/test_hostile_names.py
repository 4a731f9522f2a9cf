"""Names from somebody else's run: no output of ours carries what a terminal, a page or a Markdown reader would obey."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from synthetic_runs import write_run

from megatron_lion.cli import main

COLOUR, TITLE, BELL = "\x1b[31mred", "\x1b]0;owned\x07", "\x9b2J"
HOSTILE = [
    COLOUR, TITLE, BELL, "two\n### Lines", "two\r\nlines", "para\u2029graph", "right\u202eleft", "iso\u2066late", "nul\x00",
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "![x](http://example.invalid/x.png)", "<javascript:alert(1)>",
    "half\ud800",
]  # fmt: skip


def change(path: Path, key: str, value: Any) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def rename_metric(folder: Path, name: str) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(
        "".join(
            line.replace('"train/loss"', json.dumps(f"train/{name}")) + "\n" for line in path.read_text().splitlines()
        )
    )


def set_setting(folder: Path, name: str) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["schedule"] = {"kind": name, name: 1}
    path.write_text(yaml.safe_dump(config))


PLACES: dict[str, Callable[[Path, str], None]] = {
    "name": lambda folder, name: change(folder / "run.json", "name", name),
    "optimizer": lambda folder, name: change(folder / "run.json", "optimizer", name),
    "device": lambda folder, name: change(folder / "run.json", "device", name),
    "environment": lambda folder, name: change(folder / "environment.json", "python", name),
    "environment key": lambda folder, name: change(folder / "environment.json", name, "3.12"),
    "text": lambda folder, name: [change(path, "text_path", f"a/{name}") for path in (folder / "eval").glob("*.json")],
    "version": lambda folder, name: [change(path, "text_version", name) for path in (folder / "eval").glob("*.json")],
    "metric": rename_metric,
    "setting": set_setting,
}  # fmt: skip


def obeyed(text: str) -> list[str]:
    """Characters of a text that are not shown as themselves."""
    return [char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_no_output_obeys_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run has another bad name, at every place from which a name is read."""
    folders = []
    for number, name in enumerate(HOSTILE):
        folder = write_run(tmp_path / f"run{number}", optimizer=("lion", "sgd")[number % 2])
        for place in PLACES.values():
            place(folder, name)
        folders.append(str(folder))
    folders.append(str(write_run(tmp_path / "plain", optimizer="adamw")))
    output = tmp_path / "out"
    command = ["compare", *folders, "--output", str(output), "--no-figures"]
    for form in ("text", "markdown"):
        assert main([*command, "--format", form]) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert not obeyed(out + err), form
    files = [path for path in output.iterdir() if path.is_file()]
    assert {".csv", ".tex", ".md", ".html"} <= {path.suffix for path in files}
    for path in files:
        assert not obeyed(path.read_bytes().decode("utf-8")), path.name
    page = (output / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"<(a|img)\b", page)
    check_markdown((output / "tables.md").read_text(), titles=(output / "tables.tex").read_text().count(r"\caption{"))


def check_markdown(text: str, *, titles: int) -> None:
    """A Markdown reader finds our headings, and neither tags nor links nor pictures."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert sum(token.type == "heading_open" for token in tokens) == titles
    inner = [child.type for token in tokens for child in token.children or []]
    assert not {"link_open", "image", "html_inline"} & set(inner)
    assert not any(token.type == "html_block" for token in tokens)


@pytest.mark.parametrize("name", ["\x1b[31m", "two\nlines", "right\u202eleft"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and messages name folders, too."""
    folders = [str(write_run(tmp_path / f"{name}{number}")) for number in range(2)]
    output = tmp_path / "out"
    assert main(["compare", *folders, "--output", str(output), "--no-figures"]) == 0
    (tmp_path / f"{name}1" / "run.json").write_text("[]")
    assert main(["compare", *folders, "--output", str(output), "--no-figures"]) == 4
    out, err = capsys.readouterr()
    assert "run.json: must contain an object" in err
    assert not obeyed(out + err)
    assert not any(obeyed(path.read_text()) for path in output.iterdir() if path.is_file())


def test_a_sweep_does_not_lead_out_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "outside")
    (tmp_path / "sweep").mkdir()
    for name in ("../outside", str(tmp_path / "outside"), "..", "a/b"):
        (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"format": 1, "runs": [{"name": name}]}))
        assert main(["compare", str(tmp_path / "sweep"), "--output", str(tmp_path / "out")]) == 4
        assert "is no folder in it" in capsys.readouterr().err
