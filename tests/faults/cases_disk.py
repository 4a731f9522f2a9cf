"""Faults at every file call of a run: at its start, in a save, while old checkpoints are removed, in its logs."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence
from typing import Any

from faults.lab import Lab, changed
from faults.rows import Tally, case
from faults.shim import Call, Fault, read_log
from faults.warm import Stuck
from megatron_lion.config import RunConfig

LIFE: dict[str, Any] = {
    "train__steps": 4, "checkpoint__every": 2, "checkpoint__keep": 1, "train__test_every": 2, "train__test_batches": 1,
    "probe__every": 2, "probe__num_batches": 1,
}  # fmt: skip
"""A run with everything that writes: two saves, probes, held-out losses."""
SHORT_LIFE: dict[str, Any] = {**LIFE, "train__steps": 2}
"""The same with one save: for the start, all of which is before it."""
LONGER_LIFE: dict[str, Any] = {**LIFE, "train__steps": 6}
"""The same with a third save, at which the first one is removed."""


def phase_of(call: Call, calls: list[Call]) -> str:
    """The phase that a call of such a run belongs to: start, save, retention or logs."""
    first_save = next(other.number for other in calls if other.op == "mkdir" and ".tmp-" in other.path)
    if ".tmp-removed" in call.path or (call.op in ("unlink", "rmdir") and "/checkpoints/" in call.path):
        return "retention"
    if "/checkpoints/" in call.path:
        return "save"
    begun = next(
        (other.number for other in calls if other.path.endswith("/metrics.jsonl") and other.op == "write"), first_save
    )
    return "start" if call.number < begun else "logs"


def distinct(calls: Sequence[Call]) -> list[Call]:
    """The calls, with the first, middle and last of consecutive writes to one file: a checkpoint's file takes a hundred."""
    kept: list[Call] = []
    row: list[Call] = []
    for call in [*calls, None]:
        if call is not None and row and call.op == row[-1].op == "write" and call.path == row[-1].path:
            row.append(call)
            continue
        kept += [one for number, one in enumerate(row) if number in (0, len(row) // 2, len(row) - 1)]
        row = [call] if call is not None else []
    return kept


def one_of_each(calls: Sequence[Call]) -> list[Call]:
    """One call of each operation on each kind of file; numbers in a name, such as a step's, do not count."""
    kinds = {(call.op, re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", call.path.rsplit("/", 1)[-1])): call for call in calls}
    return list(kinds.values())


def drive(
    lab: Lab, tally: Tally, make: Any, calls: Sequence[Call], kind: str, number: int = 0, *,
    layout: str = "DP1", rank: int = 0, wanted: tuple[int, ...] = (5,), judged: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Injects a fault of one kind into each call, in a separate run, and judges the same command without the fault.

    Args:
        lab: the laboratory.
        tally: receives the counts.
        make: returns the settings of a run in its own folder, at the state before the command.
        calls: the calls to hit.
        kind, number: of the fault.
        layout: the run's layout.
        rank: rank whose calls are hit.
        wanted: exit codes of ranks that were not killed.
        judged: changes of the settings for the run that judges.
    """
    for call in lab.some([call for call in distinct(calls) if call.takes(kind, number)]):
        config: RunConfig = make()
        what = f"{kind}{f' {errno.errorcode[number]}' if number else ''} at call {call.number} ({call.op} {_short(call, config)})"
        log = f"{config.run_dir}.log"
        faults = {rank: Fault(config.run_dir, kind, call.number, number, log=log)}
        try:
            job = lab.run(config, layout, faults=faults)
        except Stuck as error:
            tally.injected += 1
            tally.verdict(what, "stuck", str(error))
            continue
        if not read_log(log)[1]:
            continue  # this run made fewer calls than the counted one
        tally.injected += 1
        for other in job.ranks:
            assert other.code is not None
            if other.code == -signal.SIGKILL and other is job.ranks[rank]:
                tally.codes["-9"] += 1
                survivors = [one.ended - other.ended for one in job.ranks if one is not other]
                tally.detect_s = max([tally.detect_s, *survivors])
            else:
                killed = kind in ("kill", "after", "half")
                tally.code(what, other.code, (8,) if killed else wanted, other.errors)
        lab.judge(tally, what, changed(config, judged or {}), layout)


def _short(call: Call, config: RunConfig) -> str:
    return call.path.replace(config.run_dir, "").rsplit("/", 1)[-1][:60]


def life(lab: Lab, tally: Tally, phase: str, kind: str, number: int = 0, wanted: tuple[int, ...] = (5,)) -> None:
    """Drives one phase of a new run with a fault of one kind."""
    run = {"start": SHORT_LIFE, "retention": LONGER_LIFE}.get(phase, LIFE)
    first = lab.config("counted", **run)
    calls = lab.calls(first)
    lab.clean(first)
    chosen = [call for call in calls if phase_of(call, calls) == phase]
    if number in ONE_OF_EACH:
        chosen = one_of_each([call for call in chosen if call.takes(kind, number)])
    drive(lab, tally, lambda: lab.config(phase, **run), chosen, kind, number, wanted=wanted)


@case(
    "resave-kill", "saves", "a save that an earlier kill interrupted: kill -9 again at every call", "same state again"
)
def resave_kill(lab: Lab, tally: Tally) -> None:
    save_again(lab, tally, "kill", 0)


@case("resave-enospc", "saves", "a save that an earlier kill interrupted: ENOSPC from every call on", "5 or 0")
def resave_enospc(lab: Lab, tally: Tally) -> None:
    save_again(lab, tally, "always", errno.ENOSPC)


def save_again(lab: Lab, tally: Tally, kind: str, number: int) -> None:
    """Drives the save of step 4 in a run that was killed just before that step's folder was renamed."""
    half = lab.config("half", **LIFE)
    first = lab.config("counted", **LIFE)
    renames = [call for call in lab.calls(first) if call.op == "rename" and call.path.endswith("/step_0000004")]
    lab.run(half, faults={0: Fault(half.run_dir, "kill", renames[0].number)})
    copy = lab.copy(half)
    calls = [call for call in lab.calls(copy) if "/step_0000004" in call.path]
    drive(lab, tally, lambda: lab.copy(half), calls, kind, number, wanted=IGNORED)


IGNORED = (5, 0)
"""A refused folder fsync, or a leftover that cannot be removed, does not end a run: the files themselves are whole."""
ONE_OF_EACH = (errno.EROFS, errno.EDQUOT)
"""Errors that the product reports by the same lines as ENOSPC and EIO, which are injected into every call."""
KINDS: dict[str, tuple[str, int, tuple[int, ...], str]] = {
    "kill": ("kill", 0, (), "kill -9 before the call"),
    "half": ("half", 0, (), "kill -9 after half of the write"),
    "enospc": ("always", errno.ENOSPC, IGNORED, "ENOSPC from the call on"),
    "eio": ("once", errno.EIO, IGNORED, "EIO once"),
    "erofs": ("always", errno.EROFS, IGNORED, "EROFS from the call on"),
    "edquot": ("once", errno.EDQUOT, IGNORED, "EDQUOT once"),
    "short": ("short", 0, (0, 5), "half of the write is taken"),
}
PHASES = {
    "start": ("starts", "the start of a new run"),
    "save": ("saves", "a save"),
    "retention": ("retention", "removing old checkpoints"),
    "logs": ("logs", "logs and results"),
}
"""Family and description of each phase of a run."""


def _register() -> None:
    for phase, (family, where) in PHASES.items():
        for name, (kind, number, wanted, text) in KINDS.items():

            def work(lab: Lab, tally: Tally, phase: str = phase, plan: Any = (kind, number, wanted)) -> None:
                life(lab, tally, phase, plan[0], plan[1], plan[2])

            codes = "same state again" if not wanted else " or ".join(map(str, sorted(wanted, reverse=True)))
            which = "one call of each operation on each kind of file" if number in ONE_OF_EACH else "every call"
            if not (name in ("half", "short") and phase == "retention"):  # it writes nothing
                case(f"{phase}-{name}", family, f"{where}: {text}, {which}", codes)(work)


_register()
