"""PeerWatch: judges which ranks of a job are gone, stopped or late, and names them in a line or an error."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lion.collective_faults import is_timeout, one_line
from megatron_lion.errors import MegatronLionError, PeerError
from megatron_lion.exit_report import leave_at_once, report, write_line
from megatron_lion.peer_board import Board, place, process_state
from megatron_lion.signals import StopNow

BEAT_S = 1.0
"""Interval of the messages that every rank leaves for the others, seconds."""
NOTICE_S = 60.0
"""Seconds of waiting after which a line names what is waited for; the next lines follow at doubled intervals."""
MUTE_S = 1800.0
"""Seconds without a message after which a rank counts as lost in a stage of `peers.alone` that sends none.

Python cannot send messages while a long call of C++ holds its lock, as Megatron's index build for BERT does.
"""
_GONE_S = 10.0  # a rank whose process has ended; the backend usually raises at once
_LAST_READ_S = 3.0  # for a store that does not answer
_NAMING_S = 7.0  # after a collective failed: how long to look for the rank that caused it
_ANSWER_S = 1.0  # a store that has not answered for long gets so much time for its last answer
_JOIN_S = 6.0  # a little more than one request to a store that answers slowly
_SILENT_S = 5.0  # no message for so long from another host, while naming

# Files whose code waits for other ranks, if it is the innermost Python code of the main thread.
_WAITING_CODE = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/distributed/param_and_grad_buffer.py",
    "/megatron_lion/parallel.py",
)


@dataclass
class _Peer:
    """The last message of another rank, and when it changed."""

    message: dict[str, Any] = field(default_factory=dict)
    changed: float = field(default_factory=time.monotonic)
    gone_since: float | None = None

    @property
    def host(self) -> str:
        return str(self.message.get("host", "unknown host"))

    def is_here(self, place: str) -> bool:
        return self.message.get("place") == place


class PeerWatch:
    """Leaves this rank's messages on a board, reads those of the others, and judges them.

    Threads do so once a second. They call no collective, change no tensor and draw no random number.

    Args:
        board: where ranks leave their messages.
        rank, world_size: of this process.
        timeout_s: longest time that a collective waits for a peer.
        backend: "gloo" or "nccl".
    """

    def __init__(self, board: Board, rank: int, world_size: int, timeout_s: float, backend: str) -> None:
        self.board, self.rank, self.timeout_s, self.backend = board, rank, timeout_s, backend
        self.stage, self.alone, self.mute, self.working = "starting", 0, False, False
        self.peers = {other: _Peer() for other in range(world_size) if other != rank}
        self.host, self._place = socket.gethostname(), place()
        self._main = threading.get_ident()
        self._ended: dict[str, Any] | None = None
        self._judging = False  # the main thread handles a failed collective
        self._changes, self._entered = 0, time.monotonic()
        self._wait_key: tuple[Any, ...] | None = None
        self._wait_began: float | None = None
        self._notice_s = NOTICE_S
        self._asked = self._answered = time.monotonic()  # begin and end of the last exchange of messages
        self._stop, self._wake = threading.Event(), threading.Event()
        # Two threads: a store whose host is cut off may keep a request waiting for a quarter of an hour.
        self._messenger = threading.Thread(target=self._exchange_messages, name="peer-messages", daemon=True)
        self._judge = threading.Thread(target=self._judge_peers, name="peer-watch", daemon=True)

    def start(self) -> None:
        """Leaves the first message and starts the threads."""
        self._post()
        self._messenger.start()
        self._judge.start()

    def mark(self, stage: str | None = None) -> None:
        """Notes that this rank has made progress, and optionally its new stage."""
        self._changes += 1
        if stage is not None:
            self.stage, self._entered = stage, time.monotonic()

    def end(self, kind: str, text: str = "", lost: Sequence[int] = ()) -> None:
        """Leaves the last message, which names the reason of this rank's end, and stops the threads.

        Args:
            kind: "done", "failed" (by itself) or "lost" (because of other ranks).
            text: the error in one line.
            lost: the other ranks.
        """
        self._ended = {"kind": kind, "text": text, "lost": list(lost)}
        self.stop()

    def stop(self) -> None:
        """Leaves the last message and stops the threads."""
        self._stop.set()
        self._wake.set()
        limit_s = _JOIN_S if self._unanswered_s() < _SILENT_S else _ANSWER_S
        for thread in (self._messenger, self._judge):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(limit_s)

    def _post(self) -> None:
        now = time.monotonic()
        self.board.post(self.rank, {
            "host": self.host, "place": self._place, "pid": os.getpid(), "count": now, "stage": self.stage,
            "stage_s": now - self._entered, "mute": self.mute, "waiting_s": self._waiting_s(now), "ended": self._ended,
        })  # fmt: skip

    def _read(self) -> None:
        for rank, message in self.board.read(list(self.peers)).items():
            peer = self.peers[rank]
            if message.get("count") != peer.message.get("count"):
                peer.message, peer.changed = message, time.monotonic()

    def _exchange_messages(self) -> None:
        _leave_signals_to_the_main_thread()
        last = False
        while not last:
            self._wake.wait(BEAT_S)
            self._wake.clear()
            last = self._stop.is_set()  # read before the message is made: it reports how the rank ended
            with contextlib.suppress(RuntimeError, ValueError):  # judged by the time since the last answer
                began = time.monotonic()
                self._post()
                self._read()
                self._asked, self._answered = began, time.monotonic()

    def _judge_peers(self) -> None:
        _leave_signals_to_the_main_thread()
        while not self._stop.wait(BEAT_S):
            self._notice_waiting()
            if not self._judging:
                self._say_what_is_waited_for()
                self._end_if_hopeless()

    def _notice_waiting(self) -> None:
        """Sets since when the main thread has been in the same wait for other ranks."""
        frame = sys._current_frames().get(self._main)
        key: tuple[Any, ...] | None = None
        if frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_CODE):
            key = (self._changes, id(frame), frame.f_lasti)
        elif self.backend == "nccl" and not self.working:
            key = (self._changes,)  # a wait for NCCL is a wait for the device, anywhere in the code
        del frame  # it would keep the tensors of the stack alive
        if key is None or key != self._wait_key:
            self._wait_began = time.monotonic() if key is not None else None
            self._notice_s = NOTICE_S
        self._wait_key = key

    def _waiting_s(self, now: float) -> float:
        return now - self._wait_began if self._wait_began is not None else 0.0

    def _unanswered_s(self) -> float:
        """Seconds since the board last answered."""
        return time.monotonic() - self._answered

    def state(self, rank: int) -> str:
        """Returns "ended", "gone", "stopped" or "alive" for a rank; "alive" if nothing else is known."""
        peer = self.peers[rank]
        if peer.message.get("ended"):
            return "ended"
        state = process_state(peer.message["pid"]) if peer.is_here(self._place) else "alive"
        if state == "gone":
            now = time.monotonic()
            peer.gone_since = peer.gone_since or now
            # It may have left its last message just before: the board must have been read since.
            if self._asked <= peer.gone_since and now < peer.gone_since + _LAST_READ_S:
                return "alive"
        return state

    def silent_s(self, rank: int) -> float:
        """Seconds since a rank's last message."""
        return time.monotonic() - self.peers[rank].changed

    def _late(self) -> list[int]:
        """Ranks for which the others seem to wait: gone, stopped or silent ones, else those that do not wait themselves."""
        there = [rank for rank in self.peers if self.state(rank) != "ended"]
        lost = [r for r in there if self.state(r) != "alive" or self.silent_s(r) > _SILENT_S + 2 * BEAT_S]
        return lost or [r for r in there if self.peers[r].message.get("waiting_s", 0) < 2 * BEAT_S]

    def _say_what_is_waited_for(self) -> None:
        waited = self._waiting_s(time.monotonic())
        if waited < self._notice_s or (self.backend == "nccl" and not self._late()):
            return
        self._notice_s *= 2
        late = self._late()
        if any(
            r < self.rank and r not in late and p.message.get("waiting_s", 0) > waited / 2
            for r, p in self.peers.items()
        ):
            return  # a lower rank waits as well and prints the line
        names = "; ".join(self._describe(rank) for rank in late[:3]) or "a collective that all ranks have entered"
        write_line(f"megatron-lion[rank {self.rank}]: waited {waited:.0f} s in '{self.stage}' for {names}")

    def _end_if_hopeless(self) -> None:
        """Ends the process if it waits for a lost rank and the backend would not raise in time, or would abort."""
        waited = self._waiting_s(time.monotonic())
        if waited == 0.0:
            return
        # gloo raises after timeout_s by itself, but for a stage of `peers.alone`. NCCL aborts then without naming a rank, so
        # this comes a little earlier.
        slack = 2.0 if self.backend != "nccl" else -min(5.0, self.timeout_s / 10)
        for rank in self.peers:
            state, silent = self.state(rank), self.silent_s(rank)
            limit = self.timeout_s + slack
            # It has left, and NCCL would wait for it until its own limit; "done" is left out, as a finished rank needs nothing.
            has_failed = (self.peers[rank].message.get("ended") or {}).get("kind") in ("failed", "lost")
            if state == "gone" or has_failed:
                limit = min(limit, _GONE_S)
            elif state == "alive" and (self.mute or self.peers[rank].message.get("mute")):
                limit = max(limit, MUTE_S)
            # A process that is known to be gone or stopped is judged by the time of the wait alone.
            is_lost = has_failed or state in ("gone", "stopped") or (state == "alive" and silent > limit)
            if waited > limit and is_lost:
                self._die(self.blame(None))
        if min(waited, self._unanswered_s()) > self.timeout_s + slack:
            self._die(self.blame(None))

    def _die(self, error: PeerError) -> None:
        self.end("lost", failure_text(error), error.lost)
        report(error, direct=True)
        leave_at_once(error.exit_code)

    def _describe(self, rank: int) -> str:
        peer, state, silent = self.peers[rank], self.state(rank), self.silent_s(rank)
        where = f"rank {rank} ({peer.host}, pid {peer.message.get('pid', '?')})"
        doing = f"'{peer.message.get('stage', 'starting')}'"
        if state == "gone":
            return f"{where}, whose process has ended without a message, last seen in {doing}"
        if state == "stopped":
            return f"{where}, which is stopped (SIGSTOP or a debugger), last seen in {doing}"
        if silent > _SILENT_S:
            return f"{where}, without a message for {silent:.0f} s (is its host or the network down?), last seen in {doing}"
        return f"{where}, which has been in {doing} for {peer.message.get('stage_s', 0) + silent:.0f} s"

    def blame(self, error: BaseException | None) -> PeerError:
        """Looks for the rank that caused a failed collective, for a few seconds, and returns the error that names it.

        Args:
            error: the backend's exception, or None if this watch found the loss.
        """
        self._judging = True
        began = time.monotonic()
        late = error is not None and is_timeout(error)
        while True:
            self._wake.set()
            failed = [r for r, p in self.peers.items() if (p.message.get("ended") or {}).get("kind") == "failed"]
            lost = [r for r in self.peers if self.state(r) in ("gone", "stopped")]
            if self._unanswered_s() < _SILENT_S:
                lost += [r for r in self.peers if self.state(r) == "alive" and self.silent_s(r) > _SILENT_S]
            fresh = all(
                self.silent_s(r) < 3 * BEAT_S and p.gone_since is None
                for r, p in self.peers.items()
                if self.state(r) == "alive"
            )
            waited = time.monotonic() - began
            is_cut_off = waited > _ANSWER_S and self._unanswered_s() >= _SILENT_S
            if failed or lost or (late and fresh) or is_cut_off or waited > _NAMING_S:
                break
            time.sleep(0.05)
        found = self._name(error, failed, lost)
        self._let_go_on(lost)
        return found

    def _let_go_on(self, ranks: list[int]) -> None:
        """Continues stopped ranks of this host (SIGCONT): they find their connections closed and end as well.

        While a process is stopped it does not act on a SIGTERM, so a launcher would wait for it until its own
        time limit.
        """
        for rank in ranks:
            if self.state(rank) == "stopped":
                with contextlib.suppress(OSError):
                    os.kill(self.peers[rank].message["pid"], signal.SIGCONT)

    def _name(self, error: BaseException | None, failed: list[int], lost: list[int]) -> PeerError:
        again = "the same command continues from what is saved"
        if failed:
            peer = self.peers[failed[0]]
            text = f"rank {failed[0]} ({peer.host}) failed: {peer.message['ended']['text']}"
        elif lost:
            text = f"lost {'; '.join(self._describe(rank) for rank in lost[:3])}; {again}"
        elif self._unanswered_s() >= _SILENT_S:
            where = getattr(self.board, "where", "its folder")
            text = f"lost the first node: the job's store at {where} does not answer; {again}"
        elif told := [r for p in self.peers.values() for r in (p.message.get("ended") or {}).get("lost", [])]:
            lost = [rank for rank in told if rank != self.rank][:1]
            text = f"lost {self._describe(lost[0])}" if lost else "the other ranks gave up waiting for this one"
            text += f"; {again}"
        elif error is not None and is_timeout(error) and (late := self._late()):
            names = "; ".join(self._describe(rank) for rank in late[:3])
            text = f"waited {self.timeout_s:g} s (parallel.timeout_s) in '{self.stage}' for {names}; {again}"
        else:
            text = f"lost a peer in '{self.stage}'; {again}"
        if error is not None and not failed:
            text += f" ({type(error).__name__}: {one_line(error, 120)})"
        found = PeerError(text)
        # One survivor of each host prints the line. A rank that failed on this host has printed its own.
        here = {r for r, p in self.peers.items() if p.is_here(self._place)}
        if failed and failed[0] in here:
            found.told_by = failed[0]
        else:
            found.told_by = min({self.rank, *here} - set(lost) - set(failed))
        found.lost = tuple(failed or lost)
        return found


def _leave_signals_to_the_main_thread() -> None:
    # The main thread blocks signals while it starts loader workers; they would arrive here instead.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def failure_text(error: BaseException) -> str:
    """One line for the other ranks about an error of this rank."""
    text = one_line(error)
    return text if isinstance(error, MegatronLionError | StopNow) else f"{type(error).__name__}: {text}"
