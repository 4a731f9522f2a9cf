"""Corollary 3 over arrays of K on both sides of K_min: equal to a loop over numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_lion.theory import bounds

# K_min by the second entry of its maximum, LΔ/σ² = 420, and by the first, σ⁶/(LΔ)³ = 216.
PROBLEMS = [{"L": 7.0, "sigma": math.sqrt(2), "gap": 120.0}, {"L": 2.0, "sigma": math.sqrt(12), "gap": 1.0}]
STEPS = [1, 2, 35, 215, 217, 419, 421, 1000, 10**6]


def plain_k_min(L: float, sigma: float, gap: float) -> float:
    return max(sigma**6 / (L * gap) ** 3, L * gap / sigma**2)


def plain_bound(K: float, d: int, L: float, sigma: float, gap: float) -> float:
    return 15 * math.sqrt(d) * math.sqrt(math.sqrt(sigma * sigma * L * gap / K))


def test_the_problems_take_both_entries_of_k_min() -> None:
    assert [plain_k_min(**problem) for problem in PROBLEMS] == pytest.approx([420, 216])
    found = bounds.k_min(**{key: np.array([problem[key] for problem in PROBLEMS]) for key in ("L", "sigma", "gap")})
    assert found.tolist() == pytest.approx([420, 216])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", [list, np.array, lambda K: np.array(K).reshape(3, 3)])
def test_below_k_min_every_entry_is_the_formula(problem: dict[str, float], kind: Any) -> None:
    found = bounds.corollary3(kind(STEPS), d=5, below_k_min=True, **problem)
    assert found.shape == np.shape(kind(STEPS))
    assert found.ravel().tolist() == pytest.approx([plain_bound(K, 5, **problem) for K in STEPS], rel=1e-13)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_entry_is_refused_in_an_array_if_it_is_alone(problem: dict[str, float]) -> None:
    least = plain_k_min(**problem)
    enough = [K for K in STEPS if least <= K]
    assert 2 < len(enough) < len(STEPS) - 2, "the case must have K on both sides of K_min"
    expected = [plain_bound(K, 5, **problem) for K in enough]
    assert bounds.corollary3(enough, d=5, **problem).tolist() == pytest.approx(expected, rel=1e-13)
    for K in STEPS:
        if K in enough:
            assert bounds.corollary3(K, d=5, **problem) == pytest.approx(plain_bound(K, 5, **problem), rel=1e-13)
            continue
        message = f"^K = {K}: Corollary 3 needs K >= K_min = {round(least)}$"
        with pytest.raises(ValueError, match=message):
            bounds.corollary3(K, d=5, **problem)
        for place in range(len(enough) + 1):
            with pytest.raises(ValueError, match=message):
                bounds.corollary3([*enough[:place], K, *enough[place:]], d=5, **problem)
            with pytest.raises(ValueError, match=message):
                bounds.corollary5([*enough[:place], K, *enough[place:]], d=5, weight_decay=0.05, radius=10.0, **problem)


def test_the_message_names_an_entry_with_its_own_k_min() -> None:
    """K_min is 35 and 420 here: 100 is enough for the first, 200 is not for the second."""
    problem = {"L": 7.0, "sigma": math.sqrt(2), "d": 1}
    gaps = np.array([10.0, 120.0])
    with pytest.raises(ValueError, match=r"^K = 200: Corollary 3 needs K >= K_min = 420$"):
        bounds.corollary3(np.array([100.0, 200.0]), gap=gaps, **problem)
    with pytest.raises(ValueError, match=r"^K = 30: Corollary 3 needs K >= K_min = 35$"):
        bounds.corollary3(np.array([[500.0], [30.0], [400.0]]), gap=gaps, **problem)
    table = bounds.corollary3(np.array([[500.0], [420.0], [1e5]]), gap=gaps, **problem)
    expected = [[plain_bound(K, 1, 7.0, math.sqrt(2), gap) for gap in gaps.tolist()] for K in (500.0, 420.0, 1e5)]
    assert table.tolist() == [pytest.approx(row, rel=1e-13) for row in expected]


def test_k_min_itself_is_enough_where_rounding_puts_it_higher() -> None:
    problem = {"L": 2.0, "sigma": 0.7, "gap": 147.0}  # 2 · 147 / 0.49 is 600
    assert float(bounds.k_min(**problem)) > 600
    assert bounds.corollary3([600, 601], d=1, **problem)[0] == pytest.approx(plain_bound(600, 1, **problem), rel=1e-13)
    with pytest.raises(ValueError, match="K = 599: "):
        bounds.corollary3([600, 599], d=1, **problem)
