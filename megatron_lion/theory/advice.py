"""Corollary 3's choice of β and η for a run of K steps, and the L that a run's own settings imply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lion.compare.table import markdown_grid
from megatron_lion.theory.bounds import (
    corollary3,
    corollary3_constants,
    k_min,
    smallest_constants,
    theorem2,
)
from megatron_lion.theory.symbols import require_positive

HONESTY = (
    "Corollary 3 sets c1 = c2, that is beta1 = beta2 (Signum): it does not explain why LION with beta1 < beta2 is "
    "better. In the inequality of its proof every beta1 >= beta2 gives the same bound, and beta1 < beta2 a larger one; the "
    "difference comes from a triangle inequality on the noise. With exact noise beta1 is not in the leading part (docs/theory.md).",
    "The corollary balances an upper bound over all functions with these L, sigma and Delta. Its eta is not a tuned "
    "learning rate: it grows with Delta^(3/4), falls with L^(-1/4), and has no warm-up or decay.",
    "sigma^2 and L are measured at the probes of a run, so they estimate lower bounds on the suprema in the assumptions. "
    "K_min and the bound are estimates, too.",
)
"""Notes below the table: the limits of Corollary 3's statement on training."""


@dataclass(frozen=True)
class Advice:
    """Corollary 3's choice for one (L, σ², Δ, d, K).

    Attributes:
        K: steps.
        L: smoothness (loss/θ²).
        noise_variance: σ² (loss²/θ²).
        gap: Δ (loss).
        d: dimension.
        beta: β₁ = β₂ = 1 − √(LΔ)/(σ√K), or None if it would be negative (K < LΔ/σ²).
        lr: η = c₃/(√d K^¾).
        k_min: K_min.
        holds: K ≥ K_min.
        bound: 15 √d K^{−¼}(σ²LΔ)^¼, a bound on the mean KKT residual only if `holds`.
        tight_bound: the right side of the inequality in the proof at the same settings; a bound only if
            `holds`.
        smallest_bound: the same right side at `smallest_constants`, which minimise its K^{−¼} part.
    """

    K: int
    L: float
    noise_variance: float
    gap: float
    d: int
    beta: float | None
    lr: float
    k_min: float
    holds: bool
    bound: float
    tight_bound: float
    smallest_bound: float


def advise(K: int, *, L: float, noise_variance: float, gap: float, d: int) -> Advice:
    """Evaluates Corollary 3.

    Args:
        K: steps of the run to plan.
        L: smoothness (loss/θ²).
        noise_variance: σ² of a global batch's gradient, summed over coordinates.
        gap: Δ = f(θ¹) − f* (nats).
        d: parameters.

    Returns:
        β₁ = β₂, η, K_min and the bounds.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> advice = advise(2000, L=7, noise_variance=2, gap=120, d=2)
        >>> round(advice.k_min), advice.holds, round(advice.beta, 3), round(advice.lr, 4)
        (420, True, 0.542, 0.0443)

    Source: Corollary 3 of Dong, Li, Lin, arXiv 2411.07724.
    """
    for name, value in (("K", K), ("L", L), ("noise_variance", noise_variance), ("gap", gap), ("d", d)):
        require_positive(name, value)
    sigma = math.sqrt(noise_variance)
    least = float(k_min(L=L, sigma=sigma, gap=gap))
    constants = corollary3_constants(L=L, sigma=sigma, gap=gap)
    smallest = smallest_constants(L=L, sigma=sigma, gap=gap)
    beta = 1 - float(constants.c1) / math.sqrt(K)
    tight, best = (
        float(theorem2(K, c1=c.c1, c2=c.c2, c3=c.c3, L=L, sigma=sigma, gap=gap, d=d, tight=True).total)
        for c in (constants, smallest)
    )
    return Advice(
        K=K,
        L=L,
        noise_variance=noise_variance,
        gap=gap,
        d=d,
        beta=beta if beta >= 0 else None,
        lr=float(constants.c3) / (math.sqrt(d) * K**0.75),
        k_min=least,
        holds=least * (1 - 1e-12) <= K,  # K_min is rounded: K = K_min must hold
        bound=float(corollary3(K, L=L, sigma=sigma, gap=gap, d=d, below_k_min=True)),
        tight_bound=tight,
        smallest_bound=best,
    )


@dataclass(frozen=True)
class Implied:
    """The L for which Corollary 3 would have chosen a run's settings; both values agree if the run followed it.

    Attributes:
        from_beta2: L = (σ(1 − β₂)√K)²/Δ.
        from_lr: L = Δ³/(σ²(η√d K^¾)⁴).
    """

    from_beta2: float
    from_lr: float


def implied_smoothness(K: int, *, beta2: float, lr: float, noise_variance: float, gap: float, d: int) -> Implied:
    """Solves Corollary 3 for L, once from β₂ and once from η.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> advice = advise(2000, L=7, noise_variance=2, gap=120, d=2)
        >>> seen = {"noise_variance": 2, "gap": 120, "d": 2}
        >>> implied = implied_smoothness(2000, beta2=advice.beta, lr=advice.lr, **seen)
        >>> round(implied.from_beta2, 6), round(implied.from_lr, 6)
        (7.0, 7.0)
    """
    for name, value in (("K", K), ("lr", lr), ("noise_variance", noise_variance), ("gap", gap), ("d", d)):
        require_positive(name, value)
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 = {beta2:g}: expected a number in [0, 1)")
    c2, c3 = (1 - beta2) * math.sqrt(K), lr * math.sqrt(d) * K**0.75
    return Implied(noise_variance * c2**2 / gap, gap**3 / (noise_variance * c3**4))


def advice_table(rows: Sequence[tuple[str, Advice]]) -> str:
    """Markdown table with one row for each labelled scenario."""
    columns = ["scenario", "L", "σ²", "Δ", "β₁ = β₂", "η", "K_min", "K ≥ K_min", "bound on mean R", "tight form"]
    cells = [
        [
            label, f"{a.L:.3g}", f"{a.noise_variance:.3g}", f"{a.gap:.3g}", "none" if a.beta is None else f"{a.beta:.5g}",
            f"{a.lr:.3g}", f"{a.k_min:.3g}", "yes" if a.holds else "no", f"{a.bound:.3g}", f"{a.tight_bound:.3g}",
        ]
        for label, a in rows
    ]  # fmt: skip
    return markdown_grid(columns, cells)
