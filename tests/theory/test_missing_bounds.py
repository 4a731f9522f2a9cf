"""Numbers that a report must not print as bounds: Δ without a measured f(θ¹), and σ² that rounding hides."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lion.cli import main
from megatron_lion.runs.series import Series
from megatron_lion.theory.estimate import estimate_gap
from megatron_lion.theory.probe_noise import read_probe_noise
from megatron_lion.theory.rate_report import advice_section
from megatron_lion.theory.rates import late_growth

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from theory_coverage import Scenario, simulate


@pytest.fixture(scope="module")
def run():
    """A simulated run with frozen probes at steps 0, 50, 100, 150 and 200."""
    return simulate(Scenario(name="", steps=200), 1, 0).records[0]


def later(series):
    return Series(series.steps[1:], series.values[1:])


def without_first_probe(run):
    found = {key: later(series) if key.startswith("probe/") else series for key, series in run.metrics.items()}
    return replace(run, metrics=found)


def without_first_loss(run):
    return replace(run, metrics={**run.metrics, "probe/loss": later(run.metrics["probe/loss"])})


def moving(run):
    steps = run.metrics["probe/loss"].steps
    return replace(run, metrics={**run.metrics, "probe/is_moving": Series(steps, (1.0,) * len(steps))})


@pytest.mark.parametrize(
    ("change", "reason", "step"),
    [
        (without_first_probe, "the first probe is at step 50, not 0", 50),
        (without_first_loss, "the first probe, at step 0, has no loss", 50),
        (moving, "the first probe is a window of training steps, not frozen", 0),
    ],
)
def test_delta_has_an_upper_bound_only_if_the_start_was_measured(run, change, reason, step):
    assert estimate_gap(run).high_bound is not None
    other = change(run)
    found = estimate_gap(other)
    assert (found.high_bound, found.not_start, found.first_step) == (None, reason, step)
    assert 0 < found.low_bound < found.low
    text = advice_section(other, 1000)
    assert f"95% lower bound {found.low_bound:.4g}; no upper bound, because {reason}. The loss at step {step}" in text
    assert "Δ between" not in text
    assert f"Δ {found.low_bound:.3g} gives β₁ = β₂" in text


def test_one_late_probe_has_no_effect_of_a_bound_of_zero(run):
    """Its lower bound is 0 and it has no upper one, so there is no setting to report for them."""
    late = replace(run, metrics={**run.metrics, "probe/loss": Series((200,), (5.0,))})
    text = advice_section(late, 1000)
    assert "Δ at least 0 (f* = smallest loss probed), or 5 with f* = 0" in text
    assert "; Δ " not in text.split("The 95% ends")[1]


def with_noise(run, value, error):
    """The run with another σ² at its second probe."""
    steps = run.metrics["probe/noise_variance"].steps
    changes = {"probe/noise_variance": value, "probe/noise_variance_standard_error": error}
    noise = {key: Series(steps, (0.5, number, *(0.5,) * (len(steps) - 2))) for key, number in changes.items()}
    return replace(run, metrics={**run.metrics, **noise})


@pytest.mark.parametrize(("value", "error"), [(0.0, 0.0), (-1e-9, 0.0), (-1e-9, 1e-9)])
def test_the_reason_for_no_interval_is_rounding_if_every_probe_has_an_error(run, value, error):
    """As for identical batches: σ² is then 0 or, in records of earlier versions, the rounding error of the norms."""
    other = with_noise(run, value, error)
    assert read_probe_noise(other).interval() is None
    text = advice_section(other, 1000)
    assert "no interval, because the batches of the probe at step 50 do not differ by more than rounding" in text
    assert f"(σ² {value:.3g})" in text
    assert "no standard error" not in text


def test_a_probe_of_all_batches_has_an_exact_variance(run):
    """Its error is 0, and the interval of the largest σ² rests on the other probes."""
    other = with_noise(run, 1.0, 0.0)
    found = read_probe_noise(other).interval()
    assert found.low >= 1.0
    assert found.high >= 1.0


def test_late_growth_is_the_jackknife_of_the_logarithm():
    steps = np.arange(0, 64, 7.0)
    curves = (steps + 1) ** -0.4 * np.random.default_rng(2).uniform(0.8, 1.2, (3, len(steps)))

    def growth(rows):
        k = np.arange(1, 65)
        sums = np.cumsum(np.interp(k, steps + 1, rows.mean(axis=0)))
        return np.log(64**-0.75 * sums[63] / (32**-0.75 * sums[31]))

    found = late_growth([(steps, row) for row in curves])
    left_out = np.array([growth(np.delete(curves, row, axis=0)) for row in range(3)])
    error = np.sqrt(2 / 3 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.estimate == pytest.approx(growth(curves))
    assert found.high - found.estimate == pytest.approx(4.302653 * error)
    for few in ([(steps, curves[0])], [(steps[:1], row[:1]) for row in curves], [(steps, 0 * row) for row in curves]):
        assert late_growth(few).low is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--dimension", "0"), ("--gap", "-1"), ("--smoothness", "-7"), ("--noise-variance", "0"), ("--steps", "0"),
     ("--confidence", "1")],
)  # fmt: skip
def test_a_number_outside_its_range_is_reported_by_its_flag(flag, value, capsys):
    numbers = {"--steps": "9", "--smoothness": "1", "--noise-variance": "1", "--gap": "1", "--dimension": "4"}
    words = [word for pair in {**numbers, flag: value}.items() for word in pair]
    assert main(["theory", *words]) == 2
    assert f"megatron-lion: {flag} is {value}: give a number " in capsys.readouterr().err
