"""Time limits of the groups, stages in which one rank works alone, what is waited for, and whose fault an exception is."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from megatron_lion import collective_faults, peer_watch, peers
from megatron_lion.collective_faults import is_collective_fault, is_timeout, start_fault, worker_fault
from megatron_lion.device import Device, install_cpu_stand_in
from megatron_lion.errors import DataError, EnvironmentFault, PeerError, StoppedOnRequest, StorageError, WorkerError
from megatron_lion.parallel import _collective_faults, agree, process_groups
from megatron_lion.peer_board import FileBoard

CPU = Device("cpu", 0, "gloo")
GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/"


def limits(rank: int, seconds: float) -> list[float]:
    """The time limit of every group of this process, in seconds, as its backend holds it."""
    install_cpu_stand_in()
    with process_groups(CPU, tensor_model_parallel_size=2, timeout_s=seconds):
        groups = [group for group in dist.distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize("seconds", [pytest.param(89.0, marks=pytest.mark.slow), 20.5])
def test_every_group_has_the_time_limit_in_seconds(seconds: float) -> None:
    """megatron-core takes whole minutes; 20 s became a minute, 89 s one and 100 s two."""
    for found in run_distributed(limits, 2, seconds):
        assert len(found) > 5
        assert set(found) == {seconds}


def work_alone(rank: int) -> str:
    """Rank 0 works for longer than the time limit; rank 1 waits for it. Returns what rank 1 prints meanwhile."""
    install_cpu_stand_in()
    peer_watch.NOTICE_S = 1.0
    folder = tempfile.mkdtemp()
    os.dup2(os.open(f"{folder}/err", os.O_WRONLY | os.O_CREAT), 2)
    with process_groups(CPU, timeout_s=60):
        assert peers._watch is not None
        peers._watch.timeout_s = 1.0  # only now: joining the groups may take longer on a loaded machine
        peers.set_timeout(1.0)
        with agree("reading a large file"):
            if rank == 0:
                time.sleep(6)
        peers.set_timeout(60)
    return Path(folder, "err").read_text()


def test_a_rank_that_works_alone_is_waited_for_and_named() -> None:
    worker, waiter = run_distributed(work_alone, 2)
    assert "megatron-lion" not in worker
    assert "waited" in waiter
    assert f"'reading a large file' for rank 0 ({socket.gethostname()}" in waiter
    assert waiter.count("waited") <= 3, "the intervals double"


OWN = [
    RuntimeError("DataLoader worker (pid(s) 4242) exited unexpectedly"),
    RuntimeError("DataLoader worker (pid 12) is killed by signal: Terminated. "),
    RuntimeError("DataLoader timed out after 120 seconds"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 40 vs 4"),
    RuntimeError(f"{GLOO}pair.cc:123] failed to connect: Too many open files"),
    dist.DistBackendError("NCCL error: unhandled cuda error … Cuda failure 2 'out of memory'"),
    DataError("the data holds token id 999"),
    StorageError("/runs/gloo/metrics.jsonl: cannot be written: Connection timed out"),
    ValueError("timed out"),
    TimeoutError("timed out"),
    KeyError("gloo"),
]
LOST = [
    RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:19336"),
    RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:19894: Connection reset by peer"),
    RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"),
    dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error, ncclRemoteError: …"),
    dist.DistStoreError("wait timeout after 20000ms, keys: /default_pg/0//1"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (a, 1)."),
]


@pytest.mark.parametrize("error", OWN, ids=str)
def test_a_ranks_own_fault_is_no_lost_peer(error: Exception) -> None:
    assert not is_collective_fault(error)


@pytest.mark.parametrize("error", LOST, ids=str)
def test_failed_collectives_are_lost_peers(error: Exception) -> None:
    assert is_collective_fault(error)


def test_an_expired_limit_is_told_from_a_broken_connection() -> None:
    assert [is_timeout(error) for error in LOST] == [False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        # NCCL starts at the first collective of a group, long after the job has started.
        (OWN[7], EnvironmentFault, "cannot start on this machine: DistBackendError: NCCL error: unhandled cuda"),
        # As gloo words it if a group of the job needs one descriptor more than `ulimit -n` allows.
        (
            RuntimeError(f"[enforce fail at {GLOO[1:]}loop.cc:48] rv != -1. -1 vs -1. pipe: Too many open files"),
            EnvironmentFault,
            "pipe: Too many open files; raise the limit, for example with `ulimit -n 1024`",
        ),
        (RuntimeError("/runs/gloo/x.idx: Too many open files"), RuntimeError, "/runs/gloo/x.idx"),
        (LOST[3], PeerError, "lost a peer: NCCL communicator was aborted"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
        (StorageError("/x: No space left on device"), StorageError, "/x: No space left on device"),
    ],
)
def test_a_fault_in_the_job_is_raised_as_what_it_is_and_left_for_the_others(
    error: Exception, kind: type[Exception], message: str
) -> None:
    ends: list[tuple[Any, ...]] = []
    lost = PeerError(f"lost a peer: {error}")
    watch: Any = SimpleNamespace(end=lambda *told: ends.append(told), blame=lambda error: lost)
    for seen_by in (watch, None):
        with pytest.raises(kind) as raised, _collective_faults(seen_by):
            raise error
        assert type(raised.value) is kind
        assert message in str(raised.value)
    ((how, text, *_),) = ends
    assert how == ("lost" if kind is PeerError else "failed")
    assert message in text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error … Cuda failure 2 'out of memory'"), EnvironmentFault),
        (dist.DistBackendError("ncclInternalError … Bootstrap : no socket interface found"), EnvironmentFault),
        (dist.DistBackendError("NCCL error …, ncclSystemError: Failed to open libibverbs.so"), EnvironmentFault),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), EnvironmentFault),
        (RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:84] Unable to find address for: none"), EnvironmentFault),
        (ValueError("environment variable MASTER_PORT expected, but not set"), EnvironmentFault),
        (dist.DistNetworkError("The server socket has failed to listen … EADDRINUSE, address already in use"), EnvironmentFault),
        (dist.DistNetworkError("The client socket has failed to connect to [a]:1 (errno: 24 - Too many open files)."), EnvironmentFault),
        (dist.DistStoreError("Timed out after 6 seconds waiting for clients. 1/2 clients joined."), PeerError),
        (dist.DistNetworkError("The client socket has timed out … (10.77.0.1, 29555)"), PeerError),
        (dist.DistBackendError("NCCL error …: ncclRemoteError: A call failed possibly due to a network error"), PeerError),
        (RuntimeError("Gloo connectFullMesh failed with [pair.cc:144] Connection refused"), PeerError),
    ],
)  # fmt: skip
def test_a_fault_of_the_start_is_reported_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    """Only a missing peer is "did not find each other"; NCCL's own faults, such as memory, keep their text."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(kind) as raised, process_groups(CPU):
        pass
    assert type(raised.value) is kind
    assert ("did not find each other" in str(raised.value)) == (kind is PeerError)
    assert str(error)[:30] in str(raised.value)
    assert type(start_fault(error)) is kind


