"""Child processes that run subcommands, on one or several processes; a rank's place in its job, and its exit code on file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol, Self

from megatron_lion.errors import ConfigError, MegatronLionError, PeerError, StoppedOnRequest
from megatron_lion.signals import STOP_SIGNALS, end_with_parent, handled, signal_name
from megatron_lion.streams import NO_HINTS

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


def shell_line(words: list[str]) -> str:
    """Words as one command line that bash, zsh and sh split into the same words.

    Example:
        >>> shell_line(["megatron-lion", "pretrain", "--data.path", "[my data]"])
        "megatron-lion pretrain --data.path '[my data]'"
    """
    # zsh replaces an unquoted =word by the path of that command.
    return " ".join(
        f"'{word}'" if word.startswith("=") and word == shlex.quote(word) else shlex.quote(word) for word in words
    )


def typed_path(path: str | Path) -> str:
    """An absolute path as typed in the current folder: relative if it is inside of it, else unchanged."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def interpreter_word() -> str:
    """This interpreter as a user can type it here: "python" if the PATH leads to it, else its path."""
    # Links are not followed: those of every environment lead to the same file.
    found = shutil.which("python")
    return "python" if found == sys.executable else typed_path(sys.executable)


def shown_job(verb: str, words: list[str], processes: int = 1) -> str:
    """The command line of `Jobs.run` with these arguments, to be pasted in a shell."""
    return shell_line([interpreter_word(), *job_words(verb, words, processes)])


@dataclass(frozen=True)
class Place:
    """This process's place in its job, from the variables that a launcher sets.

    Attributes:
        rank, world_size: RANK and WORLD_SIZE; 0 and 1 without a launcher.
        local_rank, local_world_size: LOCAL_RANK and LOCAL_WORLD_SIZE, the same among the processes of this node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_from_env() -> Place:
    """Reads this process's place from the environment; a variable that is empty counts as not set.

    Raises:
        ConfigError: a variable is not a whole number, or out of range.
    """
    world_size = _variable("WORLD_SIZE", 1)
    job, node = f" (WORLD_SIZE is {world_size})", ""
    rank = _variable("RANK", 0, world_size - 1, job)
    local_world_size = _variable("LOCAL_WORLD_SIZE", 1, world_size, job)
    most = _LARGEST
    if os.environ.get("LOCAL_WORLD_SIZE"):  # else LOCAL_RANK alone chooses the GPU of a single process
        most, node = local_world_size - 1, f" (LOCAL_WORLD_SIZE is {local_world_size})"
    return Place(rank, world_size, _variable("LOCAL_RANK", 0, most, node), local_world_size)


def world_size_from_env() -> int:
    """Number of processes of this job; 1 without a launcher. Raises ConfigError as `place_from_env`."""
    return place_from_env().world_size


def rank_from_env() -> int:
    """Rank of this process among those of its job, from 0. Raises ConfigError as `place_from_env`."""
    return place_from_env().rank


def known_rank() -> int | None:
    """RANK as far as it is a number, for the report of an error; None without one. It never raises."""
    return _whole_number(os.environ.get("RANK", ""))


def place_error(message: str) -> ConfigError:
    """An error about this process's own variables, which each process prints: the others may not have it, or not exist."""
    error = ConfigError(message)
    error.told_by = known_rank() or 0
    return error


_LARGEST = 2**31 - 1  # that torch's stores hold


def _variable(name: str, least: int, most: int = _LARGEST, reason: str = "") -> int:
    """A whole number from the environment; `least`, which all have as default, if it is not set."""
    text = os.environ.get(name, "")
    if not text:
        return least
    number = _whole_number(text)
    if number is None or not least <= number <= most:
        raise place_error(
            f"{name}={text[:40]!r}: must be a whole number from {least} to {most}{reason}; correct it or unset it"
        )
    return number


def _whole_number(text: str) -> int | None:
    # Not int(): it also takes signs, underscores and blanks, and raises for more than 4300 digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


class Child(Protocol):
    """A started job, as `subprocess.Popen`."""

    def terminate(self) -> None:
        """Sends SIGTERM."""

    def wait(self) -> int:
        """Waits for its end; returns the exit code, negative if a signal ended it."""


class Jobs:
    """Runs subcommands one after another; passes the first stop signal on to the current one as SIGTERM.

    Each job runs in a new session. Otherwise Ctrl-C in a terminal would reach it a second time.

    Args:
        fork: starts a job of one process, from its verb, arguments and environment, with stdout on stderr, in another way than
            by a new interpreter.

    Attributes:
        asked: whether a signal arrived; no further job starts then.
    """

    def __init__(self, fork: Callable[[str, list[str], dict[str, str]], Child] | None = None) -> None:
        self.asked = False
        self._fork = fork
        self._process: Child | None = None
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
        if self._fork is not None and processes == 1 and stdout is sys.stderr:
            fork = self._fork
            return self._finish(lambda: fork(verb, words, _environment()))
        return self.run_command([sys.executable, *job_words(verb, words, processes)], stdout)

    def run_command(self, command: list[str], stdout: IO[Any] | None = None) -> int:
        """Runs a command that starts subcommands.

        Returns:
            The command's exit code, negative if a signal killed it. 75, without starting the command, if a signal
            arrived before.
        """
        return self._finish(
            lambda: subprocess.Popen(
                command, env=_environment(), stdout=stdout, start_new_session=True, preexec_fn=end_with_parent()
            )
        )

    def _finish(self, start: Callable[[], Child]) -> int:
        if self.asked:
            return STOPPED
        self._process = start()
        if self.asked:  # the signal arrived during the start, when _ask had no process to forward it to
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


def _environment() -> dict[str, str]:
    # launch/torchrun.sh takes this interpreter: another, such as make's PYTHON, may lack the package.
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable, NO_HINTS: "1"}


def child_end(code: int) -> str:
    """How a child process ended, for a message.

    Example:
        >>> child_end(2), child_end(-9)
        ('code 2', 'SIGKILL; if no user did that, the machine was probably out of memory')
    """
    if code >= 0:
        return f"code {code}"
    hint = "; if no user did that, the machine was probably out of memory" if code == -signal.SIGKILL else ""
    return f"{signal_name(-code)}{hint}"


def child_failure(message: str, code: int) -> MegatronLionError:
    """The error to raise for a child process that failed: with its exit code; PeerError if a signal killed it."""
    if code < 0:
        return PeerError(message)
    error = MegatronLionError(message)
    error.exit_code = code
    return error


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
