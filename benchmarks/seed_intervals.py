"""Simulates how often the intervals over seeds contain the true value, and how often gaps are called real.

Every number comes from the functions that `compare` and `theory` use: the mean of a setting, the gap between two
settings, the sentences on several settings, the constant of the K^(−1/4) rate, and the steps to a target loss. Seeds are
drawn from distributions whose mean is known. About a minute on one core, six with the draws of the stored results:

    python benchmarks/seed_intervals.py --draws 20000 --output benchmarks/results/seed_intervals
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lion.compare.budgets import crossing, geometric_mean
from megatron_lion.compare.seeds import corrected_gap, verdicts
from megatron_lion.compare.table import markdown_grid
from megatron_lion.intervals import Interval, mean_interval
from megatron_lion.theory.rates import rate_constant, rates_over_seeds

type Array = NDArray[np.float64]
type Draw = Callable[[np.random.Generator, int], Array]

COUNTS = (2, 3, 4, 5, 8, 10)
SIDES = (*((n, n) for n in COUNTS), (2, 5), (3, 10), (2, 10), (4, 8))
# Distributions with mean 0 and standard deviation 1.
SEEDS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "log-normal (skewness 1.75)": lambda rng, n: (rng.lognormal(0.0, 0.5, n) - np.exp(0.125)) / _lognormal_sd(0.5),
    "exponential (skewness 2)": lambda rng, n: rng.exponential(size=n) - 1,
    "t with 5 degrees (heavy tails)": lambda rng, n: rng.standard_t(5, n) / np.sqrt(5 / 3),
}
GAPS = (1, 2, 4)
SPREAD = 3
"""Ratio of the standard deviations of two sides that scatter differently."""
SETTINGS = (2, 3, 4, 5)
"""Settings of a family: 1, 3, 6 and 10 pairs."""
CURVES: dict[str, Callable[[Array], Array]] = {
    "falls faster than the rate": lambda k: 3 * (k + 5) ** -0.7,
    "falls at the rate": lambda k: 3 * k**-0.25,
    "does not fall": lambda k: np.full_like(k, 3.0),
}
"""Expected norm over the iterate k; the maximum over K is early, undetermined, or at the last K."""


def _lognormal_sd(sigma: float) -> float:
    return float(np.sqrt((np.exp(sigma**2) - 1) * np.exp(sigma**2)))


def covers(interval: Interval, truth: float) -> bool:
    """Whether the truth is inside the interval.

    Raises:
        ValueError: the interval has no ends.
    """
    if interval.low is None or interval.high is None:
        raise ValueError(f"{interval}: expected an interval with ends")
    return interval.low <= truth <= interval.high


def mean_coverage(rng: np.random.Generator, n: int, draw: Draw, draws: int) -> float:
    """Share of intervals of the mean of n seeds that contain the true mean."""
    return sum(covers(mean_interval(draw(rng, n).tolist()), 0.0) for _ in range(draws)) / draws


def gap_coverage(
    rng: np.random.Generator, sides: tuple[int, int], draw: Draw, draws: int, *, scale: float = 1, gap: float = 0, truth: float = 0
) -> float:  # fmt: skip
    """Share of intervals of the gap between two settings that contain `truth`.

    Args:
        sides: seeds of the two settings.
        scale: standard deviation of the first setting; the second has 1.
        gap: true gap.
        truth: the value looked for; the power against a gap is 1 − the share that contains 0.
    """
    a, b = sides
    hits = 0
    for _ in range(draws):
        found = corrected_gap((gap + scale * draw(rng, a)).tolist(), draw(rng, b).tolist())
        hits += covers(found, truth)
    return hits / draws


def false_families(rng: np.random.Generator, settings: int, n: int, draws: int) -> float:
    """Share of families of equal settings with at least one sentence "outside the noise"."""
    hits = 0
    for _ in range(draws):
        values = {str(name): rng.normal(size=n).tolist() for name in range(settings)}
        hits += any("outside the noise" in text for text in verdicts(values))
    return hits / draws


def rate_coverage(
    rng: np.random.Generator, n: int, curve: Callable[[Array], Array], draws: int, *, common: float = 0.05, each: float = 0.08
) -> float:  # fmt: skip
    """Share of jackknife intervals of the rate constant over n seeds that contain the constant of the expected norms.

    Args:
        n: seeds.
        curve: expected norm at k.
        common: standard deviation of the logarithm of the norms between seeds, the same for all probes of a seed.
        each: standard deviation of the logarithm of a single probe.
    """
    steps = np.arange(0, 161, 20)
    norms = curve(steps + 1.0)
    truth, hits = rate_constant(steps, norms).value, 0
    for _ in range(draws):
        noise = common * rng.normal(size=(n, 1)) + each * rng.normal(size=(n, len(steps)))
        runs = norms * np.exp(noise - (common**2 + each**2) / 2)
        hits += covers(rates_over_seeds([(steps, run) for run in runs]).of_mean_interval, truth)
    return hits / draws


FLOOR, FALL, SCALE, POWER = 3.2, 7.6, 20.0, -0.6


def loss_at(step: Array) -> Array:
    """A test loss that falls by a power of the step: 10.8 at step 0, 3.9 at step 1,000."""
    return FLOOR + FALL * (1 + step / SCALE) ** POWER


def step_of(loss: Array) -> Array:
    """The inverse of `loss_at`."""
    return SCALE * (((loss - FLOOR) / FALL) ** (1 / POWER) - 1)


def target_coverage(
    rng: np.random.Generator, n: int, draws: int, *, between: float, at: float = 600.0, noise: float = 0.01
) -> tuple[float, float]:
    """Coverage of the steps to a target: of the geometric mean, as `compare` gives it, and of the plain mean.

    Args:
        n: seeds.
        between: standard deviation between seeds, a constant added to the whole curve (nats).
        at: step at which the curve without noise reaches the target.
        noise: standard deviation of one evaluation (nats).

    Returns:
        Shares of the intervals that contain the (geometric, plain) mean over all seeds of the noise-free step.
    """
    target = float(loss_at(np.array(at)))
    steps = np.arange(0, 15_001, 100)
    expected = loss_at(steps.astype(float))
    all_seeds = step_of(target - _offsets(np.random.default_rng(0), 400_000, between, target))
    truths = float(np.exp(np.log(all_seeds).mean())), float(all_seeds.mean())
    hits = [0, 0]
    for _ in range(draws):
        found = []
        for offset in _offsets(rng, n, between, target):
            losses = expected + offset + noise * rng.normal(size=len(steps))
            step = crossing(steps.tolist(), losses.tolist(), target)
            if step is None:
                raise ValueError(f"a curve with offset {offset} does not reach {target}: expected room for every seed")
            found.append(step)
        for place, interval in enumerate((geometric_mean(found), mean_interval(found))):
            hits[place] += covers(interval, truths[place])
    return hits[0] / draws, hits[1] / draws


def _offsets(rng: np.random.Generator, n: int, between: float, target: float) -> Array:
    """Normal offsets, cut at twice their deviation so that every curve reaches the target within the measurements."""
    return np.clip(between * rng.normal(size=n), -2 * between, 2 * between)


def simulate(draws: int) -> dict[str, Any]:
    """All tables as nested dictionaries; the slow simulations take a fifth of the draws.

    Args:
        draws: number of simulated comparisons for each figure.
    """
    rng = np.random.default_rng(2026)
    few = max(draws // 5, 1)
    normal = SEEDS["normal"]
    return {
        "mean": {name: {n: mean_coverage(rng, n, draw, draws) for n in COUNTS} for name, draw in SEEDS.items()},
        "gap": {
            **{name: {_versus(s): gap_coverage(rng, s, draw, draws) for s in SIDES} for name, draw in SEEDS.items()},
            **{
                f"normal, standard deviations {label}": {
                    _versus(s): gap_coverage(rng, s, normal, draws, scale=scale) for s in SIDES
                }
                for label, scale in ((f"{SPREAD}:1", SPREAD), (f"1:{SPREAD}", 1 / SPREAD))
            },
            "one side exponential, the other mirrored": {
                _versus(s): _mirrored(rng, s, draws) for s in SIDES
            },
        },
        "power": {
            gap: {_versus(s): 1 - gap_coverage(rng, s, normal, draws, gap=gap) for s in SIDES} for gap in GAPS
        },
        "families": {
            n: {k * (k - 1) // 2: false_families(rng, k, n, draws) for k in SETTINGS} for n in (2, 3, 5)
        },
        "rates": {
            name: {n: rate_coverage(rng, n, curve, few) for n in COUNTS} for name, curve in CURVES.items()
        },
        "targets": {
            between: {n: target_coverage(rng, n, few, between=between) for n in COUNTS} for between in (0.03, 0.1, 0.2)
        },
    }  # fmt: skip


def _mirrored(rng: np.random.Generator, sides: tuple[int, int], draws: int) -> float:
    draw = SEEDS["exponential (skewness 2)"]
    return sum(
        covers(corrected_gap(draw(rng, sides[0]).tolist(), (-draw(rng, sides[1])).tolist()), 0.0) for _ in range(draws)
    ) / draws  # fmt: skip


def _versus(sides: tuple[int, int]) -> str:
    return f"{sides[0]} v {sides[1]}"


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""

    def grid(corner: str, rows: dict[Any, dict[Any, float]]) -> str:
        heads = [corner, *map(str, next(iter(rows.values())))]
        cells = [[str(name), *(f"{100 * value:.1f}" for value in row.values())] for name, row in rows.items()]
        return markdown_grid(heads, cells, "l" + "r" * (len(heads) - 1))

    targets = {
        f"{between:g} nats, {kind}": {n: pair[place] for n, pair in row.items()}
        for between, row in found["targets"].items()
        for place, kind in enumerate(("geometric mean (`compare`)", "plain mean"))
    }
    gaps = {f"{gap} sd": row for gap, row in found["power"].items()}
    families = {f"{n} seeds each": row for n, row in found["families"].items()}
    parts = [
        ("Coverage of the interval of a mean, by seeds (%)", grid("seeds are", found["mean"])),
        ("Coverage of the interval of a gap, by seeds a side (%)", grid("seeds are", found["gap"])),
        ("Power: how often a true gap is called real, normal seeds (%)", grid("gap", gaps)),
        (
            "Families of equal settings with at least one gap called real, by number of pairs (%)",
            grid("", families),
        ),
        ("Coverage of the interval of a rate constant, by seeds (%)", grid("the norm", found["rates"])),
        ("Coverage of the interval of the steps to a target, by seeds (%)", grid("sd between seeds", targets)),
    ]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000, help="simulated comparisons for each figure")
    parser.add_argument("--output", default="", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    from importlib.metadata import version

    from measuring import heading, surroundings, write_results  # imports torch, which the simulation does not need

    facts = surroundings("cpu")
    facts["versions"] = {name: version(name) for name in ("numpy", "scipy")}
    found = simulate(args.draws)
    error = 100 * np.sqrt(0.95 * 0.05 / args.draws)
    text = (
        f"{heading(facts)}.\n\n`python benchmarks/seed_intervals.py --draws {args.draws}`, seed 2026. Every interval has a nominal "
        f"coverage of 95 %. A coverage near 95 % has a standard error of {error:.2f} points here; of rate constants and targets, "
        f"which have a fifth of the draws, {np.sqrt(5) * error:.2f}.\n\n{page(found)}\n"
    )
    print(text)
    write_results(
        args.output, "Intervals over seeds: coverage and power", text, {**facts, "draws": args.draws, **found}
    )


if __name__ == "__main__":
    main()
