"""The right sides of the theorems: algebra of the proof, sharpness of K_min, and rejection of invalid numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.theory import bounds
from megatron_lion.theory.lemma import initial_error, lemma6
from megatron_lion.theory.symbols import Constants, Settings

few = examples(40)
positive = st.floats(1e-2, 1e2)
KEYS = ("gap", "start", "drift", "noise", "step")


@few
@given(L=positive, sigma=positive, gap=positive, c1=positive, c2=positive, c3=positive, d=st.integers(1, 10**8))
def test_theorem2_is_the_general_bound_with_its_settings_put_in(L, sigma, gap, c1, c2, c3, d):
    K = 20_001.0  # c1, c2 <= 100 < sqrt(K)
    chosen = Constants(c1, c2, c3).settings(K, d)
    problem = {"L": L, "sigma": sigma, "gap": gap, "d": d}
    general = bounds.any_settings(K, beta1=chosen.beta1, beta2=chosen.beta2, lr=chosen.lr, **problem)
    tight = bounds.theorem2(K, c1=c1, c2=c2, c3=c3, tight=True, **problem).total
    stated = bounds.theorem2(K, c1=c1, c2=c2, c3=c3, **problem).total
    assert general == pytest.approx(tight, rel=1e-7)
    assert stated >= tight


@few
@given(L=positive, sigma=positive, gap=positive, above=st.floats(1.0, 100.0))
def test_corollary3_follows_from_theorem2_exactly_from_k_min_on(L, sigma, gap, above):
    problem = {"L": L, "sigma": sigma, "gap": gap}
    constants = bounds.corollary3_constants(**problem)
    k_min = float(bounds.k_min(**problem))
    unit = (sigma**2 * L * gap) ** 0.25

    def terms(K):
        theorem = bounds.theorem2(K, c1=constants.c1, c2=constants.c2, c3=constants.c3, d=4, **problem)
        scale = 2 * unit * K**-0.25  # √d = 2
        return {key: float(getattr(theorem, key)) / scale for key in KEYS}, float(theorem.total) / scale

    parts, total = terms(k_min * above)
    assert (parts["gap"], parts["drift"], parts["noise"]) == pytest.approx((1, 4, 6))
    assert parts["start"] <= 2 * (1 + 1e-9)
    assert parts["step"] <= 2 * (1 + 1e-9)
    assert total <= 15 * (1 + 1e-9)
    assert total * 2 * unit * (k_min * above) ** -0.25 <= bounds.corollary3(k_min * above, d=4, **problem) * (1 + 1e-9)
    # K_min is sharp: one of the two summands equals its share at K_min and exceeds it just below.
    at, _ = terms(k_min)
    below, _ = terms(k_min * 0.99)
    assert max(at["start"], at["step"]) == pytest.approx(2)
    assert max(below["start"], below["step"]) > 2


def test_tight_form_of_corollary3_has_11_instead_of_15():
    problem = {"L": 1.0, "sigma": 1.0, "gap": 1.0}
    constants = bounds.corollary3_constants(**problem)
    assert float(bounds.k_min(**problem)) == 1
    tight = bounds.theorem2(1, c1=constants.c1, c2=constants.c2, c3=constants.c3, d=1, tight=True, **problem)
    assert tight.total == pytest.approx(11)
    assert bounds.corollary3(1, d=1, **problem) == pytest.approx(15)


def test_corollary3_constants_are_the_papers():
    constants = bounds.corollary3_constants(L=7.0, sigma=math.sqrt(2), gap=120.0)
    assert constants.c1 == constants.c2 == pytest.approx(math.sqrt(840 / 2))
    assert constants.c3 == pytest.approx(120**0.75 / (7**0.25 * 2**0.25))
    chosen = constants.settings(10_000, 16)
    assert chosen.beta1 == chosen.beta2 == pytest.approx(1 - math.sqrt(420) / 100)
    assert chosen.lr == pytest.approx(constants.c3 / (4 * 1000))


@few
@given(beta1=st.floats(0, 0.999), beta2=st.floats(0, 0.999), lr=st.floats(1e-6, 1), K=st.integers(1, 10**6))
def test_settings_and_constants_undo_each_other(beta1, beta2, lr, K):
    back = Settings(beta1, beta2, lr).constants(K, 12).settings(K, 12)
    assert (back.beta1, back.beta2, back.lr) == pytest.approx((beta1, beta2, lr), abs=1e-12)


def test_smallest_constants_are_a_minimum_and_beta1_below_beta2_costs():
    problem = {"L": 3.0, "sigma": 0.7, "gap": 5.0}
    unit = (0.49 * 15) ** 0.25

    def leading(c1, c2, c3):
        terms = bounds.theorem2(1.0, c1=c1, c2=c2, c3=c3, d=1, tight=True, **problem)
        return float(terms.gap + terms.drift + terms.noise) / unit

    best = bounds.smallest_constants(**problem)
    least = leading(best.c1, best.c2, best.c3)
    assert least == pytest.approx(4 * math.sqrt(2))
    for factor in (0.7, 0.95, 1.05, 1.4):
        assert leading(best.c1 * factor, best.c2 * factor, best.c3) > least
        assert leading(best.c1, best.c2, best.c3 * factor) > least
    assert leading(best.c1 * 0.1, best.c2, best.c3) == pytest.approx(least)  # β₁ > β₂
    assert leading(best.c1 * 10, best.c2, best.c3) > 2 * least  # β₁ < β₂, as in (0.9, 0.99)
    paper = bounds.corollary3_constants(**problem)
    assert leading(paper.c1, paper.c2, paper.c3) == pytest.approx(7)


def test_lemma6_bounds_measured_errors_of_a_quadratic():
    generator = np.random.default_rng(3)
    d, K, runs, lr, sigma = 5, 200, 400, 0.02, 1.5
    curvature = np.linspace(0.1, 2.0, d)
    for beta1, beta2 in ((0.9, 0.99), (0.95, 0.9), (0.5, 0.5)):
        theta = np.ones((runs, d))
        noise = generator.standard_normal((K, runs, d)) * sigma / math.sqrt(d)
        exp_avg, total = None, 0.0
        for k in range(K):
            true = curvature * theta
            grad = true + noise[k]
            exp_avg = grad if exp_avg is None else exp_avg  # m⁰ = g¹
            c = beta1 * exp_avg + (1 - beta1) * grad
            total += float(np.linalg.norm(c - true, axis=1).mean()) / K
            theta = theta - lr * (np.sign(c) + 0.5 * theta)
            exp_avg = beta2 * exp_avg + (1 - beta2) * grad
        bound = float(lemma6(K, beta1=beta1, beta2=beta2, lr=lr, L=2.0, sigma=sigma, d=d))
        assert total < bound
        assert total > bound / 20, "a bound this loose would no longer test the constants"


def test_initial_error_of_both_momentum_starts():
    generator = np.random.default_rng(0)
    true = np.array([3.0, -4.0])
    noise = generator.standard_normal((200_000, 2))
    for beta1 in (0.0, 0.5, 0.9):
        zeros = np.linalg.norm((1 - beta1) * (true + noise) - true, axis=1).mean()
        assert zeros <= initial_error(beta1=beta1, sigma=math.sqrt(2), grad_l2=5.0, first_gradient=False)
        assert np.linalg.norm(noise, axis=1).mean() <= initial_error(beta1=beta1, sigma=math.sqrt(2))
    with pytest.raises(ValueError, match="grad_l2 = None"):
        initial_error(beta1=0.9, sigma=1.0, first_gradient=False)


def test_equation_10_is_a1_divided_by_its_powers_of_K():
    values = {"c1": 0.3, "c2": 0.5, "c3": 0.2, "L": 2.0, "sigma": 1.1, "gap": 4.0}
    # At K = 1 and d = 1 equation (A.1) and Theorem 2 times η = c₃ are the same sum.
    total = bounds.theorem2(1, d=1, **values).total
    assert bounds.gap_along_the_way(**values) == pytest.approx(total * values["c3"])


def test_theorem4_has_theorem2s_right_side_and_its_own_condition():
    values = {"c1": 1.0, "c2": 2.0, "c3": 0.5, "L": 7.0, "sigma": 1.0, "gap": 9.0, "d": 2}
    assert bounds.theorem4(100, weight_decay=0.1, radius=5.0, **values) == bounds.theorem2(100, **values)
    assert bounds.theorem4(100, weight_decay=0.0, radius=5.0, **values).total > 0
    with pytest.raises(ValueError, match=r"weight_decay = 0\.11: .* <= 1/\(2 radius\) = 0\.1 for radius = 5"):
        bounds.theorem4(100, weight_decay=0.11, radius=5.0, **values)
    problem = {"L": 7.0, "sigma": math.sqrt(2), "gap": 120.0, "d": 2}
    assert bounds.corollary5(500, weight_decay=0.05, radius=10.0, **problem) == bounds.corollary3(500, **problem)
    with pytest.raises(ValueError, match="weight_decay"):
        bounds.corollary5(500, weight_decay=0.06, radius=10.0, **problem)
    with pytest.raises(ValueError, match="K_min = 420"):
        bounds.corollary5(300, weight_decay=0.05, radius=10.0, **problem)


def test_arrays_broadcast_and_agree_with_numbers():
    K, gap = np.array([500.0, 1000.0])[:, None], np.array([50.0, 90.0])
    table = bounds.corollary3(K, L=7, sigma=1.4, gap=gap, d=2)
    assert table.shape == (2, 2)
    assert table[1, 0] == bounds.corollary3(1000, L=7, sigma=1.4, gap=50, d=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 0}, "K = 0: expected a finite number > 0"),
        ({"L": -1.0}, "L = -1"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"gap": float("inf")}, "gap = inf"),
        ({"d": 0}, "d = 0"),
        ({"K": 10}, r"K = 10: Corollary 3 needs K >= K_min = 420"),
        ({"L": "seven"}, "L = 'seven': expected a number"),
    ],
)
def test_corollary3_refuses(change, message):
    values = {"K": 1000, "L": 7.0, "sigma": math.sqrt(2), "gap": 120.0, "d": 2} | change
    with pytest.raises(ValueError, match=message):
        bounds.corollary3(values.pop("K"), **values)


def test_betas_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"beta1 = 1: expected a number in \[0, 1\)"):
        lemma6(10, beta1=1.0, beta2=0.9, lr=0.1, L=1, sigma=1, d=1)
    with pytest.raises(ValueError, match=r"c2 = 5: .* negative at K = 16; expected c2 <= sqrt\(K\), that is K >= 25"):
        Constants(1.0, 5.0, 1.0).settings(16, 2)
    with pytest.raises(ValueError, match="sigma = 0"):
        bounds.corollary3_constants(L=1, sigma=0, gap=1)
    exact = bounds.theorem2(100, c1=1, c2=1, c3=1, L=1, sigma=0, gap=1, d=1)  # the theorem allows σ = 0
    assert exact.noise == exact.start == 0
