"""κ of Lion-κ: values in numpy, and the properties that define a subgradient and a conjugate."""

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

kappas = st.builds(
    Kappa, st.sampled_from(KAPPAS), p=st.sampled_from([1.0, 1.3, 2.0, 3.0, 8.0]), delta=st.sampled_from([0.1, 1.0, 4.0])
)
shapes = st.sampled_from([(1,), (7,), (3, 4), (2, 3, 2), ()])


def draw(shape, seed, scale=1.0):
    """Values with a few zeros, also a whole row of them."""
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return np.where(np.abs(x) < 0.2 * scale, 0.0, x)


@given(kappa=kappas, shape=shapes, seed=st.integers(0, 999))
@examples(150)
def test_values_are_the_definitions(kappa, shape, seed):
    x = draw(shape, seed)
    tensor = torch.from_numpy(np.array(x))
    found = [kappa.value(tensor), kappa.dual_norm(tensor), kappa.conjugate(tensor)]
    wanted = [
        numpy_value(kappa.name, x, kappa.p, kappa.delta),
        numpy_dual_norm(kappa.name, x, kappa.p),
        numpy_conjugate(kappa.name, x, kappa.delta),
    ]
    np.testing.assert_allclose([float(value) for value in found], wanted, rtol=1e-12, atol=1e-14)
    gradient = kappa.gradient(tensor)
    assert gradient.shape == tensor.shape
    np.testing.assert_allclose(
        gradient.numpy(), numpy_gradient(kappa.name, x, kappa.p, kappa.delta), rtol=1e-10, atol=1e-12
    )


@given(kappa=kappas, shape=shapes, seed=st.integers(0, 999))
@examples(150)
def test_subgradient_and_conjugate_obey_their_definitions(kappa, shape, seed):
    """κ(y) ≥ κ(x) + ⟨∂κ(x), y-x⟩ for every y; κ*(v) ≥ ⟨v, x⟩ - κ(x) in the domain, with equality at v = ∂κ(x)."""
    x = draw(shape, seed)
    v = kappa.gradient(torch.from_numpy(np.array(x))).numpy()
    assert numpy_dual_norm(kappa.name, v, kappa.p) <= 1 + 1e-12
    value = numpy_value(kappa.name, x, kappa.p, kappa.delta)
    conjugate = float(kappa.conjugate(torch.from_numpy(v)))
    assert value + conjugate == pytest.approx((v * x).sum(), rel=1e-9, abs=1e-9)
    for other in range(20):
        y = draw(shape, seed + 1000 * other + 1, scale=10.0 ** (other % 4 - 2))
        there = numpy_value(kappa.name, y, kappa.p, kappa.delta)
        assert there >= value + (v * (y - x)).sum() - 1e-9 * (1 + there + value)
        inside = y / max(1.0, numpy_dual_norm(kappa.name, y, kappa.p))
        star = float(kappa.conjugate(torch.from_numpy(np.array(inside))))
        assert star >= (inside * x).sum() - value - 1e-9 * (1 + value)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("kappa", [Kappa("lp", p=2.0), Kappa("lp", p=3.0), Kappa("group_l2")])
def test_direction_does_not_depend_on_the_scale(kappa, scale):
    """The square of 1e-30 is 0 in float32, and that of 1e30 is inf."""
    x = torch.tensor([[3.0, -4.0], [1.0, 0.5]])
    torch.testing.assert_close(kappa.gradient(x * scale), kappa.gradient(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kappa", [Kappa("l1"), Kappa("lp", p=3.0), Kappa("huber"), Kappa("group_l2")])
def test_what_is_not_finite_becomes_nan(kappa, bad):
    found = kappa.gradient(torch.tensor([[1.0, bad], [2.0, -1.0]]))
    assert found[0, 1].isnan()
    assert found[1].isfinite().all() == (kappa.name != "lp")  # one norm for the whole tensor, or not


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "l3"}, "kappa = 'l3'"),
        ({"name": "lp", "p": 0.5}, "p = 0.5"),
        ({"name": "lp", "p": float("inf")}, "p = inf"),
        ({"name": "huber", "delta": 0.0}, "delta = 0.0"),
        ({"name": "huber", "delta": 1e-46}, "delta = 1e-46: needs at least 1.18e-38; use kappa='l1'"),
        ({"name": "huber", "delta": 1e-40}, "delta = 1e-40: needs at least"),
        ({"name": "huber", "delta": "1"}, "delta = '1'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Kappa(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kappa", "x", "value"),
    [
        (Kappa("lp", p=20.0), [1e-5] * 4, 4 ** (1 / 20) * 1e-5),
        (Kappa("lp", p=100.0), [1e-5] * 4, 4 ** (1 / 100) * 1e-5),
        (Kappa("lp", p=1e6), [3.0, -4.0, 0.0], 4.0),
        (Kappa("lp", p=2.0), [3e30, -4e30], 5e30),
        (Kappa("lp", p=100.0), [0.0, 0.0], 0.0),
        (Kappa("lp", p=3.0), [1.0, float("-inf")], math.inf),
        (Kappa("lp", p=3.0), [1.0, float("nan")], math.nan),
        (Kappa("group_l2"), [[3e-30, -4e-30], [0.0, 0.0]], 5e-30),
        (Kappa("group_l2"), [[3.0, 4.0], [float("inf"), 0.0]], math.inf),
    ],
)
def test_values_of_tiny_and_huge_elements(kappa, x, value, dtype):
    found = kappa.value(torch.tensor(x, dtype=dtype))
    assert found.shape == ()
    assert float(found) == pytest.approx(value, rel=1e-5, abs=0, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kappa", "y", "norm"),
    [
        (Kappa("lp", p=1.01), [2e4] * 4, 4 ** (0.01 / 1.01) * 2e4),
        (Kappa("lp", p=1.01), [1e-5] * 4, 4 ** (0.01 / 1.01) * 1e-5),
        (Kappa("lp", p=1.0), [3.0, -4.0], 4.0),
        (Kappa("lp", p=1.5), [1.0, float("inf")], math.inf),
        (Kappa("lp", p=1.5), [1.0, float("nan")], math.nan),
        (Kappa("group_l2"), [[3e30, -4e30], [0.0, 1.0]], 5e30),
        (Kappa("l1"), [3.0, float("-inf")], math.inf),
    ],
)
def test_dual_norms_of_tiny_and_huge_elements(kappa, y, norm, dtype):
    found = kappa.dual_norm(torch.tensor(y, dtype=dtype))
    assert found.shape == ()
    assert float(found) == pytest.approx(norm, rel=1e-5, abs=0, nan_ok=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize(
    "kappa", [Kappa("l1"), Kappa("lp", p=3.0), Kappa("lp", p=1.0), Kappa("huber"), Kappa("group_l2")]
)
def test_a_tensor_without_elements_counts_as_zero(kappa, shape):
    empty = torch.zeros(shape)
    found = [kappa.value(empty), kappa.conjugate(empty), kappa.dual_norm(empty)]
    assert [(float(value), value.shape) for value in found] == [(0.0, ())] * 3
    assert kappa.gradient(empty).shape == shape
