"""The bound on the KKT residual for a learning rate and a noise variance that change from step to step (symbols: bounds.py).

The steps of the proof hold for each η_k. Their sum, before anything is divided by an η, is

    Σ η_k E R(θ^k) ≤ Δ + 2√d Σ η_k E‖δ^k‖₂ + ½Ld(1+ρ)² Σ η_k²,   ρ ≥ λ‖θ^k‖∞

so the bound is on the mean of R with weights η_k. A bound on the plain mean would need E f(θ^k) at every step.

Source: Appendix A.3 with η_k in place of η, and `megatron_lion.theory.exact` for δ^k; not in the paper.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.symbols import Array, Terms, require_beta, require_positive


def schedule_bound(
    lr: ArrayLike,
    *,
    beta1: float,
    beta2: float,
    L: float,
    sigma: ArrayLike,
    gap: float,
    d: float,
    first_grad_l2: float | None = None,
    reach: float = 1.0,
) -> Terms:
    """Bound on Σ_{k≤K} η_k E R(θ^k) / Σ_{k≤K} η_k for every K up to the number of learning rates given.

    E‖δ^k‖₂ ≤ √s_k + β₁ L √d (1+ρ) Σ_{2≤t≤k} β₂^{k−t} η_{t−1}, where s_k is the mean square of start and noise:
    s_k = (1−β₁)²σ_k² + β₁²M_{k−1} with M_k = β₂²M_{k−1} + (1−β₂)²σ_k² and M_0 = ‖∇f(θ¹)‖² (m⁰ = 0). For m⁰ = g¹,
    s_1 = M_1 = σ_1².

    For a constant η and σ² and ρ = 1 this is `any_settings(..., exact=True)` at every K.

    Args:
        lr: η_k of the steps 1 … K, shape (K,); 0 is allowed, as in a warm-up.
        beta1: β₁.
        beta2: β₂.
        L: smoothness.
        sigma: σ, one number or σ_k of each step, shape (K,).
        gap: Δ.
        d: dimension.
        first_grad_l2: ‖∇f(θ¹)‖₂, for m⁰ = 0; None for m⁰ = g¹.
        reach: ρ with λ‖θ^k‖∞ ≤ ρ for every step; 1 holds in the box.

    Returns:
        The five summands at each K, arrays of shape (K,); infinite as long as every η is 0. 'start' is what m⁰ adds.

    Raises:
        ValueError: a number outside its range, or other shapes.

    Example:
        >>> bound = schedule_bound([0.1, 0.05], beta1=0.9, beta2=0.99, L=1, sigma=1, gap=1, d=1)
        >>> bound.total.round(3).tolist()
        [12.2, 8.89]
    """
    lr, sigma = require_positive("lr", lr, zero=True), require_positive("sigma", sigma, zero=True)
    if lr.ndim != 1 or len(lr) == 0 or sigma.shape not in ((), lr.shape):
        raise ValueError(f"lr and sigma have shapes {lr.shape} and {sigma.shape}: expected (K,), and () or the same")
    b1, b2 = float(require_beta("beta1", beta1)), float(require_beta("beta2", beta2))
    L, gap = float(require_positive("L", L)), float(require_positive("gap", gap, zero=True))
    d, reach = float(require_positive("d", d)), float(require_positive("reach", reach, zero=True))
    norm = None if first_grad_l2 is None else float(require_positive("first_grad_l2", first_grad_l2, zero=True))
    sizes, drifts = direction_errors(lr, np.broadcast_to(sigma, lr.shape), b1, b2, norm)
    noise, _ = direction_errors(lr, np.broadcast_to(sigma, lr.shape), b1, b2, 0.0)
    way = 1 + reach
    root, total = np.sqrt(d), np.cumsum(lr)

    def mean(summands: Array) -> Array:
        return np.divide(np.cumsum(summands), total, out=np.full(lr.shape, np.inf), where=total > 0)

    return Terms(
        gap=np.divide(gap, total, out=np.full(lr.shape, np.inf), where=total > 0),
        start=mean(2 * root * lr * (sizes - noise)),
        drift=mean(2 * d * b1 * L * way * lr * drifts),
        noise=mean(2 * root * lr * noise),
        step=mean(0.5 * L * d * way**2 * lr**2),
    )


def direction_errors(
    lr: Array, sigma: Array, beta1: float, beta2: float, first_grad_l2: float | None
) -> tuple[Array, Array]:
    """The parts of the bound on E‖δ^k‖₂ at each step: the size √s_k of start and noise, and Σ_{2≤t≤k} β₂^{k−t} η_{t−1}.

    Args:
        lr: η_k, shape (K,).
        sigma: σ_k, shape (K,).
        beta1: β₁.
        beta2: β₂.
        first_grad_l2: as `schedule_bound`.

    Returns:
        Two arrays of shape (K,); the second times β₁L√d(1+ρ) bounds the drift.
    """
    squares, lags = np.empty(lr.shape), np.empty(lr.shape)
    from_zero = first_grad_l2 is not None
    momentum = first_grad_l2**2 if first_grad_l2 is not None else 0.0
    lag = 0.0
    for k, (rate, variance) in enumerate(zip(lr.tolist(), (sigma**2).tolist(), strict=True)):
        is_copy = k == 0 and not from_zero  # m⁰ = g¹: c¹ = m¹ = g¹
        squares[k] = variance if is_copy else (1 - beta1) ** 2 * variance + beta1**2 * momentum
        momentum = variance if is_copy else beta2**2 * momentum + (1 - beta2) ** 2 * variance
        lags[k] = lag
        lag = beta2 * lag + rate
    return np.sqrt(squares), lags
