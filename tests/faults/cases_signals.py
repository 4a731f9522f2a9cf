"""Stop signals at each phase: the run ends with 75 and loses no finished step, and the same command continues."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from faults.cases_disk import LONGER_LIFE
from faults.lab import Lab, committed, losses
from faults.rows import Tally, case
from faults.warm import Stuck

FAMILY = "signals"
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
MOMENTS = {"rendezvous": 1, "build": 1, "index": 1, "step": 3, "held-out": 2, "probe": 2, "save": 1}
LIMIT_S = 120
RUN: dict[str, Any] = LONGER_LIFE


def at_each_phase(lab: Lab, tally: Tally, layout: str, name: str) -> None:
    """Sends a signal to every rank when rank 0 begins a phase."""
    for phase, call in lab.some(list(MOMENTS.items())):
        config = lab.config(phase, **RUN)
        what = f"{layout}: {name} at {phase}"
        marker = Path(f"{config.run_dir}.marker")
        job = lab.start(config, layout, hooks={0: (phase, call, name, str(marker))})
        try:
            lab.wait_for(lambda marker=marker, job=job: marker.exists() or job.ranks[0].code is not None)
            since = time.monotonic()
            for rank in job.ranks[1:]:
                rank.signal(signal.Signals[name])
            job.wait(LIMIT_S)
        except Stuck as error:
            job.kill()
            tally.injected += 1
            tally.verdict(what, "stuck", str(error))
            continue
        tally.injected += 1
        tally.detect_s = max(tally.detect_s, max(rank.ended for rank in job.ranks) - since)
        for rank in job.ranks:
            assert rank.code is not None
            tally.code(what, rank.code, (75,), rank.errors)
        if Path(config.run_dir, "metrics.jsonl").exists():
            lost = len(losses(config.run_dir)) - max(committed(config.run_dir), default=0)
            if lost > 0:
                tally.wrong.append(f"{what}: {lost} finished steps are lost")
        lab.judge(tally, what, config, layout)


def _register() -> None:
    for name in NAMES:

        def work(lab: Lab, tally: Tally, name: str = name) -> None:
            at_each_phase(lab, tally, "DP1", name)

        case(f"signal-{name[3:].lower()}", FAMILY, f"{name} at each phase", "75, no finished step lost")(work)


_register()


@case("signal-term-dp2", FAMILY, "SIGTERM to two ranks at each phase", "75, no finished step lost")
def two_ranks(lab: Lab, tally: Tally) -> None:
    at_each_phase(lab, tally, "DP2", "SIGTERM")


@case(
    "signal-workers",
    FAMILY,
    "each signal to the process group of a run with two loader workers",
    "75, no finished step lost",
)
def workers(lab: Lab, tally: Tally) -> None:
    run = {
        **RUN,
        "train__steps": 40,
        "data__num_workers": 2,
        "checkpoint__every": 0,
        "probe__every": 0,
        "train__test_every": 0,
    }
    for name in lab.some(NAMES):
        config = lab.config("workers", **run)
        job = lab.start(config)
        lab.until_lines(job, config.run_dir, 3)
        job.ranks[0].signal(signal.Signals[name], group=True)
        tally.injected += 1
        try:
            (code,) = job.wait(LIMIT_S)
        except Stuck as error:
            tally.verdict(name, "stuck", str(error))
            continue
        tally.code(name, code, (75,), job.errors)
        lost = len(losses(config.run_dir)) - max(committed(config.run_dir), default=0)
        if lost > 0:
            tally.wrong.append(f"{name}: {lost} finished steps are lost")
        lab.judge(tally, name, config)
