"""launch/torchrun.sh and its processes: what listens on the network, and what is left when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.lab import Lab, committed, losses
from faults.rows import REPO, Tally, case
from faults.shim import Fault
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config
from megatron_lion.signals import signal_when_parent_ends

FAMILY = "launcher"
LIMIT_S = 240
GONE_S = 60
"""Nothing may run this long after the launcher ended or was killed."""
RUN: dict[str, Any] = {
    "train__steps": 1_000_000,
    "checkpoint__every": 200,
    "parallel__timeout_s": 20,
    "schedule__kind": "constant",
}


def processes(word: str) -> list[int]:
    """Pids of processes whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and "State:\tZ" not in path.with_name("status").read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def listeners(pids: list[int]) -> list[str]:
    """Addresses outside of the loopback on which processes listen, from /proc/net/tcp and tcp6."""
    inodes = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(path))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address = fields[1].rsplit(":", 1)[0]
            loopback = address in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes and not loopback:
                found.append(fields[1])
    return found


class Launched:
    """A run under launch/torchrun.sh on two ranks; kills whatever is left of it at the end."""

    def __init__(self, lab: Lab, config: RunConfig, environment: dict[str, str] | None = None) -> None:
        self.config, self.path = config, Path(f"{config.run_dir}.yaml")
        self.path.write_text(dump_config(config))
        self.err = Path(f"{config.run_dir}.err")
        variables = {
            **os.environ,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "2",
            "PYTHONPATH": str(REPO),
        }
        with open(self.err, "w") as err:
            self.process = subprocess.Popen(
                ["bash", str(REPO / "launch" / "torchrun.sh"), str(self.path)], cwd=REPO, stdout=subprocess.DEVNULL, stderr=err,
                env={**variables, **(environment or {})}, start_new_session=True, stdin=subprocess.DEVNULL,
                preexec_fn=lambda: signal_when_parent_ends(signal.SIGTERM),
            )  # fmt: skip

    def __enter__(self) -> Launched:
        deadline = time.monotonic() + LIMIT_S
        metrics = Path(self.config.run_dir, "metrics.jsonl")
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the launcher did not begin: {self.err.read_text()[-800:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in processes(str(self.path)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def rank(self, number: int) -> int:
        for pid in processes(str(self.path)):
            if f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        raise AssertionError(f"no rank {number}")

    def gone(self) -> list[int]:
        """What still runs after the limit."""
        deadline = time.monotonic() + GONE_S
        while (left := processes(str(self.path))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


def after(
    lab: Lab, tally: Tally, what: str, act: Callable[[Launched], Any], wanted: tuple[int, ...], *,
    loses: bool = True, environment: dict[str, str] | None = None, run: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Starts the launcher, does something to it, and counts its code, what is left, and lost steps."""
    config = lab.config("launched", **{**RUN, **(run or {})})
    with Launched(lab, config, environment) as launched:
        tally.injected += 1
        since = time.monotonic()
        act(launched)
        try:
            code = launched.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            tally.verdict(what, "stuck", "the launcher did not end")
            return
        left = launched.gone()
        tally.detect_s = max(tally.detect_s, time.monotonic() - since)
        errors = launched.err.read_text(errors="replace")
        tally.code(what, code, wanted, errors)
        if left:
            tally.verdict(what, "stuck", f"{len(left)} processes are left")
            return
        lost = len(losses(config.run_dir)) - max(committed(config.run_dir), default=0)
        if not loses and lost > 0:
            tally.verdict(what, "silent", f"{lost} finished steps are lost")
            return
    tally.verdict(what, "recovered")


@case("launcher-listeners", FAMILY, "ports outside of the loopback while a run of one node trains", "none")
def ports(lab: Lab, tally: Tally) -> None:
    with Launched(lab, lab.config("ports", **RUN)) as launched:
        tally.injected += 1
        found = listeners(processes(str(launched.path)))
    tally.verdict("listeners", "silent" if found else "recovered", f"{found}")


@case("launcher-kills", FAMILY, "kill -9 of rank 0, rank 1, the launcher", "8, or nothing is left")
def kills(lab: Lab, tally: Tally) -> None:
    plans: dict[str, tuple[Callable[[Launched], Any], tuple[int, ...]]] = {
        "rank 0": (lambda run: os.kill(run.rank(0), signal.SIGKILL), (8,)),
        "rank 1": (lambda run: os.kill(run.rank(1), signal.SIGKILL), (8,)),
        "launcher": (lambda run: os.kill(run.process.pid, signal.SIGKILL), (-9,)),
    }
    for what, (act, wanted) in lab.some(list(plans.items())):
        after(lab, tally, what, act, wanted)


@case(
    "launcher-stops",
    FAMILY,
    "TERM, HUP, INT, USR1, QUIT to the launcher, and to all its processes",
    "75, no finished step lost",
)
def stops(lab: Lab, tally: Tally) -> None:
    plans = [(name, group) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGQUIT") for group in (False, True)]
    for name, group in lab.some(plans):

        def act(run: Launched, number: int = signal.Signals[name], group: bool = group) -> None:
            if not group:
                os.kill(run.process.pid, number)
                return
            for pid in {run.process.pid, *processes(str(run.path))}:
                os.kill(pid, number)

        after(
            lab,
            tally,
            f"{name} to {'all' if group else 'the launcher'}",
            act,
            (75,),
            loses=False,
            run={"data__num_workers": 2},
        )


@case("launcher-slow-save", FAMILY, "SIGTERM while a save takes 45 s", "75, no finished step lost")
def slow_save(lab: Lab, tally: Tally) -> None:
    config = lab.config("slow")  # the folder of the next run: its number is one higher
    root = config.run_dir.replace(f"slow-{lab.count}", f"launched-{lab.count + 1}")
    fault = Fault(f"{root}/checkpoints", "slow", 1, 450)
    after(
        lab, tally, "slow save", lambda run: os.kill(run.process.pid, signal.SIGTERM), (75,), loses=False,
        environment=fault.environment(0), run={"checkpoint__every": 0},
    )  # fmt: skip
