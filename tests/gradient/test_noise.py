"""Estimates of gradient noise, their standard errors, and bounds on the noise-free norm ratio."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from fake_model import Whole, measured, noise_sd, norms_of, signal
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.noise import estimate_noise, make_rung, rungs_of, unseen
from megatron_lion.gradient.norms import GAUSSIAN_RATIO
from megatron_lion.intervals import t_quantile


def draws(shape, n, share, *, repeats, d=4000, seed=0, population=None):
    """(gradient, noise variance of a batch, estimates) over `repeats` probes of n batches."""
    generator = torch.Generator().manual_seed(seed)
    clean = signal(shape, d, generator)
    sd = noise_sd(share, n, d)
    found = []
    for _ in range(repeats):
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * sd
        found.append(measured((clean + noise).float())[0])
    return clean, sd * sd * d, found


def inside(value, error, groups, truth):
    return abs(value - truth) <= t_quantile(groups - 1) * error


@examples(10)
@given(n=st.integers(4, 70), share=st.floats(0.02, 0.9), seed=st.integers(0, 10**6))
def test_estimates_are_unbiased(n, share, seed):
    """30 probes: their mean is within five of its standard errors of the truth."""
    _, variance, found = draws("dense", n, share, repeats=30, d=400, seed=seed)
    for values, truth in (
        ([e.noise_variance for e in found], variance),
        ([e.signal_l2_squared for e in found], 1.0),
    ):
        values = torch.tensor(values, dtype=torch.float64)
        assert abs(float(values.mean()) - truth) < 5 * float(values.std()) / math.sqrt(30) + 1e-5


@pytest.mark.parametrize(
    ("n", "share"), [(4, 0.3), (8, 0.1), (32, 0.5), pytest.param(100, 0.2, marks=pytest.mark.slow)]
)
def test_intervals_of_noise_and_signal_hold_the_truth(n, share):
    """95 % intervals of 200 probes: at least 90 % hold the truth, and at most 99.5 %, so errors are not overstated."""
    _, variance, found = draws("sparse", n, share, repeats=200, d=600, seed=n)
    groups = found[0].num_groups
    assert groups == {4: 4, 8: 8, 32: 32, 100: 25}[n]
    scale = variance * 8
    for name, truth in (("noise_variance", variance), ("signal", 1.0), ("noise_scale", scale)):
        value = {"signal": "signal_l2_squared", "noise_scale": "noise_scale_samples"}.get(name, name)
        held = [inside(getattr(e, value), getattr(e, f"{name}_standard_error"), groups, truth) for e in found]
        assert 0.90 <= sum(held) / 200 <= 0.995, name


def test_twice_the_standard_error_is_about_95_percent_with_many_groups():
    _, variance, found = draws("heavy", 32, 0.3, repeats=200, d=600)
    for name, value, truth in (
        ("noise_variance", "noise_variance", variance),
        ("signal", "signal_l2_squared", 1.0),
    ):
        held = [abs(getattr(e, value) - truth) <= 2 * getattr(e, f"{name}_standard_error") for e in found]
        assert 0.90 <= sum(held) / 200 <= 0.99, name
        stated = sum(getattr(e, f"{name}_standard_error") for e in found) / 200
        spread = float(torch.tensor([getattr(e, value) for e in found], dtype=torch.float64).std())
        assert 0.85 * spread < stated < 1.2 * spread


@pytest.mark.parametrize("shape", ["dense", "sparse", "heavy"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_bounds_hold_the_noise_free_ratio(shape, share):
    """Of a sparse gradient r/√d is 0.1, and the measured r at 10 % noise is 0.34: the bounds must reach down to it."""
    clean, _, found = draws(shape, 16, share, repeats=60, d=4000)
    true = float(clean.abs().sum())
    held = 0
    for e in found:
        assert e.is_resolved
        quantile = t_quantile(e.num_groups - 1)
        low = e.norm_ratio_low - quantile * e.norm_ratio_low_standard_error
        high = e.norm_ratio_high + quantile * e.norm_ratio_high_standard_error
        held += low <= true <= high
        assert e.norm_ratio_low <= e.norm_ratio_high <= math.sqrt(4000)
    assert held >= 56
    if shape == "sparse":
        mean_low = sum(e.norm_ratio_low for e in found) / 60
        assert mean_low == pytest.approx(true, rel=0.1), "for a sparse gradient the lower bound is the value"


def test_the_lower_bound_holds_for_rows_that_are_rarely_touched():
    """A few coordinates in every batch, the others in one batch of 200: their noise is not Gaussian at any n here."""
    generator = torch.Generator().manual_seed(0)
    d, n = 8000, 32
    share = torch.full((d,), 0.005, dtype=torch.float64)
    share[:40] = 1.0
    mean = 0.02 * torch.randn(d, generator=generator, dtype=torch.float64)
    mean[:40] = 1.0
    true = float((share * mean).abs().sum() / (share * mean).norm())
    for _ in range(10):
        values = mean + torch.randn(n, d, generator=generator, dtype=torch.float64)
        touched = torch.rand(n, d, generator=generator, dtype=torch.float64) < share
        estimate, ladder = measured((touched * values).float())
        assert ladder[-1].norm_ratio > 1.5 * true
        assert estimate.norm_ratio_low - 3 * estimate.norm_ratio_low_standard_error < true < estimate.norm_ratio_high


@pytest.mark.parametrize("n", [8, 24, 36])
def test_the_bounds_of_a_part_of_a_data_set_hold_those_of_the_whole(n):
    generator = torch.Generator().manual_seed(7)
    data = signal("sparse", 1000, generator) + 0.15 * torch.randn(40, 1000, generator=generator, dtype=torch.float64)
    exact = data.mean(0)
    true = float(exact.abs().sum() / exact.norm())
    found = [measured(data[torch.randperm(40, generator=generator)[:n]].float(), population=40)[0] for _ in range(40)]
    low = torch.tensor([e.norm_ratio_low for e in found], dtype=torch.float64)
    assert float(low.mean()) < true
    assert float(low.mean()) > {8: 0.3, 24: 0.7, 36: 0.9}[n] * true
    assert all(e.norm_ratio_low <= e.norm_ratio_high for e in found)
    assert sum(e.norm_ratio_high for e in found) / 40 > true


def test_the_error_of_the_lower_bound_is_not_too_small_and_at_most_twice_its_scatter():
    for n, shape, share in ((8, "sparse", 0.3), (32, "heavy", 0.1)):
        _, _, found = draws(shape, n, share, repeats=100, d=1000)
        spread = float(torch.tensor([e.norm_ratio_low for e in found], dtype=torch.float64).std())
        stated = sum(e.norm_ratio_low_standard_error for e in found) / 100
        assert 0.9 * spread < stated < 2.3 * spread


def odd_batches(n):
    """By name: gradients of n batches for which some estimate divides by zero or is not finite."""
    normal = torch.randn(n, 50, generator=torch.Generator().manual_seed(n))
    one, nan = torch.zeros(n, 50), normal.clone()
    one[0], nan[1, 3] = normal[0], math.nan
    zero = normal.clone()
    zero[n - 1] = 0.0
    opposite = torch.cat([normal[: n // 2], -normal[: n // 2], torch.zeros(n % 2, 50)])
    return {
        "zero": torch.zeros(n, 50), "not a number": torch.full((n, 50), math.nan), "one value is not": nan,
        "infinite": normal / 0, "all in one batch": one, "one batch of zero": zero, "a mean of zero": opposite,
    }  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4, 8, 33])
@pytest.mark.parametrize("name", list(odd_batches(2)))
def test_zero_and_not_finite_gradients_give_finite_figures_or_none(name, n):
    estimate, ladder = measured(odd_batches(n)[name])
    assert estimate is not None or name not in ("all in one batch", "one batch of zero")
    values = [rung.norm_ratio_standard_error for rung in ladder]
    values += [] if estimate is None else vars(estimate).values()
    assert all(value is None or math.isfinite(value) for value in values)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("n", [4, 7, 33])
def test_equal_batches_have_no_noise(n, scale):
    """Rounding of their fp32 sums is not noise, and above all not negative."""
    batch = scale * torch.randn(1000, generator=torch.Generator().manual_seed(n))
    estimate, _ = measured(batch.repeat(n, 1))
    assert estimate.noise_variance == estimate.noise_variance_standard_error == estimate.noise_share == 0.0
    assert estimate.is_resolved
    assert estimate.norm_ratio_low == pytest.approx(estimate.norm_ratio_high, rel=1e-5)


def test_a_gradient_beside_all_sampled_coordinates_has_no_bounds():
    """‖·‖₁ of the sample is then 0."""
    groups = GroupedBatches(Whole(50), 8)
    groups.sketch.l1 = lambda vector: torch.zeros((), dtype=torch.float64)
    batches = 1 + 0.1 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        groups.add(batch.clone(), 1)
    norms, found = norms_of(batches.mean(0)), groups.finish(rungs_of(8))
    estimate = estimate_noise(found, norms, batch_samples=1)
    assert estimate.is_resolved
    assert estimate.norm_ratio_low is None
    assert make_rung(8, norms, found).norm_ratio_standard_error is None


def test_pure_noise_is_called_noise_and_shows_the_gaussian_ratio():
    generator = torch.Generator().manual_seed(1)
    estimate, ladder = measured(torch.randn(64, 20000, generator=generator))
    assert estimate.noise_share == pytest.approx(1.0, abs=0.05)
    assert estimate.is_resolved is False
    assert estimate.norm_ratio_low is None
    assert ladder[-1].norm_ratio_over_sqrt_d == pytest.approx(GAUSSIAN_RATIO, abs=0.01)


def test_a_clear_signal_is_resolved():
    _, _, found = draws("dense", 8, 0.1, repeats=20, d=1000)
    assert all(e.is_resolved is True for e in found)


def test_fewer_than_four_batches_give_no_error():
    for n in (2, 3):
        estimate, ladder = measured(torch.randn(n, 50, generator=torch.Generator().manual_seed(0)))
        assert estimate.noise_variance > 0
        assert estimate.noise_variance_standard_error is None
        assert estimate.is_resolved is None
        assert [rung.norm_ratio_standard_error for rung in ladder] == [None] * len(ladder)
    assert measured(torch.ones(1, 50))[0] is None


def test_the_ladder_states_an_error_and_its_groups_on_every_rung_that_has_enough():
    """16 batches: groups of 1, 2 and 4 are disjoint; the errors at 8 and 16 leave out one of 8 and 16 batches."""
    generator = torch.Generator().manual_seed(2)
    batches = 0.1 + torch.randn(16, 3000, generator=generator)
    _, ladder = measured(batches)
    assert [(rung.num_batches, rung.num_groups) for rung in ladder] == [(1, 16), (2, 8), (4, 4), (8, 8), (16, 16)]
    assert all(rung.norm_ratio_standard_error > 0 for rung in ladder)
    ratios = batches.double().norm(p=1, dim=1) / batches.double().norm(dim=1)
    expected = float(ratios.std() / ratios.mean()) * ladder[0].norm_ratio
    assert ladder[0].norm_ratio_standard_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "share", "n"),
    [("dense", 0.03, 8), ("heavy", 0.03, 40), pytest.param("sparse", 0.3, 100, marks=pytest.mark.slow)],
)
def test_the_error_of_the_reported_ratio_is_the_scatter_of_new_batches(shape, share, n):
    """The mean stated error of r(n) over 100 probes is 1 to 1.7 times the scatter of r(n) between them.

    The jackknife overstates the variance of a function with a curvature (Efron and Stein 1981), here of |·| at 0.
    """
    generator = torch.Generator().manual_seed(n)
    clean, sd = signal(shape, 1000, generator), noise_sd(share, n, 1000)
    reported = []
    for _ in range(100):
        noise = torch.randn(n, 1000, generator=generator, dtype=torch.float64) * sd
        reported.append(measured((clean + noise).float())[1][-1])
    stated = sum(rung.norm_ratio_standard_error for rung in reported) / 100
    spread = float(torch.tensor([rung.norm_ratio for rung in reported], dtype=torch.float64).std())
    assert 0.9 * spread < stated < 1.75 * spread


def test_all_batches_of_a_data_set_leave_no_noise_and_half_of_them_half():
    generator = torch.Generator().manual_seed(5)
    data = signal("dense", 800, generator) + torch.randn(40, 800, generator=generator, dtype=torch.float64) * 0.1
    exact = data.mean(0)
    variance = float((data - exact).square().sum() / 39)
    estimate, ladder = measured(data.float(), population=40)
    assert estimate.noise_share == 0.0
    assert estimate.grad_l2_corrected == pytest.approx(float(exact.norm()), rel=1e-5)
    assert estimate.noise_variance == pytest.approx(variance, rel=1e-4)
    assert estimate.noise_variance_standard_error == 0.0
    assert ladder[-1].norm_ratio_standard_error == 0.0
    assert estimate.norm_ratio_low == pytest.approx(estimate.norm_ratio_high, rel=1e-6)
    errors, shares = [], []
    for _ in range(200):
        part = data[torch.randperm(40, generator=generator)[:20]]
        half = measured(part.float(), population=40)[0]
        errors.append(half.signal_l2_squared - float(exact.square().sum()))
        shares.append(half.noise_share * float(part.mean(0).square().sum()))
    assert abs(sum(errors) / 200) < 5 * float(torch.tensor(errors).std()) / math.sqrt(200)
    assert sum(shares) / 200 == pytest.approx(variance * (1 / 20 - 1 / 40), rel=0.03)


def test_batches_that_count_differently_are_weighed():
    """Sums over 10 to 90 tokens with equal noise per token: σ² is that of a batch with the mean count."""
    generator = torch.Generator().manual_seed(6)
    counts = torch.randint(10, 91, (24,), generator=generator).tolist()
    clean, per_token, found = signal("dense", 400, generator), 4.0, []
    for _ in range(200):
        scale = torch.tensor([math.sqrt(per_token / 400 / count) for count in counts], dtype=torch.float64)
        noise = torch.randn(24, 400, generator=generator, dtype=torch.float64) * scale[:, None]
        found.append(measured((clean + noise).float(), counts)[0])
    mean_count = sum(counts) / 24
    variance = sum(e.noise_variance for e in found) / 200
    assert variance == pytest.approx(per_token / mean_count, rel=0.01)
    left = torch.tensor([e.signal_l2_squared - 1.0 for e in found], dtype=torch.float64)
    assert abs(float(left.mean())) < 5 * float(left.std()) / math.sqrt(200)


@given(n=st.integers(1, 5000))
@examples(50)
def test_rungs_double_and_end_with_all(n):
    rungs = rungs_of(n)
    assert rungs[0] == 1
    assert rungs[-1] == n
    assert rungs == sorted(set(rungs))
    assert all(b == 2 * a for a, b in pairwise(rungs[:-1]))


@given(scale=st.floats(1e-6, 1e6))
@examples(10)
def test_ratios_do_not_depend_on_the_size_of_the_gradient(scale):
    batches = 0.6 + torch.randn(8, 100, generator=torch.Generator().manual_seed(3))
    (noise, ladder), (larger, larger_ladder) = measured(batches), measured(batches * scale)
    assert larger.noise_share == pytest.approx(noise.noise_share, rel=1e-3)
    assert larger.norm_ratio_low == pytest.approx(noise.norm_ratio_low, rel=1e-3)
    for rung, other in zip(ladder, larger_ladder, strict=True):
        assert other.norm_ratio_standard_error == pytest.approx(rung.norm_ratio_standard_error, rel=1e-3)


def test_unseen_is_the_share_of_the_data_set_that_was_not_read():
    assert unseen(30, 40.0) == 0.25
    assert unseen(41, 40.0) == 0.0  # the last batch may hold fewer samples than the others
    assert unseen(30, None) == 1.0
