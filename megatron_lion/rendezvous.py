"""Brings the processes of a job together: without a port on one machine, through one store on several nodes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_lion.device import Device
from megatron_lion.errors import PeerError, StoppedOnRequest
from megatron_lion.exit_report import leave_at_once, report
from megatron_lion.jobs import STORE, place_error, place_from_env
from megatron_lion.signals import IN_START, STOP_SIGNALS

logger = logging.getLogger(__name__)

_REMIND_S = 60.0
_STOP_S = 2.0  # for the main thread to raise what a stop signal asks for


def join_job(device: Device, timeout_s: float) -> None:
    """Makes torch's default process group of this job's processes.

    No process listens outside of this machine if all of them run on it: stores are a file in the launcher's private
    folder or, for one process, in memory, and gloo and NCCL listen on the loopback interface. torch's own TCPStore
    listens on all interfaces, and torchrun's agent unpickles what it finds in one.

    Args:
        device: from `select_device`.
        timeout_s: longest time to wait for the other processes, and later in a collective, seconds.

    Raises:
        ConfigError: a variable of a launcher is wrong, or the environment names several processes and not their store.
        PeerError: some processes did not join in time.
        RuntimeError, ValueError: torch could not start its backend.
    """
    options: dict[str, Any] = {"backend": device.backend, "timeout": timedelta(seconds=timeout_s)}
    if device.kind == "cuda":
        options["device_id"] = device.torch_device
    place, store = place_from_env(), dist.HashStore()
    rank, size = place.rank, place.world_size
    if size > 1:
        _check_rendezvous(size)
    if place.local_world_size == size:
        _listen_on_loopback()
    if size > 1:
        store = _open_store(size, timeout_s)
        _wait_for_all(store, rank, size, timeout_s)
    with stopped_also_in_cpp():
        dist.init_process_group(store=dist.PrefixStore("group", store), rank=rank, world_size=size, **options)


@contextmanager
def stopped_also_in_cpp() -> Iterator[None]:
    """Ends the process on a stop signal while the block waits in C++, where Python runs no handler; nothing is to be saved.

    If a peer is stopped between its wait for all ranks and its first connection, this rank would wait for it for the whole
    time limit, deaf to the same signal.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    done = threading.Event()

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (number := os.read(read, 1)[0]) != 0:
            if number in STOP_SIGNALS and not done.wait(_STOP_S):  # the main thread did not come back to Python
                report(StoppedOnRequest(IN_START), direct=True)
                leave_at_once(StoppedOnRequest.exit_code)

    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="stop-in-cpp", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def _check_rendezvous(size: int) -> None:
    """Refuses to train alone in place of a job of several processes, as after `srun` with WORLD_SIZE and no address."""
    missing = [] if os.environ.get("RANK") else ["RANK"]
    if not (os.environ.get(STORE) or os.environ.get("MASTER_ADDR")):
        missing.append("MASTER_ADDR")
    if missing:
        raise place_error(
            f"WORLD_SIZE={size} without {' and '.join(missing)}: the processes of this job cannot find each other; start "
            "them with launch/torchrun.sh or `python -m megatron_lion.launcher`, or unset WORLD_SIZE and RANK for a "
            "single process"
        )


def _listen_on_loopback() -> None:
    # Cluster profiles often name the network for jobs of several nodes, so values that are already set are replaced.
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]
        os.environ["NCCL_SOCKET_IFNAME"] = f"={names[0]}"  # NCCL takes a plain name for a prefix


def _open_store(size: int, timeout_s: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    name = os.environ.get(STORE)
    if not name:  # plain torchrun, or another launcher of torch's kind
        return next(dist.rendezvous("env://", timeout=limit))[0]
    if not name.startswith("tcp://"):
        return dist.FileStore(name, size)
    address, _, job = name.removeprefix("tcp://").partition("/")
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
    return dist.PrefixStore(f"{job}/ranks", store)


def _wait_for_all(store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Waits until every rank has joined.

    It waits in Python, because torch's own wait in C++ ignores signals and does not name the missing ranks.
    """
    store.set(f"joined/{rank}", "")
    store.add("joined", 1)
    began, pause, reminded = time.monotonic(), 0.01, 0.0
    while store.add("joined", 0) < size:
        time.sleep(pause)
        pause = min(2 * pause, 0.25)  # hundreds of ranks may ask one store
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise PeerError(
                f"ranks {_missing(store, size)} of {size} did not join the job within {timeout_s:.0f} s "
                "(parallel.timeout_s); see their output, or whether their node started"
            )
        if waited - reminded > _REMIND_S:
            reminded = waited
            logger.warning("waiting for ranks %s of %d to join, for %.0f s now", _missing(store, size), size, waited)


def _missing(store: Any, size: int) -> str:
    missing = [str(rank) for rank in range(size) if not store.check([f"joined/{rank}"])]
    return ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
