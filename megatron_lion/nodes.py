"""Connects the launchers of several nodes by one store: numbers of the ranks, a stop or a failure on another node."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import psutil
import torch.distributed as dist

from megatron_lion.errors import ConfigError, PeerError
from megatron_lion.jobs import STOPPED, STORE
from megatron_lion.supervise import LOST, Cause

logger = logging.getLogger(__name__)

MEET_S = 600.0
"""Time in which all nodes must start, seconds."""
_REMIND_S = 60.0
STORE_S = 60.0
"""Time in which the store must answer each request, seconds."""
BEAT_S = 2.0
SILENT_S = 120.0
"""Time without a sign of life after which a node is lost, seconds."""
END_S, HOST_END_S = 3.0, 10.0
"""After a failure, the time in which a launcher waits for the others, and that of the one with the store, seconds."""
QUIET_S = 8.0
"""Time without a sign of life after which a node is not waited for after a failure, seconds."""

NEEDS_JOB_ID = (
    "NNODES is above 1, so JOB_ID is needed: a random word. Make one once, for example by "
    "`python3 -c 'import secrets; print(secrets.token_hex(16))'`, and set it on every node"
)


def check_variables(environment: Mapping[str, str]) -> tuple[str, int, str]:
    """Returns MASTER_ADDR, MASTER_PORT and JOB_ID (SLURM's job under SLURM).

    Raises:
        ConfigError: one is missing or wrong.
    """
    job = environment.get("JOB_ID") or environment.get("SLURM_JOB_ID")
    if not job:
        raise ConfigError(NEEDS_JOB_ID)
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT") or "29500"
    if not address:
        raise ConfigError("NNODES is above 1, so MASTER_ADDR is needed: the address of one node that all others reach")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT={port}: give a free port of {address}, from 1 to 65535")
    node = environment.get("NODE_RANK") or "0"
    if not (node.isascii() and node.isdigit()):
        raise ConfigError(f"NODE_RANK={node}: give a number from 0 to below NNODES, or leave it out on all nodes")
    return address, int(port), job


class Nodes:
    """The nodes of a job, connected by a store that the launcher at MASTER_ADDR hosts on that address.

    The launchers store numbers and JSON only, and unpickle nothing. The keys begin with a digest of JOB_ID.

    Args:
        count: number of nodes.
        processes: number of processes on this node.
        environment: has JOB_ID, MASTER_ADDR, MASTER_PORT; may have NODE_RANK and INTERFACE.
        interrupt: called while waiting; raises an error to end the wait.

    Attributes:
        ranks: the numbers of this node's ranks.
        world_size: number of ranks of the job.

    Raises:
        ConfigError: a variable is wrong, or two nodes have the same number.
        PeerError: nodes did not start in time, or something else uses the port.
    """

    def __init__(
        self, count: int, processes: int, environment: Mapping[str, str], interrupt: Callable[[], None]
    ) -> None:
        self.address, self.port, job = check_variables(environment)
        self.count, self._interrupt = count, interrupt
        self._environment = environment
        self._job = hashlib.sha256(job.encode()).hexdigest()[:32]
        self._server: Any = None
        self._stop_here = self._stop_elsewhere = self._ending = False
        self._reachable = True
        self._failure: Cause | None = None
        self._answered, self._heard = time.monotonic(), [time.monotonic()] * count
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = self._open()
        self.interface = environment.get("INTERFACE") or _interface_to(self.address, self.port)
        try:
            self.number = self._number()
            self._store.set(f"node/{self.number}", json.dumps({"host": socket.gethostname(), "processes": processes}))
            self._store.add("nodes", 1)  # after the key, which the others read as soon as the count is complete
            self._wait(lambda: int(self._store.add("nodes", 0)) >= count, "nodes", MEET_S, self._missing)
            found = [json.loads(self._store.get(f"node/{number}")) for number in range(count)]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeerError(f"MASTER_ADDR {self.address}:{self.port}: the job's store was lost: {reason}") from error
        self._hosts = [str(node["host"]) for node in found]
        sizes = [int(node["processes"]) for node in found]
        first = sum(sizes[: self.number])
        self.ranks, self.world_size = range(first, first + processes), sum(sizes)

    def variables(self) -> dict[str, str]:
        """Environment variables by which this node's ranks find the store and use the chosen interface."""
        network = {
            name: self._environment.get(name) or self.interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        }
        store = f"tcp://{self.address}:{self.port}/{self._job}"
        return {STORE: store, "GROUP_RANK": str(self.number), "GROUP_WORLD_SIZE": str(self.count), **network}

    def _open(self) -> Any:
        listener = _listen(self.address, self.port, self._environment.get("INTERFACE"))
        limit = timedelta(seconds=STORE_S)
        try:
            if listener is not None:
                self.address = str(listener.getsockname()[0])
                self._server = dist.TCPStore(
                    self.address, self.port, is_master=True, wait_for_workers=False, timeout=limit,
                    master_listen_fd=listener.detach(),
                )  # fmt: skip
                store = dist.PrefixStore(self._job, self._server)
                store.set("open", "")
                return store
            # In Python, because torch's own wait in C++ ignores signals.
            self._wait(self._answers, f"{self.address}:{self.port}", MEET_S, lambda: "the node at MASTER_ADDR")
            store = dist.PrefixStore(
                self._job,
                dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=limit),
            )
            self._wait(
                lambda: bool(store.check(["open"])), "store", 10, lambda: "a store of this JOB_ID",
            )  # fmt: skip
            return store
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeerError(
                f"MASTER_ADDR {self.address}:{self.port}: no store of a job answers ({reason}); if another program uses this "
                "port, set another MASTER_PORT on all nodes"
            ) from error

    def _answers(self) -> bool:
        try:
            socket.create_connection((self.address, self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def _number(self) -> int:
        given = self._environment.get("NODE_RANK") or None
        if given is None and self._environment.get("SLURM_STEP_NUM_NODES") == str(self.count):
            given = self._environment.get("SLURM_NODEID")
        number = int(self._store.add("arrived", 1)) - 1 if given is None else int(given)
        if not 0 <= number < self.count or int(self._store.add(f"claimed/{number}", 1)) > 1:
            raise ConfigError(
                f"node number {number} is taken or not below NNODES={self.count}: each of the {self.count} nodes runs the "
                "launcher once, with its own NODE_RANK or with none on all of them"
            )
        return number

    def _missing(self) -> str:
        return f"{self.count - int(self._store.add('nodes', 0))} of {self.count} nodes"

    def _wait(self, ready: Callable[[], bool], what: str, limit_s: float, missing: Callable[[], str]) -> None:
        began, reminded = time.monotonic(), 0.0
        while not ready():
            self._interrupt()
            time.sleep(0.1)
            waited = time.monotonic() - began
            if waited > limit_s:
                raise PeerError(
                    f"{missing()} did not answer within {limit_s:.0f} s; every node needs the same MASTER_ADDR, "
                    f"MASTER_PORT, JOB_ID and NNODES (here {self.address}, {self.port}, {self.count})"
                )
            if waited - reminded > _REMIND_S:
                reminded = waited
                logger.warning(
                    "waiting for %s, for %.0f s now; every node needs the same MASTER_ADDR, MASTER_PORT, JOB_ID and NNODES",
                    missing(),
                    waited,
                )

    # --- while the job runs ---

    def __enter__(self) -> Self:
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def stop_asked(self) -> bool:
        """Whether another node was asked to stop."""
        return self._stop_elsewhere

    def failure(self) -> Cause | None:
        """Why the job failed on another node, if it did, or that the node with the store is silent."""
        if self._failure is None and self._is_cut_off(SILENT_S):
            self._lose_master()
        return self._failure

    def _is_cut_off(self, limit_s: float) -> bool:
        # Behind a cut cable, a request to the store may wait for a quarter of an hour.
        return self._server is None and time.monotonic() - self._answered > limit_s

    def _lose_master(self) -> None:
        self._reachable = False
        self._failure = Cause(LOST, f"the node at MASTER_ADDR {self.address} was lost: its launcher does not answer")

    def tell_stop(self) -> None:
        """Passes the request to stop on to the other nodes."""
        self._stop_here = True

    def _talk(self) -> None:
        """Thread: exchanges signs of life, stops and failures, so that a dead network cannot block the main thread."""
        beats, self._heard = [0] * self.count, [time.monotonic()] * self.count
        try:
            while not self._done.wait(BEAT_S):
                if self._stop_here:
                    self._store.set("stop", "")
                self._stop_elsewhere = self._stop_elsewhere or bool(self._store.check(["stop"]))
                self._store.add(f"beat/{self.number}", 1)
                self._hear_failure()
                self._answered = time.monotonic()
                if self._server is not None:
                    self._look_for_silent(beats)
        except RuntimeError:
            if not self._ending:
                self._lose_master()

    def _hear_failure(self) -> None:
        if self._failure is None and self._store.check(["failure"]):
            told = json.loads(self._store.get("failure"))
            if told["node"] != self.number:
                self._failure = Cause(int(told["code"]), str(told["message"]))

    def _look_for_silent(self, beats: list[int]) -> None:
        now = time.monotonic()
        for number in range(self.count):
            beat = int(self._store.add(f"beat/{number}", 0))
            if beat != beats[number] or self._store.check([f"ended/{number}"]):
                beats[number], self._heard[number] = beat, now
            elif now - self._heard[number] > SILENT_S and self._failure is None:
                message = f"node {number} ({self._hosts[number]}) was lost: no sign of life for {SILENT_S:.0f} s"
                self._tell_failure(Cause(LOST, message))
                self._failure = Cause(LOST, message)

    def _tell_failure(self, cause: Cause) -> None:
        content = {"node": self.number, "code": cause.code, "message": cause.message}
        # The first one counts: compare_set writes only if the key is not there.
        self._store.compare_set("failure", "", json.dumps(content))

    def agree(self, cause: Cause) -> Cause:
        """Waits for the other nodes, and returns the job's cause: that of the node that failed first.

        The launcher that hosts the store must outlive all ranks.

        Args:
            cause: why the ranks of this node ended.
        """
        lost_master = self._failure is not None and not self._reachable
        self._ending = True  # the other launchers may be gone from here on
        # Ranks here that hung, and were killed, after another node had failed are a consequence.
        is_first = self._failure is None
        is_own = cause.code not in (0, LOST, STOPPED) or (cause.code == LOST and not cause.printed and is_first)
        if not lost_master:
            talk = threading.Thread(target=self._tell_and_wait, args=(cause, is_own), name="end", daemon=True)
            talk.start()
            while talk.is_alive() and not self._is_cut_off(SILENT_S if cause.code in (0, STOPPED) else QUIET_S):
                talk.join(0.1)
        found = self._failure
        is_other = found is not None and (found.code != cause.code or not cause.printed)
        if found is not None and is_other and not is_own and cause.code in (LOST, STOPPED):
            return found
        return cause

    def _tell_and_wait(self, cause: Cause, is_own: bool) -> None:
        """Thread: a request to a store that is cut off must not block the main thread."""
        with suppress(RuntimeError):
            if is_own:
                self._tell_failure(cause)
            self._store.set(f"ended/{self.number}", "")
            self._wait_for_others(cause)

    def _wait_for_others(self, cause: Cause) -> None:
        # Without a limit if nothing failed: ranks elsewhere may still write, and the thread notices a lost node. After a
        # failure the others need the store only to read its cause; ranks that notice a lost peer end a moment before
        # the peer's node reports the cause.
        failed = cause.code not in (0, STOPPED)
        limit_s = float("inf") if not failed else HOST_END_S if self._server is not None else END_S
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and self._missing_ends(failed or self._failure is not None):
            self._hear_failure()
            if self._failure is not None and self._server is None:
                return
            if self._failure is not None:
                deadline = min(deadline, time.monotonic() + HOST_END_S)
            time.sleep(0.1)
        self._hear_failure()

    def _missing_ends(self, failed: bool) -> list[int]:
        """Nodes whose ranks have not ended; after a failure, the launcher with the store leaves out those that are silent."""
        missing = [number for number in range(self.count) if not self._store.check([f"ended/{number}"])]
        if self._server is None or not failed:
            return missing
        return [number for number in missing if time.monotonic() - self._heard[number] < QUIET_S]


def _listen(address: str, port: int, interface: str | None) -> socket.socket | None:
    """A socket that listens on this address only, or None if the address is another node's or the port is taken.

    Raises:
        ConfigError: the address cannot be resolved, or other nodes cannot reach it.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR {address}: cannot be resolved: {error.strerror}; give the address in digits"
        ) from error
    own = str(place[0])
    if (own.startswith("127.") or own == "::1") and address not in (own, "localhost"):
        # Debian's /etc/hosts gives a machine's own name the address 127.0.1.1.
        family, place = socket.AF_INET, (_outer_address(address, interface), port)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        # Another node's address; or the launcher of a second node on this machine, as in tests, came first.
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise ConfigError(f"MASTER_ADDR {address}, MASTER_PORT {port}: {error.strerror}") from error
    return listener


def _outer_address(name: str, interface: str | None) -> str:
    found = [
        item.address
        for place, items in psutil.net_if_addrs().items()
        for item in items
        if item.family == socket.AF_INET and not item.address.startswith("127.") and interface in (None, place)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"MASTER_ADDR {name} is this machine's own name, and other nodes reach it at one of {found}: "
            "give one of these addresses, or INTERFACE"
        )
    return found[0]


def _interface_to(address: str, port: int) -> str:
    """Name of the network interface through which this machine reaches an address."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # chooses the route; sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {address}: {error.strerror}; give an address that this node reaches") from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.split("%")[0] == own for item in addresses):
            return name
    raise ConfigError(
        f"no network interface has the address {own}, by which this node reaches {address}; set INTERFACE"
    )
