"""Lemma 6: a bound on the distance between LION's update direction and the full gradient (symbols: bounds.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.exact import mean_drift, mean_noise
from megatron_lion.theory.symbols import Array, require_beta, require_positive


def initial_error(
    *, beta1: ArrayLike, sigma: ArrayLike, grad_l2: ArrayLike | None = None, first_gradient: bool = True
) -> Array:
    """Bound on E‖δ¹‖₂, the error of the first update direction c¹, for both initial values of the momentum.

    m⁰ = g¹ (the proof): δ¹ = g¹ − ∇f(θ¹), so E‖δ¹‖ ≤ σ.
    m⁰ = 0 (practice): δ¹ = −β₁∇f(θ¹) + (1−β₁)(g¹ − ∇f(θ¹)), so E‖δ¹‖ ≤ √(β₁²‖∇f(θ¹)‖² + (1−β₁)²σ²).

    Args:
        beta1: β₁.
        sigma: σ.
        grad_l2: ‖∇f(θ¹)‖₂; needed for m⁰ = 0 only.
        first_gradient: m⁰ = g¹; False for m⁰ = 0.

    Raises:
        ValueError: a number outside its range, or `grad_l2` is missing for m⁰ = 0.

    Source: last line of the proof of Lemma 6 (m⁰ = g¹); the same expansion with m⁰ = 0.
    """
    beta1, sigma = require_beta("beta1", beta1), require_positive("sigma", sigma, zero=True)
    if first_gradient:
        return sigma + np.zeros_like(beta1)
    if grad_l2 is None:
        raise ValueError("grad_l2 = None: expected the l2 norm of the first full gradient if the momentum starts at 0")
    grad_l2 = require_positive("grad_l2", grad_l2, zero=True)
    return np.sqrt((beta1 * grad_l2) ** 2 + ((1 - beta1) * sigma) ** 2)


def lemma6(
    K: ArrayLike,
    *,
    beta1: ArrayLike,
    beta2: ArrayLike,
    lr: ArrayLike,
    L: ArrayLike,
    sigma: ArrayLike,
    d: ArrayLike,
    first_error: ArrayLike | None = None,
    exact: bool = False,
    first_grad_l2: ArrayLike | None = None,
) -> Array:
    """Lemma 6: bound on the distance between c^k and the full gradient, averaged over the steps.

    (1/K) Σ_{k≤K} E‖δ^k‖₂ ≤ σ/(K(1−β₂)) + 2Lη√d/(1−β₂) + (|β₁−β₂| + 1 − β₁) σ/√(1−β₂),  δ^k = c^k − ∇f(θ^k)

    It needs ‖θ^k‖∞ ≤ 1/λ for every k, and holds for any β₁, β₂ in [0, 1) and any K.

    With `exact`, the orthogonal noise of the steps is propagated exactly (`megatron_lion.theory.exact`), and the drift keeps
    its β₁. For large K the bound is then 2β₁Lη√d/(1−β₂) + σ√((1−β₁)² + β₁²(1−β₂)/(1+β₂)). Both forms have the same
    assumptions, and the exact one is never larger.

    Args:
        K: steps.
        beta1: β₁.
        beta2: β₂.
        lr: η.
        L: smoothness.
        sigma: σ; 0 means exact gradients.
        d: dimension.
        first_error: E‖δ¹‖₂, which replaces σ in the first summand; see `initial_error`. By default the paper's σ,
            which is for m⁰ = g¹. Not for the exact form, which needs the parts of this error.
        exact: propagate the noise exactly.
        first_grad_l2: for the exact form with m⁰ = 0: ‖∇f(θ¹)‖₂. By default m⁰ = g¹.

    Returns:
        The right side, in the unit of a gradient.

    Raises:
        ValueError: a number outside its range, or an argument of the other form.

    Example:
        >>> round(float(lemma6(100, beta1=0.9, beta2=0.99, lr=0.01, L=7, sigma=2**0.5, d=2)), 3)
        23.9
        >>> round(float(lemma6(100, beta1=0.9, beta2=0.99, lr=0.01, L=7, sigma=2**0.5, d=2, exact=True)), 3)
        7.355

    Source: Lemma 6 (Appendix A.2); the exact form is not in the paper.
    """
    if exact and first_error is not None:
        raise ValueError("first_error: the exact form takes first_grad_l2, the l2 norm of the first full gradient")
    if exact:
        noise = mean_noise(K, beta1=beta1, beta2=beta2, sigma=sigma, first_grad_l2=first_grad_l2)
        return np.asarray(noise + mean_drift(K, beta1=beta1, beta2=beta2, lr=lr, L=L, d=d))
    if first_grad_l2 is not None:
        raise ValueError("first_grad_l2: only the exact form takes it; see initial_error for first_error")
    K, d = require_positive("K", K), require_positive("d", d)
    beta1, beta2 = require_beta("beta1", beta1), require_beta("beta2", beta2)
    lr, L = require_positive("lr", lr), require_positive("L", L)
    sigma = require_positive("sigma", sigma, zero=True)
    first = sigma if first_error is None else require_positive("first_error", first_error, zero=True)
    start = first / (K * (1 - beta2))
    drift = 2 * L * lr * np.sqrt(d) / (1 - beta2)
    noise = (np.abs(beta1 - beta2) + 1 - beta1) * sigma / np.sqrt(1 - beta2)
    return np.asarray(start + drift + noise)
