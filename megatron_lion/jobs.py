"""Child processes that run subcommands, on one or several processes; a rank's number, and its exit code on file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megatron_lion.errors import StoppedOnRequest
from megatron_lion.signals import STOP_SIGNALS, end_with_parent, handled

STORE = "MEGATRON_LION_STORE"
"""Variable by which the launcher names the store to its ranks: the path of a file, or `tcp://ADDRESS:PORT/JOB`."""

STOPPED = StoppedOnRequest.exit_code
"""Exit code of a job that saved and ended on request."""


def job_words(verb: str, words: list[str], processes: int = 1) -> list[str]:
    """The interpreter's arguments that run a subcommand on `processes` processes of this machine.

    Example:
        >>> job_words("env", ["--device", "cpu"])
        ['-m', 'megatron_lion', 'env', '--device', 'cpu']
    """
    if processes == 1:
        return ["-m", "megatron_lion", verb, *words]
    return ["-m", "megatron_lion.launcher", "--processes", str(processes), verb, *words]


def world_size_from_env() -> int:
    """Number of processes of this job, which their launcher sets; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_env() -> int:
    """Rank of this process among those of its job, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


class Jobs:
    """Runs subcommands one after another; passes the first stop signal on to the current one as SIGTERM.

    Each job runs in a new session. Otherwise Ctrl-C in a terminal would reach it a second time.

    Attributes:
        asked: whether a signal arrived; no further job starts then.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers = ExitStack()

    def __enter__(self) -> Self:
        self._handlers.enter_context(handled(STOP_SIGNALS, self._ask))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def run(self, verb: str, words: list[str], processes: int = 1, stdout: IO[Any] | None = None) -> int:
        """Runs a subcommand to its end.

        Args:
            verb: name of the subcommand, such as "pretrain".
            words: arguments.
            processes: number of processes; `megatron_lion.launcher` starts them if there are several.
            stdout: stream of the job's results; by default this process's stdout.

        Returns:
            The exit code, as `run_command`.
        """
        return self.run_command([sys.executable, *job_words(verb, words, processes)], stdout)

    def run_command(self, command: list[str], stdout: IO[Any] | None = None) -> int:
        """Runs a command that starts subcommands.

        Returns:
            The command's exit code, negative if a signal killed it. 75, without starting the command, if a signal
            arrived before.
        """
        if self.asked:
            return STOPPED
        # launch/torchrun.sh takes this interpreter: another, such as make's PYTHON, may lack the package.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable}
        self._process = subprocess.Popen(
            command, env=environment, stdout=stdout, start_new_session=True, preexec_fn=end_with_parent()
        )
        if self.asked:  # the signal arrived during Popen, when _ask had no process to forward it to
            self._process.terminate()
        code = self._process.wait()
        self._process = None
        return code

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if self._process is not None:
            self._process.terminate()


def record_exit_code(folder: Path, rank: int, exit_code: int, message: str, printed: bool = True) -> None:
    """Writes a rank's exit code and message to `exit.<rank>.json`, from which the launcher finds the job's cause.

    Args:
        folder: the launcher's folder.
        rank, exit_code: of this process.
        message: the error in one line.
        printed: whether this rank has printed it.
    """
    content = {"rank": rank, "exit_code": exit_code, "error": message, "printed": printed}
    # Renamed when complete: a launcher may kill this rank at any moment, and the reader parses every file.
    temporary = folder / f".exit.{rank}.json.tmp"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(folder / f"exit.{rank}.json")
