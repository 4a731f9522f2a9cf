"""Two checks of the toy problem: the corollary at its own settings, and agreement with reference values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_lion.theory import bounds
from megatron_lion.theory.symbols import Array
from megatron_lion.toy.experiment import (
    Experiment,
    ToySettings,
    draw_noise,
    draw_starts,
    run_toy,
    running_means,
)
from megatron_lion.toy.problem import DIMENSION, SMOOTHNESS, loss, minimum, simulate_lion

REFERENCE_STEPS = (100, 500, 1000, 2000)
REFERENCE: dict[Experiment, dict[str, tuple[float, ...]]] = {
    "constrained": {"left": (55.2, 29.6, 15.7, 8.04), "right": (45.1, 30.2, 25.4, 21.3)},
    "unconstrained": {"left": (10.9, 6.25, 3.41, 1.81), "right": (38.8, 25.9, 21.8, 18.3)},
}
"""Running means at k = 100, 500, 1000, 2000 from an independent simulation of 5 starts × 5 repeats with
η = 0.01, λ = 0.1, β = (0.9, 0.99). Its starts, noise and m⁰ are unknown."""

CONVENTIONS: tuple[tuple[tuple[float, float], str], ...] = (
    ((0.9, 0.99), "zeros"),
    ((0.9, 0.99), "first_gradient"),
    ((0.9, 0.95), "zeros"),
    ((0.95, 0.98), "zeros"),
    ((0.9, 0.9), "zeros"),
    ((0.99, 0.99), "zeros"),
)
"""Settings of β and m⁰ that are compared by `match_reference`: LION's defaults and Signum's."""


@dataclass(frozen=True)
class TheoremPoint:
    """Both sides of Corollary 3 (or 5) for runs of K steps with the corollary's own β₁ = β₂ and η.

    Attributes:
        K: steps of the runs.
        left: mean over the runs of (1/K) Σ R(θ_k), or of (1/2K) Σ ‖∇f(θ_k)‖₁.
        right: mean over the runs of 15 √d K^{−¼} (σ²LΔ)^¼.
        left_std: standard deviation of `left` over the starts, 0 for one start.
        k_min: largest K_min of the starts.
        beta: smallest and largest β of the starts.
        lr: smallest and largest η of the starts.
    """

    K: int
    left: float
    right: float
    left_std: float
    k_min: float
    beta: tuple[float, float]
    lr: tuple[float, float]


def theorem_points(
    experiment: Experiment, settings: ToySettings, steps: Sequence[int] = (1000, 2000, 4000, 8000)
) -> list[TheoremPoint]:
    """Runs the toy with Corollary 3's settings for each K: β₁ = β₂ = 1 − c₁/√K, η = c₃/(√d K^¾), m⁰ = g¹.

    The corollary's settings depend on K, so it makes no statement about one run drawn against k. Here each point
    has its own runs.

    Args:
        experiment: 'constrained' or 'unconstrained'.
        settings: starts, repeats, seed, λ and noise; its η, β and m⁰ are not used.
        steps: values of K; a K below some start's K_min, or with λη > 1, is skipped.

    Returns:
        One point for each K.

    Source: Corollaries 3 and 5.
    """
    starts = draw_starts(experiment, settings)
    theta = np.repeat(starts, settings.repeats, axis=0)
    problem: dict[str, Any] = {
        "L": SMOOTHNESS,
        "sigma": settings.sigma,
        "gap": np.maximum(loss(theta) - minimum(settings.box), 1e-12),
    }
    constants = bounds.corollary3_constants(**problem)
    k_min = float(bounds.k_min(**problem).max())
    chosen = [(K, constants.settings(K, DIMENSION)) for K in steps if k_min <= K]
    chosen = [(K, s) for K, s in chosen if s.lr.max() * settings.weight_decay <= 1]
    if not chosen:
        return []
    # The runs of all K advance in one array for max(K) steps; a shorter run ends where its K is read below.
    noise = draw_noise(experiment, settings, steps=max(K for K, _ in chosen))
    count = len(chosen)
    beta = np.concatenate([s.beta1 for _, s in chosen])[:, None]
    path = simulate_lion(
        np.tile(theta, (count, 1)),
        np.tile(noise, (1, count, 1)),
        lr=np.concatenate([s.lr for _, s in chosen])[:, None],
        betas=(beta, beta),
        weight_decay=settings.weight_decay,
        init_exp_avg="first_gradient",
    )
    kkt, half_l1 = running_means(path, settings.weight_decay)
    left = kkt if experiment == "constrained" else half_l1
    points = []
    for index, (K, s) in enumerate(chosen):
        runs = left[K - 1, index * len(theta) : (index + 1) * len(theta)]
        per_start = runs.reshape(-1, settings.repeats).mean(axis=1)
        points.append(
            TheoremPoint(
                K=K,
                left=float(runs.mean()),
                right=float(bounds.corollary3(K, d=DIMENSION, **problem).mean()),
                left_std=float(per_start.std(ddof=1)) if len(per_start) > 1 else 0.0,
                k_min=k_min,
                beta=(float(s.beta1.min()), float(s.beta1.max())),
                lr=(float(s.lr.min()), float(s.lr.max())),
            )
        )
    return points


@dataclass(frozen=True)
class ReferenceMatch:
    """The reference's left side compared with 5-start averages that have the reference's right side.

    Attributes:
        experiment: 'constrained' or 'unconstrained'.
        betas: (β₁, β₂).
        init_exp_avg: m⁰.
        left: mean of the left sides at `REFERENCE_STEPS`.
        std: standard deviation of the left sides over draws of five starts.
        groups: number of draws of five starts with the reference's right side.
    """

    experiment: Experiment
    betas: tuple[float, float]
    init_exp_avg: str
    left: Array
    std: Array
    groups: int

    @property
    def z(self) -> Array:
        """(reference − left)/std at each of `REFERENCE_STEPS`."""
        return np.asarray((np.asarray(REFERENCE[self.experiment]["left"]) - self.left) / self.std)


def match_reference(
    experiment: Experiment,
    betas: tuple[float, float] = (0.9, 0.99),
    init_exp_avg: str = "zeros",
    *,
    pool: int = 400,
    groups: int = 20_000,
    tolerance: float = 0.015,
) -> ReferenceMatch:
    """Compares with `REFERENCE` given the reference's right side, which removes the chance of its five starts.

    The right side depends on the starts only. Of many draws of five starts from a pool, those whose right side at
    k = 1000 equals the reference's are kept. Their left sides predict the reference's left side under a given β
    and m⁰.

    Args:
        experiment: 'constrained' or 'unconstrained'.
        betas: (β₁, β₂) to try.
        init_exp_avg: m⁰ to try.
        pool: number of simulated starts, with one noise sequence each.
        groups: number of draws of five starts.
        tolerance: largest relative deviation of the right side.

    Returns:
        Mean and standard deviation of the left sides of the draws kept.
    """
    settings = replace(ToySettings(), betas=betas, init_exp_avg=init_exp_avg, starts=pool, repeats=1, seed=1)
    result = run_toy(experiment, settings)
    generator = np.random.default_rng([settings.seed, 2])
    draws = generator.integers(0, pool, (groups, 5))
    # Right sides at different k differ only by the factor k^−¼, so one k is enough.
    right = result.corollary[999][draws].mean(axis=1)
    target = REFERENCE[experiment]["right"][REFERENCE_STEPS.index(1000)]
    kept = draws[np.abs(right / target - 1) <= tolerance]
    averages = np.stack([result.left[k - 1][kept].mean(axis=1) for k in REFERENCE_STEPS])
    return ReferenceMatch(
        experiment, betas, init_exp_avg, averages.mean(axis=1), averages.std(axis=1, ddof=1), len(kept)
    )
