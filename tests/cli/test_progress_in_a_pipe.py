"""Progress bars are drawn on terminals only, also if FORCE_COLOR asks for colours, as Jupyter does for its cells."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from megatron_lion.commands import evaluate, probe
from megatron_lion.prepare.progress import ConsoleProgress
from megatron_lion.streams import busy
from megatron_lion.train.console import TrainProgress

BAR = """
import logging
from megatron_lion.logs import install_last_resort, messages_on_stderr
from megatron_lion.prepare.progress import ConsoleProgress
install_last_resort()
with messages_on_stderr(), ConsoleProgress() as progress:
    progress.stage("reading", 100)
    progress.advance(50)
    logging.getLogger("megatron_lion.prepare").info("a note of the package")
    logging.getLogger("another").warning("a warning of another package")
logging.getLogger("megatron_lion.prepare").info("a note after the block")
"""


def show_all(tmp_path: Path) -> None:
    with ConsoleProgress() as reading:
        reading.stage("reading", 100)
        reading.advance(50)
    evaluate._evaluate(SimpleNamespace(rank=0), tmp_path, [], [], SimpleNamespace(batch_size=1, watch=False))
    with probe._Progress(shown=True):
        pass
    with busy("opening a folder") as report:
        report("1 of 2 tokens")
    with TrainProgress(tiny_config(tmp_path, "data"), start=0, shown=True):
        pass


def test_no_control_characters_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_all(tmp_path)
    assert "\x1b" not in capfd.readouterr().err


def in_terminal(code: str) -> tuple[bytes, bytes]:
    """What a program writes to stderr, a terminal of 80 columns, and to stdout, a pipe."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
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
        assert process.stdout is not None
        piped = process.stdout.read()
    os.close(main)
    assert process.returncode == 0
    return shown, piped


def test_a_terminal_shows_the_bar_and_messages_above_it() -> None:
    shown, _ = in_terminal(BAR)
    assert b"reading" in shown
    assert b"\x1b[?25l" in shown
    for message in (b"a note of the package", b"a warning of another package"):
        # On a line of its own: the bar's line was erased before it.
        assert re.search(rb"(\n|\x1b\[2K)" + message + rb"\r?\n", shown), shown
        assert shown.count(message) == 1
    assert b"after the block" not in shown


BUSY = """
import sys
from megatron_lion.streams import busy
with busy("opening [bold]a folder") as report:
    report("3 of 40 tokens")
    sys.stdout.write("a result")
with busy("of another process", shown=False) as report:
    report("its text")
"""


def test_a_terminal_shows_that_a_verb_is_busy_and_stdout_has_results_alone() -> None:
    shown, piped = in_terminal(BUSY)
    assert b"opening [bold]a folder" in shown, "a name is no markup"
    assert b"3 of 40 tokens" in shown
    assert shown.endswith(b"\x1b[1A\x1b[2K"), "the line is removed"
    assert b"another process" not in shown
    assert piped == b"a result"
