"""What ranks know of each other without a collective: messages in files or the job's TCP store, and processes of one host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_lion.files import storage_errors

_ANSWER_S = 5
"""Seconds that one request to a TCP store may take."""


class Board(Protocol):
    """One message of each rank; a new message replaces the rank's earlier one."""

    def post(self, rank: int, message: dict[str, Any]) -> None:
        """Leaves a rank's message."""

    def read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """Returns the messages of those ranks that left one."""

    def remove(self) -> None:
        """Removes the messages at the end of a job that did not fail; called by one rank."""


class FileBoard:
    """Messages as files of one folder, `<rank>.json`; for ranks on one node."""

    def __init__(self, folder: Path) -> None:
        with storage_errors(folder, "made"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def post(self, rank: int, message: dict[str, Any]) -> None:
        # Renamed when complete: a reader never sees a part. If a full disk rejects a message, the message is lost and the run continues.
        temporary = self._folder / f".{rank}.tmp"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(message), encoding="utf-8")
            temporary.replace(self._folder / f"{rank}.json")

    def read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in ranks:
            with contextlib.suppress(OSError):
                found[rank] = (self._folder / f"{rank}.json").read_bytes()
        return _parse(found)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class TcpBoard:
    """Messages as keys of the job's TCPStore, over a separate connection.

    A client of a store that waits for a key holds a lock until the key is there, so the connection of the process
    groups would be blocked exactly when a peer is missing.

    Raises:
        RuntimeError: (from `post` and `read` too) the store does not answer.
    """

    def __init__(self, host: str, port: int, name: str) -> None:
        self.where = f"{host}:{port}"
        client = dist.TCPStore(host, port, None, False, timeout=timedelta(seconds=_ANSWER_S), wait_for_workers=False)
        self._store = dist.PrefixStore(name, client)
        self._known: set[int] = set()  # ranks that left a message: a key is never removed

    def post(self, rank: int, message: dict[str, Any]) -> None:
        self._store.set(str(rank), json.dumps(message))

    def read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        # Reading a key that is not there would wait for it. A check of each rank by each rank every second would be N^2
        # requests at one store, so a rank is checked until its first message only.
        self._known |= {rank for rank in ranks if rank not in self._known and self._store.check([str(rank)])}
        known = [str(rank) for rank in ranks if rank in self._known]
        return _parse({int(key): text for key, text in zip(known, self._store.multi_get(known), strict=True)})

    def remove(self) -> None:
        """Leaves the keys: the store ends with the job."""


def _parse(texts: Mapping[int, bytes | str]) -> dict[int, dict[str, Any]]:
    """The messages among these texts by rank; one that is torn or foreign hides no other one."""
    found = {}
    for rank, text in texts.items():
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(text)
            if isinstance(message, dict):
                found[rank] = message
    return found


def open_board(number: int) -> Board | None:
    """Opens the board beside the default process group's store, or returns None if the store is of another kind.

    Args:
        number: counts the boards of a process; the same on all ranks.
    """
    # torch: no public function returns the default group's store.
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    # Restarted workers may get the same store and must not find the messages of the ranks before them.
    name = f"peers-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{number}"
    if isinstance(store, dist.FileStore):
        return FileBoard(Path(f"{store.path}.{name}"))  # type: ignore[attr-defined]  # absent from torch's stubs
    if isinstance(store, dist.TCPStore):
        return TcpBoard(store.host, store.port, f"megatron-lion-{name}")
    return None


def place() -> str:
    """Identifies the set of processes among which a pid has the same meaning."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"unknown to rank {os.getpid()} of {socket.gethostname()}"


def process_state(pid: int) -> str:
    """Returns "gone", "stopped" or "alive" for a process of this machine."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "alive")
