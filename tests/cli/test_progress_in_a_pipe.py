"""Progress bars are drawn on terminals only, also if FORCE_COLOR asks for colours, as Jupyter does for its cells."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from megatron_lion.commands import evaluate, probe
from megatron_lion.prepare.progress import ConsoleProgress
from megatron_lion.train.console import TrainProgress

BAR = """
from megatron_lion.prepare.progress import ConsoleProgress
with ConsoleProgress() as progress:
    progress.stage("reading", 100)
    progress.advance(50)
"""


def show_all(tmp_path: Path) -> None:
    with ConsoleProgress() as reading:
        reading.stage("reading", 100)
        reading.advance(50)
    evaluate._evaluate(SimpleNamespace(rank=0), tmp_path, [], [], SimpleNamespace(batch_size=1, watch=False))
    with probe._Progress(shown=True):
        pass
    with TrainProgress(tiny_config(tmp_path, "data"), start=0, shown=True):
        pass


def test_no_control_characters_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_all(tmp_path)
    assert "\x1b" not in capfd.readouterr().err


def test_a_terminal_shows_the_bar() -> None:
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", BAR], stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(main)
    assert process.returncode == 0
    assert b"reading" in shown
    assert b"\x1b[?25l" in shown
