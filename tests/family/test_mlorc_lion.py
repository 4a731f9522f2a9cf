"""MLorc-Lion: the projection in numpy, LION itself where nothing is lost, and the size of its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.family.mlorc_lion import MLorcLion, randomized_svd
from megatron_lion.family.plain_rule import generator_of
from megatron_lion.optim.lion import Lion

ROWS, COLUMNS = 9, 6


def momentum_of(optimizer, param) -> np.ndarray:
    state = optimizer.state[param]
    return (state["left"] @ torch.diag(state["singular"]) @ state["right"]).numpy()


@given(rank=st.integers(1, 6), oversampling=st.sampled_from([0, 2, 50]), seed=st.integers(0, 99))
@examples(60)
def test_steps_are_the_equations_in_numpy(rank, oversampling, seed):
    """A ↦ the best rank-r part of PA, P the projection onto the range of AΩ, here from the normal equations."""
    rng = np.random.default_rng(seed)
    theta, m = rng.standard_normal((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = MLorcLion(
        [param], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, rank=rank, oversampling=oversampling, seed=seed
    )
    for step in range(5):
        g = rng.standard_normal((ROWS, COLUMNS))
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        theta -= 0.1 * (np.sign(0.8 * m + 0.2 * g) + 0.3 * theta)
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-10, atol=1e-12)
        exact = 0.9 * m + 0.1 * g
        noise = torch.randn(
            (COLUMNS, min(rank + oversampling, COLUMNS)),
            generator=generator_of(seed, 0, step, param.device),
            dtype=torch.float64,
        ).numpy()
        range_ = exact @ noise
        projected = range_ @ np.linalg.solve(range_.T @ range_, range_.T @ exact)
        left, values, right = np.linalg.svd(projected)
        m = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(momentum_of(optimizer, param), m, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6,), (3, 4, 2), ()])
def test_it_is_lion_if_nothing_is_lost(shape):
    """Rank as large as the matrix, or no matrix."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.97), "weight_decay": 0.1}
    mine, lion = MLorcLion([ours], **settings, rank=5), Lion([theirs], **settings)
    for _ in range(20):
        ours.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step()
        lion.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


def test_it_is_lion_if_all_gradients_have_the_same_few_rows():
    """Gradients A_k B with B of two rows: their mean has rank 2, whatever A_k are."""
    rng = np.random.default_rng(4)
    base = rng.standard_normal((2, COLUMNS))
    ours, theirs = (torch.nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.float64)) for _ in range(2))
    mine, lion = MLorcLion([ours], lr=0.01, rank=2), Lion([theirs], lr=0.01, betas=(0.95, 0.98))
    for _ in range(20):
        ours.grad = torch.from_numpy(rng.standard_normal((ROWS, 2)) @ base)
        theirs.grad = ours.grad.clone()
        mine.step()
        lion.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-12)


@given(rank=st.integers(1, 6), oversampling=st.integers(0, 3), seed=st.integers(0, 99))
@examples(60)
def test_the_approximation_is_between_the_best_one_and_none(rank, oversampling, seed):
    """Eckart and Young: no matrix of rank r is closer than the first r singular values; a projection loses no more than all."""
    matrix = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS))
    left, values, right = randomized_svd(
        torch.from_numpy(matrix), rank, oversampling, torch.Generator().manual_seed(seed)
    )
    lost = np.linalg.norm(matrix - (left @ torch.diag(values) @ right).numpy())
    best = np.sqrt((np.linalg.svd(matrix)[1][rank:] ** 2).sum())
    assert best - 1e-9 <= lost <= np.linalg.norm(matrix) + 1e-9
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))


def test_numbers_of_state():
    """r (rows + columns + 1) for a matrix; a vector keeps its own."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(40, 30), (30,), (2, 50)]]
    optimizer = MLorcLion(params, rank=4)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    counts = [sum(v.numel() for name, v in optimizer.state[param].items() if name != "step") for param in params]
    assert counts == [4 * 71, 30, 2 * 53]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_becomes_nan(bad):
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = MLorcLion([param], lr=0.1, rank=2)
    param.grad = torch.ones(4, 3)
    param.grad[1, 2] = bad
    optimizer.step()
    assert param.detach().isnan().nonzero().tolist() == [[1, 2]]
    param.grad = torch.ones(4, 3)
    optimizer.step()  # the momentum of the whole matrix is lost with it
    assert param.detach().isnan().all()


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"rank": 2.0}, {"oversampling": -1}, {"seed": -1}, {"betas": (0.9, 1.0)}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MLorcLion([torch.nn.Parameter(torch.ones(2, 2))], **settings)
