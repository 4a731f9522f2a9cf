"""Meters a process from outside, and fits how costs grow with a size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""The figures of one size by column; the same columns in every row of a subject, the size first."""

# A process of its own, because ru_maxrss of a child begins with the size of the process that starts it.
METER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu_s": round(used.ru_utime + used.ru_stime, 2), "wall_s": round(wall, 2),
                  "peak_mb": round(used.ru_maxrss * 1024 / 1e6)}))
sys.exit(done.returncode)
"""
PARTS = Path(__file__).with_name("parts.py")


def metered(words: Sequence[str]) -> Row:
    """Runs a command to its end; returns its CPU seconds, wall seconds and peak memory in MB."""
    done = subprocess.run([sys.executable, "-c", METER, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}: {done.stderr[-2000:]}")
    row: Row = json.loads(done.stdout)
    return row


def metered_parts(part: str, folder: Path, *words: object, processes: int = 1) -> Row:
    """Runs a function of parts.py in its own processes; returns the seconds that it measured, and those of `metered`.

    Args:
        part: name of the function.
        folder: where it works; it writes its figures there.
        words: its arguments.
        processes: ranks that run it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    used = metered([sys.executable, *launch, str(PARTS), part, str(folder), *map(str, words)])
    return {**json.loads((folder / "figures.json").read_text()), **used}


def exponents(rows: Sequence[Row]) -> Row:
    """The exponents p of cost ~ size^p: by least squares over all rows, and between the two largest sizes.

    A cost that does not depend on the size makes the first one small; the second one shows what dominates at large sizes.
    """
    size = next(iter(rows[0]))
    found: Row = {"exponent over": size}
    for name in rows[0]:
        pairs = sorted((float(row[size]), float(row[name])) for row in rows if _is_positive(row[name]) and name != size)
        logs = [(math.log(one), math.log(cost)) for one, cost in pairs]
        if len({x for x, _ in logs}) < 2:
            continue
        (x1, y1), (x2, y2) = next(pair for pair in logs[::-1] if pair[0] < logs[-1][0]), logs[-1]
        centre_x, centre_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
        slope = sum((x - centre_x) * (y - centre_y) for x, y in logs) / sum((x - centre_x) ** 2 for x, _ in logs)
        found[name] = f"{slope:.2f} ({(y2 - y1) / (x2 - x1):.2f})"
    return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
