"""The store by which the launchers of several nodes meet: whose cause counts, wrong numbers, a store that goes away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch.distributed as dist
from job_processes import REPO, free_port

from megatron_lion import launcher
from megatron_lion.errors import ConfigError, MegatronLionError, PeerError
from megatron_lion.nodes import Nodes, check_variables
from megatron_lion.supervise import Cause


def two_nodes(work: Any, *numbers: str) -> list[Any]:
    """Runs `work(nodes)` on two nodes in threads; returns what each gave or raised. A number is the node's NODE_RANK."""
    base = {"JOB_ID": "x" * 32, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "INTERFACE": "lo"}
    found: list[Any] = [None, None]
    met = threading.Barrier(2)  # the node with the store must not end before the other has met it

    def node(place: int) -> None:
        number = {"NODE_RANK": numbers[place]} if numbers else {}
        try:
            with Nodes(2, 1, {**base, **number}, lambda: None) as nodes:
                with suppress(threading.BrokenBarrierError):  # the other one was refused
                    met.wait(100)
                found[place] = work(nodes)
        except (MegatronLionError, RuntimeError) as error:
            found[place] = error
            met.abort()

    threads = [threading.Thread(target=node, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return found


def test_ranks_that_were_killed_after_another_nodes_error_are_not_the_cause() -> None:
    """As with NCCL: the other node's ranks hang in a collective, do not obey SIGTERM, and are killed."""

    def work(nodes: Nodes) -> Cause:
        if nodes.number == 1:
            return nodes.agree(Cause(3, "too little data", printed=True))
        while nodes.failure() is None:
            threading.Event().wait(0.05)
        return nodes.agree(Cause(8, "rank 0 did not end when it was asked to, and was killed"))

    found = two_nodes(work)
    assert [cause.code for cause in found] == [3, 3]
    assert {cause.message for cause in found} == {"too little data"}


def test_a_silent_node_is_not_waited_for_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a cut cable: the launcher that hosts the store would otherwise wait for the whole time limit."""
    monkeypatch.setattr("megatron_lion.nodes.HOST_END_S", 1000.0)
    monkeypatch.setattr("megatron_lion.nodes.QUIET_S", 3.0)
    monkeypatch.setattr("megatron_lion.nodes.BEAT_S", 0.1)
    agreed = threading.Event()

    def work(nodes: Nodes) -> Cause | None:
        if nodes._server is None:
            nodes._done.set()  # no further sign of life, and no message that its ranks have ended
            return None if agreed.wait(90) else Cause(1, "the other node waited")
        cause = nodes.agree(Cause(8, "lost a peer", printed=True))
        agreed.set()
        return cause

    assert {None, Cause(8, "lost a peer", printed=True)} == set(two_nodes(work))


class CutOff:
    """A store behind a cut cable: a request gets no answer for as long as anybody waits."""

    def __init__(self) -> None:
        self.connected = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> None:
            self.connected.wait()
            raise RuntimeError("Connection reset by peer")

        return ask


@pytest.mark.parametrize("ended", [True, False], ids=["at the end", "while the ranks run"])
def test_a_node_that_is_cut_off_from_the_store_ends(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lion.nodes.BEAT_S", 0.05)
    monkeypatch.setattr("megatron_lion.nodes.QUIET_S" if ended else "megatron_lion.nodes.SILENT_S", 1.0)
    lost = Cause(8, "lost the first node", printed=True)

    def work(nodes: Nodes) -> Cause | None:
        if nodes._server is not None:
            return None
        nodes._store = store = CutOff()
        try:
            if ended:
                return nodes.agree(lost)
            deadline = time.monotonic() + 60
            while nodes.failure() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            return nodes.failure()
        finally:
            store.connected.set()

    found = [cause for cause in two_nodes(work) if cause is not None]
    assert [cause.code for cause in found] == [8], found
    assert "127.0.0.1 was lost" in found[0].message or ended


def test_a_node_number_that_is_taken_does_not_count_as_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that is left waits for the other one and reports that; it does not look for the refused one."""
    monkeypatch.setattr("megatron_lion.nodes.MEET_S", 3.0)
    found = two_nodes(lambda nodes: nodes.number, "0", "5")
    kinds = {type(error) for error in found}
    assert kinds == {ConfigError, PeerError}, found
    assert all("\n" not in str(error) for error in found)


@pytest.mark.parametrize("number", ["abc", "-1", "1.5"])
def test_a_node_number_is_a_number(number: str) -> None:
    with pytest.raises(ConfigError, match=f"NODE_RANK={number}: give a number"):
        check_variables({"JOB_ID": "x", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": number})


def test_an_empty_node_number_is_none() -> None:
    assert sorted(two_nodes(lambda nodes: nodes.number, "", "")) == [0, 1]


def test_a_store_that_goes_away_while_the_nodes_meet_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Nodes) -> int:
        raise dist.DistNetworkError("Connection reset by peer\nException raised from recv")

    monkeypatch.setattr(Nodes, "_number", lost)
    for error in two_nodes(lambda nodes: None):
        assert isinstance(error, PeerError)
        assert str(error).endswith("the job's store was lost: Connection reset by peer")


def test_a_node_that_waits_names_what_all_nodes_must_share(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With another JOB_ID the other nodes are not seen here, although they run."""
    monkeypatch.setattr("megatron_lion.nodes.MEET_S", 1.0)
    monkeypatch.setattr("megatron_lion.nodes._REMIND_S", 0.0)
    environment = {"JOB_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "INTERFACE": "lo"}
    with pytest.raises(PeerError, match="1 of 2 nodes did not answer"):
        Nodes(2, 1, environment, lambda: None)
    assert "waiting for 1 of 2 nodes" in caplog.text
    assert "every node needs the same MASTER_ADDR, MASTER_PORT, JOB_ID and NNODES" in caplog.text


LAUNCHER = """
import sys
from megatron_lion import launcher
launcher._import_nodes().STORE_S = 2.0
sys.exit(launcher.main(["--nodes", "2", "--processes", "1", "env"]))
"""


def test_a_port_of_another_program_is_named_in_one_line() -> None:
    """A program that accepts a connection and closes it at once, as gloo does with a stranger."""
    with socket.create_server(("127.0.0.1", free_port())) as server:

        def refuse() -> None:
            with suppress(OSError):  # the server is closed
                while True:
                    server.accept()[0].close()

        threading.Thread(target=refuse, daemon=True).start()
        port = server.getsockname()[1]
        variables = {"JOB_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "INTERFACE": "lo"}
        environment = {**os.environ, **variables}
        environment.pop("TORCH_CPP_LOG_LEVEL", None)
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER], env=environment, cwd=REPO, capture_output=True, text=True, timeout=300
        )
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread
    assert done.returncode == PeerError.exit_code
    assert done.stderr.startswith(f"megatron-lion: MASTER_ADDR 127.0.0.1:{port}: no store of a job answers (")
    assert done.stderr.endswith("; if another program uses this port, set another MASTER_PORT on all nodes\n")
    assert done.stderr.count("\n") == 1


def test_ranks_keep_torchs_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    launcher._import_nodes()
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    launcher._import_nodes()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO"
