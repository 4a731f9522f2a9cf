"""The command that injects all faults can be interrupted, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from faults import rows


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_run_ends_with_its_workers(tmp_path: Path) -> None:
    """The signal reaches the main process alone, as from a supervisor: the workers have hours of cases left."""
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(rows.REPO / "tests"), str(rows.REPO)]),
    }
    words = [sys.executable, "-m", "faults", "save-kill", "start-kill", "--results", str(tmp_path / "rows.jsonl")]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=rows.REPO)
    while not list(tmp_path.glob("megatron-lion-faults-*/*/corpus*")):  # a case has begun
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; the same command continues" in error
    assert "Traceback" not in error
    gone, left = psutil.wait_procs(started, 60)
    assert not left, left
    assert gone
    assert not list(tmp_path.glob("megatron-lion-faults-*"))
