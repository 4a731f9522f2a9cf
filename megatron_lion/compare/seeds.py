"""Statistics over seeds: mean and confidence interval of each setting, and a sentence on each gap between settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from megatron_lion.compare.labels import group_key
from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.compare.table import Cell, Table
from megatron_lion.intervals import LEVEL, Interval, gap_interval, mean_interval
from megatron_lion.runs.record import RunRecord

MAX_SENTENCES = 10
"""Largest number of sentences on all pairs of a measure; above it, settings are compared with the lowest only."""


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
                interval = mean_interval(values)
                row: list[Cell] = [groups[key][0].model, group_label(groups, key), name, len(values)]
                rows.append([*row, interval.estimate, interval.low, interval.high])
        for model in dict.fromkeys(run.model for run in runs):
            named = {
                group_label(groups, key): values
                for key, values in by_group.items()
                if values and groups[key][0].model == model
            }
            notes += [f"{model}, {name}: {text}" for text in verdicts(named)]
    notes.append(
        f"low and high: {LEVEL:.0%} Student's t interval of the mean over seeds; gaps: Welch's t interval and test. Both "
        "assume that a setting's results scatter roughly normally over its seeds"
    )
    return Table(
        slug="seeds",
        title=f"Several seeds: mean and {LEVEL:.0%} interval",
        columns=["model", "setting", "measure", "seeds", "mean", "low", "high"],
        rows=rows,
        formats={"mean": ".4f", "low": ".4f", "high": ".4f"},
        notes=notes,
    )


def verdicts(values: dict[str, list[float]]) -> list[str]:
    """A sentence for each pair of settings; with more than `MAX_SENTENCES` pairs, for each against the lowest mean.

    All intervals hold together: with m pairs of settings with several seeds, each gap has an interval of confidence
    1 − 0.05/m and its p times m (Bonferroni), so that the interval excludes 0 exactly if p is below 0.05. Against the
    lowest mean m still counts all pairs, because the lowest is known only from the same values.

    Args:
        values: values of one measure by setting, one value per seed.
    """
    several = [name for name in values if len(values[name]) > 1]
    tests = len(several) * (len(several) - 1) // 2
    pairs = [(a, b) for a, b in combinations(values, 2) if a in several or b in several]
    singles = 0
    if len(pairs) > MAX_SENTENCES:
        singles = len(values) - len(several)
        lowest = min(several, key=lambda name: fmean(values[name]))
        pairs = [(lowest, name) for name in several if name != lowest]
    found = [sentence(a, b, corrected_gap(values[a], values[b], max(tests, 1))) for a, b in pairs]
    if singles:
        found.append(f"{singles} settings have a single seed: the noise of their gaps to the others is not known.")
    if tests > 1:
        found.append(
            f"these intervals and p are corrected for {tests} pairs (Bonferroni): they hold together with {LEVEL:.0%} confidence."
        )
    return found


def corrected_gap(a: list[float], b: list[float], tests: int = 1) -> Interval:
    """Welch's interval of mean(a) − mean(b) as one of several, which hold together with 95 %; its p is multiplied.

    >>> one, three = (corrected_gap([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], tests) for tests in (1, 3))
    >>> round(one.high, 3), round(one.p_value, 3), round(three.high, 3), round(three.p_value, 3)
    (-0.073, 0.021, 0.023, 0.064)
    """
    gap = gap_interval(a, b, 1 - (1 - LEVEL) / tests)
    return gap if gap.p_value is None else replace(gap, p_value=min(1.0, tests * gap.p_value))


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
    """A sentence on whether the gap a − b exceeds the scatter of the seeds; smaller values are better.

    >>> sentence("LION", "SGD", corrected_gap([1.0, 1.1, 1.2], [1.5, 1.6, 1.7]))
    'LION is 0.500 below SGD, outside the noise of the seeds (interval -0.727 to -0.273, p = 0.004).'
    >>> sentence("LION", "AdamW", corrected_gap([1.0, 1.1], [1.1, 1.2]))
    'the gap of 0.100 between LION and AdamW is inside the noise of the seeds (interval -0.404 to +0.204): no winner.'
    """
    size = abs(gap.estimate)
    if gap.low is None or gap.high is None or gap.p_value is None:
        return f"the gap of {size:.3f} between {a} and {b} has a single seed on one side: its noise is not known."
    interval = f"interval {gap.low:+.3f} to {gap.high:+.3f}"
    if gap.low <= 0 <= gap.high:
        return f"the gap of {size:.3f} between {a} and {b} is inside the noise of the seeds ({interval}): no winner."
    side = "below" if gap.estimate < 0 else "above"
    p_value = f"p = {gap.p_value:.3f}" if gap.p_value >= 0.001 else "p < 0.001"
    return f"{a} is {size:.3f} {side} {b}, outside the noise of the seeds ({interval}, {p_value})."
