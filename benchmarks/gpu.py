"""Checks this project on a GPU and measures its performance within seven minutes; each result is saved at once.

    PYTHONPATH=.:wheels python benchmarks/gpu.py --output gpu-results            # on the GPU machine, from the root
    python benchmarks/gpu.py --rehearse --output /tmp/rehearsal                  # every stage at tiny sizes on a CPU

`benchmarks/gpu_wheels.py` makes the folder `wheels` for a machine without a package index; a machine with the project
installed does not need it. Each stage is a process with its own time limit: an error, a crash or the limit ends only
that stage. Every row is on disk in OUTPUT/results.jsonl before the next measurement begins. Afterwards
`python benchmarks/gpu_report.py OUTPUT` compares the rows with benchmarks/goals.json.

Stages, in order of value: facts (card, bandwidth), correct (bit for bit), kernel (time over bytes / bandwidth), loop
(tokens/s of GPT-2 124M), run (pretrain, SIGTERM, resume, CPU and back, probe), peers (other optimizers), bert.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_stages.stage import ROWS, Stage, describe, end_with_parent, read_rows, work_folder

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent

# Seconds of each stage, start of its process included; together 410 of the 420. A larger budget scales them.
BUDGET_S = 420.0
CAPS = {"facts": 10, "correct": 60, "kernel": 50, "loop": 110, "run": 90, "peers": 50, "bert": 40}
# Factor on the limits in a rehearsal, which may run on a loaded machine because it measures nothing.
REHEARSAL_SLACK = 20
# Exit code of a stage's process that recorded its own error.
RECORDED = 3
# Seconds after its limit at which a stage's process is killed.
GRACE_S = 2.0
TABLE_WIDTH = 150
# Fields of a row that the printed table omits: they are equal in all rows, or part of the part's name.
HIDDEN = {"stage", "part", "time", "passed", "trace", "rehearsal", "card", "memory_gib", "driver", "python", "torch",
          "triton", "megatron_core", "commit", "error", "skipped", "size", "mode", "name", "kind"}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float,
        help="seconds for all stages; default 420; a larger budget gives each stage more time. "
        f"With --rehearse there is no limit, and the stages' limits are {REHEARSAL_SLACK} times longer",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder for results.jsonl, logs and temporary files")
    parser.add_argument("--only", nargs="+", choices=CAPS, metavar="STAGE", help=f"some of {', '.join(CAPS)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, kernels interpreted")
    parser.add_argument(
        "--text", type=Path, help="text file for the evaluation in stage `run`; without it that part is skipped"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="dataset folder for stage `run`; default wheels/gpu_data, else one made from Python's documentation",
    )
    parser.add_argument(
        "--commit", help="commit of this checkout; needed only without git's history and without wheels"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)  # JSON: this process is a stage
    args = parser.parse_args()
    for name in ("text", "data"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: does not exist")
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget {args.budget:g}: must be above 0 seconds")
    return args


def main() -> int:
    args = arguments()
    if args.child:
        code = run_stage(json.loads(args.child))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # all rows are on disk; torch's normal exit takes two seconds, as long as a part of a stage
    add_wheels()
    budget = args.budget or (float("inf") if args.rehearse else BUDGET_S)
    slack = REHEARSAL_SLACK if args.rehearse else max(1.0, budget / BUDGET_S)
    started = time.monotonic()
    facts = common_facts(args)
    if not args.rehearse and facts["card"] is None:
        sys.stderr.write("gpu.py: no NVIDIA driver on this machine; --rehearse runs every stage on a CPU\n")
        return 9
    chosen = [stage for stage in CAPS if not args.only or stage in args.only]
    from gpu_stages.preflight import problem_of  # imports torch, which --help does not need

    if problem := problem_of(args, facts, chosen):
        sys.stderr.write(f"gpu.py: {problem}\n")
        return 2
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.stderr.write(f"gpu.py: --output {args.output}: {error.strerror}; give a folder that can be created\n")
        return 5
    already = len(read_rows(args.output / ROWS))
    with data_for(args, needed="run" in chosen) as data, children_end_with_us() as processes:
        for name in chosen:
            cap, left = CAPS[name] * slack, budget - (time.monotonic() - started)
            if cap > left:
                record(args, facts, name, skipped=f"needs {cap:g} s, {left:.0f} s remain of the budget of {budget:g} s")
            else:
                start_stage(args, facts, name, cap, data, processes)
            sys.stdout.write(summary(read_rows(args.output / ROWS)[already:]))
            sys.stdout.flush()
    counts = Counter(outcome(row) for row in read_rows(args.output / ROWS)[already:])
    found = ", ".join(
        f"{counts[word]} {word}" for word in ("passed", "measured", "FAILED", "error", "skipped") if counts[word]
    )
    sys.stdout.write(f"\n{found}; {time.monotonic() - started:.0f} s; rows in {args.output / ROWS}\n")
    return 1 if counts["FAILED"] or counts["error"] else 0


def add_wheels() -> None:
    """Adds the folder of gpu_wheels.py to sys.path if it is in the checkout and megatron-core is not installed."""
    try:
        importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        if (ROOT / "wheels").is_dir():
            sys.path.append(str(ROOT / "wheels"))


def start_stage(
    args: argparse.Namespace, facts: dict[str, Any], name: str, cap: float, data: Path | None, processes: list[Any]
) -> None:
    """Runs a stage in a new process group and records how it ended."""
    child = {
        "name": name, "output": str(args.output.resolve()), "cap_s": cap, "rehearse": args.rehearse, "facts": facts,
        "data": data and str(data), "text": args.text and str(args.text.resolve()),
    }  # fmt: skip
    before = len(read_rows(args.output / ROWS))
    # Files of an earlier call would be mistaken for those of this one.
    shutil.rmtree(work_folder(args.output, name), ignore_errors=True)
    log, began = args.output / f"{name}.log", time.monotonic()
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--output",
        str(args.output),
        "--child",
        json.dumps(child),
    ]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment(args.rehearse, name), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=end_with_parent(),  # a killed driver must not leave a stage on the GPU
        )  # fmt: skip
        processes.append(process)
        try:
            code = process.wait(timeout=cap + GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_group(process)
            processes.remove(process)
    if code is None:
        record(args, facts, name, error=f"killed at its limit of {cap:g} s; earlier rows are kept")
    elif code and code != RECORDED:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        record(
            args, facts, name, error=f"the stage's process ended with {ended}; last line of its log: {last_line(log)}"
        )
    elif not code:
        record(args, facts, name, seconds=time.monotonic() - began, limit_s=cap)
        if all(outcome(row) not in ("FAILED", "error") for row in read_rows(args.output / ROWS)[before:]):
            # Checkpoints and tokens, which are useful only to examine a failure.
            shutil.rmtree(work_folder(args.output, name), ignore_errors=True)


def run_stage(child: dict[str, Any]) -> int:
    """Runs a stage in this process; returns the exit code."""
    paths = {key: child[key] and Path(child[key]) for key in ("data", "text")}
    stage = Stage(**{**child, **paths, "output": Path(child["output"])})
    try:
        importlib.import_module(f"gpu_stages.stage_{stage.name}").run(stage)
    except Exception as error:
        stage.row("stage", error=describe(error))
        traceback.print_exc()
        return RECORDED
    return 0


def environment(rehearse: bool, stage: str = "") -> dict[str, str]:
    """This process's environment with the checkout on the path; a rehearsal hides the GPU and interprets the kernels."""
    paths = [str(ROOT), str(BENCHMARKS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    paths += [path for path in (str(ROOT / "wheels"),) if path in sys.path]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))), "PYTHONUNBUFFERED": "1"}
    if stage in ("correct", "run"):
        # They train with train.deterministic and without it in one process; torch reads this variable only once.
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return found