def test_a_second_lost_worker_does_not_hide_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's handler of SIGCHLD raises once for each worker: also while the error about the first one is on its way."""
    killed = "DataLoader worker (pid {}) is killed by signal: Killed. "

    def error_of(first: BaseException, second: BaseException) -> BaseException:
        second.__context__ = first  # as Python sets it for an exception that a signal handler raises meanwhile
        return second

    reported = WorkerError("the data loader's worker (pid 7) was ended by SIGKILL")
    assert worker_fault(error_of(reported, RuntimeError(killed.format(8)))) is reported
    lost = worker_fault(error_of(RuntimeError(killed.format(7)), ConnectionResetError(104, "Connection reset by peer")))
    assert lost is not None
    assert "pid 7" in str(lost)
    assert worker_fault(error_of(RuntimeError(killed.format(7)), StorageError("a: no space left"))) is None
    assert worker_fault(error_of(RuntimeError(killed.format(7)), RuntimeError("mat1 and mat2"))) is None
    assert worker_fault(ConnectionResetError(104, "Connection reset by peer")) is None
    # Workers that this process has killed itself, because no batch came in time, are not the fault.
    monkeypatch.setattr(collective_faults, "killed_because", ["waited 5 s for a batch"])
    assert str(worker_fault(RuntimeError(killed.format(7)))) == "waited 5 s for a batch"


