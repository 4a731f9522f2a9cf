"""Waits for the batches of loader workers with a time limit, and lets stopped workers end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import torch

from megatron_lion.collective_faults import killed_because, lost_worker
from megatron_lion.errors import MegatronLionError, WorkerError
from megatron_lion.exit_report import write_line
from megatron_lion.peer_board import process_state
from megatron_lion.peer_watch import NOTICE_S
from megatron_lion.signals import GROUP_SIGNALS, blocked

_POLL_S = 1.0
_END_S = 5.0  # a worker whose connection is reset is about to end


def read_batches(
    loader: torch.utils.data.DataLoader[Any], limit_s: float, rank: int, kept: list[BaseProcess] | None = None
) -> Iterator[Any]:
    """Yields the batches of a loader; a line names from time to time what a long wait is for.

    Args:
        loader: its `timeout` is limit_s if it has workers.
        limit_s: longest wait for one batch, seconds.
        rank: of this process, for the lines.
        kept: the workers of a loader that keeps them from one reading to the next. The first reading fills the list, later
            ones use it, and `let_end` belongs before their end. None if the workers end with the reading.

    Raises:
        WorkerError: no batch came in time, or a worker was lost.
        MegatronLionError: a worker raised it; with the worker's message, without its traceback.
    """
    killed_because.clear()
    watch = _Watch([] if kept is None else kept, limit_s, rank)
    try:
        if watch.workers:  # each answers before it reads: one that was stopped since would not
            watch.start()
            batches = _in_time(lambda: iter(loader), watch)
        else:
            before = multiprocessing.active_children()
            # A worker calls obey_only_the_parent only after its own set-up. Without the block, a signal to the process
            # group in these milliseconds kills it. Every probe starts new workers.
            with blocked(GROUP_SIGNALS):
                batches = iter(loader)
            watch.workers.extend(child for child in multiprocessing.active_children() if child not in before)
            if watch.workers:
                watch.start()
        while True:
            try:
                batch = _in_time(lambda: next(batches), watch)
            except StopIteration:
                return
            yield batch
    finally:
        watch.done.set()
        if kept is None:
            let_end(watch.workers)


def let_end(workers: list[BaseProcess]) -> None:
    """Continues stopped workers. torch asks its workers to end and waits seconds; a stopped one would be there after the run."""
    for worker in workers:
        if worker.pid is not None and process_state(worker.pid) == "stopped":
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGCONT)


def end(workers: list[BaseProcess]) -> None:
    """Ends the workers whose loader still exists: the traceback of an error refers to it until the process ends."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(_END_S)
    workers.clear()


class _Watch(threading.Thread):
    """Writes lines about a long wait for a batch, and kills the workers when the limit is over.

    torch's own `timeout` is for an empty queue alone. The parts of a queued batch come from the memory of its worker, and
    if that is stopped, the main thread waits for an answer from it without a limit.
    """

    def __init__(self, workers: list[BaseProcess], limit_s: float, rank: int) -> None:
        super().__init__(name="loader-watch", daemon=True)
        self.workers, self.limit_s, self.rank = workers, limit_s, rank
        self.done, self.expired = threading.Event(), False
        self._because, self._lock = "", threading.Lock()
        self.began: float | None = None
        self.notice_s = NOTICE_S

    def run(self) -> None:
        # As in the watch over the ranks: the main thread blocks signals while it starts workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self.done.wait(_POLL_S):
            began = self.began
            waited = monotonic() - began if began is not None else 0.0
            if began is not None and waited >= self.limit_s:
                killed_because.append(self.reason())
                self.expired = True
                for worker in self.workers:
                    worker.kill()
                return
            if began is not None and waited >= self.notice_s:
                self.notice_s *= 2
                write_line(
                    f"megatron-lion[rank {self.rank}]: waited {waited:.0f} s for a batch of the data loader's {self.names()}"
                )

    def reason(self) -> str:
        """The message if no batch came in time, with the state of the workers at the first call: later they are killed."""
        with self._lock:  # torch's own limit can be over in the main thread at the same moment
            self._because = self._because or (
                f"waited {self.limit_s:g} s (parallel.timeout_s) for a batch of the data loader's {self.names()}; were they "
                "stopped, or is the file system of the data stuck? The same command continues from what is saved"
            )
            return self._because

    def names(self) -> str:
        """The workers, and which of them are stopped."""
        pids = [worker.pid for worker in self.workers if worker.pid is not None]
        stopped = [str(pid) for pid in pids if process_state(pid) == "stopped"]
        text = f"worker processes (pid {', '.join(map(str, pids))})"
        return f"{text}; stopped (SIGSTOP or a debugger): {', '.join(stopped)}" if stopped else text


def _in_time(ask: Callable[[], Any], watch: _Watch) -> Any:
    """Returns what a loader answers, while the watch limits the wait."""
    watch.notice_s, watch.began = NOTICE_S, monotonic()
    try:
        return ask()
    except MegatronLionError as error:
        raise _as_raised(error) from error
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught "):  # torch's text about an exception of a worker's own code
            raise
        if watch.expired or str(error).startswith("DataLoader timed out"):
            raise WorkerError(watch.reason()) from error
        # A queued batch of a killed worker cannot be fetched from it: its connection is reset before torch notices.
        if isinstance(error, RuntimeError):
            raise
        ended = wait([worker.sentinel for worker in watch.workers], _END_S)
        gone = [worker for worker in watch.workers if worker.sentinel in ended]
        if not gone:
            raise
        for worker in gone:
            worker.join(_END_S)  # its descriptors are closed a moment before the kernel has its exit code
        by = [signal.Signals(-worker.exitcode).name for worker in gone if worker.exitcode and worker.exitcode < 0]
        raise lost_worker(", ".join(str(worker.pid) for worker in gone), by[0] if by else None) from error
    finally:
        watch.began = None


def _as_raised(error: MegatronLionError) -> MegatronLionError:
    """An error that a worker raised, with its own message: torch puts the worker's whole traceback into it."""
    kind = type(error)
    _, found, text = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return kind(text.strip()) if found else error