def common_facts(args: argparse.Namespace) -> dict[str, Any]:
    """The facts that every row contains. This process does not initialise CUDA: only the stages' processes do."""
    from measuring import commit, processor, version_of

    facts: dict[str, Any] = {"card": None, "memory_gib": None, "driver": None}
    if args.rehearse:
        facts["card"] = processor()
    else:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            command.append(f"--id={visible.split(',')[0]}")
        with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError, IndexError):
            found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            name, memory, driver = found.stdout.strip().splitlines()[0].split(", ")
            facts = {"card": name, "memory_gib": round(float(memory) / 1024, 1), "driver": driver}
    versions = {package.replace("-", "_"): version_of(package) for package in ("torch", "triton", "megatron-core")}
    return {
        **facts,
        "python": platform.python_version(),
        **versions,
        "commit": args.commit or carried_commit() or commit(),
    }


def carried_commit() -> str | None:
    """Returns the commit that gpu_wheels.py recorded if git cannot name it, else None."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        return None
    from measuring import CARRIED, source_digest

    noted = (Path(folder) / CARRIED for folder in sys.path)
    words = next((path.read_text().split() for path in noted if path.is_file()), None)
    if not words:
        return None
    return words[0] if words[1:] == [source_digest()] else f"{words[0]}, with changed sources"


@contextlib.contextmanager
def data_for(args: argparse.Namespace, *, needed: bool) -> Iterator[Path | None]:
    """The dataset of stage `run`: given, carried, or made by a CPU process while the first stages use the GPU."""
    carried = next((path for folder in sys.path if (path := Path(folder) / "gpu_data").is_dir()), None)
    data = args.data or (None if args.rehearse else carried)
    if data is not None or not needed:
        yield data and data.resolve()
        return
    data = (args.output / "gpu_data").resolve()
    command = [sys.executable, str(BENCHMARKS / "gpu_data.py"), str(data), *(["--small"] if args.rehearse else [])]
    with open(args.output / "data.log", "wb") as log:
        maker = subprocess.Popen(
            command, env=environment(True), stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent()
        )
        try:
            yield data
        finally:
            maker.kill()
            maker.wait()


@contextlib.contextmanager
def children_end_with_us() -> Iterator[list[Any]]:
    """Kills the running stage if this process receives a stop signal."""
    processes: list[Any] = []

    def stop(number: int, frame: Any) -> None:
        for process in processes:
            kill_group(process)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a stage's process and its children, which are in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def record(args: argparse.Namespace, facts: dict[str, Any], name: str, **values: Any) -> None:
    Stage(name, args.output, 0.0, args.rehearse, facts).row("stage", **values)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def summary(rows: list[dict[str, Any]]) -> str:
    """One line per row: stage, part, outcome, figures."""
    lines = [f"\n{'stage':<8} {'part':<44} {'outcome':<8} figures"]
    for row in rows:
        head = f"{row['stage']:<8} {row['part']:<44} {outcome(row):<8} "
        if reason := row.get("error") or row.get("skipped"):
            lines.append(head + reason)
        else:
            figures = ", ".join(f"{key} {short(value)}" for key, value in row.items() if key not in HIDDEN)
            lines.append((head + figures)[:TABLE_WIDTH])
    return "\n".join(lines) + "\n"


def outcome(row: dict[str, Any]) -> str:
    """error, skipped, passed, FAILED, or measured if the row has figures and no check."""
    word = next((word for word in ("error", "skipped") if row.get(word)), None)
    return word or {True: "passed", False: "FAILED", None: "measured"}[row.get("passed")]


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
