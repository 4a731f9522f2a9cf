"""The held-out samples are read by the same worker processes in every measurement of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import tiny
import torch

from megatron_lion.data import loader_workers
from megatron_lion.data.batches import RepeatedBatches
from megatron_lion.device import Device
from megatron_lion.errors import MegatronLionError, StoppedOnRequest
from megatron_lion.parallel import Ranks, _collective_faults
from megatron_lion.peer_board import process_state

SAMPLES = 24


class Counted:
    """A dataset whose sample holds its value and the number of samples that this process has read before."""

    def __init__(self, first: int) -> None:
        self.first, self.read = first, 0

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self.read += 1
        return {"tokens": torch.tensor([self.first + number]), "read": torch.tensor(self.read)}


def opened(workers: int, limit_s: float = 600) -> RepeatedBatches:
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in a training process
    one, cpu = Ranks(0, 1, 0, 1, 0, 1, 0, 1), Device("cpu", 0, "gloo")
    return RepeatedBatches(
        [None, Counted(100), Counted(200)], end=SAMPLES, global_batch_size=4, micro_batch_size=2, ranks=one, device=cpu,
        num_workers=workers, timeout_s=limit_s,
    )  # fmt: skip


def children() -> list[int]:
    return sorted(child.pid for child in multiprocessing.active_children() if child.pid is not None)


def tokens(batches: Any) -> list[int]:
    return [int(token) for batch in batches for token in batch["tokens"].flatten()]


def error_of(fault: Callable[[], Any]) -> tuple[str, str]:
    try:
        with _collective_faults(None):
            fault()
    except MegatronLionError as error:
        return type(error).__name__, str(error)
    return "", ""


def expected(part: int) -> list[int]:
    return [100 * part + number for number in range(SAMPLES)]


def measure_twice(pipe: Connection) -> None:
    """Sends what two measurements of two splits read and by which processes, with a reading cut short between them."""
    batches = opened(2)
    found, pids = [], []
    for part in (1, 2, 1, 2):
        found.append(tokens(batches.read(part)))
        pids.append(children())
    cut = batches.read(1)
    next(cut)
    cut.close()
    found.append(tokens(batches.read(2)))
    pids.append(children())
    # Each worker reads every second micro-batch: half of the samples of a measurement, and nothing ahead of the next.
    reads = [int(batch["read"].max()) for batch in batches.read(1)]
    batches.close()
    pipe.send((found, pids, reads, children()))


def ask(target: Callable[[Connection], None]) -> Any:
    """What `target` sends, from a process of its own, which must end by itself with 0."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,))
    process.start()
    theirs.close()
    try:
        assert ours.poll(120)
        answer = ours.recv()
        process.join(60)
        assert process.exitcode == 0
        return answer
    finally:
        process.kill()


def test_two_measurements_use_the_same_processes_and_read_the_same_samples() -> None:
    found, pids, reads, left = ask(measure_twice)
    assert found == [expected(part) for part in (1, 2, 1, 2, 2)]
    assert len(pids[0]) == 2
    assert pids == [pids[0]] * len(pids)
    assert left == []
    assert len(reads) == SAMPLES // 2
    # Two whole readings of part 1 before, and of the one that was cut at most two micro-batches a worker were read ahead.
    assert SAMPLES * 3 // 2 <= reads[-1] <= SAMPLES * 3 // 2 + 3 * 2


def test_without_workers_the_samples_are_the_same() -> None:
    batches = opened(0)
    assert [tokens(batches.read(part)) for part in (1, 2, 1)] == [expected(1), expected(2), expected(1)]
    assert children() == []
    batches.close()


def lose_idle_workers(pipe: Connection) -> None:
    """Sends what is raised if a worker is killed or stopped between two measurements, and which are left."""
    loader_workers._POLL_S = 0.05
    pids: list[int] = []

    def between(number: signal.Signals, limit_s: float) -> None:
        before = children()
        with contextlib.closing(opened(2, limit_s)) as batches:
            tokens(batches.read(1))
            pids.append(next(pid for pid in children() if pid not in before))
            os.kill(pids[-1], number)
            if number == signal.SIGKILL:
                time.sleep(60)  # ended by torch's handler
            tokens(batches.read(2))

    with contextlib.redirect_stderr(io.StringIO()):
        found = [error_of(lambda: between(signal.SIGKILL, 600)), error_of(lambda: between(signal.SIGSTOP, 1))]
    for worker in multiprocessing.active_children():
        worker.join(60)
    pipe.send((found, pids, children()))


