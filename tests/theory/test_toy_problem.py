"""The toy problem: its mathematics, its simulation compared with the optimizer, and both sides of the inequality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.optim.lion import Lion
from megatron_lion.toy import problem
from megatron_lion.toy.experiment import EXPERIMENTS, ToySettings, draw_noise, draw_starts, run_toy
from megatron_lion.toy.toy_checks import REFERENCE, REFERENCE_STEPS, match_reference, theorem_points
from megatron_lion.toy.toy_figures import optimizer_paths

few = examples(25)


@pytest.fixture(scope="module")
def results():
    return {experiment: run_toy(experiment) for experiment in EXPERIMENTS}


def torch_path(make_optimizer, theta, noise):
    """The same runs with a torch optimizer in float64, as one parameter tensor."""
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimizer = make_optimizer([parameter])
    path = [theta.copy()]
    for noise_k in noise:
        parameter.grad = torch.tensor(problem.gradient(parameter.detach().numpy()) + noise_k)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
@pytest.mark.parametrize("init", ["zeros", "first_gradient"])
@pytest.mark.parametrize(("betas", "weight_decay"), [((0.9, 0.99), 0.1), ((0.95, 0.98), 0.0), ((0.0, 0.5), 0.7)])
def test_simulation_is_the_optimizer_bit_for_bit(implementation, init, betas, weight_decay):
    spec = ToySettings(steps=300, starts=3, repeats=2, betas=betas, weight_decay=weight_decay, init_exp_avg=init)
    theta = np.repeat(draw_starts("unconstrained", spec), 2, axis=0)
    noise = draw_noise("unconstrained", spec)
    ours = problem.simulate_lion(theta, noise, lr=0.01, betas=betas, weight_decay=weight_decay, init_exp_avg=init)
    theirs = torch_path(
        lambda p: Lion(
            p, lr=0.01, betas=betas, weight_decay=weight_decay, init_exp_avg=init, implementation=implementation
        ),
        theta,
        noise,
    )
    assert np.array_equal(ours, theirs)


def test_comparison_optimizers_agree_with_torch():
    spec = ToySettings(steps=200, starts=4, repeats=1)
    theta, noise = draw_starts("unconstrained", spec), draw_noise("unconstrained", spec)
    sgd = problem.simulate_sgd(theta, noise, lr=0.01)
    np.testing.assert_allclose(
        sgd, torch_path(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), theta, noise), rtol=1e-9
    )
    adamw = problem.simulate_adamw(theta, noise, lr=0.01, weight_decay=0.1)
    np.testing.assert_allclose(
        adamw, torch_path(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), theta, noise), rtol=1e-9
    )
    paths = optimizer_paths(theta, noise, spec)
    assert list(paths) == ["LION", "SGD", "AdamW"]
    assert np.array_equal(paths["AdamW"], adamw)


@few
@given(
    weight_decay=st.floats(0.01, 5.0),
    product=st.floats(1e-4, 1.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    noise_std=st.floats(0.01, 100.0),
    seed=st.integers(0, 1000),
)
def test_box_is_never_left(weight_decay, product, betas, noise_std, seed):
    """‖θ_k‖∞ ≤ 1/λ for every k, from any start in the box, if λη ≤ 1."""
    spec = ToySettings(
        lr=product / weight_decay, weight_decay=weight_decay, betas=betas, noise_std=noise_std,
        steps=60, starts=4, repeats=2, seed=seed,
    )  # fmt: skip
    for experiment in EXPERIMENTS:
        result = run_toy(experiment, spec)
        assert np.abs(result.path).max() <= spec.box * (1 + 1e-12)
        assert result.kkt.min() >= -1e-9 * np.abs(result.half_l1).max()  # Theorem 2 (i): R ≥ 0


def test_a_start_outside_the_box_comes_closer_every_step():
    theta = np.array([[25.0, -40.0]])
    path = problem.simulate_lion(
        theta, np.random.default_rng(0).standard_normal((400, 1, 2)), lr=0.05, betas=(0.9, 0.99), weight_decay=0.1
    )
    excess = np.abs(path).max(axis=(1, 2)) - 10
    assert np.all(excess[1:] <= np.maximum(excess[:-1] * (1 - 0.005), 0) + 1e-9)


@few
@given(x=st.tuples(st.floats(-12, 12), st.floats(-12, 12)), y=st.tuples(st.floats(-12, 12), st.floats(-12, 12)))
def test_gradient_and_smoothness(x, y):
    x, y = np.array(x), np.array(y)
    step = 1e-5
    numeric = [(problem.loss(x + step * e) - problem.loss(x - step * e)) / (2 * step) for e in np.eye(2)]
    np.testing.assert_allclose(problem.gradient(x), numeric, atol=1e-6)
    change = np.linalg.norm(problem.gradient(x) - problem.gradient(y))
    assert change <= problem.SMOOTHNESS * np.linalg.norm(x - y) + 1e-12


def test_smoothness_is_attained():
    x = np.array([np.pi / 2, np.pi / 2])
    along = np.array([1e-6, 1e-6])
    change = problem.gradient(x + along) - problem.gradient(x)
    assert np.linalg.norm(change) / np.linalg.norm(along) == pytest.approx(7.0, rel=1e-6)


def test_minimum_of_the_box():
    assert problem.minimum(10.0) == pytest.approx(1.8843, abs=1e-4)
    for point in ((0, 2.1253), (0, -2.1253), (2.1253, 0), (-2.1253, 0)):
        assert problem.loss(np.array(point)) == pytest.approx(problem.minimum(10.0), abs=1e-7)
    grid = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 1201)] * 2), -1)
    assert problem.minimum(1.5) == pytest.approx(problem.loss(grid).min(), abs=1e-5)
    assert problem.minimum(1.5) <= problem.loss(grid).min() + 1e-9


def test_results_are_reproducible_and_seeded(results):
    assert np.array_equal(run_toy("constrained").path, results["constrained"].path)
    other = run_toy("constrained", ToySettings(seed=1))
    assert not np.array_equal(other.path[0], results["constrained"].path[0])
    shorter = run_toy("constrained", ToySettings(steps=50))
    assert np.array_equal(shorter.path, results["constrained"].path[:51])


def test_starts_are_where_the_experiments_want_them(results):
    constrained, unconstrained = (results[e].path[0] for e in EXPERIMENTS)
    assert constrained.shape == (25, 2)
    assert np.all(constrained[:, 0] == 10.0)
    assert np.abs(unconstrained).max() <= 10.0
    assert len(np.unique(constrained[:, 1])) == 5
    small_box = draw_starts("unconstrained", ToySettings(weight_decay=0.5))
    assert np.abs(small_box).max() <= 2.0


def test_running_means_are_plain_means(results):
    result = results["constrained"]
    theta = result.path[:7, 3]
    grad = problem.gradient(theta)
    residual = 0.1 * (grad * theta).sum(1) + np.abs(grad).sum(1)
    assert result.kkt[6, 3] == pytest.approx(residual.mean())
    assert result.half_l1[6, 3] == pytest.approx(np.abs(grad).sum(1).mean() / 2)
    assert result.left is result.kkt
    assert results["unconstrained"].left is results["unconstrained"].half_l1


def test_bound_for_the_runs_own_settings_holds_at_every_k(results):
    for result in results.values():
        assert np.all(result.kkt.mean(axis=1) <= result.own_bound.mean(axis=1))


def test_left_exceeds_the_corollary_only_below_k_min(results):
    result = results["constrained"]
    assert result.left[99].mean() > result.corollary[99].mean()
    crossing = result.first_crossing()
    assert crossing is not None
    assert 100 < crossing <= result.k_min.max()
    assert results["unconstrained"].first_crossing() == 1
    assert run_toy("constrained", ToySettings(steps=100)).first_crossing() is None


def test_condition_of_theorem_4_is_reported(results):
    assert results["constrained"].theorem4_applies == 0.0
    assert 0 < results["unconstrained"].theorem4_applies < 0.5
    assert run_toy("unconstrained", ToySettings(weight_decay=0.0, steps=20)).theorem4_applies == 1.0


def test_corollaries_hold_at_their_own_settings_with_the_rate():
    for experiment in EXPERIMENTS:
        points = theorem_points(experiment, ToySettings(), steps=(200, 1000, 4000))
        assert [p.K for p in points] == [1000, 4000]  # 200 is below K_min
        for point in points:
            assert point.k_min <= point.K
            assert 0 < point.left < point.right / 5
        slope = np.log(points[1].left / points[0].left) / np.log(4)
        assert slope == pytest.approx(-0.25, abs=0.03)
    assert theorem_points("constrained", ToySettings(), steps=(100,)) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_reference_values_fit_once_the_starts_are_matched(experiment, results):
    match = match_reference(experiment)
    assert match.groups > 500
    assert np.all(np.abs(match.z) < 2)
    right = [results[experiment].corollary[k - 1].mean() for k in REFERENCE_STEPS]
    left = [results[experiment].left[k - 1].mean() for k in REFERENCE_STEPS]
    np.testing.assert_allclose(right, REFERENCE[experiment]["right"], rtol=0.02)
    np.testing.assert_allclose(left, REFERENCE[experiment]["left"], rtol=0.08)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr = 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: expected a finite number >= 0"),
        ({"betas": (1.0, 0.9)}, r"beta1 = 1: expected a number in \[0, 1\)"),
        ({"init_exp_avg": "ones"}, "init_exp_avg = 'ones': expected zeros or first_gradient"),
        ({"steps": 0}, "steps = 0: expected an integer of at least 1"),
        ({"seed": -1}, "seed = -1"),
        ({"lr": 11.0}, "lr = 11: expected lr <= 1/weight_decay = 10"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ToySettings(), **change)


def test_constrained_needs_a_box():
    with pytest.raises(ValueError, match="weight_decay = 0: the constrained experiment needs a box"):
        run_toy("constrained", ToySettings(weight_decay=0.0))
