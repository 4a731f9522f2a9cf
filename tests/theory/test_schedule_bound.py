"""The bound for a changing learning rate and noise: its definition, the constant case, and simulated runs of LION."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_lion.theory.bounds import any_settings
from megatron_lion.theory.schedule_bound import schedule_bound

PAIRS = ((0.9, 0.99), (0.9, 0.95), (0.99, 0.9))
STARTS = (None, 3.0)


@pytest.mark.parametrize("norm", STARTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_constant_settings_give_the_bound_for_any_settings(pair, norm):
    problem = {"beta1": pair[0], "beta2": pair[1], "L": 3.0, "gap": 7.0, "d": 11, "first_grad_l2": norm}
    found = schedule_bound(np.full(400, 0.02), sigma=1.5, **problem).total
    expected = any_settings(np.arange(1, 401), lr=0.02, sigma=1.5, exact=True, **problem)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("norm", STARTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_sum_is_that_of_unit_vectors_sent_through_the_two_averages(pair, norm):
    """Each ξ^t is a unit vector times σ_t, each change of ∇f points in one direction, and m⁰ − ∇f(θ¹) in another."""
    rng, K, d, L, gap, reach = np.random.default_rng(5), 30, 6, 2.0, 4.0, 0.25
    lr, sigma = rng.uniform(0, 0.1, K), rng.uniform(0.1, 2, K)
    beta1, beta2 = pair
    noise, moved = np.diag(sigma), np.concatenate([[0.0], np.cumsum(L * math.sqrt(d) * (1 + reach) * lr)[:-1]])
    first = np.zeros(K) if norm is not None else noise[0]
    momentum, momentum_moved, bias = first, 0.0, 0.0 if norm is None else norm
    summed = 0.0
    for k in range(K):
        error = math.hypot(np.linalg.norm(beta1 * momentum + (1 - beta1) * noise[k]), beta1 * bias)
        drift = abs(beta1 * momentum_moved + (1 - beta1) * moved[k] - moved[k])
        summed += lr[k] * (2 * math.sqrt(d) * (error + drift) + 0.5 * L * d * (1 + reach) ** 2 * lr[k])
        momentum = beta2 * momentum + (1 - beta2) * noise[k]
        momentum_moved, bias = beta2 * momentum_moved + (1 - beta2) * moved[k], beta2 * bias
    found = schedule_bound(
        lr, beta1=beta1, beta2=beta2, L=L, sigma=sigma, gap=gap, d=d, first_grad_l2=norm, reach=reach
    )
    assert found.total[-1] == pytest.approx((gap + summed) / lr.sum(), rel=1e-12)


def cosine(K, warmup):
    k = np.arange(K)
    return np.where(k < warmup, k / warmup, 0.5 * (1 + np.cos(np.pi * (k - warmup) / (K - warmup))))


@pytest.mark.parametrize("pair", PAIRS)
def test_weighted_means_of_simulated_runs_stay_below_the_bound(pair):
    """A quadratic with a warm-up, a cosine and noise that falls; m⁰ = 0, as in training."""
    d, K, runs, L, decay = 10, 300, 100, 2.0, 0.2
    curvature, rng = np.linspace(0.2, L, d), np.random.default_rng(2)
    lr, sigma = 0.05 * cosine(K, 20), np.linspace(3.0, 0.5, K)
    theta, exp_avg, residuals = np.full((runs, d), 3.0), np.zeros((runs, d)), []
    gap, norm, reach = 0.5 * curvature.sum() * 9, 3 * float(np.linalg.norm(curvature)), 0.0
    for k in range(K):
        true = curvature * theta
        residuals.append(float((decay * (true * theta).sum(axis=1) + np.abs(true).sum(axis=1)).mean()))
        reach = max(reach, decay * float(np.abs(theta).max()))
        grad = true + rng.standard_normal((runs, d)) * sigma[k] / math.sqrt(d)
        direction = pair[0] * exp_avg + (1 - pair[0]) * grad
        theta = theta - lr[k] * (np.sign(direction) + decay * theta)
        exp_avg = pair[1] * exp_avg + (1 - pair[1]) * grad
    weighted = np.cumsum(lr * residuals)[1:] / np.cumsum(lr)[1:]
    problem = {"beta1": pair[0], "beta2": pair[1], "L": L, "gap": gap, "d": d, "first_grad_l2": norm}
    loose = schedule_bound(lr, sigma=3.0, **problem).total[1:]
    sharp = schedule_bound(lr, sigma=sigma, reach=reach, **problem).total[1:]
    assert np.all(weighted < sharp)
    assert np.all(sharp < loose)
    assert sharp[-1] < 20 * weighted[-1], "a bound this loose would no longer test the summands"


def test_steps_of_rate_zero_carry_no_weight():
    problem = {"beta1": 0.9, "beta2": 0.99, "L": 1.0, "sigma": 1.0, "gap": 1.0, "d": 3, "first_grad_l2": 1.0}
    found = schedule_bound([0.0, 0.0, 0.1], **problem).total
    assert np.isinf(found[:2]).all()
    assert np.isfinite(found[2])
    assert schedule_bound([0.1, 0.0], **problem).total[1] == schedule_bound([0.1, 0.0], **problem).total[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": []}, r"shapes \(0,\) and \(\): expected"),
        ({"lr": 0.1}, r"shapes \(\) and"),
        ({"sigma": [1.0]}, r"shapes \(2,\) and \(1,\): expected"),
        ({"reach": -1.0}, "reach = -1"),
        ({"beta2": 1.0}, "beta2 = 1: expected a number in"),
    ],
)
def test_schedule_bound_refuses(change, message):
    values = {"lr": [0.1, 0.1], "beta1": 0.9, "beta2": 0.9, "L": 1.0, "sigma": 1.0, "gap": 1.0, "d": 1} | change
    with pytest.raises(ValueError, match=message):
        schedule_bound(values.pop("lr"), **values)