def test_an_idle_worker_that_is_killed_or_stopped_is_reported() -> None:
    (killed, stopped), pids, left = ask(lose_idle_workers)
    assert killed[0] == stopped[0] == "WorkerError"
    assert f"pid {pids[0]}" in killed[1]
    assert "SIGKILL" in killed[1]
    assert "parallel.timeout_s" in stopped[1]
    assert f"stopped (SIGSTOP or a debugger): {pids[1]}" in stopped[1]
    assert left == []


def test_the_reason_states_how_the_workers_were_before_they_are_killed() -> None:
    """Two threads ask for it, one of which kills the workers; each must state the same."""
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    try:
        watch = loader_workers._Watch([worker], 1.0, rank=0)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        while process_state(worker.pid) != "stopped":
            time.sleep(0.01)
        first = watch.reason()
        assert f"stopped (SIGSTOP or a debugger): {worker.pid}" in first
    finally:
        worker.kill()
        worker.join(60)
    assert watch.reason() == first


def close_with_a_stopped_worker(pipe: Connection) -> None:
    batches = opened(2)
    tokens(batches.read(1))
    os.kill(children()[0], signal.SIGSTOP)
    while process_state(children()[0]) != "stopped":
        time.sleep(0.01)
    batches.close()
    pipe.send(children())


def test_a_stopped_worker_does_not_stay_after_the_end() -> None:
    assert ask(close_with_a_stopped_worker) == []


def pids_in_each_measurement(rank: int, config: Any) -> tuple[list[list[int]], str, list[int]]:
    """Runs a config; returns the worker processes at the end of each held-out reading, the error, and what is left."""
    from megatron_lion.train import loop

    found: list[list[int]] = []
    plain = loop.mean_losses

    def noting(*args: Any, **kwargs: Any) -> Any:
        before = set(children())
        losses = plain(*args, **kwargs)
        found.append(sorted(kept(before)))
        if config.name == "interrupted" and len(found) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if config.name == "failing" and len(found) == 3:
            raise RuntimeError("of the test")
        return losses

    def kept(before: set[int]) -> set[int]:
        return set(children()) if len(found) == 0 else before & set(children())

    error, left = "", []
    with mock.patch.object(loop, "mean_losses", noting):
        try:
            tiny.train(config)
        except (RuntimeError, StoppedOnRequest) as raised:
            # Here the traceback still refers to the loaders, and torch has not ended their workers.
            error, left = type(raised).__name__, [pid for pid in children() if pid in found[0]]
    return found, error, left + children()


@pytest.mark.parametrize("name", ["whole", "interrupted", "failing"])
def test_a_run_keeps_its_workers_and_leaves_none(tmp_path: Path, name: str) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    settings = {"train__steps": 4, "train__test_every": 2, "train__test_batches": 1}
    config = tiny.tiny_config(tmp_path / "ahead", corpus, data__num_workers=1, name=name, **settings)
    found, error, left = distributed.run_distributed(pids_in_each_measurement, 1, config)[0]
    assert error == {"whole": "", "interrupted": "StoppedOnRequest", "failing": "RuntimeError"}[name]
    assert len(found) == {"whole": 6, "interrupted": 4, "failing": 3}[name]
    assert len(found[0]) == 1
    assert all(set(found[0]) <= set(pids) for pids in found), found
    assert left == []
    if name != "whole":
        return
    plain = dataclasses.replace(
        config, run_dir=str(tmp_path / "plain"), data=dataclasses.replace(config.data, num_workers=0)
    )
    distributed.run_distributed(tiny.train_each, 1, {"": plain})
    losses = [
        [
            (line["step"], line["valid/loss"], line["test/loss"])
            for line in tiny.read_metrics(run.run_dir)
            if "test/loss" in line
        ]
        for run in (config, plain)
    ]
    assert [step for step, *_ in losses[0]] == [0, 2, 4]
    assert losses[0] == losses[1]
