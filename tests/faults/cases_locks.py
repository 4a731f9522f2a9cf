"""Two writers of one run folder, and a writer that was killed: the second ends with 7, the next start is not refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from faults.lab import Lab
from faults.rows import Tally, case
from faults.warm import Stuck

FAMILY = "locks"
RUN: dict[str, Any] = {"train__steps": 60, "checkpoint__every": 10}


@case("lock-two-writers", FAMILY, "the same command, and --fresh, beside a writer", "7; the writer ends as its twin")
def two_writers(lab: Lab, tally: Tally) -> None:
    for what, words in lab.some([("the same command", ()), ("--fresh", ("--fresh",))]):
        config = lab.config("busy", **RUN)
        # The writer waits before its fourth step for as long as the second one needs.
        marker = Path(f"{config.run_dir}.marker")
        writer = lab.start(config, hooks={0: ("step", 4, "stop", str(marker))})
        lab.wait_for(lambda marker=marker, writer=writer: marker.exists() or writer.ranks[0].code is not None)
        tally.injected += 1
        try:
            (second,) = lab.run(config, words=words).ranks
        except Stuck as error:
            writer.kill()
            tally.verdict(what, "stuck", str(error))
            continue
        assert second.code is not None
        tally.code(what, second.code, (7,), second.errors)
        writer.ranks[0].signal(signal.SIGCONT)
        (code,) = writer.wait()
        if code:
            tally.wrong.append(f"{what}: the writer ended with {code}: {writer.errors[-200:]}")
        lab.judge(tally, what, config)


@case(
    "lock-killed-writer",
    FAMILY,
    "kill -9 of a writer, with 0 and 2 loader workers, and a foreign pid in the lock",
    "the next start",
)
def killed_writer(lab: Lab, tally: Tally) -> None:
    for workers in lab.some((0, 2)):
        config = lab.config("killed", **RUN, data__num_workers=workers)
        what = f"{workers} workers"
        job = lab.start(config)
        lab.until_lines(job, config.run_dir, 5)
        job.ranks[0].signal(signal.SIGKILL)  # the workers live on for a while
        job.wait()
        tally.injected += 1
        tally.codes["-9"] += 1
        lab.judge(tally, what, config)
    config = lab.config("foreign", **RUN)
    Path(config.run_dir).mkdir()
    Path(config.run_dir, "lock").write_text("pid 1 on elsewhere\n")
    tally.injected += 1
    lab.judge(tally, "a foreign pid", config)
