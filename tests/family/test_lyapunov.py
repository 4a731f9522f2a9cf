"""Lyapunov function and optimality residual of Lion-κ: the definitions in numpy, and both statements on how H falls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from family_cases import numpy_conjugate, numpy_dual_norm, numpy_gradient, numpy_value
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.family.kappas import KAPPAS, Kappa
from megatron_lion.family.lion_kappa import LionKappa
from megatron_lion.family.lyapunov import lyapunov, optimality

SHAPE = (3, 4)
kappas = st.builds(
    Kappa, st.sampled_from(KAPPAS), p=st.sampled_from([1.0, 1.5, 2.0, 4.0]), delta=st.sampled_from([0.2, 1.0])
)
betas = st.sampled_from([(0.9, 0.99), (0.5, 0.9), (0.9, 0.9), (0.0, 0.8)])


class Problem:
    """f(θ) = ⟨Aθ, θ⟩/2 - ⟨b, θ⟩ + Σ cos θ with eigenvalues of A up to 3: not convex, with a 4-Lipschitz gradient."""

    lipschitz = 4.0

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
        self.matrix = basis @ np.diag(rng.uniform(0.1, 3, 12)) @ basis.T
        self.offset = rng.standard_normal(12) * 3

    def value(self, theta):
        x = theta.reshape(-1)
        return x @ self.matrix @ x / 2 - self.offset @ x + np.cos(x).sum()

    def gradient(self, theta):
        x = theta.reshape(-1)
        return (self.matrix @ x - self.offset - np.sin(x)).reshape(theta.shape)


def path(problem, kappa, lr, betas, decay, seed, steps):
    """Steps of the product on exact gradients from inside the domain of κ*: (θ, m, H) before and after each."""
    start = np.random.default_rng(seed + 1).standard_normal(SHAPE)
    start /= max(1.0, 1.01 * decay * numpy_dual_norm(kappa.name, start, kappa.p))
    param = torch.nn.Parameter(torch.from_numpy(start))
    settings = {"lr": lr, "betas": betas, "weight_decay": decay}
    optimizer = LionKappa([param], **settings, kappa=kappa.name, p=kappa.p, delta=kappa.delta)
    m = np.zeros(SHAPE)
    before = start.copy(), m, lyapunov(kappa, problem.value(start), [param], [torch.from_numpy(m)], **settings)
    for _ in range(steps):
        param.grad = torch.from_numpy(problem.gradient(before[0]))
        optimizer.step()
        theta = param.detach().numpy().copy()
        momentum = optimizer.state[param]["exp_avg"]
        height = lyapunov(kappa, problem.value(theta), [param], [momentum], **settings)
        after = theta, momentum.numpy().copy(), height
        yield before, after
        before = after


def coupling(lr, betas, decay):
    """(ε, C) of the docstring."""
    implicit = lr / (1 - lr * decay)
    return implicit, implicit * betas[0] / (implicit * decay * (1 - betas[0]) + 1 - betas[1])


def subgradient_of_conjugate(kappa, y):
    """An element of ∂κ*(y) inside of the domain."""
    return kappa.delta * y if kappa.name == "huber" else np.zeros_like(y)


@given(
    kappa=kappas,
    betas=betas,
    decay=st.sampled_from([0.0, 0.3, 1.0]),
    lr=st.sampled_from([1e-3, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
@examples(60)
def test_the_discrete_statement_holds_at_every_step(kappa, betas, decay, lr, seed):
    """H_{k+1} - H_k ≤ L‖Δθ‖²/2 - ε(1+Cλ) D1 - C(1-β2)/(β2-β1) D2 with D1, D2 ≥ 0, at any rate; θ stays in the domain."""
    problem = Problem(seed)
    implicit, c = coupling(lr, betas, decay)
    for (theta, m, height), (theta2, m2, height2) in path(problem, kappa, lr, betas, decay, seed, 30):
        mixed = betas[0] * m + (1 - betas[0]) * problem.gradient(theta)
        step = numpy_gradient(kappa.name, mixed, kappa.p, kappa.delta)
        d1 = ((step + decay * theta2) * (mixed + subgradient_of_conjugate(kappa, decay * theta2))).sum()
        d2 = ((step - numpy_gradient(kappa.name, m2, kappa.p, kappa.delta)) * (mixed - m2)).sum()
        bound = problem.lipschitz / 2 * ((theta2 - theta) ** 2).sum() - implicit * (1 + c * decay) * d1
        if betas[0] < betas[1]:
            bound -= c * (1 - betas[1]) / (betas[1] - betas[0]) * d2
        assert min(d1, d2) >= -1e-9
        assert height2 - height <= bound + 1e-8 * (1 + abs(height))
        assert numpy_dual_norm(kappa.name, decay * theta2, kappa.p) <= 1 + 1e-9


@given(
    delta=st.sampled_from([0.1, 1.0, 3.0]), betas=betas, decay=st.sampled_from([0.0, 0.3, 1.0]), share=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@examples(40)
def test_with_hubers_function_h_falls_at_every_step(delta, betas, decay, share, seed):
    """If ε ≤ 2δ(1+Cλ)/L; as C ≥ 0, ε = 2δ/L is small enough."""
    problem = Problem(seed)
    implicit = share * 2 * delta / problem.lipschitz
    lr = implicit / (1 + implicit * decay)
    heights = [
        after[2] - before[2]
        for before, after in path(problem, Kappa("huber", delta=delta), lr, betas, decay, seed, 300)
    ]
    assert max(heights) <= 1e-11
    assert heights[0] < -1e-4


@given(kappa=kappas, betas=betas, seed=st.integers(0, 99))
@examples(40)
def test_in_continuous_time_h_never_rises(kappa, betas, seed):
    """The rise of H in a step, per time, is at most of order η: with (1-β2)/η fixed it vanishes with η."""
    problem, decay, rate = Problem(seed), 0.4, 2.0
    rises = []
    for lr in (1e-3, 1e-5):
        pair = betas[0], 1 - rate * lr
        steps = path(problem, kappa, lr, pair, decay, seed, 200)
        rises.append(max((after[2] - before[2]) / lr for before, after in steps))
    # ‖Δθ‖₂ ≤ η(‖∂κ‖₂ + λ‖θ‖₂) ≤ 2η√12 in the domain of any of these functions.
    assert rises[0] <= problem.lipschitz / 2 * 48 * 1e-3 + 1e-9
    assert rises[1] <= problem.lipschitz / 2 * 48 * 1e-5 + 1e-6


def test_with_the_sign_h_also_rises():
    """So the claim of a fall at every step cannot be made for LION itself: near the solution its steps are too long."""
    heights = [after[2] - before[2] for before, after in path(Problem(0), Kappa("l1"), 0.05, (0.9, 0.99), 0.3, 0, 400)]
    assert min(heights) < -1e-3
    assert max(heights) > 1e-4


@given(kappa=kappas, seed=st.integers(0, 999), decay=st.sampled_from([0.0, 0.2, 1.0]), betas=betas)
@examples(100)
def test_values_are_the_definitions(kappa, seed, decay, betas):
    rng = np.random.default_rng(seed)
    params = [rng.standard_normal(SHAPE), rng.standard_normal(5)]
    params = [x / (1.1 * max(1.0, decay * numpy_dual_norm(kappa.name, x, kappa.p))) for x in params]
    others = [rng.standard_normal(SHAPE), rng.standard_normal(5)]
    stars = sum(numpy_conjugate(kappa.name, decay * x, kappa.delta) for x in params)
    gap = stars + sum(
        numpy_value(kappa.name, g, kappa.p, kappa.delta) + decay * (x * g).sum()
        for x, g in zip(params, others, strict=True)
    )
    tensors = [[torch.from_numpy(x) for x in values] for values in (params, others)]
    found = optimality(kappa, *tensors, decay)
    assert found.gap == pytest.approx(gap, rel=1e-9, abs=1e-9)
    assert found.gap >= -1e-9
    assert found.excess == 0
    _, c = coupling(0.1, betas, decay)
    wanted = 2.5 + (stars / decay if decay else 0) + c * gap
    height = lyapunov(kappa, 2.5, *tensors, lr=0.1, betas=betas, weight_decay=decay)
    assert height == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(kappa=kappas, seed=st.integers(0, 999), decay=st.sampled_from([0.2, 1.0]))
@examples(100)
def test_the_residual_is_zero_at_solutions_and_only_there(kappa, seed, decay):
    """λθ ∈ ∂κ(-g) at a solution, which gives one for any gradient; another point of the domain has a gap."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(SHAPE) * 3
    theta = -numpy_gradient(kappa.name, g, kappa.p, kappa.delta) / decay
    gradients = [torch.from_numpy(g)]
    found = optimality(kappa, [torch.from_numpy(theta)], gradients, decay)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.excess == pytest.approx(0, abs=1e-9)
    assert optimality(kappa, [torch.from_numpy(0.5 * theta)], gradients, decay).gap > 1e-3
    assert optimality(kappa, [torch.from_numpy(2.5 * theta)], gradients, decay).excess > 1e-3
    if kappa.name != "huber":  # a point inside, with gradient 0
        still = optimality(kappa, [torch.from_numpy(0.5 * theta)], [torch.zeros(SHAPE, dtype=torch.float64)], decay)
        assert still == (0.0, 0.0)


