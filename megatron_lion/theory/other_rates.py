"""Rates of other algorithms: the paper's equations 2 and 3, SGD with its constant, and what their sources state (symbols: bounds.py).

A rate that is known as O(·) only has its constant as an argument. The list has the algorithms that the paper names, as far as
the paper's text or the abstract of the source states a rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.symbols import Array, require_positive


def sgd_rate(K: ArrayLike, *, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike, constant: ArrayLike) -> Array:
    """Equation 2: (1/K) Σ E‖∇f(θ^k)‖₂ ≤ constant · (σ²LΔ)^¼ K^{−¼} for SGD.

    Args:
        K: steps.
        L: smoothness.
        sigma: σ.
        gap: Δ.
        constant: that of O(·), which the paper does not state; `sgd_any_settings` proves 2^{3/4} = 1.682.

    Raises:
        ValueError: a number outside its range.

    Source: equation 2 of Dong, Li, Lin; Bottou, Curtis, Nocedal (2018).
    """
    K, constant = require_positive("K", K), require_positive("constant", constant)
    L, gap = require_positive("L", L), require_positive("gap", gap, zero=True)
    sigma = require_positive("sigma", sigma, zero=True)
    return np.asarray(constant * (sigma**2 * L * gap / K) ** 0.25)


def sgd_any_settings(K: ArrayLike, *, lr: ArrayLike, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike) -> Array:
    """(1/K) Σ E‖∇f(θ^k)‖₂ ≤ √(2Δ/(ηK) + Lησ²) for SGD without momentum and decay, with η ≤ 1/L.

    Assumptions 1 to 3 give E f(θ^{k+1}) ≤ E f(θ^k) − η(1 − Lη/2) E‖∇f(θ^k)‖² + ½Lη²σ². The sum over k and Jensen's
    inequality are the bound. η = √(2Δ/(LKσ²)), which is at most 1/L for K ≥ 2LΔ/σ², gives 2^{3/4} (σ²LΔ)^¼ K^{−¼}.

    Raises:
        ValueError: η > 1/L, or a number outside its range.

    Example:
        >>> round(float(sgd_any_settings(800, lr=0.05, L=1, sigma=1, gap=1)) * 800**0.25, 3)
        1.682

    Source: the descent lemma, summed; the form is that of Theorem 4.8 of Bottou, Curtis, Nocedal (2018).
    """
    K, lr, L = require_positive("K", K), require_positive("lr", lr), require_positive("L", L)
    gap, sigma = require_positive("gap", gap, zero=True), require_positive("sigma", sigma, zero=True)
    if np.any(lr * L > 1 + 1e-12):
        raise ValueError(f"lr = {np.max(lr):g}: expected lr <= 1/L = {1 / np.max(L):g}")
    return np.asarray(np.sqrt(2 * gap / (lr * K) + L * lr * sigma**2))


def signsgd_momentum_rate(K: ArrayLike, *, L: ArrayLike, gap: ArrayLike, d: ArrayLike, constant: ArrayLike) -> Array:
    """Equation 3: (1/K) Σ E‖∇f(θ^k)‖₁ ≤ constant · (Δ/L + d) K^{−¼} for SignSGD with momentum.

    The O(·) of equation 3 has σ and the choice of the settings in its constant, so it has a unit and is another number for
    each problem.

    Args:
        K: steps.
        L: smoothness.
        gap: Δ.
        d: dimension.
        constant: that of O(·), which the paper does not state.

    Raises:
        ValueError: a number outside its range.

    Source: equation 3 of Dong, Li, Lin; Sun, Wang, Li, Wang (2023).
    """
    K, d, constant = require_positive("K", K), require_positive("d", d), require_positive("constant", constant)
    L, gap = require_positive("L", L), require_positive("gap", gap, zero=True)
    return np.asarray(constant * (gap / L + d) * K**-0.25)


@dataclass(frozen=True)
class PublishedRate:
    """A rate as its source states it.

    Attributes:
        algorithm: its name.
        rate: the statement, with K steps, d coordinates and accuracy ε.
        condition: what it needs beyond Assumptions 1 to 3, or what limits it; empty if nothing is stated.
        reference: authors and year.
        source: where the statement is.
    """

    algorithm: str
    rate: str
    condition: str
    reference: str
    source: str


PUBLISHED_RATES = (
    PublishedRate("SGD", "mean ‖∇f‖₂ ≤ O((σ²LΔ)^¼ K^−¼)", "", "Bottou et al. 2018", "paper, equation 2"),
    PublishedRate(
        "lower bound", "≥ Ω(ε^−4) gradients for ‖∇f‖₂ ≤ ε", "", "Arjevani et al. 2023", "abstract, arXiv 1912.02365"
    ),
    PublishedRate(
        "LION", "mean R ≤ 15√d (σ²LΔ)^¼ K^−¼", "θ¹ in the box, K ≥ K_min", "Dong et al. 2024", "paper, Corollary 3"
    ),
    PublishedRate(
        "SignSGD, momentum", "mean ‖∇f‖₁ ≤ O((Δ/L + d) K^−¼)", "", "Sun et al. 2023", "paper, equation 3"
    ),
    PublishedRate(
        "SignSGD", "rate of SGD", "growing batch size (the paper)", "Bernstein et al. 2018", "abstract, arXiv 1802.04434"
    ),
    PublishedRate("SignSGD-EF", "rate of SGD", "", "Karimireddy et al. 2019", "abstract, arXiv 1901.09847"),
    PublishedRate(
        "SSDM", "optimal rate in ‖∇f‖₂", "homogeneous data", "Safaryan, Richtárik 2021", "abstract, arXiv 1905.12938"
    ),
    PublishedRate("RMSProp", "mean ‖∇f‖₁ ≤ O(√d C K^−¼), C as for SGD", "", "Li et al. 2024", "abstract, arXiv 2402.00389"),
    PublishedRate(
        "AdaGrad", "O(ε^−2) steps for ‖∇f‖ < ε", "over-parameterized, affine noise", "Wang et al. 2023", "abstract, COLT 2023"
    ),
    PublishedRate(
        "AdaGrad, momentum", "Õ(K^−½), high probability", "noise grows with f, ∇f", "Hong, Lin 2024",
        "abstract, arXiv 2402.13794",
    ),
    PublishedRate(
        "Adam", "O(ε^−4) gradients for ‖∇f‖ ≤ ε", "generalized smoothness", "Li et al. 2023", "abstract, arXiv 2304.13972"
    ),
)  # fmt: skip
"""Rates of the algorithms that the paper names. "mean" is (1/K) Σ_{k≤K} E."""


def rates_table() -> list[list[str]]:
    """The rows of `PUBLISHED_RATES` as cells, in the order of the table of docs/theory.md.

    Example:
        >>> first, *_ = rates_table()
        >>> ", ".join(first)
        'SGD, mean ‖∇f‖₂ ≤ O((σ²LΔ)^¼ K^−¼), –, Bottou et al. 2018, paper, equation 2'
    """
    return [[row.algorithm, row.rate, row.condition or "–", row.reference, row.source] for row in PUBLISHED_RATES]
