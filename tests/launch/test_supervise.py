"""The launcher's supervision with small processes in the place of ranks: causes, exit codes, a killed parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from job_processes import REPO, alive

from megatron_lion import supervise
from megatron_lion.jobs import record_exit_code
from megatron_lion.launcher import _private_folder
from megatron_lion.signals import IN_START, end_with_parent, handled
from megatron_lion.supervise import Rank, find_cause, watch

HOST = socket.gethostname()


def scripts(tmp_path: Path, *texts: str, stop_timeout_s: float = 100) -> tuple[int, str, float]:
    """Runs a shell script for each rank; returns the cause's code and message, and the seconds it took."""
    ranks = [Rank(number, ["sh", "-c", text], {**os.environ, "W": str(tmp_path)}) for number, text in enumerate(texts)]
    began = time.monotonic()
    watch(ranks, [], stop_timeout_s)
    assert not any(rank.running() for rank in ranks)
    cause = find_cause(ranks, tmp_path)
    return cause.code, cause.message, time.monotonic() - began


def report(rank: int, code: int) -> str:
    """A shell command that leaves a rank's exit file and ends with that code."""
    content = json.dumps({"rank": rank, "exit_code": code, "error": f"error {code} of rank {rank}"})
    return f"echo '{content}' > $W/{rank}; mv $W/{rank} $W/exit.{rank}.json; exit {code}"