def test_the_stack_of_torchs_own_code_is_left_out() -> None:
    for stack in (
        "\nException raised from recv at x.cpp:1 (most recent call first):\nframe #0",
        "\nC++ CapturedTraceback:\n#4",
    ):
        text = str(start_fault(dist.DistNetworkError(f"Connection reset by peer{stack}")))
        assert text.endswith("did not find each other: Connection reset by peer")


@pytest.mark.parametrize(("kind", "dies"), [("failed", True), ("lost", True), ("done", False)])
def test_a_peer_that_left_with_an_error_is_not_waited_for(
    kind: str, dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL does not notice that a peer has left: without the watch, a rank waits until its limit, in `alone` a day."""
    board = FileBoard(tmp_path / "board")
    watch = peer_watch.PeerWatch(board, 0, 2, 600.0, "nccl")
    board.post(
        1,
        {"host": "b", "place": "elsewhere", "pid": 1, "count": 1, "mute": True, "ended": {"kind": kind, "text": "x"}},
    )
    watch._read()
    watch.alone = 1
    ended: list[PeerError] = []
    monkeypatch.setattr(watch, "_die", ended.append)
    watch._wait_began = time.monotonic() - peer_watch._GONE_S + 5
    watch._end_if_hopeless()
    assert not ended, "it has some seconds to end by itself"
    watch._wait_began = time.monotonic() - peer_watch._GONE_S - 1
    watch._end_if_hopeless()
    assert bool(ended) == dies


def test_a_stop_in_a_block_with_collectives_sends_nothing_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be in a collective of the block, and would read this rank's message as the data that they exchange."""
    sent: list[object] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, item: sent.append(item))
    with pytest.raises(StoppedOnRequest), agree("reading"):
        raise StoppedOnRequest("stopped")
    assert sent == []
    with pytest.raises(DataError), agree("reading"):
        raise DataError("damaged")
    assert sent == [(DataError, "damaged")]


class CutOffBoard:
    """A store behind a cut cable: a request gets no answer for as long as anybody waits."""

    where = "10.0.0.1:29500"

    def __init__(self) -> None:
        self.connected = threading.Event()

    def post(self, rank: int, message: dict[str, Any]) -> None:
        if message["ended"] is not None or rank == 0:
            self.connected.wait()

    def read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        self.connected.wait()
        return {}


def test_a_store_that_is_cut_off_is_named_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time limit has passed in silence, ten more seconds are too long for an answer that does not come."""
    monkeypatch.setattr(peer_watch, "_NAMING_S", 1e6)
    monkeypatch.setattr(peer_watch, "_JOIN_S", 1e6)
    monkeypatch.setattr(peer_watch, "_ANSWER_S", 0.1)
    board: Any = CutOffBoard()
    watch = peer_watch.PeerWatch(board, 1, 2, 20.0, "gloo")
    watch.start()
    watch._answered = time.monotonic() - 20
    found = watch.blame(RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation"))
    watch.end("lost", str(found))
    board.connected.set()
    assert "lost the first node: the job's store at 10.0.0.1:29500 does not answer" in str(found)


@pytest.mark.parametrize(("mute", "dies"), [(False, True), (True, False)])
def test_silence_of_another_host_counts_in_every_stage(
    mute: bool, dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one rank saves alone, it sends signs of life; only the index build keeps Python from sending them."""
    board = FileBoard(tmp_path / "board")
    watch = peer_watch.PeerWatch(board, 0, 2, 20.0, "gloo")
    board.post(1, {"host": "b", "place": "elsewhere", "pid": 1, "count": 1, "ended": None})
    watch._read()
    ended: list[PeerError] = []
    monkeypatch.setattr(watch, "_die", ended.append)
    monkeypatch.setattr(peers, "_watch", watch)
    monkeypatch.setattr(peers, "set_timeout", lambda seconds: None)
    watch._wait_began = watch.peers[1].changed = time.monotonic() - 40
    with peers.alone("the sample index"), peers.alone("saving", mute=mute), peers.alone("hashing"):
        watch._wait_began = time.monotonic() - 40
        watch._end_if_hopeless()
        assert bool(ended) == dies
    assert not watch.mute
    watch.peers[1].changed = time.monotonic()
    ended.clear()
    with peers.alone("saving"):
        watch._wait_began = time.monotonic() - 40
        watch._end_if_hopeless()
    assert not ended, "a rank that sends signs of life is waited for"
