"""How long a launcher waits for a save after a request to stop, and what it sends to its ranks meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion import launcher, supervise
from megatron_lion.supervise import Rank, watch


class Saving:
    """A rank that ends with code 75 some seconds after the first SIGTERM, on a clock that only the launcher's sleep moves."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.asked = seconds, 1000.0, None
        self.sent: list[int] = []
        self.code: int | None = None
        self.killed_after: float | None = None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def running(self) -> bool:
        if self.code is None and self.asked is not None and self.now > self.asked + self.seconds:
            self.code = 75
        return self.code is None

    def send(self, number: int) -> None:
        self.sent.append(number)
        self.asked = self.asked or self.now

    def kill(self) -> None:
        self.killed_after, self.code = self.now - (self.asked or 0), -9

    @property
    def stopped(self) -> bool:
        return self.code == 75

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0, 75)


@pytest.mark.parametrize(("seconds", "killed"), [(31, False), (1700, False), (1900, True)])
def test_a_save_may_take_as_long_as_the_stop_timeout(
    seconds: float, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank: Any = Saving(seconds)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=rank.monotonic, sleep=rank.sleep))
    watch([rank], [signal.SIGTERM], 1800)
    assert rank.sent == [signal.SIGTERM]
    assert (rank.killed_after is not None) == killed
    assert not killed or 1800 <= rank.killed_after < 1801


class Done:
    """A rank that has ended well."""

    code, stopped, failed = 0, False, False

    def __init__(self, number: int, *others: object) -> None:
        self.number = number

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(("text", "seconds"), [(None, 1800.0), ("", 1800.0), ("90", 90.0), ("0.5", 0.5)])
def test_the_stop_timeout_of_the_environment(text: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    monkeypatch.setattr(launcher, "Rank", Done)
    monkeypatch.setattr(launcher, "watch", lambda ranks, received, stop_timeout_s, link: used.append(stop_timeout_s))
    monkeypatch.delenv("STOP_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("STOP_TIMEOUT", text)
    assert launcher.main(["--processes", "1", "env"]) == 0
    assert used == [seconds]


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "ten"])
def test_a_stop_timeout_that_is_none(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "Rank", Done)
    monkeypatch.setattr(launcher, "watch", lambda *others: pytest.fail("the job was started"))
    monkeypatch.setenv("STOP_TIMEOUT", text)
    assert launcher.main(["--processes", "1", "env"]) == 2
    assert capsys.readouterr().err == f"megatron-lion: STOP_TIMEOUT={text}: give a time in seconds, above 0\n"


def test_ranks_receive_one_sigterm_for_any_number_of_signals(tmp_path: Path) -> None:
    """They are in sessions of their own, so that a terminal's Ctrl-C reaches the launcher alone."""
    script = (
        'for s in INT HUP QUIT USR1 TERM; do trap "echo $s >> $W/got" $s; done; touch $W/ready; '
        "until [ -e $W/end ]; do sleep 0.02; done"
    )
    received: list[int] = []

    def wait_for(name: str) -> None:
        end = time.monotonic() + 60
        while not (tmp_path / name).exists() and time.monotonic() < end:
            time.sleep(0.01)

    def ask() -> None:
        wait_for("ready")
        received.append(signal.SIGINT)
        wait_for("got")
        received.extend([signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1])
        time.sleep(0.5)  # for signals that must not come: a slow machine only makes the test weaker
        (tmp_path / "end").touch()

    rank = Rank(0, ["sh", "-c", script], {**os.environ, "W": str(tmp_path)})
    assert os.getsid(rank._process.pid) == os.getpgid(rank._process.pid) == rank._process.pid
    threading.Thread(target=ask, daemon=True).start()
    watch([rank], received, 100)
    assert (tmp_path / "got").read_text() == "TERM\n"
    assert rank.code == 0
