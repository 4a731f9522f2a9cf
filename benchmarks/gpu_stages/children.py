"""Starts, stops and waits for megatron-lion subcommands as child processes of a stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .stage import Stage, end_with_parent

POLL_S = 0.005


class Child:
    """One process in a new process group; its output goes to a log in the stage's folder."""

    def __init__(self, stage: Stage, name: str, words: list[str], *, hide_gpu: bool = False) -> None:
        self.name, self.log = name, stage.folder / f"{name}.log"
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=end_with_parent(),
            )  # fmt: skip

    def wait(self, seconds: float) -> int:
        """Waits for the end of the process and returns its exit code.

        Raises:
            TimeoutError: it did not end in time and was killed.
        """
        try:
            return self.process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.name} did not end within {seconds:.0f} s; {self.last_line()}") from None

    def check(self, seconds: float) -> None:
        """Waits for the end; raises RuntimeError with the last line of the log unless the exit code is 0."""
        if code := self.wait(seconds):
            raise RuntimeError(f"{self.name} exited with code {code}; last line of its log: {self.last_line()}")

    def signal_group(self, number: int) -> None:
        """Sends a signal to the process and its children, like torchrun, timeout and SLURM."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)
        self.process.wait()

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"


def logged_step(run_dir: Path) -> int:
    """The newest step in a run's metrics.jsonl, 0 if there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(child: Child, run_dir: Path, step: int, seconds: float) -> bool:
    """Whether the run reached the step before its process ended; checks every few milliseconds."""
    deadline = time.monotonic() + seconds
    while logged_step(run_dir) < step:
        if child.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return child.process.poll() is None


def newest_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run's newest checkpoint.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    found = sorted(run_dir.glob("checkpoints/step_*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"{run_dir.name}: no checkpoint")
    manifest: dict[str, Any] = json.loads(found[-1].read_text())
    return manifest
