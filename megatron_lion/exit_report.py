"""How a process ends after an error: its line on stderr, its exit file for launchers, and its exit code."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from megatron_lion.errors import ConfigError, MegatronLionError, NumericsError, StoppedOnRequest
from megatron_lion.jobs import known_rank, place_from_env, record_exit_code
from megatron_lion.plain_text import plain
from megatron_lion.streams import say

UNTYPED = 1
"""Exit code of an exception that is not a MegatronLionError: an error in this project or below it."""

_KILL_S = 5.0  # SIGKILL ends any process at once that the kernel lets end


def report(error: MegatronLionError, *, direct: bool = False) -> None:
    """Prints one line to stderr; a launched rank also writes exit.<rank>.json to MEGATRON_LION_EXIT_DIR.

    Args:
        error: its message is the line.
        direct: write with one system call, as a thread beside the main thread must (see `write_line`).
    """
    rank = known_rank() or 0
    prefix = f"megatron-lion[rank {rank}]: " if rank else "megatron-lion: "
    # Every rank raises these errors itself, so rank 0 alone prints them.
    alike = isinstance(error, StoppedOnRequest | ConfigError | NumericsError)
    told_by = 0 if error.told_by is None and alike else error.told_by
    printed = told_by is None or rank == told_by
    if printed:
        # Paths and names in it may come from somebody else's files; some messages have a line for each mistake.
        (write_line if direct else say)(plain(f"{prefix}{error}", keep="\n"))
    record(error.exit_code, str(error), printed=printed)


def write_line(text: str) -> None:
    """Writes a line to this process's stderr without Python's lock on it.

    A loader worker that is forked while another thread holds the lock inherits it locked and then waits without end.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def record(exit_code: int, message: str, *, printed: bool = True) -> None:
    """Writes this rank's exit file if a launcher started the rank and reads the file."""
    folder = os.environ.get("MEGATRON_LION_EXIT_DIR")
    rank = known_rank()
    if rank is not None and folder and os.path.isdir(folder):
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is reported
            record_exit_code(Path(folder), rank, exit_code, message, printed)


def leave(exit_code: int) -> NoReturn:
    """Ends the process; after an error on one of several ranks, or if a child cannot be ended, at once."""
    stuck, several = kill_children(), False
    with contextlib.suppress(ConfigError):  # wrong variables: reported before, and no groups were made
        several = place_from_env().world_size > 1
    if stuck or (exit_code and several):
        leave_at_once(exit_code)
    sys.exit(exit_code)


def kill_children() -> bool:
    """Kills the loader workers that are left, and returns whether one did not end, as one that hangs in a file system.

    multiprocessing's own exit sends them SIGTERM, on which a stopped process does not act, and waits without a limit.
    """
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for child in children:
        child.kill()
    for child in children:
        child.join(_KILL_S)
    return any(child.is_alive() for child in children)


def leave_at_once(exit_code: int) -> NoReturn:
    """Ends the process without waiting for anything.

    The interpreter's normal end destroys the process groups that are left. With NCCL this waits for the peers, and
    they wait for this rank in a collective, until the time limit.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()  # a stopped one would not notice that its parent has ended
    os._exit(exit_code)
