"""Several seeds of one setting: mean, bootstrap interval, and a plain sentence about each gap."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from megatron_lion.compare.runs import RunRecord, evaluation_key
from megatron_lion.compare.table import Cell, Table

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its bootstrap interval; the ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def bootstrap(values: list[float], resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Percentile bootstrap of the mean; the same numbers every time.

    >>> bootstrap([1.0])
    Interval(mean=1.0, low=None, high=None)
    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    if len(values) < 2:
        return Interval(mean=fmean(values), low=None, high=None)
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    return _interval(fmean(values), means, level)


def bootstrap_gap(a: list[float], b: list[float], resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Percentile bootstrap of mean(a) - mean(b), both resampled by themselves."""
    if len(a) < 2 or len(b) < 2:
        return Interval(mean=fmean(a) - fmean(b), low=None, high=None)
    draw = random.Random(0)
    gaps = sorted(fmean(draw.choices(a, k=len(a))) - fmean(draw.choices(b, k=len(b))) for _ in range(resamples))
    return _interval(fmean(a) - fmean(b), gaps, level)


def _interval(mean: float, ordered: list[float], level: float) -> Interval:
    cut = int((1 - level) / 2 * len(ordered))
    return Interval(mean=mean, low=ordered[cut], high=ordered[-1 - cut])


def seed_groups(runs: list[RunRecord]) -> dict[tuple[str, ...], list[RunRecord]]:
    """Runs that differ in their seed alone, grouped, in the order given."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.group_key(), []).append(run)
    return groups


def _test_loss(run: RunRecord) -> float | None:
    return run.series("test/loss").last


def _log_ppl(run: RunRecord, key: tuple[object, ...]) -> float | None:
    found = [r["log_token_ppl"] for r in run.evaluations if evaluation_key(r) == key and "log_token_ppl" in r]
    return float(found[-1]) if found else None


def seeds_table(runs: list[RunRecord]) -> Table | None:
    """Final test loss and zero-shot log perplexity by setting; None unless some setting has several seeds."""
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
        for a, b in combinations([key for key, values in by_group.items() if values], 2):
            several = max(len(by_group[a]), len(by_group[b])) > 1
            if several and groups[a][0].model == groups[b][0].model:
                gap = bootstrap_gap(by_group[a], by_group[b])
                model = groups[a][0].model
                notes.append(f"{model}, {name}: " + sentence(group_label(groups, a), group_label(groups, b), gap))
    notes.append(
        f"{LEVEL:.0%} percentile bootstrap over seeds, {RESAMPLES:,} resamples; with fewer than about five seeds "
        "such an interval is as a rule too narrow"
    )
    return Table(
        slug="seeds",
        title="Several seeds: mean and bootstrap interval",
        columns=["model", "setting", "measure", "seeds", "mean", "low", "high"],
        rows=rows,
        formats={"mean": ".4f", "low": ".4f", "high": ".4f"},
        notes=notes,
    )


def _measures(runs: list[RunRecord]) -> dict[str, Callable[[RunRecord], float | None]]:
    """The final test loss, and the log perplexity by the convention most results share."""
    measures: dict[str, Callable[[RunRecord], float | None]] = {"final test loss": _test_loss}
    keys = [evaluation_key(r) for run in runs for r in run.evaluations if r.get("log_token_ppl") is not None]
    if keys:
        key = max(dict.fromkeys(keys), key=keys.count)
        measures["final zero-shot log perplexity"] = lambda run: _log_ppl(run, key)
    return measures


def group_label(groups: dict[tuple[str, ...], list[RunRecord]], key: tuple[str, ...]) -> str:
    """What a setting is called: its runs' label without the seed."""
    label = groups[key][0].label
    words = [word for word in label.split(" ") if not word.startswith("seed=")]
    return " ".join(words)


def sentence(a: str, b: str, gap: Interval) -> str:
    """Says whether a gap a - b is larger than the scatter of the seeds; smaller is better.

    >>> sentence("LION", "SGD", Interval(mean=-0.5, low=-0.6, high=-0.4))
    'LION is 0.500 below SGD, outside the noise of the seeds (interval -0.600 to -0.400).'
    >>> sentence("LION", "AdamW", Interval(mean=-0.01, low=-0.03, high=0.02))
    'the gap of 0.010 between LION and AdamW is inside the noise of the seeds (interval -0.030 to +0.020): no winner.'
    """
    if gap.low is None or gap.high is None:
        return (
            f"the gap of {abs(gap.mean):.3f} between {a} and {b} has a single seed on one side: its noise is not known."
        )
    interval = f"(interval {gap.low:+.3f} to {gap.high:+.3f})"
    if gap.low <= 0 <= gap.high:
        return f"the gap of {abs(gap.mean):.3f} between {a} and {b} is inside the noise of the seeds {interval}: no winner."
    side = "below" if gap.mean < 0 else "above"
    return f"{a} is {abs(gap.mean):.3f} {side} {b}, outside the noise of the seeds {interval}."