def test_outside_of_the_domain_h_is_infinite():
    theta = torch.tensor([3.0])
    settings = {"lr": 0.1, "betas": (0.9, 0.99)}
    assert lyapunov(Kappa(), 1.0, [theta], [theta], weight_decay=0.5, **settings) == math.inf
    assert lyapunov(Kappa(), 1.0, [theta], [theta], weight_decay=1 / 3, **settings) < math.inf
    with pytest.raises(ValueError, match="lr x weight_decay = 1"):
        lyapunov(Kappa(), 1.0, [theta], [theta], weight_decay=10.0, **settings)


def test_the_gap_of_a_tiny_gradient_is_not_lost():
    """1e-500 is 0 also in float64."""
    found = optimality(Kappa("lp", p=100.0), [torch.zeros(4)], [torch.full((4,), 1e-5)], 0.1)
    assert found.gap == pytest.approx(4**0.01 * 1e-5, rel=1e-6)
    assert found.excess == 0


@pytest.mark.parametrize("name", KAPPAS)
def test_a_parameter_without_elements_adds_nothing(name):
    kappa = Kappa(name, p=3.0)
    whole = torch.tensor([[0.3, -0.4], [0.1, 0.0]])
    empty = torch.zeros(0, 2)
    assert optimality(kappa, [whole, empty], [whole, empty], 0.5) == optimality(kappa, [whole], [whole], 0.5)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    height = lyapunov(kappa, 1.0, [whole], [whole], **settings)
    assert lyapunov(kappa, 1.0, [empty, whole], [empty, whole], **settings) == height


@pytest.mark.parametrize("place", [0, 1])
def test_a_parameter_that_is_not_finite_is_not_inside_the_box(place):
    params = [torch.zeros(3), torch.zeros(3)]
    params[place][1] = math.nan
    found = optimality(Kappa("l1"), params, [torch.ones(3)] * 2, 0.5)
    assert math.isnan(found.excess)
    assert math.isnan(found.gap)
