"""Loader workers ignore stop signals that are not from their parent, and never outlive it."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import distributed  # noqa: F401 - its fork server has imported torch and megatron-core
import psutil
import pytest
import torch

from megatron_lion.data import loader_workers
from megatron_lion.data.batches import micro_batches
from megatron_lion.device import Device
from megatron_lion.errors import DataError, MegatronLionError
from megatron_lion.exit_report import leave
from megatron_lion.files import file_lock
from megatron_lion.parallel import Ranks, _collective_faults

STEPS = 12
SAMPLES = [{"tokens": torch.full((4,), number)} for number in range(STEPS)]
held: Any = None


def batches(start_method: str | None = None, samples: Any = SAMPLES) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches, with workers of this start method; None is the platform's default, as in a training process."""
    multiprocessing.set_start_method(start_method, force=True)
    one, cpu = Ranks(0, 1, 0, 1, 0, 1, 0, 1), Device("cpu", 0, "gloo")
    return micro_batches(
        samples, start=0, end=STEPS, global_batch_size=1, micro_batch_size=1, ranks=one, device=cpu, num_workers=2
    )


def read(pipe: Connection) -> None:
    """Reads one batch, sends the workers' ids, waits for an answer, and reads the rest."""
    found = [int(batch["tokens"][0, 0]) for batch in _with_a_break(pipe)]
    pipe.send((found, [child.pid for child in multiprocessing.active_children()]))


def _with_a_break(pipe: Connection) -> Iterator[dict[str, torch.Tensor]]:
    for number, batch in enumerate(batches()):
        if number == 1:
            pipe.send([child.pid for child in multiprocessing.active_children()])
            pipe.recv()
        yield batch


def read_with_a_signal_at_each_fork(pipe: Connection) -> None:
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
    read(pipe)


def leave_with_the_loader_open(pipe: Connection) -> None:
    """Ends as after an uncaught exception, whose traceback refers to the loader until the process ends."""
    global held
    held = batches()
    next(held)
    pipe.send([child.pid for child in multiprocessing.active_children()])


def wait_with_workers_of_a_fork_server(pipe: Connection) -> None:
    found = batches("forkserver")
    next(found)
    pipe.send([child.pid for child in multiprocessing.active_children()])
    pipe.recv()


