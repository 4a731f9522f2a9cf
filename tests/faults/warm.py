"""Starts processes within milliseconds: they are forked from a server (server.py) that holds the imports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.shim import Fault, library

TESTS = Path(__file__).resolve().parent.parent
GENEROUS_S = 600.0
"""Longest wait for anything; a case that measures a time does so with the process's own end."""


class Stuck(Exception):
    """A process did not end within the limit."""


@dataclass
class Forked:
    """A process of the server.

    Attributes:
        pid: process id, which is also its process group.
        code: exit code when it has ended (negative: the signal), else None.
        started, ended: time.monotonic() of start and end.
        out, err: files with its output.
    """

    server: Warm
    pid: int
    out: Path
    err: Path
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    ended: float = 0.0

    def wait(self, limit_s: float = GENEROUS_S) -> int:
        """Waits for the end and returns the exit code.

        Raises:
            Stuck: it did not end in time; it was killed.
        """
        if not self.server.until(lambda: self.code is not None, limit_s):
            self.signal(signal.SIGKILL)
            self.server.until(lambda: self.code is not None, 30)
            raise Stuck(f"did not end within {limit_s:.0f} s: {self.last_line()}")
        assert self.code is not None
        return self.code

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process or its group; one that has ended is left alone."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.err.read_text(errors="replace") if self.err.exists() else ""

    def last_line(self) -> str:
        lines = self.errors.strip().splitlines()
        return lines[-1][:300] if lines else ""


class Warm:
    """The server and its processes; a context manager.

    Args:
        folder: for the files with the processes' output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.processes: dict[int, Forked] = {}
        self._pending = b""
        self._answers: list[dict[str, Any]] = []

    def __enter__(self) -> Warm:
        self.folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ, "LD_PRELOAD": str(library()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "faults" / "server.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment, cwd=self.folder, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._channel = ours
        if not self.until(lambda: bool(self._answers), GENEROUS_S):
            raise Stuck("the server of processes did not start")
        self._answers.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.signal(signal.SIGKILL, group=True)
        self._channel.close()
        self._server.wait(60)

    def start(
        self, work: str, *arguments: Any, environment: dict[str, str] | None = None, fault: Fault | None = None
    ) -> Forked:
        """Forks a process that runs `module:function` with JSON-like arguments and exits with its result as code."""
        self.count += 1
        out, err = (self.folder / f"{self.count:05d}.{kind}" for kind in ("out", "err"))
        request = {
            "work": work, "arguments": arguments, "environment": environment or {}, "out": str(out), "err": str(err),
            "fault": fault.as_dict() if fault is not None else None,
        }  # fmt: skip
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        if not self.until(lambda: bool(self._answers), GENEROUS_S):
            raise Stuck("the server of processes does not answer")
        process = Forked(self, self._answers.pop(0)["pid"], out, err)
        self.processes[process.pid] = process
        return process

    def until(self, condition: Callable[[], bool], limit_s: float, pause_s: float = 0.005) -> bool:
        """Receives reports of ended processes until the condition holds; False if it did not within the limit."""
        import select

        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            if select.select([self._channel], [], [], pause_s)[0]:
                received = self._channel.recv(1 << 20)
                if not received:
                    raise Stuck("the server of processes ended")
                *lines, self._pending = (self._pending + received).split(b"\n")
                for line in map(json.loads, lines):
                    if "ended" in line:
                        process = self.processes.get(line["ended"])
                        if process is not None:
                            process.code, process.ended = line["code"], line["time"]
                    else:
                        self._answers.append(line)
        return True


@contextlib.contextmanager
def warm(folder: Path) -> Iterator[Warm]:
    """A started server."""
    with Warm(folder) as server:
        yield server
