"""Rates of other algorithms: SGD's bound against simulated runs, the forms of equations 2 and 3, and the table of the docs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lion.theory.other_rates import (
    PUBLISHED_RATES,
    rates_table,
    sgd_any_settings,
    sgd_rate,
    signsgd_momentum_rate,
)
from megatron_lion.toy.problem import SMOOTHNESS, gradient, loss, minimum

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("lr", [0.002, 0.02, 1 / SMOOTHNESS])
def test_sgd_on_the_toy_stays_below_its_bound(lr):
    rng, K, runs = np.random.default_rng(1), 400, 200
    theta = np.tile([3.0, 1.0], (runs, 1))
    gap, norms = float(loss(theta)[0]) - minimum(np.inf), []
    for _ in range(K):
        grad = gradient(theta)
        norms.append(float(np.linalg.norm(grad, axis=1).mean()))
        theta = theta - lr * (grad + rng.standard_normal((runs, 2)))
    steps = np.arange(1, K + 1)
    measured = np.cumsum(norms) / steps
    bound = sgd_any_settings(steps, lr=lr, L=SMOOTHNESS, sigma=2**0.5, gap=gap)
    assert np.all(measured < bound)
    assert bound[-1] < 5 * measured[-1], "a bound this loose would no longer test the summands"


def test_gradient_descent_on_the_worst_quadratic_nearly_reaches_it():
    """Without noise, with a curvature so small that ‖∇f‖ hardly changes over the run: Δ ≥ ηK(1 − Lη/2)‖∇f‖²."""
    K, lr, curvature, theta, norms = 50, 0.9, 1e-4, 1.0, []
    for _ in range(K):
        norms.append(curvature * theta)
        theta -= lr * curvature * theta
    reached = 0.5 * curvature * (1.0 - theta**2)  # as if f* were the last value
    assert np.mean(norms) <= sgd_any_settings(K, lr=lr, L=1, sigma=0, gap=reached)
    assert np.mean(norms) == pytest.approx(sgd_any_settings(K, lr=lr, L=1, sigma=0, gap=reached) / 2**0.5, rel=1e-4)


def test_the_best_rate_gives_equation_2_with_its_constant():
    L, sigma, gap, K = 3.0, 0.7, 5.0, np.array([1e3, 1e5])
    lr = (2 * gap / (L * K * sigma**2)) ** 0.5
    best = sgd_any_settings(K, lr=lr, L=L, sigma=sigma, gap=gap)
    assert best.tolist() == pytest.approx(sgd_rate(K, L=L, sigma=sigma, gap=gap, constant=2**0.75).tolist())
    for factor in (0.8, 1.2):
        assert np.all(sgd_any_settings(K, lr=lr * factor, L=L, sigma=sigma, gap=gap) > best)
    with pytest.raises(ValueError, match=r"lr = 0\.5: expected lr <= 1/L = 0\.333333"):
        sgd_any_settings(10, lr=0.5, L=L, sigma=sigma, gap=gap)


def test_equation_3_has_its_two_summands():
    found = signsgd_momentum_rate([16, 81], L=2.0, gap=6.0, d=10, constant=4.0)
    assert found.tolist() == pytest.approx([4 * (3 / 2 + 10 / 2), 4 * (3 / 3 + 10 / 3)])
    with pytest.raises(ValueError, match="constant = 0"):
        signsgd_momentum_rate(16, L=2.0, gap=6.0, d=10, constant=0)


def test_the_table_of_the_docs_is_the_list():
    text = (REPO / "docs" / "theory.md").read_text(encoding="utf-8")
    for row in rates_table():
        assert f"| {' | '.join(row)} |" in text
    assert len({(row.algorithm, row.reference) for row in PUBLISHED_RATES}) == len(PUBLISHED_RATES)
    assert all(row.source.startswith(("paper, ", "abstract, ")) for row in PUBLISHED_RATES)
