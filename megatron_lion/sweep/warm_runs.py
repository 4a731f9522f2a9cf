"""Runs of a sweep that are forked from a process which has imported torch and megatron-core once.

Imports take several seconds, longer than many small runs. The process is Python's own fork server (`multiprocessing`): it
only imports, so a child begins in the state of a fresh `python -m megatron_lion pretrain` after its imports. Everything else
is as for a child of `Jobs`: session, environment, streams, signals and exit code.

Where a fork would not be safe, runs are started as before: with a GPU, since imports may open the driver, which a child
cannot use; on systems other than Linux; and if the imports left a second thread.
"""

from __future__ import annotations

import glob
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from megatron_lion.signals import end_with_parent

_IMPORTS = "megatron_lion.train.warm_imports"
_DRIVERS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def can_fork() -> bool:
    """Returns whether runs may be forked on this machine: on Linux without a GPU."""
    return sys.platform == "linux" and not any(map(glob.glob, _DRIVERS))


class WarmRun:
    """One run as a child of the fork server; has the methods of `subprocess.Popen` that `Jobs` uses.

    Args:
        verb: name of the subcommand.
        words: its arguments.
        environment: environment variables of the server, and so of every run.
    """

    def __init__(self, verb: str, words: Sequence[str], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_IMPORTS])
        # Not a daemon: those may have no children, and a run has loader workers.
        self._process: Any = context.Process(target=_run, args=([verb, *words],), daemon=False)
        before = dict(os.environ)
        os.environ.update(environment)  # the first start starts the server, which takes this process's environment
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def wait(self) -> int:
        """Waits for the end; returns the exit code, negative if a signal ended it."""
        self._process.join()
        return int(self._process.exitcode)


def _end_with(sweep: Any) -> None:
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(words: list[str]) -> None:
    """Does in a forked child what a new interpreter does with these words."""
    os.setsid()  # Ctrl-C in a terminal reaches the sweep only, which passes one SIGTERM on
    end_with_parent(os.getppid())()
    # The server outlives a killed sweep: multiprocessing keeps it for as long as one of its children lives.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.dup2(2, 1)  # a sweep's stdout is for its own table
    multiprocessing.set_start_method(None, force=True)  # loader workers start as in any run
    imported = sys.modules.get(_IMPORTS)
    if imported is None or imported.THREADS != 1:
        os.execv(sys.executable, [sys.executable, "-m", "megatron_lion", *words])
    sys.argv = ["megatron_lion", *words]
    importlib.import_module("megatron_lion.__main__").start()
