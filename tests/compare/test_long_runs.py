"""Runs of many log lines: what is computed faster than by its definition has the same bits as by its definition."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from synthetic_runs import write_run

from megatron_lion.compare.panels import panels
from megatron_lion.compare.selection import read_runs
from megatron_lion.errors import CheckpointError
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.runs.series import Series, read_metrics

LOSSES = st.floats(1e-6, 20.0)
ODD_NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 5e-324, 1e300, 1e18])


def plain_means(values: list[float], window: int) -> list[float]:
    """The mean over each window by the definition: the sum without an error, rounded once, over the number of values."""
    windows = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [float(sum(map(Fraction, part))) / len(part) for part in windows]


@examples(100)
@given(st.lists(LOSSES, max_size=60), st.integers(1, 70))
def test_smoothed_losses_have_the_bits_of_their_definition(losses: list[float], window: int) -> None:
    found = list(Series(tuple(range(len(losses))), losses).smoothed(window).values)
    assert found == plain_means(losses, window)
    assert found == [math.fsum(losses[max(0, n - window) : n]) / min(n, window) for n in range(1, len(losses) + 1)]


@examples(100)
@given(st.lists(ODD_NUMBERS, max_size=30), st.integers(1, 40))
def test_smoothing_numbers_of_all_magnitudes_neither_fails_nor_rounds_twice(values: list[float], window: int) -> None:
    found = list(Series(tuple(range(len(values))), values).smoothed(window).values)
    if max(map(abs, values), default=0.0) * window < 1e308:
        assert found == plain_means(values, window)
    else:  # the sum may be no finite float, but the mean is
        assert all(map(math.isfinite, found))


def test_a_window_is_smoothed_once(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    losses = run.series("train/loss")
    assert losses.smoothed(7) is losses.smoothed(7)
    assert losses.smoothed(7) != losses.smoothed(8)


def plain_reader(content: bytes) -> dict[str, dict[int, float]] | int:
    """The numbers by key and step, line by line as documented, or the number of the first damaged line."""
    table: dict[str, dict[int, float]] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = entry["step"]
            if type(entry) is not dict or type(step) is not int or step < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                return number
            continue
        for key, value in entry.items():
            if key != "step":
                good = type(value) in (int, float) and abs(value) < 1e308
                table.setdefault(key, {}).pop(step, None)
                if good:
                    table[key][step] = float(value)
    return {key: values for key, values in table.items() if values}


VALUES = st.floats(-1e9, 1e9) | st.integers(-(10**6), 10**6) | st.sampled_from(
    [None, True, math.nan, math.inf, 10**400, "text", [1], {"step": 3}, "é", "{", "\x1b"]
)  # fmt: skip
ENTRIES = st.tuples(st.integers(0, 12), st.dictionaries(st.sampled_from("abcé"), VALUES, max_size=3)).map(
    lambda pair: {"step": pair[0], **pair[1]}
)
LINES = st.tuples(ENTRIES, st.booleans(), st.sampled_from(["", "", "", "", "\r", "  "])).map(
    lambda made: json.dumps(made[0], ensure_ascii=made[1]) + made[2]
)
DAMAGED = ["", " ", "rubbish", "[1]", "{}", '{"step": 1} {"step": 2}', '{"step": 1},', '{"step": 1, "a":', '2}',
           '{"step": 1.0}', '{"step": true}', '{"step": -1}', '{"step": null}', "\ufeff{}", '{"a": {"step": 1}}']  # fmt: skip


@examples(300)
@given(st.lists(LINES | st.sampled_from(DAMAGED[:2]), max_size=12), st.none() | st.sampled_from(DAMAGED), st.integers(0, 12),
       st.sampled_from(["", "\n"]))  # fmt: skip
def test_a_file_is_read_as_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], damage: str | None, place: int, end: str
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    if damage is not None:
        lines = [*lines[:place], damage, *lines[place:]]
    content = ("\n".join(lines) + end).encode()
    path.write_bytes(content)
    expected = plain_reader(content)
    if isinstance(expected, int):
        with pytest.raises(CheckpointError, match=rf"metrics.jsonl, line {expected}: not a JSON object with a step"):
            read_metrics(path)
    else:
        found = read_metrics(path)
        assert {key: dict(zip(s.steps, s.values, strict=True)) for key, s in found.items()} == expected
        assert all(list(series.steps) == sorted(series.steps) for series in found.values())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"step": 1, "a": 1}\n{"step": 2, "a":\n3}\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2, "a": 1\n,"b": 2}\n', 2),
        ('{"step": 1}{"step": 2}\n', 1),
        ('{"step": 1}, {"step": 2}\n', 1),
        ('{"step": 1, "a": "x\n", "b": "}\n{"step": 2}\n', 1),
    ],
)
def test_an_object_counts_only_if_it_is_the_whole_line(content: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"metrics.jsonl, line {line}: not a JSON object"):
        read_metrics(path)


def test_steps_of_any_size_and_lines_of_any_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        f'{{"a": 1, "step": {10**30}}}\n{{"step": 2, "b": 1}}\n{{"b": 5, "step": 2, "a": 3}}\n{{"step": 2, "a": 4}}\n'
    )
    assert read_metrics(path) == {"a": Series((2, 10**30), (4.0, 1.0)), "b": Series((2,), (5.0,))}


def test_runs_with_equal_steps_hold_them_once(tmp_path: Path) -> None:
    """Whole numbers take four times the memory of the values."""
    one, two, short = read_runs([
        write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=2), write_run(tmp_path / "short", seed=3, steps=500)
    ])  # fmt: skip
    assert one.series("train/loss").steps is two.series("train/loss").steps is one.series("optim/lr").steps
    assert short.series("train/loss").steps == one.series("train/loss").steps[:50]


def plain_seconds(run: RunRecord, step: int) -> float:
    """The training time up to a step: over each stretch of steps the tokens by the throughput that ends it."""
    rate = run.series("perf/tokens_per_s")
    logged = [pair for pair in zip(rate.steps, rate.values, strict=True) if pair[1] > 0]
    spent, before = 0.0, 0
    for place, (at, value) in enumerate(logged):
        if step <= at or place == len(logged) - 1:
            break
        spent, before = spent + (at - before) * (run.tokens_per_step or 0) / value, at
    part = at - before if step > at else step - before
    spent += part * (run.tokens_per_step or 0) / value
    return spent + (step - at) * (run.tokens_per_step or 0) / value if step > at else spent


@pytest.mark.parametrize(
    "steps", [[0, 1, 9, 10, 11, 500, 999, 1000, 1200], [1000, 3, 700, 0, 20, 20]], ids=["up", "any"]
)
def test_the_training_time_of_steps_in_any_order(steps: list[int], tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    rates = run.series("perf/tokens_per_s")
    uneven = [0.0 if place % 7 == 3 else value * (1 + place % 5) for place, value in enumerate(rates.values)]
    for changed in (rates, Series(rates.steps, uneven)):
        timed = replace(run, metrics={**run.metrics, "perf/tokens_per_s": changed})
        assert timed.seconds_at(steps) == pytest.approx([plain_seconds(timed, step) for step in steps], rel=1e-12)
        assert timed.seconds_at(steps) == [timed.training_seconds(step) for step in steps]
    assert replace(run, metrics={}).seconds_at(steps) is None


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_the_curve_of_seeds_is_their_mean_at_the_steps_that_all_have(axis: str, tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{seed}", seed=seed)) for seed in (1, 2, 3)]
    losses = runs[1].series("train/loss")
    gaps = Series(losses.steps[:40] + losses.steps[45:], [*losses.values[:40], *losses.values[45:]])
    runs[1] = replace(runs[1], metrics={**runs[1].metrics, "train/loss": gaps})
    (curve,) = next(panel for panel in panels(runs, axis) if panel.slug == "training-loss").curves
    window = max(1, len(losses.steps) // 50)
    means = [dict(zip(run.series("train/loss").steps, plain_means(list(run.series("train/loss").values), window), strict=True))
             for run in runs]  # fmt: skip
    assert window > 1
    assert list(curve.y) == [math.fsum(mean[step] for mean in means) / 3 for step in gaps.steps]
    place = {"step": lambda run, step: step, "tokens": lambda run, step: step * 16 * 1024,
             "time": lambda run, step: run.training_seconds(step) / 60}[axis]  # fmt: skip
    assert list(curve.x) == [math.fsum(place(run, step) for run in runs) / 3 for step in gaps.steps]
    assert [list(y) for _, y in curve.behind] == [list(mean.values()) for mean in means]