@contextmanager
def running(target: Any) -> Iterator[tuple[Any, Connection, list[psutil.Process]]]:
    """Yields a process that runs `target`, a pipe to it, and its loader workers."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60)
        workers = [psutil.Process(number) for number in ours.recv()]
        assert len(workers) == 2
        yield process, ours, workers
    finally:
        process.kill()
        process.join()


def still_there(workers: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Returns the workers that are alive after `seconds`; a zombie that is not reaped yet counts as dead."""
    end = time.monotonic() + seconds
    while workers and time.monotonic() < end:
        time.sleep(0.02)
        workers = [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return workers


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT"])
def test_a_stop_signal_from_elsewhere_does_not_end_a_worker(number: str) -> None:
    with running(read) as (process, pipe, workers):
        for worker in workers:
            worker.send_signal(getattr(signal, number))
        assert len(still_there(workers, 0.1)) == 2
        pipe.send("continue")
        assert pipe.poll(20)
        assert pipe.recv() == (list(range(STEPS)), [])
        assert not still_there(workers, 2)
        process.join(10)
        assert process.exitcode == 0


def test_a_stop_signal_does_not_end_a_worker_that_is_starting() -> None:
    with running(read_with_a_signal_at_each_fork) as (_, pipe, _):
        pipe.send("continue")
        assert pipe.poll(20)
        assert pipe.recv() == (list(range(STEPS)), [])


def test_the_signal_of_the_parent_ends_its_workers() -> None:
    """Otherwise a process that fails would wait for its workers without end at exit."""
    with running(leave_with_the_loader_open) as (process, _, workers):
        process.join(10)
        assert process.exitcode == 0
        assert not still_there(workers, 2)


@pytest.mark.parametrize("target", [read, pytest.param(wait_with_workers_of_a_fork_server, marks=pytest.mark.slow)])
def test_a_killed_parent_leaves_no_workers(target: Any) -> None:
    """Workers check their parent every 5 seconds; a fork server is the default from Python 3.14 on."""
    with running(target) as (process, _, workers):
        process.kill()
        assert not still_there(workers, 12)


def read_under_a_lock(path: str, pipe: Connection) -> None:
    """Holds a lock, as a run does, while its workers read."""
    with file_lock(path, "THE RUN", "WAIT"):
        read(pipe)


def test_workers_do_not_hold_the_lock_of_their_run(tmp_path: Path) -> None:
    """Otherwise a run that was killed is "in use by" itself until its workers notice."""
    ours, theirs = multiprocessing.Pipe()
    path = tmp_path / "lock"
    process = multiprocessing.get_context("forkserver").Process(target=read_under_a_lock, args=(str(path), theirs))
    process.start()
    try:
        assert ours.poll(120)
        workers = ours.recv()
        opened = {pid: [entry.path for entry in psutil.Process(pid).open_files()] for pid in (process.pid, *workers)}
        assert len(workers) == 2
        assert str(path) in opened.pop(process.pid)
        assert not [files for files in opened.values() if str(path) in files]
        process.kill()
        process.join()
        with file_lock(path, "THE RUN", "WAIT"):
            pass
    finally:
        process.kill()


class Damaged:
    """A dataset whose samples cannot be read."""

    def __getitem__(self, number: int) -> Any:
        raise DataError("a.bin: sample is damaged; prepare it again")


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def read_with_faults(pipe: Connection) -> None:
    """Sends what a job's block raises if its workers are killed, stopped or fail, and what it prints meanwhile."""
    loader_workers._POLL_S = 0.05
    told: list[str] = []

    def error_of(fault: Any) -> tuple[str, int, str]:
        try:
            with _collective_faults(None):
                fault()
        except MegatronLionError as error:
            return type(error).__name__, error.exit_code, str(error)
        return "", 0, ""

    def signal_workers(number: int) -> list[int]:
        for pid in children():
            os.kill(pid, number)
        return children()

    def killed_in_another_call() -> None:
        reader = batches()
        next(reader)
        pipe.send(children())
        os.kill(children()[0], signal.SIGKILL)
        time.sleep(60)  # ended by torch's handler

    def killed_in_the_wait() -> None:
        before = children()  # those of the reader above may still be ending
        reader = batches()
        next(reader)
        os.kill(next(pid for pid in children() if pid not in before), signal.SIGKILL)
        list(reader)

    def stopped() -> None:
        reader = batches()
        next(reader)
        signal_workers(signal.SIGSTOP)
        clock = iter(range(0, 10**9, 400))
        with mock.patch.object(loader_workers, "monotonic", clock.__next__):
            list(reader)

    def continue_them(text: str) -> None:
        told.append(text)
        signal_workers(signal.SIGCONT)

    def stopped_for_a_while() -> list[int]:
        reader = batches()
        found = [int(next(reader)["tokens"][0, 0])]
        signal_workers(signal.SIGSTOP)
        with mock.patch.object(loader_workers, "NOTICE_S", 0.0):
            return found + [int(batch["tokens"][0, 0]) for batch in reader]

    with contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, Any] = {"in another call": error_of(killed_in_another_call)}
        found["in the wait"] = error_of(killed_in_the_wait)
        with mock.patch.object(loader_workers, "write_line", told.append):
            found["stopped"] = error_of(stopped)
        # A run ends after such an error; here, torch's handler must not report a killed worker again in the next reading.
        for worker in multiprocessing.active_children():
            for _ in range(4):  # the handler can interrupt it once for each killed worker
                with contextlib.suppress(RuntimeError):
                    worker.join(10)
        with mock.patch.object(loader_workers, "write_line", continue_them):
            found["read"] = stopped_for_a_while()
        for worker in multiprocessing.active_children():
            worker.join(60)
        left = children()
        found["own"] = error_of(lambda: list(batches(samples=Damaged())))
    pipe.send((found, told, left))


def test_a_worker_that_is_killed_stopped_or_fails_is_reported_in_one_line() -> None:
    with running(read_with_faults) as (_, pipe, workers):
        assert pipe.poll(120)
        found, told, left = pipe.recv()
    for name in ("in another call", "in the wait"):
        kind, code, text = found[name]
        assert (kind, code, text.count("\n")) == ("WorkerError", 8, 0), found
        assert "SIGKILL" in text, text
        assert "data.num_workers" in text
    assert (
        f"pid {workers[0].pid}" in found["in another call"][2] or f"pid {workers[1].pid}" in found["in another call"][2]
    )
    kind, code, text = found["stopped"]
    assert (kind, code, text.count("\n")) == ("WorkerError", 8, 0), found
    assert "parallel.timeout_s" in text
    assert "pid" in text
    assert found["own"] == ("DataError", 3, "a.bin: sample is damaged; prepare it again")
    assert found["read"] == list(range(STEPS)), "after a wait the loader goes on with the same batch"
    assert ["waited" in line for line in told] == [True] * len(told)
    assert len(told) >= 2
    assert left == []


def leave_with_stopped_workers(pipe: Connection) -> None:
    leave_with_the_loader_open(pipe)
    for pid in children():
        os.kill(pid, signal.SIGSTOP)
    leave(8)


def test_stopped_workers_do_not_keep_a_process_alive() -> None:
    with running(leave_with_stopped_workers) as (process, _, workers):
        process.join(60)
        ended, left = process.exitcode, still_there(workers, 10)
        for worker in left:
            worker.kill()
        assert ended == 8
        assert not left
