"""A stage of the GPU check: its device, its time limit, and the rows that it appends as they are measured."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = "results.jsonl"
# Facts on which a figure depends: all rows of a file must agree in them.
SAME = ("card", "driver", "torch", "triton", "megatron_core", "commit", "rehearsal")
_PR_SET_PDEATHSIG = 1


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON line with fsync, so that a lost machine or a kill loses no earlier row."""
    # One write call on a file opened for appending: after a kill the line is complete or absent.
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a results file, or an empty list if it does not exist.

    Raises:
        ValueError: a line is not a row of this script; the message names file and line.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:  # also raised for text that is not UTF-8
            raise ValueError(f"{path}, line {number}: not a JSON object") from error
        missing = (
            [key for key in ("stage", "part", "time", *SAME) if key not in row] if isinstance(row, dict) else ["fields"]
        )
        if missing or not isinstance(row["time"], str):
            raise ValueError(
                f"{path}, line {number}: no {(missing or ['time'])[0]}, so it is no row of benchmarks/gpu.py"
            )
        rows.append(row)
    return rows


def work_folder(output: Path, stage: str) -> Path:
    """Folder of a stage's files; gpu.py deletes it, so its name must be unique to the stage."""
    return output / f"gpu_{stage}_files"


@dataclass
class Stage:
    """The inputs of a stage's process.

    Attributes:
        name: name of the stage.
        output: folder of results.jsonl; each stage may keep files in `work_folder`.
        cap_s: limit in seconds, after which the process is killed.
        rehearse: whether to use tiny sizes on a CPU, to show that all code runs.
        facts: card, driver, versions and commit, which are part of every row.
        data: prepared dataset folder with real text, or None.
        text: file to evaluate on, or None.
        started: monotonic time at which the stage's process was started.
    """

    name: str
    output: Path
    cap_s: float
    rehearse: bool
    facts: dict[str, Any]
    data: Path | None = None
    text: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def folder(self) -> Path:
        """The folder for the files of this stage; it is created."""
        path = work_folder(self.output, self.name)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remaining(self) -> float:
        """Seconds until the limit."""
        return self.cap_s - (time.monotonic() - self.started)

    def row(self, part: str, **values: Any) -> None:
        """Appends a row: `passed` (a check's outcome), `error`, `skipped` or measured values, with the common facts."""
        moment = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stage": self.name, "part": part}
        append_row(self.output / ROWS, {**moment, **values, "rehearsal": self.rehearse, **self.facts})

    def attempt(self, part: str, needs_s: float, work: Callable[[], None]) -> bool:
        """Runs one part of the stage and records its exception, out of memory included.

        Args:
            part: name of the part in the rows.
            needs_s: seconds that the part takes on an H100; it is skipped if fewer remain.
            work: function that appends the rows of the part.

        Returns:
            Whether the part ran to its end.
        """
        if self.remaining() < needs_s:
            self.row(
                part,
                skipped=f"needs {needs_s:g} s, {max(0.0, self.remaining()):.0f} s remain of the stage's {self.cap_s:g} s",
            )
            return False
        began = time.monotonic()
        try:
            work()
        except Exception as error:
            self.row(part, error=describe(error), seconds=round(time.monotonic() - began, 2), trace=_last_frames(error))
            return False
        finally:
            release_memory()
        return True


def describe(error: BaseException) -> str:
    """The class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def _last_frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def release_memory() -> None:
    """Frees the memory of the last part, so that the next one does not run out of memory because of it."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def end_with_parent() -> Callable[[], None]:
    """Returns a function for `Popen(preexec_fn=...)`: if this process ends, even by SIGKILL, the child is killed (Linux only)."""
    parent = os.getpid()
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return lambda: None

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask_the_kernel
