"""Power cuts: what was not synced is lost. At every call of a run, and in random histories of kills, cuts and stops."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from faults.cases_disk import LIFE, LONGER_LIFE, distinct
from faults.lab import Job, Lab, committed
from faults.power import cut, snapshot
from faults.rows import Tally, case
from faults.shim import Call, Fault, read_log
from faults.warm import Stuck
from megatron_lion.config import RunConfig

FAMILY = "power cuts"


def durable_step(calls: list[Call]) -> int:
    """The newest step whose commit is on the disk: its folder was renamed, and then the parent folder was synced."""
    renamed, durable = 0, 0
    for call in calls:
        match = re.search(r"/checkpoints/step_(\d{7})$", call.path)
        if call.op == "rename" and match:
            renamed = int(match[1])
        if call.op == "fsync" and call.path.endswith("/checkpoints"):
            durable = renamed
    return durable


def disturbed(lab: Lab, config: RunConfig, at: int, ending: str) -> tuple[Job, int, bool]:
    """Runs until call `at`; then a kill, a power cut of a model, or a signal.

    Returns:
        The job, the step that must have survived, and whether the fault took place.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(exist_ok=True)
    shadow, log = Path(f"{run_dir}.shadow"), Path(f"{run_dir}.log")
    log.unlink(missing_ok=True)
    shadow.mkdir()
    before = snapshot(run_dir)
    kind, number = ("signal", int(signal.SIGTERM)) if ending == "stop" else ("kill", 0)
    fault = Fault(str(run_dir), kind, at, number, log=str(log), shadow=str(shadow))
    job = lab.run(config, faults={0: fault})
    calls, injected = read_log(log)
    if ending in ("strict", "names"):
        cut(run_dir, before, shadow, ending)
    else:
        for path in shadow.iterdir():
            path.unlink()
        shadow.rmdir()
    return job, durable_step(calls[:-1] if injected else calls), injected


def every_call(lab: Lab, tally: Tally, model: str) -> None:
    """Cuts the power before each call of a run."""
    first = lab.config("counted", **LONGER_LIFE)
    Path(first.run_dir).mkdir()
    calls = lab.calls(first)
    for call in lab.some(distinct(calls)):
        config = lab.config("cut", **LONGER_LIFE)
        what = f"power cut ({model}) before call {call.number} ({call.op} {Path(call.path).name})"
        try:
            _, step, injected = disturbed(lab, config, call.number, model)
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            continue
        if not injected:
            continue
        tally.injected += 1
        if max(committed(config.run_dir), default=0) < step:
            tally.wrong.append(f"{what}: the checkpoint of step {step} was committed and is lost")
        lab.judge(tally, what, config)


@case("power-strict", FAMILY, "power cut at every call; only what was synced is left", "same state again")
def strict(lab: Lab, tally: Tally) -> None:
    every_call(lab, tally, "strict")


@case(
    "power-names",
    FAMILY,
    "power cut at every call; names are left, files that were not synced are empty",
    "same state again",
)
def names(lab: Lab, tally: Tally) -> None:
    every_call(lab, tally, "names")


def histories(lab: Lab, tally: Tally, examples: int, length: int) -> None:
    """Random histories of one run: it is killed, cut or stopped at a random call, again and again, then ends."""
    run = {**LIFE, "train__steps": 8}
    lab.twin(lab.config("twin", **run))

    class History(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.config = lab.config("history", **run)
            self.events: list[str] = []
            self.survived = 0
            self.injected = 0

        @rule(at=st.integers(1, 500), ending=st.sampled_from(["kill", "strict", "names", "stop"]))
        def disturb(self, at: int, ending: str) -> None:
            self.events.append(f"{ending} at {at}")
            try:
                job, step, injected = disturbed(lab, self.config, at, ending)
            except Stuck as error:
                tally.verdict(", ".join(self.events), "stuck", str(error))
                return
            tally.injected += injected
            self.injected += injected
            (rank,) = job.ranks
            assert rank.code is not None
            if rank.code == -signal.SIGKILL:
                tally.codes["-9"] += 1
            else:
                wanted = (75, 0) if ending == "stop" else (0,)
                tally.code(", ".join(self.events), rank.code, wanted, rank.errors)
            self.survived = max(self.survived, step)
            if max(committed(self.config.run_dir), default=0) < self.survived:
                tally.wrong.append(f"{', '.join(self.events)}: step {self.survived} was committed and is lost")

        def teardown(self) -> None:
            if lab.judge(tally, ", ".join(self.events) or "nothing", self.config) == "recovered":
                tally.recovered += self.injected - 1  # the end is the proof of every event

    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=examples, stateful_step_count=length, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@case("power-histories", FAMILY, "random histories of kills, power cuts and stops of one run", "same state again")
def random_histories(lab: Lab, tally: Tally) -> None:
    histories(lab, tally, examples=lab.limit or 40, length=4 if lab.limit else 6)
