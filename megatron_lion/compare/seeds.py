"""Statistics over seeds: mean, bootstrap interval, and a sentence on each gap between settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from megatron_lion.compare.labels import group_key
from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.compare.table import Cell, Table
from megatron_lion.runs.record import RunRecord

RESAMPLES = 10_000
LEVEL = 0.95
EXACT_UP_TO = 5_000
MAX_SENTENCES = 10
"""Largest number of sentences on all pairs of a measure; above it, settings are compared with the lowest only."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its bootstrap interval; the ends are None for a single value.

    Attributes:
        mean: mean of the values, or difference of two means.
        low, high: ends of the interval.
        p_value: for a gap, the share of reassignments of the seeds to the two sides that give a gap as large.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None = None


def bootstrap(values: list[float], resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Percentile bootstrap of the mean; the random seed is fixed, so equal values give equal intervals.

    >>> bootstrap([1.0]).low, bootstrap([1.0, 1.0, 1.0]).low, bootstrap([1.0, 3.0]).high
    (None, 1.0, 3.0)
    """
    if len(values) < 2:
        return Interval(mean=fmean(values), low=None, high=None)
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    return _interval(fmean(values), means, level)


def bootstrap_gap(a: list[float], b: list[float], resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Percentile bootstrap of mean(a) - mean(b), each side resampled independently."""
    if len(a) < 2 or len(b) < 2:
        return Interval(mean=fmean(a) - fmean(b), low=None, high=None)
    draw = random.Random(0)
    gaps = sorted(fmean(draw.choices(a, k=len(a))) - fmean(draw.choices(b, k=len(b))) for _ in range(resamples))
    return replace(_interval(fmean(a) - fmean(b), gaps, level), p_value=permutation_p(a, b))


def _interval(mean: float, ordered: list[float], level: float) -> Interval:
    cut = int((1 - level) / 2 * len(ordered))
    return Interval(mean=mean, low=ordered[cut], high=ordered[-1 - cut])


def permutation_p(a: list[float], b: list[float]) -> float:
    """Two-sided permutation test of equal means: exact up to 5,000 assignments of values to sides, sampled above.

    With two seeds a side p cannot fall below 1/3, with three a side not below 1/10.

    >>> round(permutation_p([1.0, 1.1], [2.0, 2.1]), 3), permutation_p([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    (0.333, 0.1)
    """
    pooled, total = [*a, *b], sum(a) + sum(b)
    observed = abs(fmean(a) - fmean(b))

    def as_large(chosen: Iterable[float]) -> bool:
        part = sum(chosen)
        # The observed assignment must count itself although its sums round differently: 1e-12 covers that.
        return abs(part / len(a) - (total - part) / len(b)) >= observed - 1e-12 * abs(total)

    if math.comb(len(pooled), len(a)) <= EXACT_UP_TO:
        return fmean(map(as_large, combinations(pooled, len(a))))
    draw = random.Random(0)
    hits = sum(as_large(draw.sample(pooled, len(a))) for _ in range(RESAMPLES))
    return (hits + 1) / (RESAMPLES + 1)  # the observed assignment counts as one draw, so p is never zero


def seed_groups(runs: list[RunRecord]) -> dict[tuple[str, ...], list[RunRecord]]:
    """Groups of runs that differ only in their seed, in the order given."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    return groups


def _test_loss(run: RunRecord) -> float | None:
    return run.series("test/loss").last


def _log_ppl(run: RunRecord, key: tuple[object, ...]) -> float | None:
    found = [r["log_token_ppl"] for r in run.evaluations if evaluation_key(r) == key and "log_token_ppl" in r]
    return float(found[-1]) if found else None


def seeds_table(runs: list[RunRecord]) -> Table | None:
    """Final test loss and zero-shot log perplexity by setting, or None if no setting has several seeds."""
    groups = seed_groups(runs)
    if max(map(len, groups.values()), default=0) < 2:
        return None
    measures = _measures(runs)
    rows: list[list[Cell]] = []
    notes: list[str] = []
    for name, measure in measures.items():
        by_group = {
            key: [value for run in group if (value := measure(run)) is not None] for key, group in groups.items()
        }
        for key, values in by_group.items():
            if values:
                interval = bootstrap(values)
                row: list[Cell] = [groups[key][0].model, group_label(groups, key), name, len(values)]
                rows.append([*row, interval.mean, interval.low, interval.high])
        for model in dict.fromkeys(run.model for run in runs):
            named = {
                group_label(groups, key): values
                for key, values in by_group.items()
                if values and groups[key][0].model == model
            }
            notes += [f"{model}, {name}: {text}" for text in verdicts(named)]
    notes.append(
        f"{LEVEL:.0%} percentile bootstrap over seeds, {RESAMPLES:,} resamples; with fewer than about five seeds "
        "such an interval is usually too narrow, so a gap must also pass a permutation test"
    )
    return Table(
        slug="seeds",
        title="Several seeds: mean and bootstrap interval",
        columns=["model", "setting", "measure", "seeds", "mean", "low", "high"],
        rows=rows,
        formats={"mean": ".4f", "low": ".4f", "high": ".4f"},
        notes=notes,
    )


def verdicts(values: dict[str, list[float]]) -> list[str]:
    """A sentence for each pair of settings; with more than `MAX_SENTENCES` pairs, for each against the lowest mean.

    Args:
        values: values of one measure by setting, one value per seed.
    """
    pairs = [(a, b) for a, b in combinations(values, 2) if max(len(values[a]), len(values[b])) > 1]
    singles = []
    if len(pairs) > MAX_SENTENCES:
        several = [name for name in values if len(values[name]) > 1]
        singles = [name for name in values if len(values[name]) == 1]
        lowest = min(several, key=lambda name: fmean(values[name]))
        pairs = [(lowest, name) for name in several if name != lowest]
    found = [sentence(a, b, bootstrap_gap(values[a], values[b])) for a, b in pairs]
    if singles:
        found.append(f"{len(singles)} settings have a single seed: the noise of their gaps to the others is not known.")
    return found


def _measures(runs: list[RunRecord]) -> dict[str, Callable[[RunRecord], float | None]]:
    """The final test loss, and the log perplexity under the convention that most runs share."""
    measures: dict[str, Callable[[RunRecord], float | None]] = {"final test loss": _test_loss}
    key = main_evaluation_key(runs)
    if key is not None:
        measures["final zero-shot log perplexity"] = lambda run: _log_ppl(run, key)
    return measures


def group_label(groups: dict[tuple[str, ...], list[RunRecord]], key: tuple[str, ...]) -> str:
    """Name of a setting: the label of its runs without the seed."""
    label = groups[key][0].label
    words = [word for word in label.split(" ") if not word.startswith("seed=")]
    return " ".join(words)


def sentence(a: str, b: str, gap: Interval) -> str:
    """A sentence on whether the gap a - b exceeds the scatter of the seeds; smaller values are better.

    >>> sentence("LION", "SGD", Interval(mean=-0.5, low=-0.6, high=-0.4, p_value=0.008))
    'LION is 0.500 below SGD, outside the noise of the seeds (interval -0.600 to -0.400, p = 0.008).'
    >>> sentence("LION", "AdamW", Interval(mean=-0.01, low=-0.03, high=0.02, p_value=0.5))
    'the gap of 0.010 between LION and AdamW is inside the noise of the seeds (interval -0.030 to +0.020): no winner.'
    >>> sentence("LION", "AdamW", Interval(mean=-0.5, low=-0.6, high=-0.4, p_value=0.333))
    'LION is 0.500 below AdamW, but with so few seeds that may be chance (permutation p = 0.333).'
    """
    if gap.low is None or gap.high is None or gap.p_value is None:
        return (
            f"the gap of {abs(gap.mean):.3f} between {a} and {b} has a single seed on one side: its noise is not known."
        )
    interval = f"interval {gap.low:+.3f} to {gap.high:+.3f}"
    if gap.low <= 0 <= gap.high:
        return f"the gap of {abs(gap.mean):.3f} between {a} and {b} is inside the noise of the seeds ({interval}): no winner."
    apart = f"{a} is {abs(gap.mean):.3f} {'below' if gap.mean < 0 else 'above'} {b}"
    if gap.p_value > 1 - LEVEL:
        return f"{apart}, but with so few seeds that may be chance (permutation p = {gap.p_value:.3f})."
    return f"{apart}, outside the noise of the seeds ({interval}, p = {gap.p_value:.3f})."
