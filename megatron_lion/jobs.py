"""Verbs as jobs of their own: on one process or, through torchrun, on several; a request to stop is passed on."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megatron_lion.errors import StoppedOnRequest

_PR_SET_PDEATHSIG = 1
STOPPED = 75
"""Exit code of a job that saved and left because it was asked to."""


def job_words(verb: str, words: list[str], processes: int = 1) -> list[str]:
    """What follows the interpreter to run a verb on so many processes of this machine.

    Example:
        >>> job_words("env", ["--device", "cpu"])
        ['-m', 'megatron_lion', 'env', '--device', 'cpu']
    """
    if processes == 1:
        return ["-m", "megatron_lion", verb, *words]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "megatron_lion", verb, *words]  # fmt: skip


@contextmanager
def told_to_stop(what: str) -> Iterator[None]:
    """While the block runs, SIGTERM ends it as StoppedOnRequest(what): for work whose finished parts are kept anyhow."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedOnRequest(what)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Jobs:
    """Runs verbs one after another; SIGINT, SIGTERM and SIGUSR1 reach the one that runs as a single SIGTERM.

    A job has a session of its own, so that Ctrl-C in a terminal does not reach it a second time: torchrun would take
    that for an order to kill its workers while they save.

    Attributes:
        asked: whether a signal came; no further job starts then.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, verb: str, words: list[str], processes: int = 1, stdout: IO[Any] | None = None) -> int:
        """Runs a verb to its end.

        Args:
            verb: such as "pretrain".
            words: its arguments.
            processes: how many train together.
            stdout: where the job's results go; by default where ours go.

        Returns:
            As `run_command`.
        """
        return self.run_command([sys.executable, *job_words(verb, words, processes)], stdout)

    def run_command(self, command: list[str], stdout: IO[Any] | None = None) -> int:
        """Runs a command that starts verbs.

        Returns:
            Its exit code: that of the process that failed first, where torchrun would say 1 for everything;
            75 without starting it where a signal came before.
        """
        if self.asked:
            return STOPPED
        with tempfile.TemporaryDirectory() as folder:
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "MEGATRON_LION_EXIT_DIR": folder}
            self._process = subprocess.Popen(
                command, env=environment, stdout=stdout, start_new_session=True, preexec_fn=_end_with_parent
            )
            if self.asked:  # the signal came while the process was made
                self._process.terminate()
            code = self._process.wait()
            self._process = None
            return (_first_code(Path(folder)) or code) if code else 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if self._process is not None:
            self._process.terminate()


def _end_with_parent() -> None:
    """Runs in the new process: where this one is killed, the job is asked to save and leave instead of going on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _first_code(folder: Path) -> int | None:
    """The exit code of the rank that failed first; ranks leave them as `cli` writes them."""
    files = sorted(folder.glob("exit.*.json"), key=lambda path: path.stat().st_mtime_ns)
    return int(json.loads(files[0].read_text())["exit_code"]) if files else None
