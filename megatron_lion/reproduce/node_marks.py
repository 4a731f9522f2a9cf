"""How nodes that share only a file system wait for the first one: marks of finished steps, and a sign of life."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lion.errors import MegatronLionError, PeerError, StoppedOnRequest, StorageError
from megatron_lion.files import make_folder, storage_errors, write_whole
from megatron_lion.streams import say

BEAT_S = 10.0
"""Interval of the first node's signs of life, seconds."""
SILENCE_S = 1800.0
"""Seconds without a sign of life after which the first node counts as lost."""
POLL_S = 2.0
RESTART_S = 120.0
"""Seconds in which the first node may start again and remove a mark of failure from the start before."""
NOTICE_S = 60.0


class NodeMarks:
    """Marks of one plan in OUTPUT/.steps. Marks of another job do not count, nor those of an earlier start under SLURM.

    Args:
        output: a folder on the shared file system.
        plan: the plan's name.
    """

    def __init__(self, output: Path, plan: str) -> None:
        job = os.environ.get("JOB_ID") or os.environ.get("SLURM_JOB_ID") or ""
        job += os.environ.get("SLURM_RESTART_COUNT", "")
        # A digest, because other users may be able to list this folder and must not learn JOB_ID.
        self._folder = output / ".steps" / f"{plan}-{hashlib.sha256(job.encode()).hexdigest()[:12]}"
        self._alive = self._folder / "alive"

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Removes old marks and gives signs of life while the block runs; for the first node."""
        make_folder(self._folder)
        for old in self._folder.glob("step-*"):
            with storage_errors(old, "removed"):
                old.unlink(missing_ok=True)
        ended = threading.Event()
        start = os.urandom(6).hex()

        def beat() -> None:
            count = 0
            while True:
                with contextlib.suppress(StorageError):  # the steps report a full disk
                    write_whole(self._alive, f"{start} {count}".encode())
                count += 1
                if ended.wait(BEAT_S):
                    return

        thread = threading.Thread(target=beat, name="sign-of-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def set(self, number: int, code: int = 0) -> None:
        """Marks a step as ended with an exit code; for the first node."""
        write_whole(self._folder / f"step-{number}", str(code).encode())

    def wait(self, number: int, title: str, asked: Callable[[], bool]) -> None:
        """Waits until the first node has ended a step; for the other nodes.

        Args:
            number: the step's number.
            title: the step's title, for messages.
            asked: whether this node was asked to stop.

        Raises:
            StoppedOnRequest: it was.
            PeerError: the first node gave no sign of life for SILENCE_S.
            MegatronLionError: the step failed there; has its exit code.
        """
        began = changed = time.monotonic()
        sign, noticed, lives = self._read(self._alive), False, False
        while True:
            if (now_sign := self._read(self._alive)) != sign:
                # Before the marks are read: the first node removes old ones before it gives a sign of life.
                sign, changed, lives = now_sign, time.monotonic(), True
            code = self._read(self._folder / f"step-{number}")
            if code == "0":
                return
            # The mark of a failure may be of the start before, if somebody gave the command again on all nodes.
            if code and (lives or time.monotonic() - began > RESTART_S):
                error = MegatronLionError(f"the first node stopped: {title} ended there with code {code}")
                error.exit_code = int(code)
                raise error
            if asked():
                raise StoppedOnRequest("stopped while waiting for the first node; the same command continues there")
            now = time.monotonic()
            if now - changed > SILENCE_S:
                raise PeerError(
                    f"waited for the first node ({title}), which has given no sign of life in {self._folder} for "
                    f"{now - changed:.0f} s; start the same command on every node, with one --output on a shared file system"
                )
            if now - began > NOTICE_S and not noticed:
                noticed = True
                say(f"waiting for the first node: {title}")
            time.sleep(POLL_S)  # polled, since the nodes share nothing but the file system here

    @staticmethod
    def _read(path: Path) -> str:
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8")
        return ""
