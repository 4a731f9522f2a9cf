"""Theorems 2 and 4, Corollaries 3 and 5 and Lemma 6 as functions, with the symbols of the paper.

Symbols (all functions take them by these names):

| symbol   | name              | meaning                                                          | unit    |
|----------|-------------------|------------------------------------------------------------------|---------|
| K        | `K`               | optimizer steps                                                  | 1       |
| d        | `d`               | coordinates of θ, every parameter counted                        | 1       |
| L        | `L`               | ‖∇f(x) − ∇f(y)‖₂ ≤ L ‖x − y‖₂ (Assumption 1, equation 5)         | loss/θ² |
| σ        | `sigma`           | E‖g − ∇f‖₂² ≤ σ², over all coordinates (Assumption 3, eq. 7)     | loss/θ  |
| Δ        | `gap`             | f(θ¹) − f*                                                       | loss    |
| β₁ β₂ η  | `beta1 beta2 lr`  | the settings of Algorithm 1                                      | 1, 1, θ |
| c₁ c₂ c₃ | `c1 c2 c3`        | β₁ = 1 − c₁/√K, β₂ = 1 − c₂/√K, η = c₃/(√d K^¾)                  | 1, 1, θ |
| λ        | `weight_decay`    | the box is ‖θ‖∞ ≤ 1/λ                                            | 1/θ     |

Arguments are numbers or numpy arrays, which broadcast: a curve against K takes one call.

Source: Dong, Li, Lin, "Convergence Rate Analysis of LION" (arXiv 2411.07724).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.exact import mean_drift, mean_noise, noise_factor
from megatron_lion.theory.lemma import lemma6
from megatron_lion.theory.symbols import Array, Constants, Terms, require_positive


def any_settings(
    K: ArrayLike,
    *,
    beta1: ArrayLike,
    beta2: ArrayLike,
    lr: ArrayLike,
    L: ArrayLike,
    sigma: ArrayLike,
    gap: ArrayLike,
    d: ArrayLike,
    first_error: ArrayLike | None = None,
    exact: bool = False,
    first_grad_l2: ArrayLike | None = None,
) -> Array:
    """The bound before the proof inserts its choice of β₁, β₂ and η; valid for any settings of a run.

    (1/K) Σ_{k≤K} E[λ⟨∇f(θ^k), θ^k⟩ + ‖∇f(θ^k)‖₁] ≤ Δ/(Kη) + 2√d · Lemma6(K) + 2dLη

    Theorem 2 is this inequality with β₁ = 1 − c₁/√K, β₂ = 1 − c₂/√K, η = c₃/(√d K^¾) and |c₁−c₂| + c₁ ≤ 2c₁ + c₂.
    Unlike Corollary 3 it can be drawn against K for one run with fixed settings.

    Args: as `lemma6`, and gap: Δ.

    Raises:
        ValueError: a number outside its range.

    Source: Appendix A.3, the inequality above (A.1).
    """
    gap = require_positive("gap", gap, zero=True)
    error = lemma6(
        K, beta1=beta1, beta2=beta2, lr=lr, L=L, sigma=sigma, d=d, first_error=first_error, exact=exact,
        first_grad_l2=first_grad_l2,
    )  # fmt: skip
    K, d, lr, L = (np.asarray(x, dtype=np.float64) for x in (K, d, lr, L))
    return np.asarray(gap / (K * lr) + 2 * np.sqrt(d) * error + 2 * d * L * lr)


def theorem2(
    K: ArrayLike,
    *,
    c1: ArrayLike,
    c2: ArrayLike,
    c3: ArrayLike,
    L: ArrayLike,
    sigma: ArrayLike,
    gap: ArrayLike,
    d: ArrayLike,
    tight: bool = False,
    exact: bool = False,
) -> Terms:
    """Theorem 2 (ii): bound on the mean KKT residual over K steps.

    (1/K) Σ_{k≤K} E[λ⟨∇f(θ^k), θ^k⟩ + ‖∇f(θ^k)‖₁]
      ≤ Δ√d/(c₃K^¼) + 2σ√d/(c₂K^½) + 4Lc₃√d/(c₂K^¼) + 2σ(2c₁+c₂)√d/(√c₂K^¼) + 2Lc₃√d/K^¾

    Needs β₁ = 1 − c₁/√K, β₂ = 1 − c₂/√K, η = c₃/(√d K^¾), m⁰ = g¹, ‖θ¹‖∞ ≤ 1/λ and λη ≤ 1.

    Args:
        K: steps.
        c1: of β₁.
        c2: of β₂.
        c3: of η.
        L: smoothness.
        sigma: σ.
        gap: Δ.
        d: dimension.
        tight: keep the |c₁−c₂| + c₁ of the proof (A.1), which the theorem rounds up to 2c₁ + c₂.
        exact: propagate the noise exactly, as `lemma6` does; `tight` then changes nothing. Needs c₁, c₂ ≤ √K. The summand
            'start' is what the first gradients add to the noise after many steps, 'drift' is that of K steps.

    Returns:
        The five summands and, as `.total`, the right side.

    Raises:
        ValueError: a number outside its range, or, with `exact`, c₁ or c₂ above √K.

    Example:
        >>> float(theorem2(16, c1=1, c2=1, c3=1, L=1, sigma=1, gap=1, d=1).total)
        6.25

    Source: Theorem 2 (ii).
    """
    K, d = require_positive("K", K), require_positive("d", d)
    c1, c2, c3 = require_positive("c1", c1), require_positive("c2", c2), require_positive("c3", c3)
    L, gap = require_positive("L", L), require_positive("gap", gap, zero=True)
    sigma = require_positive("sigma", sigma, zero=True)
    root = np.sqrt(d)
    if exact:
        chosen = Constants(c1, c2, c3).settings(K, d)
        beta1, beta2 = chosen.beta1, chosen.beta2
        noise = noise_factor(beta1=beta1, beta2=beta2) * sigma
        return Terms(
            gap=gap * root / (c3 * K**0.25),
            start=2 * root * (mean_noise(K, beta1=beta1, beta2=beta2, sigma=sigma) - noise),
            drift=2 * root * mean_drift(K, beta1=beta1, beta2=beta2, lr=chosen.lr, L=L, d=d),
            noise=2 * root * noise,
            step=2 * L * c3 * root / K**0.75,
        )
    spread = np.abs(c1 - c2) + c1 if tight else 2 * c1 + c2
    return Terms(
        gap=gap * root / (c3 * K**0.25),
        start=2 * sigma * root / (c2 * K**0.5),
        drift=4 * L * c3 * root / (c2 * K**0.25),
        noise=2 * sigma * spread * root / (np.sqrt(c2) * K**0.25),
        step=2 * L * c3 * root / K**0.75,
    )


def theorem4(
    K: ArrayLike,
    *,
    c1: ArrayLike,
    c2: ArrayLike,
    c3: ArrayLike,
    L: ArrayLike,
    sigma: ArrayLike,
    gap: ArrayLike,
    d: ArrayLike,
    weight_decay: float,
    radius: float,
    tight: bool = False,
) -> Terms:
    """Theorem 4: the right side of Theorem 2 bounds (1/2K) Σ_{k≤K} E‖∇f(θ^k)‖₁ if θ stays away from the box.

    Args: as `theorem2`, and
        weight_decay: λ; 0 is allowed here: the box is then all of space.
        radius: C with ‖θ^k‖∞ ≤ C for every k.

    Raises:
        ValueError: λ > 1/(2C), or a number outside its range.

    Source: Theorem 4. Its proof takes C from a bound on E f(θ^k) and coercivity (equation 10); such a bound
    on a mean does not hold path by path, so here C is an input, to be measured.
    """
    require_positive("weight_decay", weight_decay, zero=True)
    require_positive("radius", radius)
    if weight_decay > 1 / (2 * radius) * (1 + 1e-12):
        raise ValueError(
            f"weight_decay = {weight_decay:g}: Theorem 4 needs weight_decay <= 1/(2 radius) = {1 / (2 * radius):g} "
            f"for radius = {radius:g}"
        )
    return theorem2(K, c1=c1, c2=c2, c3=c3, L=L, sigma=sigma, gap=gap, d=d, tight=tight)


def corollary3_constants(*, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike) -> Constants:
    """Corollary 3's choice: c₁ = c₂ = √(LΔ)/σ and c₃ = Δ^¾/(L^¼ σ^½), hence β₁ = β₂.

    Raises:
        ValueError: a number is not positive (the choice does not exist for σ = 0).

    Source: Corollaries 3 and 5.
    """
    L, sigma, gap = require_positive("L", L), require_positive("sigma", sigma), require_positive("gap", gap)
    c = np.sqrt(L * gap) / sigma
    return Constants(c, c, gap**0.75 / (L**0.25 * np.sqrt(sigma)))


def k_min(*, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike) -> Array:
    """K_min = max{σ⁶/(L³Δ³), LΔ/σ²}, a real number; Corollaries 3 and 5 hold for K ≥ K_min.

    From the first entry on the 'start' term, and from the second on the 'step' term, is at most
    2 K^{−¼}√d(σ²LΔ)^¼. The second entry also gives β₁ = β₂ ≥ 0.

    Example:
        >>> round(float(k_min(L=7, sigma=2**0.5, gap=120)), 6)
        420.0

    Source: Corollary 3.
    """
    L, sigma, gap = require_positive("L", L), require_positive("sigma", sigma), require_positive("gap", gap)
    snr = L * gap / sigma**2
    return np.asarray(np.maximum(snr**-3, snr))


def corollary3(
    K: ArrayLike,
    *,
    L: ArrayLike,
    sigma: ArrayLike,
    gap: ArrayLike,
    d: ArrayLike,
    below_k_min: bool = False,
) -> Array:
    """Corollary 3: (1/K) Σ_{k≤K} E[λ⟨∇f(θ^k), θ^k⟩ + ‖∇f(θ^k)‖₁] ≤ 15 √d K^{−¼} (σ²LΔ)^¼ for K ≥ K_min.

    The 15 is 1 + 2 + 4 + 6 + 2, the five summands of Theorem 2 at Corollary 3's constants. With the
    |c₁−c₂| + c₁ of the proof the fourth is 2, and the bound holds with 11.

    Args:
        K: steps.
        L: smoothness.
        sigma: σ.
        gap: Δ.
        d: dimension.
        below_k_min: also evaluate the formula for K < K_min, where it is not a bound, to draw a curve.

    Raises:
        ValueError: some K < its K_min and not `below_k_min` (the message names the smallest such K), or a number
            outside its range.

    Example:
        >>> round(float(corollary3(2000, L=7, sigma=2**0.5, gap=120, d=2)), 2)
        20.31

    Source: Corollary 3.
    """
    K, d = require_positive("K", K), require_positive("d", d)
    least = k_min(L=L, sigma=sigma, gap=gap)
    below = least * (1 - 1e-12) > K
    if not below_k_min and np.any(below):
        first = np.argmin(
            np.where(below, K, np.inf)
        )  # K and K_min of the same entry: arrays of L, σ, Δ have several K_min
        k, needed = (np.broadcast_to(x, below.shape).flat[first] for x in (K, least))
        raise ValueError(f"K = {k:g}: Corollary 3 needs K >= K_min = {math.ceil(needed)}")
    L, sigma, gap = (np.asarray(x, dtype=np.float64) for x in (L, sigma, gap))
    return np.asarray(15 * np.sqrt(d) * K**-0.25 * (sigma**2 * L * gap) ** 0.25)


def corollary5(
    K: ArrayLike,
    *,
    L: ArrayLike,
    sigma: ArrayLike,
    gap: ArrayLike,
    d: ArrayLike,
    weight_decay: float,
    radius: float,
    below_k_min: bool = False,
) -> Array:
    """Corollary 5: (1/2K) Σ_{k≤K} E‖∇f(θ^k)‖₁ ≤ 15 √d K^{−¼} (σ²LΔ)^¼ for K ≥ K_min and λ ≤ 1/(2C).

    Args: as `corollary3`, and λ and C as in `theorem4`.

    Raises:
        ValueError: K < K_min, λ > 1/(2C), or a number outside its range.

    Source: Corollary 5.
    """
    constants = corollary3_constants(L=L, sigma=sigma, gap=gap)
    c1, c2, c3 = constants.c1, constants.c2, constants.c3
    theorem4(K, c1=c1, c2=c2, c3=c3, L=L, sigma=sigma, gap=gap, d=d, weight_decay=weight_decay, radius=radius)
    return corollary3(K, L=L, sigma=sigma, gap=gap, d=d, below_k_min=below_k_min)


def gap_along_the_way(
    *, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike
) -> Array:
    """Equation 10: E f(θ^k) − f* ≤ Δ + 2c₃σ/c₂ + 4Lc₃²/c₂ + 2c₃σ(2c₁+c₂)/√c₂ + 2Lc₃², for every k ≤ K.

    Raises:
        ValueError: a number outside its range.

    Source: equation 10, from (A.1).
    """
    c1, c2, c3 = require_positive("c1", c1), require_positive("c2", c2), require_positive("c3", c3)
    L, gap = require_positive("L", L), require_positive("gap", gap, zero=True)
    sigma = require_positive("sigma", sigma, zero=True)
    rise = 2 * sigma / c2 + 4 * L * c3 / c2 + 2 * sigma * (2 * c1 + c2) / np.sqrt(c2) + 2 * L * c3
    return np.asarray(gap + c3 * rise)


def smallest_constants(*, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike) -> Constants:
    """The constants that minimise the K^{−¼} part of the tight form of Theorem 2, with c₁ = c₂.

    c₁ = c₂ = 2√(LΔ)/σ and c₃ = √(Δc₂/(4L)) give 4√2 = 5.66 times K^{−¼}√d(σ²LΔ)^¼. Corollary 3's choice gives
    7 (1 + 4 + 2) in the same form. Any c₁ ≤ c₂, that is β₁ ≥ β₂, gives the same value. c₁ > c₂, the β₁ < β₂ of
    practice, gives a larger one. With exact noise, `exact.sharpest_constants` gives 2^{9/4} = 4.757.

    Source: minimisation of the inequality (A.1) over c₂ and c₃; not in the paper.
    """
    L, sigma, gap = require_positive("L", L), require_positive("sigma", sigma), require_positive("gap", gap)
    c = 2 * np.sqrt(L * gap) / sigma
    return Constants(c, c, np.sqrt(gap * c / (4 * L)))
