"""Child processes: subcommands, also under torchrun; stop signals, torchrun's environment, ranks' exit codes.

`python -m megatron_lion.jobs first-exit-code FOLDER` prints the exit code of the rank that failed first, for launchers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megatron_lion.signals import STOP_SIGNALS, handled, signal_when_parent_ends

STOPPED = 75
"""Exit code of a job that saved and ended on request."""


def job_words(verb: str, words: list[str], processes: int = 1) -> list[str]:
    """The interpreter's arguments that run a subcommand on `processes` processes of this machine.

    Example:
        >>> job_words("env", ["--device", "cpu"])
        ['-m', 'megatron_lion', 'env', '--device', 'cpu']
    """
    if processes == 1:
        return ["-m", "megatron_lion", verb, *words]
    # Port 0 takes a free one, so that jobs on one machine do not collide.
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "megatron_lion", verb, *words]  # fmt: skip


def world_size_from_env() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_env() -> int:
    """Rank of this process among those that torchrun started, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


class Jobs:
    """Runs subcommands one after another; forwards SIGINT, SIGTERM and SIGUSR1 to the current one as one SIGTERM.

    Each job runs in a new session. Otherwise Ctrl-C in a terminal would reach it a second time, and torchrun would
    kill its workers while they save.

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
            processes: number of processes; torchrun starts them if there are several.
            stdout: stream of the job's results; by default this process's stdout.

        Returns:
            The exit code, as `run_command`.
        """
        return self.run_command([sys.executable, *job_words(verb, words, processes)], stdout)

    def run_command(self, command: list[str], stdout: IO[Any] | None = None) -> int:
        """Runs a command that starts subcommands.

        Returns:
            The exit code of the process that failed first (torchrun itself returns 1 for every failure), negative if
            a signal killed the job. 75, without starting the command, if a signal arrived before.
        """
        if self.asked:
            return STOPPED
        with tempfile.TemporaryDirectory() as folder:
            # launch/torchrun.sh takes this interpreter: another, such as make's PYTHON, may lack the package.
            environment = {
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "PYTHON": sys.executable,
                "MEGATRON_LION_EXIT_DIR": folder,
            }
            self._process = subprocess.Popen(
                command, env=environment, stdout=stdout, start_new_session=True, preexec_fn=_end_with_parent
            )
            if self.asked:  # the signal arrived during Popen, when _ask had no process to forward it to
                self._process.terminate()
            code = self._process.wait()
            self._process = None
            return (first_exit_code(Path(folder)) or code) if code else 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        if self._process is not None:
            self._process.terminate()


def _end_with_parent() -> None:
    """Called in the new process: if this process is killed, the kernel asks the job to save and end."""
    signal_when_parent_ends(signal.SIGTERM)


def record_exit_code(folder: Path, rank: int, exit_code: int, message: str) -> None:
    """Writes a rank's exit code to `exit.<rank>.json`: torchrun reports 1 for every failed worker."""
    content = {"rank": rank, "exit_code": exit_code, "error": message}
    # Renamed when complete: torchrun may kill this rank at any moment, and the reader parses every file.
    temporary = folder / f".exit.{rank}.json.tmp"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(folder / f"exit.{rank}.json")


def first_exit_code(folder: Path) -> int | None:
    """The exit code of the rank that failed first, or None if no rank recorded one."""
    # By time: torchrun kills the other ranks after the first failure, and those may record codes of their own.
    files = sorted(folder.glob("exit.*.json"), key=lambda path: path.stat().st_mtime_ns)
    return int(json.loads(files[0].read_text(encoding="utf-8"))["exit_code"]) if files else None


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "first-exit-code":
        sys.exit("usage: python -m megatron_lion.jobs first-exit-code FOLDER")
    found = first_exit_code(Path(sys.argv[2]))
    sys.stdout.write("" if found is None else f"{found}\n")
