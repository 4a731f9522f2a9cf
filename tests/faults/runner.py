"""Runs fault cases: `python -m faults` lists them, `python -m faults NAME …` runs some, `python -m faults --all` all.

make chaos [CASE=name] and make test-full [FAMILY=name] are these commands. Options: --family NAME (all cases of a
family), --results FILE (default fault-results/results.jsonl), --force (also cases that have a row of this commit),
--jobs N, --docs (write the page at the end).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import page, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=rows.REPO / "fault-results" / "results.jsonl")
    parser.add_argument("--docs", action="store_true", help="write docs/scorecard.md and its result file at the end")
    options = parser.parse_args()
    cases = rows.all_cases()
    families = set(options.family) or {one.family for one in cases.values() if options.all}
    if not options.names and not families:
        for case in cases.values():
            print(f"{case.name:28} {case.family}: {case.fault}")
        return 0
    unknown = [name for name in options.names if name not in cases]
    unknown += sorted(families - {one.family for one in cases.values()})
    if unknown:
        print(f"no case or family {unknown[0]}; python -m faults lists them", file=sys.stderr)
        return 2
    whole = [name for name, one in cases.items() if one.family in families]
    chosen = options.names or whole
    commit, found = rows.commit(), rows.read(options.results)
    if families and not options.force and "+changes" not in commit:
        chosen = [name for name in chosen if found.get(name, {}).get("commit") != commit]
    started = time.monotonic()
    try:
        done = _run(chosen, min(options.jobs, len(chosen)), options.results)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues with the cases that have no row", file=sys.stderr)
        return 130
    minutes = (time.monotonic() - started) / 60
    if families:  # with the rows of an earlier run that this one continued
        done = {**{name: found[name] for name in whole if name in found}, **done}
    print(f"\n{page.text_table(list(done.values()))}\n")
    for row in done.values():
        for line in row["failures"]:
            print(f"{row['case']}: {line}")
    print(f"{len(chosen)} cases in {minutes:.1f} minutes; rows: {options.results}")
    if options.docs:
        page.publish(options.results, cases.values(), families)
    return int(any(not row["passed"] for row in done.values()))


def _run(names: list[str], jobs: int, results: Path) -> dict[str, dict[str, Any]]:
    """Runs cases in several processes, each with its own server; returns the rows by name."""
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    finished: Any = context.Queue()
    for name in names:
        waiting.put(name)
    for _ in range(jobs):
        waiting.put(None)
    workers = [context.Process(target=_worker, args=(waiting, finished)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        return _collect(names, workers, finished, results)
    except BaseException:  # otherwise the interpreter would wait for the workers, which have hours of cases left
        for worker in workers:
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, signal.SIGINT)  # they remove their folders
        for worker in workers:
            worker.join(30)
            worker.kill()
        raise


def _collect(names: list[str], workers: list[Any], finished: Any, results: Path) -> dict[str, dict[str, Any]]:
    """Writes and prints each row as it comes; returns all by name."""
    done: dict[str, dict[str, Any]] = {}
    while len(done) < len(names):
        try:
            row = finished.get(timeout=5)
        except Exception:
            if not any(worker.is_alive() for worker in workers):
                raise SystemExit("the processes that run the cases ended early") from None
            continue
        done[row["case"]] = row
        rows.append(results, row)
        state = "ok" if row["passed"] else "FAILED"
        print(
            f"{state:7}{row['case']:28}{row['seconds']:7.1f} s  {row['injected']} injected, {row['recovered']} recovered, "
            f"{row['silent']} silent, {row['stuck']} stuck, {row['wrong']} wrong",
            flush=True,
        )
    for worker in workers:
        worker.join()
    return {name: done[name] for name in names if name in done}


def _worker(waiting: Any, finished: Any) -> None:
    from faults.lab import Lab
    from faults.warm import warm
    from megatron_lion.signals import signal_when_parent_ends

    signal_when_parent_ends(signal.SIGKILL)  # the server ends with this process, and kills what it forked
    cases = rows.all_cases()
    folder = Path(tempfile.mkdtemp(prefix="megatron-lion-faults-"))
    try:  # the process that started this one reports an interruption
        with contextlib.suppress(KeyboardInterrupt), warm(folder / "output") as server:
            while (name := waiting.get()) is not None:
                finished.put(rows.run_case(cases[name], Lab(folder / name, server)))
                if os.environ.get("KEEP") != "1":
                    shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)
