"""Child processes of `Jobs`: which interpreter a launcher of an installed package uses."""

from __future__ import annotations

import sys

import pytest

from megatron_lion.jobs import Jobs


def test_launchers_run_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    script = '[ "$PYTHON" = "$1" ]'
    with Jobs() as jobs:
        assert jobs.run_command(["sh", "-c", script, "sh", sys.executable]) == 0
        monkeypatch.setenv("PYTHON", "/opt/python-without-the-package")
        assert jobs.run_command(["sh", "-c", script, "sh", sys.executable]) == 0
