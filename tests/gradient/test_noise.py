"""The coordinate sample of a probe, and the estimates of gradient noise that are computed from it."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import probe_config
from properties import examples
from tiny import opened_run

from megatron_lion.gradient.coordinate_sample import CoordinateSample, Group, _spread
from megatron_lion.gradient.noise import estimate_noise, make_rung, mccandlish, rungs_of
from megatron_lion.gradient.norms import GAUSSIAN_RATIO, GradientNorms


def sampled(rank, config, size):
    """Work of one process: estimates from a small sample, and exact norms of the running mean."""
    from megatron_lion.gradient.accumulate import FullGradient

    with opened_run(config) as run:
        sample = CoordinateSample(run.model, size)
        batches = run.probe_batches()
        settings = {"micro_batch_size": 1, "seq_length": 16, "vocab_size": 120}
        with FullGradient(
            run.model, run.optimizer, run.forward_step, run.ranks,
            num_microbatches=config.num_microbatches(run.ranks.world_size), sample=sample, **settings,
        ) as full:  # fmt: skip
            reads = []
            for _ in range(4):
                assert not full.add(batches), "no process was asked to stop"
                reads.append(full.read().norms())
            groups, whole = sample.groups()
        return [vars(group) for group in groups], vars(whole), [norms.as_dict() for norms in reads], sample.fraction


@pytest.mark.parametrize(
    ("size", "changes"),
    [(1, {}), (4, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True})],
    ids=["DP1", "TP2xDP2 SP"],
)
def test_small_sample_estimates_the_whole(tmp_path, corpus, size, changes):
    config = probe_config(tmp_path / "run", corpus, probe__num_batches=4, **changes)
    groups, whole, exact, fraction = run_distributed(sampled, size, config, 8000)[0]
    assert 0.2 < fraction < 0.75
    assert [group["level"] for group in groups] == [0, 0, 1, 0, 0, 1, 2]
    assert whole["l1"] == pytest.approx(exact[-1]["grad_l1"], rel=0.05)
    assert whole["squares"] == pytest.approx(exact[-1]["grad_l2"] ** 2, rel=0.15)
    # the first batch and the first two are also prefixes, for which the exact norms are known
    for group, norms in ((groups[0], exact[0]), (groups[2], exact[1]), (groups[6], exact[3])):
        assert group["l1"] == pytest.approx(norms["grad_l1"], rel=0.05)
        assert group["squares"] == pytest.approx(norms["grad_l2"] ** 2, rel=0.15)
    # ‖a + b‖² = ‖a‖² + ‖b‖² + 2⟨a, b⟩ ties the levels together exactly
    for a, b, both in ((0, 1, 2), (3, 4, 5), (2, 5, 6)):
        left = groups[a]["squares"] + groups[b]["squares"] + 2 * groups[both]["dot"]
        assert left == pytest.approx(4 * groups[both]["squares"], rel=1e-5)


def simulated_groups(n, d, signal_std, noise_std, generator):
    signal = torch.randn(d, generator=generator, dtype=torch.float64) * signal_std
    batches = signal + torch.randn(n, d, generator=generator, dtype=torch.float64) * noise_std
    groups, level = [], 0
    while 1 << level <= n:
        size = 1 << level
        means = [batches[start : start + size].mean(0) for start in range(0, n - size + 1, size)]
        halves = [
            (batches[s : s + size // 2].mean(0), batches[s + size // 2 : s + size].mean(0))
            for s in range(0, n - size + 1, size)
        ]
        for mean, (a, b) in zip(means, halves, strict=True):
            dot = float(a @ b) if level else None
            groups.append(Group(level, float(mean.abs().sum()), float(mean.square().sum()), size, dot))
        level += 1
    mean = batches.mean(0)
    whole = Group(-1, float(mean.abs().sum()), float(mean.square().sum()), n, None)
    norms = GradientNorms(whole.l1, math.sqrt(whole.squares), float(mean.abs().max()), 0.0, None, 0.0, None, d)
    return signal, groups, whole, norms


@examples(15)
@given(n=st.integers(8, 40), noise=st.floats(0.5, 10.0), seed=st.integers(0, 10**6))
def test_noise_estimates_are_unbiased(n, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(30):
        signal, groups, whole, norms = simulated_groups(n, 400, 1.0, noise, generator)
        estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
        assert estimate.noise_variance == pytest.approx(400 * noise**2, rel=6 * math.sqrt(2 / (400 * (n - 1))))
        errors.append(estimate.signal_l2_squared - float(signal.square().sum()))
    mean, error = sum(errors) / 30, float(torch.tensor(errors).std()) / math.sqrt(30)
    assert abs(mean) < 5 * error


def test_pure_noise_is_called_noise_and_shows_the_gaussian_ratio():
    generator = torch.Generator().manual_seed(1)
    _, groups, whole, norms = simulated_groups(64, 20000, 0.0, 1.0, generator)
    estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
    assert estimate.noise_share == pytest.approx(1.0, abs=0.05)
    assert estimate.is_resolved is False
    assert norms.norm_ratio_over_sqrt_d == pytest.approx(GAUSSIAN_RATIO, abs=0.01)
    rung = make_rung(1, norms, groups)
    assert rung.num_groups == 64


def test_standard_error_of_the_signal_covers_the_spread():
    generator = torch.Generator().manual_seed(2)
    errors, stated = [], []
    for _ in range(200):
        signal, groups, whole, norms = simulated_groups(32, 300, 1.0, 3.0, generator)
        estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
        errors.append(estimate.signal_l2_squared - float(signal.square().sum()))
        stated.append(estimate.signal_standard_error)
    spread, mean_stated = float(torch.tensor(errors).std()), sum(stated) / 200
    assert 0.7 * spread < mean_stated < 2.5 * spread


def test_one_batch_gives_no_noise_estimate():
    _, groups, whole, norms = simulated_groups(1, 50, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0) is None
    assert make_rung(1, norms, groups).norm_ratio_std is None


@given(n=st.integers(1, 5000))
@examples(50)
def test_rungs_double_and_end_with_all(n):
    rungs = rungs_of(n)
    assert rungs[0] == 1
    assert rungs[-1] == n
    assert rungs == sorted(set(rungs))
    assert all(b == 2 * a for a, b in pairwise(rungs[:-1]))


@given(signal=st.floats(0.1, 10), variance=st.floats(0, 100), small=st.integers(1, 5), factor=st.integers(2, 50))
@examples(50)
def test_mccandlish_inverts_its_model(signal, variance, small, factor):
    big = small * factor
    found = mccandlish(signal + variance / small, small, signal + variance / big, big)
    assert found == pytest.approx((signal, variance), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_ratios_do_not_depend_on_the_size_of_the_gradient(scale):
    """r = ‖ḡ‖₁ / ‖ḡ‖₂, and so its spread between groups, stays if every gradient is multiplied by a number."""
    _, groups, _, norms = simulated_groups(8, 100, 1.0, 2.0, torch.Generator().manual_seed(3))
    scaled = [Group(group.level, scale * group.l1, scale**2 * group.squares, group.count, None) for group in groups]
    larger = replace(norms, grad_l1=scale * norms.grad_l1, grad_l2=scale * norms.grad_l2)
    singles = [group.l1 / math.sqrt(group.squares) for group in groups if group.level == 0]
    rung = make_rung(1, larger, scaled)
    assert rung.num_groups == 8
    assert rung.norm_ratio_std == pytest.approx(
        statistics.stdev(singles) / statistics.fmean(singles) * norms.norm_ratio, rel=1e-9
    )


@given(numel=st.integers(1, 3000), share=st.floats(0.001, 1.0), key=st.text(max_size=3))
@examples(100)
def test_sampled_coordinates_lie_one_in_each_of_equal_intervals(numel, share, key):
    count = max(1, int(numel * share))
    index = _spread(numel, count, key).tolist()
    for number, place in enumerate(index):
        # Interval `number` is [number, number + 1) · numel / count; in whole numbers, so that nothing is rounded.
        assert number * numel <= (place + 1) * count - 1
        assert place * count < (number + 1) * numel
    assert _spread(numel, numel, key).tolist() == list(range(numel))
    assert _spread(numel, count, key).tolist() == index


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_error_of_the_signal_is_from_the_largest_groups_of_which_there_are_enough(best):
    """Inner products of larger halves are less noisy, and 4 of them are the least whose spread says something."""
    dots = [3.0, 4.0, 6.0, 7.0]
    groups = [Group(0, 1.0, 2.0, 1, None) for _ in range(8)]
    for level in (1, 2, 3, 4):
        values = dots if level == best else [100.0 * level] * (8 if level < best else 3)
        groups += [Group(level, 1.0, 1.0, 1, value + number * (level != best)) for number, value in enumerate(values)]
    norms = GradientNorms(2.0, 1.0, 1.0, 0.0, None, 0.0, None, 10)
    estimate = estimate_noise(groups, Group(-1, 1.0, 1.0, 8, None), norms, batch_samples=1, sampled_fraction=1.0)
    assert estimate.signal_standard_error == pytest.approx(statistics.stdev(dots) / 2, rel=1e-12)
