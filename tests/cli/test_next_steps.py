"""The next command that a verb prints: for a person at a terminal, ready to paste."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.streams import next_steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_commands_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["printf", "%s|", "a run's folder", "[data/own text]", "$HOME", "x;y"]
    monkeypatch.setattr(sys, "stderr", Terminal())
    next_steps(words, "open file:///tmp/x in a browser")
    first, second = sys.stderr.getvalue().splitlines()
    assert first.startswith("next: printf ")
    assert second == " or:  open file:///tmp/x in a browser"
    assert shlex.split(first.removeprefix("next: ")) == words
    done = subprocess.run(["bash", "-c", first.removeprefix("next: ")], capture_output=True, text=True, check=True)
    assert done.stdout == "a run's folder|[data/own text]|$HOME|x;y|"


def test_without_a_terminal_there_is_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    next_steps(["megatron-lion", "env"])
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)
    next_steps(["megatron-lion", "env"])


def test_compare_ends_with_its_report_and_leaves_stdout_to_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a run")
    words = ["compare", str(run), "--output", str(tmp_path / "out folder"), "--no-figures", "--format", "csv"]
    assert main(words) == 0
    quiet = capsys.readouterr()
    assert "next:" not in quiet.err + quiet.out
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(words) == 0
    last = sys.stderr.getvalue().splitlines()[-1]
    assert last == f"next: open {(tmp_path / 'out folder' / 'report.html').as_uri()} in a browser"
    assert capsys.readouterr().out == quiet.out
