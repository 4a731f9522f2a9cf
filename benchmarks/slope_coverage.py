"""Measures how often the interval of a run's slope over log K holds, beside a block bootstrap of the same residuals.

    python benchmarks/slope_coverage.py [--runs 1000] [--output benchmarks/results/slope_coverage]

Synthetic runs have a known expected norm at each probe, times exp(0.2 e), where e is autoregressive: its correlation from
one probe to the next is ρ. Runs of the toy problem share one start and have other noise; the truth is the slope of their
mean. Groups of three runs test Student's interval over runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from measuring import heading, surroundings, write_results
from numpy.typing import NDArray

from megatron_lion.compare.table import markdown_grid
from megatron_lion.theory.slopes import slope_interval, slope_over_runs
from megatron_lion.toy.problem import gradient, simulate_lion

Floats = NDArray[np.float64]
SPREAD = 0.2
SHAPES = {
    "K^(−1/4)": lambda part: part**-0.25,
    "plateau": lambda part: 0.3 + np.exp(-12 * part),
    "about 1/K": lambda part: (1 + 40 * part) ** -1.2 + 0.002,
}
"""The expected norm as a function of K over the last K."""


@dataclass(frozen=True)
class Case:
    """Runs with a known expectation: probe steps (probes,), norms (runs, probes), and the expected norms (probes,)."""

    name: str
    steps: Floats
    values: Floats
    expected: Floats


def synthetic(shape: str, probes: int, correlation: float, runs: int, seed: int) -> Case:
    """Runs of 5,000 steps with probes at equal distances, the first at step 0."""
    rng = np.random.default_rng(seed)
    steps = np.round(np.linspace(0, 5_000, probes))
    errors = rng.standard_normal((runs, probes))
    for probe in range(1, probes):
        errors[:, probe] = correlation * errors[:, probe - 1] + math.sqrt(1 - correlation**2) * errors[:, probe]
    expected = SHAPES[shape]((steps + 1) / (steps[-1] + 1))
    return Case(f"{shape}, {probes} probes, ρ = {correlation:g}", steps, expected * np.exp(SPREAD * errors), expected)


def toy(runs: int, every: int, seed: int) -> Case:
    """Runs of the toy from θ¹ = (10, 5) with η = 0.01, λ = 0.1, β = (0.9, 0.99): R at every `every`-th of 2000 steps."""
    rng = np.random.default_rng(seed)
    theta = np.tile([10.0, 5.0], (runs, 1))
    path = simulate_lion(theta, rng.standard_normal((2000, runs, 2)), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)[
        ::every
    ]
    grad = gradient(path)
    values = (0.1 * (grad * path).sum(axis=-1) + np.abs(grad).sum(axis=-1)).T
    return Case(f"toy, {values.shape[1]} probes", np.arange(0.0, 2001, every), values, values.mean(axis=0))


def bootstrap(case: Case, row: Floats, rng: np.random.Generator, draws: int = 200) -> tuple[float, float]:
    """95 % interval from blocks of residuals of log(values) around a quadratic in log K."""
    log_K, logs, count = np.log(case.steps + 1), np.log(row), len(row)
    trend = np.vander((log_K - log_K.mean()) / log_K.std(), 3)
    fitted = trend @ np.linalg.lstsq(trend, logs, rcond=None)[0]
    rest = (logs - fitted) * math.sqrt(count / (count - 3))
    length = max(1, round(count ** (1 / 3)))
    center = slope_interval(case.steps, np.exp(fitted)).estimate
    found = []
    for _ in range(draws):
        starts = rng.integers(0, count, math.ceil(count / length))
        index = np.concatenate([(start + np.arange(length)) % count for start in starts])[:count]
        found.append(slope_interval(case.steps, np.exp(fitted + rest[index])).estimate - center)
    low, high = np.quantile(found, [0.025, 0.975])
    slope = slope_interval(case.steps, row).estimate
    return slope - float(high), slope - float(low)


def measure(case: Case, bootstrapped: int, seed: int) -> dict[str, Any]:
    """Shares of the runs whose interval holds the slope of the expected norms."""
    truth = slope_interval(case.steps, case.expected).estimate
    found = [slope_interval(case.steps, row) for row in case.values]
    ends = [
        (interval.low, interval.high) for interval in found if interval.low is not None and interval.high is not None
    ]
    rng = np.random.default_rng(seed)
    blocks = [bootstrap(case, row, rng) for row in case.values[:bootstrapped]]
    plain_truth = slope_interval(case.steps, case.expected, of_mean=False).estimate
    plain = [slope_interval(case.steps, row, of_mean=False) for row in case.values]
    groups = [
        slope_over_runs([(case.steps, row) for row in case.values[first : first + 3]])
        for first in range(0, len(case.values) - 2, 3)
    ]
    return {
        "case": case.name, "slope": round(truth, 4), "runs": len(ends),
        "deviation": round(float(np.std([interval.estimate for interval in found])), 4),
        "holds": round(float(np.mean([low <= truth <= high for low, high in ends])), 4),
        "half_width": round(float(np.median([(high - low) / 2 for low, high in ends])), 4),
        "norm_slope": round(plain_truth, 4),
        "norm_holds": round(float(np.mean([i.low is not None and i.high is not None and i.low <= plain_truth <= i.high
                                           for i in plain])), 4),
        "bootstrap_runs": len(blocks),
        "bootstrap_holds": round(float(np.mean([low <= truth <= high for low, high in blocks])), 4),
        "seeds_hold": round(float(np.mean([g.low is not None and g.high is not None and g.low <= truth <= g.high
                                           for g in groups])), 4),
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    columns = ["runs", "true slope", "sd of the slope", "95 % interval of one run holds", "median half width",
               "block bootstrap holds", "t interval of 3 runs holds",
               "true slope of the norm itself", "its interval holds"]  # fmt: skip
    cells = [
        [row["case"], f"{row['slope']:.3f}", f"{row['deviation']:.3f}", f"{row['holds']:.1%}", f"{row['half_width']:.3f}",
         f"{row['bootstrap_holds']:.1%}", f"{row['seeds_hold']:.1%}", f"{row['norm_slope']:.3f}",
         f"{row['norm_holds']:.1%}"]
        for row in rows
    ]  # fmt: skip
    return markdown_grid(columns, cells) + "\n"


def main() -> None:
    """Measures all cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs of each case")
    parser.add_argument("--bootstrapped", type=int, default=100, help="runs of each case that are bootstrapped")
    parser.add_argument("--output", help="writes OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    facts = surroundings("cpu")
    cases = [
        synthetic(shape, probes, correlation, args.runs, 100 * index + probes)
        for index, shape in enumerate(SHAPES)
        for probes in (9, 20, 51)
        for correlation in (0.0, 0.5, 0.8)
    ]
    cases += [toy(args.runs, every, every) for every in (200, 50)]
    rows = [measure(case, args.bootstrapped, seed) for seed, case in enumerate(cases)]
    command = f"`python benchmarks/slope_coverage.py --runs {args.runs} --bootstrapped {args.bootstrapped}`"
    about = (
        f"The slope is that of the log running mean over log K, from a tenth of the last K on. {args.runs} runs of each "
        f"line, of which {args.bootstrapped} were bootstrapped with 200 draws; blocks have the cube root of the number of probes."
    )
    text = f"{command}. {heading(facts)}.\n\n{about}\n\n{report(rows)}"
    sys.stdout.write(text)
    write_results(args.output, "Coverage of the interval of a slope over log K", text, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
