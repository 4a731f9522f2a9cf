"""Statistics over seeds: mean and confidence interval of each setting, and a sentence on each gap between settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from megatron_lion.compare.held_out import differences
from megatron_lion.compare.labels import by_model, seed_groups, setting_names
from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.compare.table import Cell, Table
from megatron_lion.intervals import LEVEL, Interval, gap_interval, mean_interval
from megatron_lion.runs.record import RunRecord

MAX_SENTENCES = 10
"""Largest number of sentences on all pairs of a measure; above it, settings are compared with the lowest only."""
MOST_LISTED = 3
"""Largest number of runs that a note lists one by one."""
SHOWN_SIZE = 0.0005
"""Smallest number that three decimals do not show as zero."""
_Key = tuple[str, ...]
_Groups = Mapping[_Key, Sequence[RunRecord]]


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """A quantity of the runs of one model.

    Attributes:
        name: its name in the table.
        values: for each setting that has it, its value for each seed; None for a seed without it.
        withheld: settings without a mean although all seeds have a value, with the reason.
        notes: reservations about the measure.
        incomparable: the reason why no gap is judged, or None.
    """

    name: str
    values: dict[_Key, list[float | None]]
    withheld: dict[_Key, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    incomparable: str | None = None


def seeds_table(runs: list[RunRecord]) -> Table | None:
    """Final test loss and zero-shot log perplexity by setting, or None if no setting has several seeds.

    Means are over finished runs. A setting is compared only if all of its seeds are finished and have the measure,
    because the seeds that are missing may be missing for their results.
    """
    groups = seed_groups(runs)
    if max(map(len, groups.values()), default=0) < 2:
        return None
    names = setting_names(groups)
    families = {model: seed_groups(family) for model, family in by_model(runs).items()}
    rows: list[list[Cell]] = []
    notes = [f"{group[0].model}, {names[key]}: {text}" for key, group in groups.items() if (text := unfinished(group))]
    losses = {model: _final_losses(family) for model, family in families.items()}
    convention = main_evaluation_key(runs)
    perplexities = {model: _perplexities(family, convention) for model, family in families.items()}
    for found in (losses, perplexities):
        for model, measure in found.items():
            rows += _rows(model, measure, names)
            notes += _notes(model, measure, families[model], names)
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


def _rows(model: str, measure: _Measure, names: Mapping[_Key, str]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for key, values in measure.values.items():
        known = [value for value in values if value is not None]
        interval = mean_interval(known) if known and key not in measure.withheld else None
        ends: list[Cell] = [interval.low, interval.high] if interval and not _alike(known) else [None, None]
        rows.append([model, names[key], measure.name, len(known), interval.estimate if interval else None, *ends])
    return rows


def _notes(model: str, measure: _Measure, groups: _Groups, names: Mapping[_Key, str]) -> list[str]:
    """The reservations about a measure, the reasons for which settings are not compared, and the verdicts on the others."""
    notes = [f"{model}: {note}" for note in measure.notes]
    if measure.incomparable:
        return [*notes, f"{model}, {measure.name}: no gap is judged, because {measure.incomparable}"]
    compared: list[tuple[str, list[float]]] = []
    for key, values in measure.values.items():
        lacking = [run for run, value in zip(groups[key], values, strict=True) if run.finished and value is None]
        reason = measure.withheld.get(key)
        if lacking:
            seeds = listed([_seed(run) for run in lacking])
            verb = "has" if len(lacking) == 1 else "have"
            reason = f"{seeds} {verb} no finite value at the step compared (not measured there, or not a number)"
        if reason:
            notes.append(f"{model}, {measure.name}, {names[key]}: {reason}, so no gap to this setting is judged")
        elif all(run.finished for run in groups[key]):
            compared.append((names[key], [value for value in values if value is not None]))
    return notes + [f"{model}, {measure.name}: {text}" for text in verdicts(compared)]


def unfinished(group: Sequence[RunRecord]) -> str | None:
    """A note on the seeds of a setting that are not finished, or None if all are."""
    late = [run for run in group if not run.finished]
    if not late:
        return None
    if len(group) == 1:
        return f"its only run {stopped_at(group[0])}, so no gap to this setting is judged"
    ends = listed([f"{_seed(run)} {stopped_at(run)}" for run in late])
    done = len(group) - len(late)
    mean = "; its mean is over the finished seeds" if done else ""
    return f"{done} of {len(group)} seeds are finished, {ends}, so no gap to this setting is judged{mean}"


def stopped_at(run: RunRecord) -> str:
    """Where an unfinished run stopped, as a predicate."""
    if run.diverged:
        return f"diverged at step {run.last_step:,}"
    return f"is at step {run.last_logged:,} of {run.planned_steps or 0:,}"


def _seed(run: RunRecord) -> str:
    return run.label if run.seed is None else f"seed {run.seed}"


def listed(texts: Sequence[str]) -> str:
    """The texts with commas; only the number of those after the first `MOST_LISTED`."""
    more = len(texts) - MOST_LISTED
    return ", ".join(texts[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _final_losses(groups: _Groups) -> _Measure:
    """The test loss of each run at its last due measurement."""
    measured = {key: group for key, group in groups.items() if any(run.series("test/loss") for run in group)}
    finals = {key: [run.final("test/loss") for run in group] for key, group in measured.items()}
    steps = {key: sorted({final[0] for final in found if final}) for key, found in finals.items()}
    every = sorted({step for found in steps.values() for step in found})
    # A seed has its own samples, and its noise is part of the scatter over seeds; any other difference is not.
    different = differences(run for group in measured.values() for run in group)
    return _Measure(
        name="final test loss",
        values={key: [final[1] if final else None for final in found] for key, found in finals.items()},
        # Runs that stop early and are measured at different intervals.
        withheld={key: f"its seeds were last measured at different steps ({listed([f'{step:,}' for step in found])})"
                  for key, found in steps.items() if len(found) > 1},
        notes=(f"the final test losses are of different steps, {every[0]:,} to {every[-1]:,}",) if len(every) > 1 else (),
        incomparable=f"the runs are tested on different samples ({'; '.join(different)})" if different else None,
    )  # fmt: skip


def _perplexities(groups: _Groups, convention: tuple[Any, ...] | None) -> _Measure:
    """The zero-shot log perplexity of finished runs at the last step that all of them have, of those that were evaluated."""
    results = {
        key: [
            {int(r["step"]): r["log_token_ppl"] for r in run.evaluations
             if run.finished and evaluation_key(r) == convention and "log_token_ppl" in r}
            for run in group
        ]
        for key, group in groups.items()
    }  # fmt: skip
    evaluated = {key: found for key, found in results.items() if any(found)}
    name = "zero-shot log perplexity"
    common = (
        set.intersection(*(set(steps) for found in evaluated.values() for steps in found if steps))
        if evaluated
        else set()
    )
    if not common:
        note = f"there is no verdict on the {name}, because the finished runs that have one share no step"
        return _Measure(name=name, values={}, notes=(note,) if evaluated else ())
    step = max(common)
    return _Measure(
        name=f"{name} at step {step:,}",
        values={key: [_finite(steps.get(step)) for steps in found] for key, found in evaluated.items()},
    )


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def verdicts(values: Mapping[str, Sequence[float]] | Sequence[tuple[str, Sequence[float]]]) -> list[str]:
    """A sentence for each pair of settings; with more than `MAX_SENTENCES` pairs, for each against the lowest mean.

    All intervals hold together: with m pairs of settings whose noise is known, each gap has an interval of confidence
    1 − 0.05/m and its p times m (Bonferroni), so that the interval excludes 0 exactly if p is below 0.05. Against the
    lowest mean m still counts all pairs, because the lowest is known only from the same values.

    Args:
        values: names of settings, and values of one measure, one per seed. Names that are equal stay two settings.
    """
    sides = list(values.items()) if isinstance(values, Mapping) else list(values)
    several = [side for side in sides if len(side[1]) > 1]
    noisy = [side for side in several if not _alike(side[1])]
    tests = len(noisy) * (len(noisy) - 1) // 2
    pairs = [(a, b) for a, b in combinations(sides, 2) if len(a[1]) > 1 or len(b[1]) > 1]
    singles = 0
    if len(pairs) > MAX_SENTENCES:
        singles = len(sides) - len(several)
        lowest = min(noisy or several, key=lambda side: fmean(side[1]))
        pairs = [(lowest, side) for side in several if side is not lowest]
    found = [_verdict(a, b, max(tests, 1)) for a, b in pairs]
    if singles:
        found.append(f"{singles} settings have a single seed: the noise of their gaps to the others is not known.")
    if tests > 1:
        found.append(
            f"these intervals and p are corrected for {tests} pairs (Bonferroni): they hold together with {LEVEL:.0%} confidence."
        )
    return found


def _verdict(a: tuple[str, Sequence[float]], b: tuple[str, Sequence[float]], tests: int) -> str:
    alike = " and ".join(name for name, values in (a, b) if len(values) > 1 and _alike(values))
    return sentence(a[0], b[0], corrected_gap(a[1], b[1], tests), alike or "a side")


def _alike(values: Sequence[float]) -> bool:
    return min(values) == max(values)


def corrected_gap(a: Sequence[float], b: Sequence[float], tests: int = 1) -> Interval:
    """Welch's interval of mean(a) − mean(b) as one of several, which hold together with 95 %; its p is multiplied.

    >>> one, three = (corrected_gap([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], tests) for tests in (1, 3))
    >>> round(one.high, 3), round(one.p_value, 3), round(three.high, 3), round(three.p_value, 3)
    (-0.073, 0.021, 0.023, 0.064)
    """
    gap = gap_interval(a, b, 1 - (1 - LEVEL) / tests)
    return gap if gap.p_value is None else replace(gap, p_value=min(1.0, tests * gap.p_value))


def sentence(a: str, b: str, gap: Interval, alike: str = "a side") -> str:
    """A sentence on whether the gap a − b exceeds the scatter of the seeds; smaller values are better.

    Args:
        a: name of a setting.
        b: name of the other setting.
        gap: the gap of their means.
        alike: the settings whose seeds all gave the same value, if the gap has no interval for that reason.

    >>> sentence("LION", "SGD", corrected_gap([1.0, 1.1, 1.2], [1.5, 1.6, 1.7]))
    'LION is 0.500 below SGD, outside the noise of the seeds (interval -0.727 to -0.273, p = 0.004).'
    >>> sentence("LION", "AdamW", corrected_gap([1.0, 1.1], [1.1, 1.2]))
    'the gap of 0.100 between LION and AdamW is inside the noise of the seeds (interval -0.404 to +0.204): no winner.'
    """
    between = f"the gap of {_number(abs(gap.estimate))} between {a} and {b}"
    if gap.low is None or gap.high is None or gap.p_value is None:
        if gap.count > 1:
            return f"{between}: all seeds of {alike} gave the same value, so their noise is not known."
        return f"{between} has a single seed on one side: its noise is not known."
    interval = f"interval {_number(gap.low, '+')} to {_number(gap.high, '+')}"
    if gap.low <= 0 <= gap.high:
        return f"{between} is inside the noise of the seeds ({interval}): no winner."
    side = "below" if gap.estimate < 0 else "above"
    p_value = f"p = {gap.p_value:.3f}" if gap.p_value >= 0.001 else "p < 0.001"
    return f"{a} is {_number(abs(gap.estimate))} {side} {b}, outside the noise of the seeds ({interval}, {p_value})."


def _number(value: float, sign: str = "") -> str:
    """Three decimals, or two significant digits if three decimals would show zero.

    >>> _number(0.1234), _number(0.00012345), _number(-0.00012345, "+"), _number(0.0)
    ('0.123', '0.00012', '-0.00012', '0.000')
    """
    return format(value, f"{sign}.2g" if 0 < abs(value) < SHOWN_SIZE else f"{sign}.3f")
