"""Simulates how often the interval of `scaling` contains the exponent of r, and which verdicts it gives.

Families of models with log r = a + b log d + scatter of the size + scatter of each seed, and bounds on r without noise
of a given width, inside of which r lies at random or at a place that drifts with d. About a minute on one core:

    python benchmarks/exponent_intervals.py --draws 4000 --output benchmarks/results/exponent_intervals
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

import numpy as np

from megatron_lion.compare.table import markdown_grid
from megatron_lion.scaling.exponent import SizeMean, exponent_between_bounds

SIZES = (120_512, 205_056, 339_328, 656_448, 1_071_872, 2_197_632, 3_716_608)
"""d of the default family."""
OF_SIZE, OF_SEED, OF_BOUND, SEEDS = 0.06, 0.05, 0.02, 2
"""Standard deviations in log r of the sizes about the line, of the seeds of a size, and of a bound; number of seeds."""
EXPONENTS = (0.5, 0.4, 0.3, 0.0)
CASES = (("exact", 0.0, "random"), ("at random", 0.1, "random"), ("at random", 0.3, "random"),
         ("from upper to lower", 0.3, "down"), ("from lower to upper", 0.3, "up"))  # fmt: skip
"""Place of r between its bounds, log of the ratio of the bounds, and how the place is drawn."""
VERDICTS = ("holds", "does not hold here", "not resolved")


def family(rng: np.random.Generator, b: float, width: float, drift: str, sizes: tuple[int, ...]) -> list[SizeMean]:
    """One measured family.

    Args:
        b: true exponent.
        width: log of the ratio of the upper bound to the lower one.
        drift: "random"; "up" or "down": at the lower or upper bound for the smallest d, at the other for the largest.
        sizes: d of the models, ascending.
    """
    found = []
    for number, d in enumerate(sizes):
        along = number / (len(sizes) - 1)
        place = {"random": rng.uniform(), "up": along, "down": 1 - along}[drift]
        clean = math.log(0.3) + b * math.log(d) + OF_SIZE * rng.normal() + OF_SEED * rng.normal(size=SEEDS)
        low = clean - place * width + OF_BOUND * rng.normal(size=SEEDS)
        high = clean + (1 - place) * width + OF_BOUND * rng.normal(size=SEEDS)
        found.append(SizeMean(d=d, measured=float(high.mean()), low=float(low.mean()), high=float(high.mean())))
    return found


def shares(rng: np.random.Generator, b: float, width: float, drift: str, count: int, draws: int) -> dict[str, float]:
    """Coverage, median length of the interval, and share of each verdict."""
    places = np.linspace(0, len(SIZES) - 1, count).round().astype(int)
    inside, lengths, verdicts = 0, [], Counter[str]()
    for _ in range(draws):
        found = exponent_between_bounds(family(rng, b, width, drift, tuple(SIZES[place] for place in places)))
        if found.low is None or found.high is None:
            raise ValueError(f"{found}: expected an interval with ends")
        inside += found.low <= b <= found.high
        lengths.append(found.high - found.low)
        verdicts[found.verdict] += 1
    return {
        "coverage": inside / draws,
        "length": float(np.median(lengths)),
        **{verdict: verdicts[verdict] / draws for verdict in VERDICTS},
    }


def simulate(draws: int) -> list[dict[str, Any]]:
    """One entry for each case, number of sizes and exponent."""
    rng = np.random.default_rng(2026)
    return [
        {"place": place, "width": width, "sizes": count, "b": b, **shares(rng, b, width, drift, count, draws)}
        for place, width, drift in CASES
        for count in (7, 4)
        for b in EXPONENTS
    ]


def page(found: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows = [
        [row["place"], f"{row['width']:g}", str(row["sizes"]), f"{row['b']:g}", f"{100 * row['coverage']:.1f}",
         f"{row['length']:.2f}", *(f"{100 * row[verdict]:.1f}" for verdict in VERDICTS)]
        for row in found
    ]  # fmt: skip
    heads = ["r between its bounds", "ln(high/low)", "sizes", "b", "coverage", "median length", *VERDICTS]
    return markdown_grid(heads, rows, "lrrrrrrrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000, help="simulated families for each row")
    parser.add_argument("--output", default="", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    from importlib.metadata import version

    from measuring import heading, surroundings, write_results  # imports torch, which the simulation does not need

    facts = surroundings("cpu")
    facts["versions"] = {name: version(name) for name in ("numpy", "scipy")}
    found = simulate(args.draws)
    error = 100 * math.sqrt(0.95 * 0.05 / args.draws)
    text = (
        f"{heading(facts)}.\n\n`python benchmarks/exponent_intervals.py --draws {args.draws}`, seed 2026. {SEEDS} seeds; standard "
        f"deviations in ln r: {OF_SIZE:g} of the sizes about the line, {OF_SEED:g} of the seeds, {OF_BOUND:g} of a bound. Coverage of "
        f"the 95 % interval and verdicts on b = ½ in %; a coverage near 95 % has a standard error of {error:.2f} points.\n\n"
        f"{page(found)}\n"
    )
    print(text)
    write_results(args.output, "The exponent of the norm ratio: coverage and verdicts", text, {**facts, "rows": found})


if __name__ == "__main__":
    main()
