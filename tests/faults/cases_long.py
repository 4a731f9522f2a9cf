"""Long runs: one that is killed twenty times, and one whose memory, descriptors and threads are watched."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

from faults.lab import Lab, committed, steps_lost
from faults.rows import Tally, case
from faults.warm import Forked, Stuck

FAMILY = "long runs"
KILLS = 20


def torture(lab: Lab, tally: Tally, layout: str, steps: int, kills: int) -> None:
    """Kills one rank at random steps, each time gives the same command again, and lets the last one end."""
    run: dict[str, Any] = {
        "train__steps": steps, "checkpoint__every": max(steps // 50, 1), "checkpoint__keep": 2, "train__test_every": steps // 4,
        "train__test_batches": 1, "probe__every": steps // 4, "probe__num_batches": 1,
        "parallel__timeout_s": 60,  # no launcher ends the other rank if one is killed before they have joined
    }  # fmt: skip
    config = lab.config("torture", **run)
    chosen = random.Random(11)
    for number in range(kills):
        before = max(committed(config.run_dir), default=0)
        left = steps - before
        if left <= 4:
            break
        job = lab.start(config, layout)
        target = before + chosen.randrange(1, max(2, min(left - 2, 2 * steps // kills)))
        lab.wait_for(
            lambda job=job, target=target: (
                any(rank.code is not None for rank in job.ranks) or _reached(config.run_dir, target)
            )
        )
        victim = job.ranks[chosen.randrange(len(job.ranks))]
        victim.signal(signal.SIGKILL)
        what = f"{layout} kill {number + 1} after step {target}"
        try:
            codes = job.wait()
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            return
        tally.injected += 1
        tally.lost = max(tally.lost, steps_lost(config.run_dir))
        tally.codes["-9"] += codes.count(-signal.SIGKILL)
        for rank in job.ranks:
            assert rank.code is not None
            if rank is not victim:
                tally.detect_s = max(tally.detect_s, rank.ended - victim.ended)
                tally.code(what, rank.code, (8,), rank.errors)
    outcome = lab.judge(tally, f"the end after {tally.injected} kills", config, layout)
    if outcome == "recovered":
        tally.recovered += tally.injected - 1  # the end is the proof of every restart


def _reached(run_dir: str, step: int) -> bool:
    path = Path(run_dir, "metrics.jsonl")
    if not path.exists():
        return False
    tail = path.read_bytes()[-4000:].split(b"\n")[-2:-1]
    return bool(tail) and b'"step"' in tail[0] and int(tail[0].split(b'"step":')[1].split(b",")[0].strip(b" }")) >= step


@case("torture-dp1", FAMILY, "a run of 2,000 steps, killed 20 times at random", "the twin's end")
def torture_one(lab: Lab, tally: Tally) -> None:
    torture(lab, tally, "DP1", 60 if lab.limit else 2000, lab.limit or KILLS)


@case("torture-dp2", FAMILY, "the same on two ranks, a random one is killed", "8; the twin's end")
def torture_two(lab: Lab, tally: Tally) -> None:
    torture(lab, tally, "DP2", 60 if lab.limit else 1000, lab.limit or KILLS)


def usage(process: Forked) -> tuple[int, int, int]:
    """(resident KiB, open descriptors, threads) of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    descriptors = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]), descriptors, int(status["Threads"])


@case(
    "soak", FAMILY, "10,000 steps with saves, probes and held-out losses", "memory ≤ +2 %, descriptors and threads ± 2"
)
def soak(lab: Lab, tally: Tally) -> None:
    steps = 400 if lab.limit else 10_000
    config = lab.config(
        "soak", train__steps=steps, checkpoint__every=250, checkpoint__keep=2, train__test_every=50, probe__every=250,
        probe__num_batches=2, train__test_batches=1,
    )  # fmt: skip
    job = lab.start(config)
    (rank,) = job.ranks
    found = []
    for part in (0.2, 0.95):  # the first fifth warms up: caches, the allocator's pools
        lab.wait_for(lambda part=part: rank.code is not None or _reached(config.run_dir, int(part * steps)), 1800)
        assert rank.code is None, rank.last_line()
        found.append(usage(rank))
    code = rank.wait(600)
    tally.injected += 1
    tally.code("soak", code, (0,), rank.errors)
    (memory, descriptors, threads), (memory_2, descriptors_2, threads_2) = found
    growth = memory_2 / memory - 1
    tally.notes.append(
        f"memory {growth:+.2%} of {memory / 1024:.0f} MiB, descriptors {descriptors} then {descriptors_2}, "
        f"threads {threads} then {threads_2}"
    )
    if growth > 0.02 or abs(descriptors_2 - descriptors) > 2 or abs(threads_2 - threads) > 2:
        tally.verdict("soak", "silent", tally.notes[-1])
    else:
        tally.verdict("soak", "recovered")
