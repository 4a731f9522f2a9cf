"""Ranks that are killed or stopped at each phase: the others end with 8 and name the rank, and the run resumes."""

from __future__ import annotations

import errno
import signal
import time
from pathlib import Path
from typing import Any

from faults.cases_disk import LIFE, LONGER_LIFE, drive, phase_of
from faults.lab import Lab, changed
from faults.rows import Tally, case
from faults.warm import Stuck

FAMILY = "peers"
TIMEOUT_S = 15
"""parallel.timeout_s of these runs."""
AFTER_S = 10
"""Survivors must have ended this long after a kill, and this long after the timeout if a rank is stopped."""
LIMIT_S = 150
RUN: dict[str, Any] = {**LONGER_LIFE, "parallel__timeout_s": TIMEOUT_S}
PATIENT = {"parallel__timeout_s": 600.0}
"""Settings of the runs that judge: nothing is lost in them, whatever else the machine does."""
MOMENTS = {"build": 1, "index": 1, "step": 3, "held-out": 2, "probe": 2, "save": 2, "end": 1}
"""Number of the phase's call at which the fault takes place."""


def at_each_phase(lab: Lab, tally: Tally, layout: str, action: str) -> None:
    """Kills or stops each rank at each phase."""
    plans = [(phase, call, rank) for phase, call in MOMENTS.items() for rank in (0, 1)]
    for phase, call, victim in lab.some(plans):
        config = lab.config(f"{phase}-{victim}", **RUN)
        what = f"{layout}: {action} of rank {victim} at {phase}"
        marker = Path(f"{config.run_dir}.marker")
        job = lab.start(config, layout, hooks={victim: (phase, call, action, str(marker))})
        try:
            lab.wait_for(
                lambda marker=marker, job=job: marker.exists() or all(one.code is not None for one in job.ranks)
            )
        except Stuck as error:
            job.kill()
            tally.verdict(what, "stuck", str(error))
            continue
        if not marker.exists():  # a phase that this rank has not: rank 1 builds no index
            if failed := [one for one in job.ranks if one.code]:
                tally.wrong.append(f"{what}: ended with {failed[0].code} before the fault: {failed[0].last_line()}")
            continue
        tally.injected += 1
        since = time.monotonic()
        others = [one for number, one in enumerate(job.ranks) if number != victim]
        try:
            for one in others:
                one.wait(LIMIT_S)
        except Stuck as error:
            job.kill()
            tally.verdict(what, "stuck", f"a survivor {error}")
            continue
        took = max(one.ended for one in others) - since
        tally.detect_s = max(tally.detect_s, took)
        allowed = AFTER_S + (TIMEOUT_S if action == "stop" else 0)
        if took > allowed and phase != "end":
            tally.wrong.append(f"{what}: the others ended after {took:.0f} s, wanted {allowed} s")
        for one in others:
            assert one.code is not None
            done = phase == "end" and one.code == 0  # everything was saved before
            tally.code(what, one.code, (8, 0) if done else (8,), one.errors)
            if one.code == 8 and f"rank {victim}" not in one.errors and phase != "end":
                tally.wrong.append(f"{what}: rank {victim} is not named: {one.last_line()}")
        job.kill()
        lab.judge(tally, what, changed(config, PATIENT), layout)


def _register() -> None:
    for layout in ("DP2", "TP2"):
        for action, text in (("kill", "kill -9"), ("stop", "SIGSTOP")):

            def work(lab: Lab, tally: Tally, plan: tuple[str, str] = (layout, action)) -> None:
                at_each_phase(lab, tally, *plan)

            name = f"peer-{action}-{layout.lower()}"
            case(name, FAMILY, f"{text} of each rank at each phase, {layout}", "8, the rank is named")(work)


_register()


def in_a_save(lab: Lab, tally: Tally, kind: str, number: int, wanted: tuple[int, ...]) -> None:
    """A fault at each call of the second save on each rank; the first one left a checkpoint that must stay."""
    run = {**LIFE, "parallel__timeout_s": TIMEOUT_S}
    for rank in (0, 1):
        first = lab.config("counted", **run)
        calls = lab.calls(first, "DP2", rank)
        saves = [call for call in calls if "/checkpoints/" in call.path and "/step_0000002" not in call.path]
        if rank == 0:
            saves = [call for call in saves if phase_of(call, calls) == "save"]
        drive(
            lab,
            tally,
            lambda: lab.config("save", **run),
            saves,
            kind,
            number,
            layout="DP2",
            rank=rank,
            wanted=wanted,
            judged=PATIENT,
        )


@case("peer-save-kill", FAMILY, "kill -9 of a rank at each call of a second save, DP2", "8")
def save_kill(lab: Lab, tally: Tally) -> None:
    in_a_save(lab, tally, "kill", 0, ())


@case("peer-save-enospc", FAMILY, "ENOSPC on one rank from each call of a second save on, DP2", "5 on all ranks")
def save_enospc(lab: Lab, tally: Tally) -> None:
    in_a_save(lab, tally, "always", errno.ENOSPC, (5, 0))


@case("peer-random", FAMILY, "kill -9 of a random rank at a random moment of a long run, DP2", "8")
def at_random(lab: Lab, tally: Tally) -> None:
    import random

    chosen = random.Random(7)
    run = {**LIFE, "train__steps": 120, "checkpoint__every": 10, "train__test_every": 40, "probe__every": 40}
    for number in range(lab.limit or 12):
        config = lab.config("random", **run, parallel__timeout_s=TIMEOUT_S)
        victim, lines = chosen.randrange(2), chosen.randrange(1, 110)
        what = f"rank {victim} after line {lines} ({number})"
        job = lab.start(config, "DP2")
        lab.until_lines(job, config.run_dir, lines)
        job.ranks[victim].signal(signal.SIGKILL)
        since = time.monotonic()
        try:
            job.wait(LIMIT_S)
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            continue
        tally.injected += 1
        other = job.ranks[1 - victim]
        tally.detect_s = max(tally.detect_s, other.ended - since)
        assert other.code is not None
        tally.code(what, other.code, (8,), other.errors)
        lab.judge(tally, what, changed(config, PATIENT), "DP2")
