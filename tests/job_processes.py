"""Starts jobs as a user does, and observes their processes: which exist, on which ports they listen, what they leave."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[1]
LAUNCH = ("bash", str(REPO / "launch" / "torchrun.sh"))


def outer_interface() -> str | None:
    """Name of an interface that other machines reach, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.family.name == "AF_INET" and not item.address.startswith("127.") for item in addresses):
            return name
    return None


class Job:
    """A started command, its output, and a temporary folder (TMPDIR) of its own.

    Attributes:
        pid: of the command.
        temporary: folder in which the job makes its temporary files.
    """

    def __init__(self, command: tuple[str, ...], folder: Path, **variables: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._out = folder / "out"
        environment = {
            **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # else a cache in TMPDIR, which later runs use
            **variables,
        }  # fmt: skip
        for name in ("JOB_ID", "SLURM_JOB_ID", "MASTER_ADDR", "NNODES"):
            if name not in variables:
                environment.pop(name, None)
        with self._out.open("w") as out:
            self._process = subprocess.Popen(
                command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=out, start_new_session=True
            )
        self.pid = self._process.pid
        self._seen: dict[int, psutil.Process] = {}

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._out.read_text()

    def running(self) -> list[psutil.Process]:
        """The command and all processes that it started, directly or not, as far as they were seen and still run."""
        known = [self._process.pid, *self._seen]
        for pid in known:
            try:
                found = psutil.Process(pid)
                self._seen.setdefault(pid, found)
                for child in found.children(recursive=True):
                    self._seen.setdefault(child.pid, child)
            except psutil.NoSuchProcess:
                continue
        return [process for process in self._seen.values() if process.is_running() and alive(process)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks by number."""
        found = {}
        for process in self.running():
            try:
                words, number = process.cmdline(), process.environ().get("RANK")
            except (
                psutil.NoSuchProcess,
                psutil.AccessDenied,
            ):  # it ended just now; a zombie's environment is unreadable
                continue
            if {"megatron_lion", "pretrain"} <= set(words) and number:
                found[int(number)] = process
        return found

    def wait_until(self, ready: Callable[[], Any], limit_s: float = 300) -> None:
        """Waits for a condition while the command runs."""
        deadline = time.monotonic() + limit_s
        while not ready():
            assert self._process.poll() is None, self.errors
            assert time.monotonic() < deadline, f"not ready in {limit_s} s: {self.errors}"
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Signals the command alone."""
        self._process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Signals the command's process group, as a terminal does."""
        os.killpg(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Signals every process of the job, as SLURM does."""
        for process in self.running():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def code(self, limit_s: float = 300) -> int:
        """Waits for the end and returns the exit code."""
        self.running()
        return self._process.wait(limit_s)

    def wait_for_all(self, limit_s: float = 300) -> None:
        """Waits until no process of the job runs."""
        deadline = time.monotonic() + limit_s
        while left := self.running():
            assert time.monotonic() < deadline, f"still there: {[process.cmdline() for process in left]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Kills everything that is left."""
        for process in self.running():
            process.kill()
        self._process.wait()


def alive(process: psutil.Process) -> bool:
    """Whether a process is neither gone nor a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started(command: tuple[str, ...], folder: Path, **variables: str) -> Iterator[Job]:
    """Starts a job, and kills what is left of it after the block."""
    job = Job(command, folder, **variables)
    try:
        yield job
    finally:
        job.kill()


def listeners(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which these processes listen for TCP connections, read from /proc: "127.0.0.1:4000", "[::1]:4000"."""
    inodes = set()
    for process in processes:
        try:
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes.add(found[1])
        except FileNotFoundError:
            continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A is LISTEN
                address, port = fields[1].split(":")
                addresses.add(f"{readable(address)}:{int(port, 16)}")
    return addresses


def readable(address: str) -> str:
    """An address of /proc/net/tcp, in which each group of four bytes is reversed."""
    words = [bytes.fromhex(address[place : place + 8])[::-1] for place in range(0, len(address), 8)]
    joined = b"".join(words)
    if len(joined) == 4:
        return ".".join(str(byte) for byte in joined)
    return "[::1]" if joined == bytes(15) + b"\1" else f"[{joined.hex()}]"


def local(address: str) -> bool:
    """Whether only this machine reaches an address of `listeners`."""
    return address.startswith(("127.", "[::1]"))


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def free_port() -> int:
    """A port that nothing uses, outside of the range from which the kernel takes a port if a program names none.

    A port of that range may become a listener of gloo, or a connection's own port, before the job opens it.
    """
    first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(10_000, 65_536) if not first <= port <= last]
    # Not the module's generator: workers of pytest may have given theirs the same seed.
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port is free from 10000 to 65535, outside of {first} to {last}")
