"""Measures how the cost of a subject grows with its size: CPU seconds and the peak memory of a process.

    python benchmarks/growth.py --output benchmarks/results/growth          # all subjects
    python benchmarks/growth.py --only compare --quick                      # the smallest sizes, for a test

Subjects:

- compare: `megatron-lion compare` with figures, over synthetic run folders with a metrics line for each step. Its sizes are the
  lines of each metrics.jsonl and the number of runs.
- parameters: the optimizer's section of a step (the least of three), a save, a verification and a restore on one process.
- documents: writing and opening token files, the index of their samples, and 200 samples.
- checkpoints: listing, opening and verifying those of one run, `pretrain` of the finished run, and `compare`.
- ranks: the start of a job, a step and a save on several processes with gloo.

Each row is a separate process that ends before the next begins. CPU seconds are user and system time of that process. The peak
is its largest resident size (ru_maxrss) in MB of 10^6 bytes. Parts of a process have names such as save_s (wall seconds) and
save_cpu_s; the parts of a job with several ranks are those of the first one. A row is printed, and appended to OUTPUT.md and
OUTPUT.jsonl, as soon as it is measured, so that a stopped benchmark keeps its rows. After the rows of a subject come the
exponents p of cost ~ size^p, by least squares and, in brackets, between the two largest sizes. Other processes of the machine
change CPU seconds less than wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from growth_subjects import subjects
from growth_subjects.costs import Row, exponents, metered
from measuring import heading, surroundings

from megatron_lion.compare.table import markdown_grid

LINES, RUNS = (1_000, 10_000, 50_000), (5, 20)
QUICK_LINES, QUICK_RUNS = (200, 400), (2,)
SETTINGS = (("lion", 1e-3, 4.2), ("adamw", 3e-3, 4.3), ("sgd", 0.3, 6.4))
"""Optimizer, learning rate and last loss of the synthetic runs, in turn."""


def write_run(folder: Path, lines: int, number: int) -> Path:
    """Writes a run folder as `pretrain` leaves it: a metrics line a step, 50 held-out losses and 10 probes with errors.

    Args:
        folder: the run folder, not existing yet.
        lines: lines of metrics.jsonl, at least 200.
        number: number of the run; it decides optimizer, seed and noise.
    """
    optimizer, lr, floor = SETTINGS[number % len(SETTINGS)]
    steps, seed = lines - 61, 1 + number // len(SETTINGS)
    noise = random.Random(number)
    folder.mkdir(parents=True)
    config = {
        "name": "synthetic", "seed": seed, "model": {"kind": "gpt2", "seq_length": 1024},
        "optimizer": {"name": optimizer, "lr": lr, "weight_decay": 0.01},
        "train": {"steps": steps, "global_batch_size": 16, "test_every": steps // 50},
    }  # fmt: skip
    facts = {"format": 1, "name": "synthetic", "model": "gpt2", "optimizer": optimizer, "num_parameters": 124_475_904}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "environment.json").write_text(json.dumps({"python": "3.12", "device": "cpu"}))
    with (folder / "metrics.jsonl").open("w") as stream:
        for line in _metrics(steps, lr, floor, noise):
            stream.write(json.dumps(line) + "\n")
    return folder


def _metrics(steps: int, lr: float, floor: float, noise: random.Random) -> Iterator[dict[str, Any]]:
    """The lines of a run: after each step, and 61 more for held-out losses and probes."""
    tests = {round(steps * part / 50) for part in range(51)}
    probes = {round(steps * part / 9) for part in range(10)}
    for step in range(steps + 1):
        loss = floor + (10.8 - floor) * math.exp(-6 * step / steps)
        head = {"step": step, "time": round(1.8e9 + step * 0.5, 3)}
        if step:
            yield head | {
                "train/loss": loss + noise.gauss(0, 0.05), "optim/lr": lr * (1 - step / steps / 2),
                "optim/grad_l2": abs(noise.gauss(1, 0.1)), "optim/skipped_steps": 0,
                "perf/tokens_per_s": 30_000 + noise.gauss(0, 300), "perf/mfu": None if step == 1 else 0.4 + noise.gauss(0, 0.01),
                "memory/max_gib": 1.5 + step * 1e-6, "progress/consumed_samples": step * 16,
                "progress/consumed_tokens": step * 16 * 1024,
            }  # fmt: skip
        if step in tests:
            yield head | {"valid/loss": loss + noise.gauss(0, 0.01), "test/loss": loss + noise.gauss(0, 0.01)}
        if step in probes:
            ratio = 11_157 * (0.62 + 0.1 * noise.random())
            yield head | {
                "probe/loss": loss, "probe/grad_l1": ratio * 2, "probe/grad_l2": 2.0, "probe/norm_ratio": ratio,
                "probe/norm_ratio_over_sqrt_d": ratio / 11_157, "probe/norm_ratio_standard_error": 40.0,
                "probe/norm_ratio_low": ratio * 0.9, "probe/norm_ratio_high": ratio * 1.1, "probe/noise_groups": 10,
                "probe/noise_share": 0.1, "probe/kkt_residual": ratio * 2, "probe/num_batches": 10,
                "probe/num_parameters": 124_475_904, "probe/is_moving": 0,
            }  # fmt: skip


def compare(folder: Path, quick: bool) -> Iterator[Row]:
    """`megatron-lion compare` over the lines of each metrics.jsonl and the number of runs."""
    for lines in QUICK_LINES if quick else LINES:
        counts = QUICK_RUNS if quick else RUNS
        runs = [write_run(folder / f"{lines}" / f"run{number}", lines, number) for number in range(max(counts))]
        for count in counts:
            words = [sys.executable, "-m", "megatron_lion", "compare", *map(str, runs[:count])]
            used = metered([*words, "--output", str(folder / f"report-{lines}-{count}")])
            megabytes = sum((run / "metrics.jsonl").stat().st_size for run in runs[:count]) / 1e6
            yield {"metrics_mb": round(megabytes, 1), "runs": count, "lines a run": lines, **used}


SUBJECTS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "compare": compare, "parameters": subjects.parameters, "documents": subjects.documents,
    "checkpoints": subjects.checkpoints, "ranks": subjects.ranks,
}  # fmt: skip
"""Functions from an empty folder and whether the sizes are the smallest ones to rows, one for each size."""


class Results:
    """Prints rows, and appends each to OUTPUT.md and OUTPUT.jsonl if an output is given."""

    def __init__(self, output: str | None, facts: dict[str, Any]) -> None:
        self.paths = (Path(f"{output}.md"), Path(f"{output}.jsonl")) if output else ()
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        self._add(f"# How costs grow\n\n{heading(facts)}\n", facts)

    def subject(self, name: str, rows: Iterator[Row]) -> None:
        """Writes the table of a subject while its rows are measured."""
        done: list[Row] = []
        for number, row in enumerate(rows):
            done.append(row)
            grid = markdown_grid(list(row), [list(map(str, row.values()))], "r" * len(row))
            text = f"\n## {name}\n\n{grid}\n" if number == 0 else f"{grid.splitlines()[-1]}\n"
            self._add(text, {"subject": name, **row})
        fitted = exponents(done)
        listed = ", ".join(f"{key} {value}" for key, value in list(fitted.items())[1:])
        self._add(f"\nExponents over {fitted['exponent over']}: {listed}\n", {"subject": name, **fitted})

    def _add(self, text: str, entry: dict[str, Any]) -> None:
        print(text, end="", flush=True)
        for path, content in zip(self.paths, (text, json.dumps(entry) + "\n"), strict=False):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(content)


def main() -> None:
    """Measures the subjects and writes their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="subjects to measure; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: seconds instead of minutes")
    parser.add_argument(
        "--output", metavar="PREFIX", help="write PREFIX.md and PREFIX.jsonl; default: print the tables only"
    )
    args = parser.parse_args()
    results = Results(args.output, surroundings("cpu"))
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            results.subject(name, SUBJECTS[name](Path(folder), args.quick))


if __name__ == "__main__":
    main()