FOREVER = "while :; do sleep 0.1; done"
AFTER_0 = "until [ -e $W/exit.0.json ]; do sleep 0.02; done; "
AFTER_1 = AFTER_0.replace("0.json", "1.json")
STUCK = f"trap '' TERM; {FOREVER}"


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        (("exit 0", "exit 0"), 0, ""),
        (("kill -9 $$", report(1, 8)), 8, f"rank 0 on {HOST} was lost: it was ended by SIGKILL; if no user did that, the"),
        ((report(0, 8), f"{AFTER_0} kill -9 $$"), 8, f"rank 1 on {HOST} was lost"),
        (("kill -ABRT $$", "exit 1"), 8, f"rank 0 on {HOST} was lost: it was ended by SIGABRT; with NCCL, its watchdog"),
        ((report(0, 8), f"{AFTER_0} {report(1, 5)}"), 5, "error 5 of rank 1"),
        ((report(0, 3), f"{AFTER_0} {report(1, 5)}"), 3, "error 3 of rank 0"),
        (("exit 1", report(1, 8)), 1, f"rank 0 on {HOST} failed with code 1"),
        ((report(0, 75), report(1, 75)), 75, "error 75 of rank "),
        ((report(0, 75), f"{AFTER_0} {report(1, 8)}"), 75, "error 75 of rank 0"),
        ((f"{AFTER_1} {report(0, 75)}", report(1, 8)), 8, "error 8 of rank 1"),
        (("kill -TERM $$", FOREVER), 75, IN_START),
        (("kill -40 $$", "exit 0"), 8, f"rank 0 on {HOST} was lost: it was ended by signal 40"),
    ],
    ids=[
        "done", "lost", "lost later than missed", "watchdog", "own error", "first own error", "traceback", "stopped",
        "stopped, then missed", "missed, then stopped", "stopped in its start", "a signal without a name",
    ],
)  # fmt: skip
def test_the_cause(texts: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    found = scripts(tmp_path, *texts)
    assert found[0] == code
    assert found[1].startswith(message)


@pytest.mark.parametrize(("printed", "expected"), [((False, False), False), ((False, True), True)])
def test_a_cause_that_no_rank_has_printed_is_left_to_the_launcher(
    printed: tuple[bool, bool], expected: bool, tmp_path: Path
) -> None:
    """A rank leaves the line of an error that all ranks share to another one, which may end for another reason."""
    ranks = [Rank(number, ["sh", "-c", "exit 2"], dict(os.environ)) for number in range(2)]
    for number, flag in enumerate(printed):
        record_exit_code(tmp_path, number, 2, "a wrong setting", flag)
    watch(ranks, [], 100)
    found = find_cause(ranks, tmp_path)
    assert (found.code, found.message, found.printed) == (2, "a wrong setting", expected)


def test_the_launcher_prints_which_signal_ended_a_rank(tmp_path: Path) -> None:
    """Also if a rank has printed that it missed its peer: it cannot know the signal."""
    ranks = [Rank(0, ["sh", "-c", "kill -9 $$"], dict(os.environ)), Rank(1, ["sh", "-c", "exit 8"], dict(os.environ))]
    record_exit_code(tmp_path, 1, 8, "lost rank 0", True)
    watch(ranks, [], 100)
    found = find_cause(ranks, tmp_path)
    assert found.message.startswith(f"rank 0 on {HOST} was lost: it was ended by SIGKILL")
    assert not found.printed


def test_a_rank_that_hangs_after_the_failure_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, but is not taken for the cause."""
    monkeypatch.setattr(supervise, "NOTICE_S", 0.3)
    monkeypatch.setattr(supervise, "END_S", 0.3)
    code, message, seconds = scripts(tmp_path, report(0, 8), STUCK)
    assert (code, message) == (8, "error 8 of rank 0")
    assert seconds > 0.6, "the others have time to report and to end"


def test_a_rank_that_does_not_end_on_request(tmp_path: Path) -> None:
    code, message, _ = scripts(tmp_path, "kill -TERM $$", STUCK, stop_timeout_s=0.5)
    assert (code, message) == (75, IN_START)
    code, message, _ = scripts(tmp_path, f"trap 'exit 0' TERM; {report(0, 75)}", STUCK, stop_timeout_s=0.5)
    assert (code, message) == (75, "error 75 of rank 0")


def test_a_second_interrupt_does_not_wait_for_the_checkpoint(tmp_path: Path) -> None:
    ready = f"touch {tmp_path}/ready"
    received: list[int] = []

    def interrupt_twice() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        received.extend([signal.SIGINT, signal.SIGINT])

    threading.Thread(target=interrupt_twice, daemon=True).start()
    rank = Rank(0, ["sh", "-c", f"trap '' TERM; trap 'exit 130' INT; {ready}; {FOREVER}"], os.environ)
    watch([rank], received, 100)
    found = find_cause([rank], tmp_path, interrupted=True)
    assert (found.code, found.message) == (130, "interrupted")


PARENT = """
import sys, time
from megatron_lion.supervise import Rank
rank = Rank(0, [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], {})
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_rank_ends_when_its_launcher_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert parent.stdout is not None
    rank = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60
        while alive(rank):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        if rank.is_running():
            rank.kill()


SAVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
"""
KILLED_LAUNCHER = """
import os, signal, sys, time
from megatron_lion.launcher import _private_folder
from megatron_lion.supervise import Rank
with _private_folder() as (folder, kept):
    Rank(0, [sys.executable, "-c", *sys.argv[1:]], os.environ, kept)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.02)
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_launcher_is_removed_after_its_last_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, end, temporary = tmp_path / "ready", tmp_path / "end", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    words = [sys.executable, "-c", KILLED_LAUNCHER, SAVES, str(ready), str(end)]
    with open(tmp_path / "out", "w") as out:  # not a pipe, which the rank would keep open
        killed = subprocess.run(words, cwd=REPO, stdout=out, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = Path((tmp_path / "out").read_text().strip())
    assert left.parent == temporary
    try:
        with _private_folder() as (own, _):
            assert {own, left} == set(temporary.iterdir()), "its rank still saves"
    finally:
        end.touch()
    deadline = time.monotonic() + 60
    while left.exists() and time.monotonic() < deadline:
        with _private_folder():
            time.sleep(0.05)
    assert not list(temporary.iterdir())


def test_a_child_obeys_the_end_of_its_parent_before_exec() -> None:
    """A handler of the parent would note the signal, and exec would forget it: the child would outlive the job."""
    with handled([signal.SIGTERM], lambda number, frame: None):
        prepare = end_with_parent()
        child = os.fork()
        if child == 0:
            prepare()
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
