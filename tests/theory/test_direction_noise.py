"""The noise in LION's update direction: its exact size, and how far Lemma 6's summand exceeds it."""

from __future__ import annotations

import math

import numpy as np
import pytest


def exact(beta1, beta2):
    """Root mean square of c^k − ∇f in units of σ, for a constant ∇f, independent noise and large k."""
    return math.sqrt((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2))


def lemma6_summand(beta1, beta2):
    """The noise summand of Lemma 6 in units of σ."""
    return (abs(beta1 - beta2) + 1 - beta1) / math.sqrt(1 - beta2)


@pytest.mark.parametrize(
    ("betas", "looser"), [((0.9, 0.99), 16.0), ((0.9, 0.95), 3.8), ((0.95, 0.98), 5.2), ((0.99, 0.99), 1.41)]
)
def test_simulated_noise_has_the_exact_size(betas, looser):
    (beta1, beta2), rng = betas, np.random.default_rng(0)
    exp_avg = np.zeros(20_000)
    for _ in range(round(6 / (1 - beta2))):  # β₂^(2k) of the variance is missing: e^−12
        grad = rng.standard_normal(len(exp_avg))
        direction = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    assert math.sqrt(float(np.mean(direction**2))) == pytest.approx(exact(*betas), rel=0.02)
    assert lemma6_summand(*betas) / exact(*betas) == pytest.approx(looser, rel=0.02)


def test_smaller_beta1_costs_less_noise_than_the_paper_bounds():
    """(0.9, 0.99) against (0.99, 0.99): 19 times in Lemma 6, 1.7 times exactly."""
    assert lemma6_summand(0.9, 0.99) / lemma6_summand(0.99, 0.99) == pytest.approx(19)
    assert exact(0.9, 0.99) / exact(0.99, 0.99) == pytest.approx(1.67, abs=0.01)
