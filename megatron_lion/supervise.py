"""Starts the processes of a job on this node, passes stop signals on to them, and finds the job's exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_lion.errors import PeerError
from megatron_lion.jobs import STOPPED
from megatron_lion.signals import GROUP_SIGNALS, IN_START, end_with_parent, signal_name

LOST = PeerError.exit_code

# After one rank failed, the others have nothing to save: most of them notice its loss and end by themselves.
NOTICE_S = 3.0
END_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Cause:
    """Why a job ended.

    Attributes:
        code: exit code of the job.
        message: one line about it.
        printed: whether a rank has printed that line itself.
    """

    code: int
    message: str
    printed: bool = False


class Link(Protocol):
    """Connection to the launchers of the other nodes."""

    def stop_asked(self) -> bool:
        """Whether another node was asked to stop."""

    def failure(self) -> Cause | None:
        """Why the job failed on another node, if it did."""

    def tell_stop(self) -> None:
        """Passes the request to stop on to the other nodes."""


class Rank:
    """One process of the job.

    Args:
        number: its rank.
        command: the words to run.
        environment: its environment variables.
        kept: open file descriptors that it inherits.

    Attributes:
        number: its rank.
        code: its exit code, negative if a signal ended it; None while it runs.
        ended_ns: time at which its end was seen, in nanoseconds since the epoch.
        killed: whether this launcher sent SIGKILL.
    """

    def __init__(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], kept: Sequence[int] = ()
    ) -> None:
        self.number = number
        self.code: int | None = None
        self.ended_ns = 0
        self.killed = False
        # A new session: Ctrl-C in a terminal reaches this launcher only, which passes one SIGTERM on.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(kept),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )

    def running(self) -> bool:
        """Whether the process still runs."""
        if self.code is None and (code := self._process.poll()) is not None:
            self.code, self.ended_ns = code, time.time_ns()
        return self.code is None

    def send(self, number: int) -> None:
        """Sends a signal to the process, but not to its loader workers."""
        if self.running():
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the process and its loader workers."""
        if self.running():
            self.killed = True
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def stopped(self) -> bool:
        """Whether it ended on request: with a saved checkpoint, or by a stop signal before it began."""
        return self.code == STOPPED or (self.code is not None and -self.code in GROUP_SIGNALS)

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than at its end or on request."""
        return self.code not in (None, 0) and not self.stopped


def watch(ranks: Sequence[Rank], received: Sequence[int], stop_timeout_s: float, link: Link | None = None) -> None:
    """Waits until all ranks have ended; stops them on request, and after a failure of one.

    Args:
        ranks: the started ranks.
        received: stop signals that this process received; a handler appends to it.
        stop_timeout_s: time in which the ranks must save and end after a request, seconds; then they are killed.
        link: connection to other nodes, if there are any.
    """
    asked_at = failed_at = None
    interrupted = terminated = False
    while sum(rank.running() for rank in ranks):  # asks every rank, so that the end of each is noted when it happens
        now = time.monotonic()
        elsewhere = link is not None and link.stop_asked()
        if asked_at is None and (received or elsewhere or any(rank.stopped for rank in ranks)):
            asked_at = now
            if link is not None and not elsewhere:
                link.tell_stop()
            for rank in ranks:
                rank.send(signal.SIGTERM)
        if list(received).count(signal.SIGINT) > 1 and not interrupted:
            interrupted = True  # the user does not want to wait for the checkpoint
            for rank in ranks:
                rank.send(signal.SIGINT)
        if failed_at is None and (any(rank.failed for rank in ranks) or (link is not None and link.failure())):
            failed_at = now
        if failed_at is not None and now > failed_at + NOTICE_S and not terminated:
            terminated = True
            for rank in ranks:
                rank.send(signal.SIGTERM)
        too_late = asked_at is not None and now > asked_at + stop_timeout_s
        if too_late or (failed_at is not None and now > failed_at + NOTICE_S + END_S):
            for rank in ranks:
                rank.kill()
        time.sleep(_POLL_S)


def find_cause(ranks: Sequence[Rank], exits: Path, interrupted: bool = False) -> Cause:
    """Finds why the job ended, from the ends of its ranks.

    If a rank is lost, the others fail too. Therefore an error that a rank reports about itself has priority over a lost
    rank, and a lost rank over the errors of ranks that noticed its loss. Among equals the first one counts.

    Args:
        ranks: the ranks; all have ended.
        exits: folder of the files that ranks write on an error (`jobs.record_exit_code`).
        interrupted: whether a user interrupted the job twice.
    """
    found: list[tuple[int, int, Cause]] = []
    reported: list[Cause] = []
    for rank in ranks:
        cause, order, time_ns = _end_of(rank, exits)
        if cause is not None:
            found.append((order, time_ns, cause))
            if _exit_file(exits, rank).is_file():
                reported.append(cause)
    if not found:
        return Cause(0, "")
    first = min(found, key=lambda item: item[:2])[2]
    if interrupted and first.code != STOPPED:
        return Cause(128 + signal.SIGINT, "interrupted")
    if first not in reported:
        return first  # what this launcher saw itself, such as the signal that ended a rank, which no rank can know
    # If all ranks raise an error, one of them prints it, which need not be the first.
    return replace(first, printed=any(cause.printed and cause.code == first.code for cause in reported))


def _exit_file(exits: Path, rank: Rank) -> Path:
    return exits / f"exit.{rank.number}.json"


def _end_of(rank: Rank, exits: Path) -> tuple[Cause | None, int, int]:
    """The cause, its order among those of other ranks, and its time in nanoseconds."""
    where = f"rank {rank.number} on {socket.gethostname()}"
    path = _exit_file(exits, rank)
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        code = int(told["exit_code"])
        # Lines about a lost peer and lines of a stop are equals: either can be a consequence of the other.
        return (
            Cause(code, str(told["error"]), printed=bool(told.get("printed", True))),
            {LOST: 3, STOPPED: 3, 1: 2}.get(code, 0),
            path.stat().st_mtime_ns,
        )
    assert rank.code is not None
    if rank.code == 0:
        return None, 0, 0
    if rank.killed:
        return Cause(LOST, f"{where} did not end when it was asked to, and was killed"), 4, rank.ended_ns
    if rank.stopped:
        return Cause(STOPPED, IN_START), 3, rank.ended_ns
    if rank.code < 0:
        name = signal_name(-rank.code)
        hints: dict[int, str] = {
            signal.SIGKILL: "; if no user did that, the machine was probably out of memory (see dmesg)",
            signal.SIGABRT: "; with NCCL, its watchdog does that to a rank whose peer is lost or hangs",
        }
        ended = f"it was ended by {name}{hints.get(-rank.code, '')}"
        message = f"{where} was lost: {ended}; the same command resumes from the newest checkpoint"
        return Cause(LOST, message), 1, rank.ended_ns
    return Cause(rank.code, f"{where} failed with code {rank.code}; its error is above"), 2, rank.ended_ns
