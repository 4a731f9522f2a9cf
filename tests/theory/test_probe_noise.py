"""Estimates from the probes' own noise: coverage of their intervals on simulated runs, and what the reader accepts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lion.runs.series import Series
from megatron_lion.theory.estimate import estimate_gap, estimate_smoothness
from megatron_lion.theory.probe_noise import ProbeNoise, l2_norms, read_probe_noise
from megatron_lion.theory.rate_report import advice_section, rates_section
from megatron_lion.theory.rates import c_sgd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from theory_coverage import SCENARIOS, Scenario, measure, simulate

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
RUNS = 200


@pytest.fixture(scope="module")
def run():
    """A simulated run with all the numbers of frozen probes."""
    return simulate(Scenario(name="", steps=200), 1, 0).records[0]


def changed(run, settings=None, **metrics):
    """The run with other metrics, as Series, numbers for all steps, or None to remove one."""
    steps = run.need("probe/grad_l2").steps
    new = dict(run.metrics)
    for key, value in metrics.items():
        key = f"probe/{key}"
        if value is None:
            new.pop(key)
        else:
            new[key] = value if isinstance(value, Series) else Series(steps, (float(value),) * len(steps))
    return replace(run, metrics=new, settings={**run.settings, **(settings or {})})


@pytest.mark.parametrize(
    "name", ["moderate noise", "same samples in every probe", "4 batches a probe", "noise in 3 coordinates",
             "heavy-tailed coordinates", "σ² falls with the loss"]
)  # fmt: skip
def test_intervals_hold_in_simulated_runs(name):
    row = measure(BY_NAME[name], RUNS, 0)
    assert row["variance_holds"] >= 0.93
    assert row["smoothness_holds"] >= 0.95
    assert row["gap_holds"] >= 0.95
    assert 0.05 < row["smoothness_bound"] < row["smoothness_point"]


def test_the_estimates_that_they_replace_fail_in_the_same_runs():
    row = measure(BY_NAME["moderate noise"], RUNS, 0)
    assert row["variance_alone_holds"] >= 0.92
    assert row["training_2se"] < 0.93
    assert abs(row["training_mean"] - 1) > 0.2
    assert abs(row["variance_median"] - 1) < 0.02
    assert row["gap_low_holds"] < 0.95
    assert row["variance_largest"] > 1.05  # the largest of nine estimates of the same σ²
    close = measure(BY_NAME["probes every 2 steps, high noise"], RUNS, 0)
    assert close["smoothness_point_holds"] == 0
    assert close["smoothness_holds"] >= 0.95


def test_intervals_are_too_short_if_whole_batches_scatter_in_size():
    """docs/theory.md states this limit; the noise keeps its variance, and the interval of one probe misses it."""
    row = measure(BY_NAME["the same, s = 1, same samples"], RUNS // 2, 0)
    assert row["variance_median"] == pytest.approx(1, abs=0.2)
    assert row["variance_holds"] < 0.85
    assert row["variance_alone_holds"] < 0.85


def test_corrected_norms_bring_c_sgd_near_the_truth():
    row = measure(BY_NAME["starts near the minimum"], RUNS, 0)
    assert row["noise_share"] > 0.5
    assert row["sgd_raw"] > 2
    assert row["lion"] > 2
    assert row["sgd_corrected"] == pytest.approx(1, abs=0.1)


def test_ranges_of_the_norm_hold_for_noise_along_the_gradient():
    """The worst case of `norm_ranges`, where it has no slack: nominally 95 % of the runs, for all probes at once."""
    rng, B, grad = np.random.default_rng(0), 10, np.array([0.0, 0.3, 1.0, 3.0, 10.0])
    held = 0
    for _ in range(RUNS * 5):
        singles = grad[:, None] + rng.standard_normal((len(grad), B))
        values, mean = singles.var(axis=1, ddof=1), singles.mean(axis=1)
        full = np.full(len(grad), float(B))
        low, high = ProbeNoise(grad, values, full, full - 1, full, values / B, abs(mean), mean**2).norm_ranges()
        held += bool(np.all((low <= grad) & (grad <= high)))
    assert held / (RUNS * 5) >= 0.93


def test_interval_of_a_single_probe_is_students_t_of_its_logarithm():
    fields = (0.0, 2.0, 0.2, 4.0, 10.0, 0.2, 1.0, 0.8)  # σ² = 2 ± 0.2 with 4 degrees of freedom
    noise = ProbeNoise(*(np.array([field]) for field in fields))
    interval = noise.interval(0.95)
    assert interval.low == pytest.approx(2 * np.exp(-2.7764451 * 0.1))
    assert interval.high == pytest.approx(2 * np.exp(2.7764451 * 0.1))
    assert (interval.estimate, interval.count) == (2.0, 5)
    assert noise.interval(0.5).high < interval.high


def test_reader_takes_only_what_frozen_probes_of_several_batches_wrote(run):
    noise = read_probe_noise(run)
    assert noise.steps.tolist() == [0, 50, 100, 150, 200]
    assert noise.freedom.tolist() == [19] * 5
    np.testing.assert_allclose(noise.mean_variance, noise.values / 20)
    np.testing.assert_allclose(noise.signal_l2_squared, run.need("probe/grad_l2_corrected").arrays()[1] ** 2)
    assert read_probe_noise(changed(run, noise_variance=None)) is None
    assert read_probe_noise(changed(run, num_batches=1)) is None
    for missing in ("noise_variance_standard_error", "noise_groups"):
        other = read_probe_noise(changed(run, **{missing: None}))
        assert other.interval() is None
        assert other.largest == noise.largest
        assert estimate_smoothness(run, other).bound == pytest.approx(estimate_smoothness(run, noise).bound)
    older = read_probe_noise(changed(run, grad_l2_corrected=None, noise_share=None))
    np.testing.assert_allclose(older.signal_l2_squared, noise.signal_l2_squared)


def test_a_probe_of_the_whole_data_set_has_an_exact_norm(run):
    """The noise share is 0 there, although a batch has the variance σ²."""
    noise = read_probe_noise(changed(run, noise_share=0, grad_l2_corrected=run.need("probe/grad_l2")))
    low, high = noise.norm_ranges()
    np.testing.assert_allclose(low, run.need("probe/grad_l2").arrays()[1])
    np.testing.assert_allclose(high, low)
    assert noise.interval() is not None


def test_gap_without_standard_errors_or_later_probes(run):
    full = estimate_gap(run)
    assert 0 <= full.low_bound < full.low < full.high < full.high_bound
    assert estimate_gap(run, 0.5).high_bound < full.high_bound
    assert estimate_gap(changed(run, loss_standard_error=None)).low_bound is None
    one = estimate_gap(changed(run, loss=Series((0,), (5.0,))))
    assert (one.low, one.low_bound) == (0.0, 0.0)
    assert one.high_bound > 5


def test_c_sgd_uses_the_corrected_norm_of_each_probe_that_has_one(run):
    steps, norms, count = l2_norms(run)
    raw, better = (run.need(f"probe/{key}").arrays()[1] for key in ("grad_l2", "grad_l2_corrected"))
    assert count == len(steps) == 5
    assert np.array_equal(norms, better)
    part = changed(run, grad_l2_corrected=Series((0, 50), tuple(better[:2].tolist())))
    assert l2_norms(part)[1].tolist() == [*better[:2], *raw[2:]]
    assert "c_SGD uses ‖∇f‖₂ without the noise of the probes" in rates_section([run], "linear", 0.95)
    assert "c_SGD uses probe/grad_l2_corrected at 2 of 5 probes" in rates_section([part], "linear", 0.95)
    near = simulate(BY_NAME["starts near the minimum"], 1, 0).records[0]  # the two norms differ most there
    steps, norms, _ = l2_norms(near)
    assert f"| c_SGD (‖∇f‖₂) | {c_sgd(steps, norms).value:.4g} |" in rates_section([near], "linear", 0.95)
    assert c_sgd(steps, norms).value < 0.6 * c_sgd(steps, near.need("probe/grad_l2").arrays()[1]).value
    shares = run.need("probe/noise_share").values
    assert f"largest {max(shares):.2g}." in rates_section([run], "linear", 0.95)


def test_report_has_intervals_and_their_effect(run):
    text = advice_section(run, 100_000)
    noise = read_probe_noise(run)
    assert (
        f"- σ² = {noise.largest:.4g}: the largest of 5 estimates of frozen probes (step {noise.largest_step};" in text
    )
    interval = noise.interval()
    assert f"95% interval of the largest σ² at the probes [{interval.low:.4g}, {interval.high:.4g}]" in text
    bound = estimate_smoothness(run, noise)
    assert f"L estimated from below: {bound.low:.4g}" in text
    assert f"with 95% confidence L ≥ {bound.bound:.4g}" in text
    gap = estimate_gap(run)
    assert f"95% bounds {gap.low_bound:.4g} and {gap.high_bound:.4g}" in text
    assert (
        f"The 95% ends, one at a time in the first row: σ² {interval.low:.3g} to {interval.high:.3g} gives β₁" in text
    )
    assert f"; L {bound.bound:.3g} to {bound.low:.3g} gives β₁" in text
    assert "dropout" not in text
    half = advice_section(run, 100_000, confidence=0.5)
    wider, nearer = estimate_smoothness(run, noise, 0.5), estimate_gap(run, 0.5)
    assert wider.bound > bound.bound
    assert f"interval of the largest σ² at the probes [{noise.interval(0.5).low:.4g}," in half
    assert f"with 50% confidence L ≥ {wider.bound:.4g}" in half
    assert f"50% bounds {nearer.low_bound:.4g} and {nearer.high_bound:.4g}" in half
    given = advice_section(run, 100_000, smoothness=3.0, noise_variance=0.5, gap=20.0)
    assert "The 95% ends" not in given
    assert "no interval, because a probe has no standard error" in advice_section(changed(run, noise_groups=None), 10)
    flat = advice_section(changed(run, noise_variance=1e6, noise_share=1), 10)
    assert "no 95% bound above 0, because the norms do not differ by more than their noise" in flat
    assert "; L " not in flat.split("The 95% ends")[1]


@pytest.mark.parametrize(
    ("settings", "moving", "text"),
    [
        ({"model.hidden_dropout": 0.1, "model.attention_dropout": 0.0}, False,
         "- Training used dropout (hidden 0.1), the probes did not: g also has the noise of dropout, which is not in this σ²"),
        ({"model.hidden_dropout": 0.1, "model.attention_dropout": 0.2, "probe.dropout": True}, False,
         "- Training and probes used dropout (hidden 0.1, attention 0.2): its noise is in this σ²"),
        ({"model.hidden_dropout": 0.1}, True, "- Training and probes used dropout (hidden 0.1)"),
        ({"probe.data": "test"}, False, "- The probes used the test split"),
    ],
)  # fmt: skip
def test_report_states_conditions_of_the_noise(run, settings, moving, text):
    dropped = changed(run, settings)
    if moving:
        dropped = moving_run(settings)
    assert text in advice_section(dropped, 1000)


def test_report_states_that_moving_windows_have_no_noise_estimate():
    text = advice_section(moving_run({}), 1000)
    assert (
        "because the probes are moving windows; no interval, because the error of the interpolation is not known"
        in text
    )
    assert "no confidence bound, because the records have no noise estimate of the probes" in text


def moving_run(settings):
    """A run near its minimum, where training norms determine σ², with the keys of moving windows."""
    run = simulate(BY_NAME["starts near the minimum"], 1, 0).records[0]
    missing = ("noise_variance", "noise_variance_standard_error", "noise_groups", "noise_share", "grad_l2_corrected")
    return changed(run, settings, is_moving=1, **dict.fromkeys(missing))
