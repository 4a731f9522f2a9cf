"""Signal handlers, blocked signals, and the handling of a parent's signals in its child processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_lion.errors import StoppedOnRequest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask a job to save and end; SIGHUP is a closed terminal, SIGUSR1 is SLURM before a time limit."""
# torchrun and GNU timeout send these to the whole process group, a terminal and SLURM to every process of the job.
GROUP_SIGNALS = STOP_SIGNALS

_PR_SET_PDEATHSIG = 1


def signal_name(number: int) -> str:
    """Returns the name of a signal, such as SIGKILL.

    >>> signal_name(9), signal_name(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs `handler` for these signals while the block runs, then restores the earlier handlers."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


IN_START = "stopped in its start, with nothing to save; the same command starts again"
"""Message of a run that a stop signal ended before its first step."""


class StopNow(BaseException):
    """What a stop signal raises at the line that runs; the block that handles signals turns it into StoppedOnRequest.

    It is not an Exception, like KeyboardInterrupt. Code that takes every Exception for a fault of a file or a package,
    here or in third-party code, would otherwise report the signal as that fault.
    """


class _RaiseOnce:
    """A handler that raises StopNow at the first signal. Launchers and schedulers may send more than one."""

    def __init__(self, message: str) -> None:
        self.message, self.raised = message, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.raised:
            self.raised = True
            raise StopNow(self.message)


@contextmanager
def _stopped_on_request() -> Iterator[None]:
    """Raises a StopNow of the block as StoppedOnRequest."""
    try:
        yield
    except StopNow as stop:
        raise StoppedOnRequest(str(stop)) from None


@contextmanager
def stop_raises(message: str) -> Iterator[None]:
    """While the block runs, a stop signal except SIGINT ends it: StopNow inside, StoppedOnRequest(message) outside.

    For work that has nothing to save, or whose finished parts are kept anyway.
    """
    with _stopped_on_request(), handled(set(STOP_SIGNALS) - {signal.SIGINT}, _RaiseOnce(message)):
        yield


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """While the block runs, a stop signal sets "now" of the returned flags; a second SIGINT raises KeyboardInterrupt.

    As long as the flag "at_once" is set, the first signal also ends the block: StopNow inside, StoppedOnRequest
    outside. The block clears that flag when it has something to save, and from then on asks for "now".

    Raises:
        StoppedOnRequest: also if a block around this one received a signal and its exception was lost, as Python loses
            an exception in a finalizer.
    """
    stop = {"now": False, "at_once": True}
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, _RaiseOnce) and outer.raised:
        raise StoppedOnRequest(IN_START)

    def ask(number: int, frame: FrameType | None) -> None:
        # A launcher and a scheduler may both send SIGTERM; only another Ctrl-C comes from a user who will not wait.
        if stop["now"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop["now"] = True
        if isinstance(outer, _RaiseOnce):
            outer.raised = True  # the reason that this block gives counts, also if more signals follow
        if stop["at_once"]:
            raise StopNow(IN_START)

    with _stopped_on_request(), handled(STOP_SIGNALS, ask):
        yield stop


@contextmanager
def blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Blocks signals in this thread; a signal that arrives in the block is delivered at its end.

    Processes that are started in the block inherit the blocked signals, so a signal to the process group cannot kill
    a child that has not installed its handlers yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(numbers))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_when_parent_ends(number: int) -> None:
    """Asks the kernel to send this process a signal when its parent ends, even by SIGKILL; no effect outside Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def end_with_parent(parent: int | None = None) -> Callable[[], None]:
    """Returns a function for `Popen(preexec_fn=...)`: if the parent ends, the child receives SIGTERM.

    Args:
        parent: pid of the child's parent; by default this process's.
    """
    parent = parent or os.getpid()
    if sys.platform == "linux":
        import ctypes  # here and not in the child: between fork and exec it must not import

        prctl = ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        # Until exec, the child has this process's handlers: one would note the signal, and exec would forget it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.platform == "linux":
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended before the kernel was asked
                os.kill(os.getpid(), signal.SIGTERM)

    return ask_the_kernel


@contextmanager
def collected() -> Iterator[list[int]]:
    """While the block runs, each stop signal is appended to the returned list and has no other effect."""
    received: list[int] = []
    with handled(STOP_SIGNALS, lambda number, frame: received.append(number)):
        yield received


def obey_only_the_parent(worker: int) -> None:
    """Makes a loader worker ignore stop signals, except the SIGTERM of the process that started it.

    On a stop signal the parent finishes the step and saves, for which it needs its workers. If a worker dies first,
    torch raises "DataLoader worker is killed by signal: Terminated" in the middle of the step, and no checkpoint is
    written. The parent ends its workers through the loader's shutdown. If it fails and exits without that,
    multiprocessing sends them SIGTERM and waits without a limit. A worker that ignored every SIGTERM would keep the
    failed process alive for ever.

    Args:
        worker: number of the worker, which torch passes; not used.
    """
    for number in set(GROUP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS: torch's handler stays, any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    # sigtimedwait on a blocked SIGTERM returns the sender's pid, which a Python signal handler does not receive.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    import multiprocessing

    parent = multiprocessing.parent_process()  # not os.getppid(): that can be multiprocessing's fork server
    assert parent is not None, "torch runs this in a worker process"
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: Any) -> None:
    # torch's workers watch os.getppid(), which is the fork server's pid: they would outlive a killed parent.
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)  # torch's own worker exits with 0 if its parent sends SIGTERM; other codes count as a failure
