"""Exact noise in Lemma 6: against the definition summed term by term, simulated errors, and the closed form of the constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from scipy import optimize

from megatron_lion.theory import bounds
from megatron_lion.theory.exact import mean_drift, mean_noise, noise_factor, sharpest_constants
from megatron_lion.theory.lemma import initial_error, lemma6

few = examples(40)
positive = st.floats(1e-2, 1e2)
betas = st.floats(0, 0.999)
PAIRS = ((0.9, 0.99), (0.9, 0.95), (0.99, 0.99), (0.95, 0.8), (0.0, 0.9), (0.9, 0.0))


def weights(k, beta1, beta2, first_gradient):
    """Weights of ξ^1 … ξ^k and of ∇f(θ¹) in c^k, from Algorithm 1 applied to unit vectors; row 0 is ∇f(θ¹)."""
    momentum = np.zeros(k + 1)
    if first_gradient:
        momentum[1] = 1
    for step in range(1, k + 1):
        grad = np.zeros(k + 1)
        grad[step] = 1
        direction = beta1 * momentum + (1 - beta1) * grad
        momentum = beta2 * momentum + (1 - beta2) * grad
    direction[0] = direction[1:].sum() - 1  # a constant ∇f is in every g; what is missing is the bias of m⁰ = 0
    return direction


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("norm", [None, 0.0, 5.0])
def test_mean_noise_is_the_sum_over_the_weights(pair, norm):
    sigma = 1.3
    for K in (1, 2, 3, 40):
        sizes = []
        for k in range(1, K + 1):
            row = weights(k, *pair, norm is None)
            bias = 0.0 if norm is None else row[0] * norm
            sizes.append(math.sqrt(bias**2 + sigma**2 * float(np.sum(row[1:] ** 2))))
        found = mean_noise(K, beta1=pair[0], beta2=pair[1], sigma=sigma, first_grad_l2=norm)
        assert found == pytest.approx(np.mean(sizes), rel=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_pure_noise_reaches_the_bound(pair):
    """∇f is constant: no drift, and the norm of the noise in many coordinates hardly scatters."""
    d, K, sigma, runs = 600, 150, 2.0, 40
    rng = np.random.default_rng(1)
    for start in ("zeros", "first_gradient"):
        true = np.full(d, 0.4)
        exp_avg, total = np.zeros((runs, d)), 0.0
        for k in range(K):
            grad = true + rng.standard_normal((runs, d)) * sigma / math.sqrt(d)
            exp_avg = grad if k == 0 and start == "first_gradient" else exp_avg
            direction = pair[0] * exp_avg + (1 - pair[0]) * grad
            total += float(np.linalg.norm(direction - true, axis=1).mean()) / K
            exp_avg = pair[1] * exp_avg + (1 - pair[1]) * grad
        norm = None if start == "first_gradient" else float(np.linalg.norm(true))
        bound = float(mean_noise(K, beta1=pair[0], beta2=pair[1], sigma=sigma, first_grad_l2=norm))
        assert 0.99 * bound < total < 1.002 * bound


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("lr", [0.002, 0.05])
def test_a_quadratic_with_drift_stays_below_the_bound_at_every_K(pair, lr):
    d, K, runs, sigma, L, decay = 20, 200, 200, 1.5, 2.0, 0.5
    curvature, rng = np.linspace(0.1, L, d), np.random.default_rng(3)
    for start in ("zeros", "first_gradient"):
        theta, errors, exp_avg = np.ones((runs, d)), [], np.zeros((runs, d))
        for k in range(K):
            true = curvature * theta
            grad = true + rng.standard_normal((runs, d)) * sigma / math.sqrt(d)
            exp_avg = grad if k == 0 and start == "first_gradient" else exp_avg
            direction = pair[0] * exp_avg + (1 - pair[0]) * grad
            errors.append(float(np.linalg.norm(direction - true, axis=1).mean()))
            theta = theta - lr * (np.sign(direction) + decay * theta)
            exp_avg = pair[1] * exp_avg + (1 - pair[1]) * grad
        steps = np.arange(1, K + 1)
        norm = None if start == "first_gradient" else float(np.linalg.norm(curvature))
        problem = {"beta1": pair[0], "beta2": pair[1], "lr": lr, "L": L, "sigma": sigma, "d": d}
        exact = lemma6(steps, exact=True, first_grad_l2=norm, **problem)
        measured = np.cumsum(errors) / steps
        assert np.all(measured < exact * 1.01)
        first = initial_error(beta1=pair[0], sigma=sigma, grad_l2=norm, first_gradient=norm is None)
        assert np.all(exact <= lemma6(steps, first_error=first, **problem) * (1 + 1e-12))


@few
@given(
    beta1=betas, beta2=betas, sigma=positive, norm=st.none() | positive, K=st.integers(1, 10**7), lr=st.floats(1e-6, 1)
)
def test_the_exact_form_is_never_above_the_papers(beta1, beta2, sigma, norm, K, lr):
    problem = {"beta1": beta1, "beta2": beta2, "lr": lr, "L": 3.0, "sigma": sigma, "d": 7}
    first = initial_error(beta1=beta1, sigma=sigma, grad_l2=norm, first_gradient=norm is None)
    exact = lemma6(K, exact=True, first_grad_l2=norm, **problem)
    assert exact <= lemma6(K, first_error=first, **problem) * (1 + 1e-9)


def test_a_drift_that_adds_up_reaches_its_bound():
    """∇f moves by the same vector in every step, as on a plane ramp of curvature L along the path."""
    beta1, beta2, K, move = 0.9, 0.95, 300, 0.3
    exp_avg, total = 0.0, 0.0
    for k in range(K):
        grad = move * k
        exp_avg = grad if k == 0 else exp_avg
        total += abs(beta1 * exp_avg + (1 - beta1) * grad - grad) / K
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    assert mean_drift(K, beta1=beta1, beta2=beta2, lr=move / 2, L=1, d=1) == pytest.approx(total, rel=1e-12)
    assert mean_drift(10**9, beta1=beta1, beta2=beta2, lr=0.1, L=1, d=4) == pytest.approx(0.9 * 0.4 / 0.05)


def test_arrays_broadcast_like_single_numbers():
    K, beta1 = np.array([1, 5, 900, 10**9])[:, None], np.array([0.5, 0.9, 0.9])
    table = mean_noise(K, beta1=beta1, beta2=0.99, sigma=[1.0, 2.0, 2.0], first_grad_l2=3.0)
    assert table.shape == (4, 3)
    one = mean_noise(900, beta1=0.9, beta2=0.99, sigma=2.0, first_grad_l2=3.0)
    assert np.shape(one) == ()
    assert table[2, 1] == table[2, 2] == one
    assert table[3, 0] == pytest.approx(noise_factor(beta1=0.5, beta2=0.99), rel=1e-6)


def leading(c2, c3, c1=1.0, K=1e14):
    """Theorem 2 with exact noise over K^{−¼}√d(σ²LΔ)^¼, so late that only the K^{−¼} part counts."""
    return float(bounds.theorem2(K, c1=c1, c2=c2, c3=c3, L=1, sigma=1, gap=1, d=1, exact=True).total) * K**0.25


def test_sharpest_constants_are_found_by_a_numerical_minimisation():
    """The search knows the formula of the noise only, not the closed form."""
    K = 1e8

    def value(logs):
        c1, c2, c3 = np.exp(logs)
        beta1, beta2 = 1 - c1 * K**-0.5, 1 - c2 * K**-0.5
        noise = math.sqrt((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)) * K**0.25
        return 1 / c3 + 4 * c3 * beta1 / c2 + 2 * noise + 2 * c3 / math.sqrt(K)

    found = optimize.minimize(
        value, [0.5, 0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 9999}
    )
    best = sharpest_constants(L=1, sigma=1, gap=1)
    c1, c2, c3 = np.exp(found.x)
    assert (c1 / c2, c2, c3) == pytest.approx((0.75, best.c2, best.c3), rel=1e-3)
    assert best.c1 == pytest.approx(0.75 * best.c2)
    assert found.fun == pytest.approx(2 ** (9 / 4), rel=1e-4)
    assert value(np.log([best.c1, best.c2, best.c3])) == pytest.approx(found.fun, rel=1e-7)


def test_sharpest_constants_keep_their_factor_in_any_unit():
    problem = {"L": 3.0, "sigma": 0.7, "gap": 5.0}
    unit, K = (0.49 * 15) ** 0.25, 1e9
    for choice, constant in ((sharpest_constants, 2**2.25), (bounds.smallest_constants, 2 + 2 * math.sqrt(2))):
        c = choice(**problem)
        total = float(bounds.theorem2(K, c1=c.c1, c2=c.c2, c3=c.c3, d=9, exact=True, **problem).total)
        assert total * K**0.25 / (3 * unit) == pytest.approx(constant, rel=2e-2)


@pytest.mark.slow
def test_c1_is_not_in_the_leading_part_with_exact_noise():
    best = sharpest_constants(L=1, sigma=1, gap=1)
    values = [leading(best.c2, best.c3, c1=factor * best.c2) for factor in (0.01, 0.75, 1.0, 10.0)]
    assert values == pytest.approx([2**2.25] * 4, rel=1e-3)
    for factor in (0.8, 1.25):
        assert leading(best.c2 * factor, best.c3) > values[1]
        assert leading(best.c2, best.c3 * factor) > values[1]


@few
@given(L=positive, sigma=positive, gap=positive, c1=positive, c2=positive, c3=positive, d=st.integers(1, 10**8))
def test_theorem2_with_exact_noise_is_the_general_bound(L, sigma, gap, c1, c2, c3, d):
    K = 20_001.0
    chosen = bounds.Constants(c1, c2, c3).settings(K, d)
    problem = {"L": L, "sigma": sigma, "gap": gap, "d": d}
    general = bounds.any_settings(K, beta1=chosen.beta1, beta2=chosen.beta2, lr=chosen.lr, exact=True, **problem)
    exact = bounds.theorem2(K, c1=c1, c2=c2, c3=c3, exact=True, **problem)
    assert exact.total == pytest.approx(general, rel=1e-9)
    assert exact.start >= -1e-12 * exact.total
    assert exact.total <= bounds.theorem2(K, c1=c1, c2=c2, c3=c3, tight=True, **problem).total * (1 + 1e-9)


def test_arguments_of_the_other_form_are_refused():
    problem = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "L": 1, "sigma": 1, "d": 1}
    with pytest.raises(ValueError, match="the exact form takes first_grad_l2"):
        lemma6(10, exact=True, first_error=1.0, **problem)
    with pytest.raises(ValueError, match="only the exact form takes it"):
        lemma6(10, first_grad_l2=1.0, **problem)
    with pytest.raises(ValueError, match=r"K = 0\.5: expected at least one step"):
        mean_noise(0.5, beta1=0.9, beta2=0.9, sigma=1)
    with pytest.raises(ValueError, match="c1 = 5: beta = 1 - c1/sqrt"):
        bounds.theorem2(16, c1=5, c2=1, c3=1, L=1, sigma=1, gap=1, d=1, exact=True)
