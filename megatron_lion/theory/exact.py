"""The error of LION's update direction with the noise propagated exactly (symbols: bounds.py).

With ξ^k = g^k − ∇f(θ^k), the two averages of Algorithm 1 give, for every k ≥ 1,

    δ^k = β₁β₂^{k−1}(m⁰ − ∇f(θ¹)) − β₁ Σ_{2≤t≤k} β₂^{k−t}(∇f(θ^t) − ∇f(θ^{t−1})) + (1−β₁)ξ^k + β₁(1−β₂) Σ_{t<k} β₂^{k−1−t}ξ^t

Assumption 2 makes different ξ orthogonal in expectation, so the squares of the last two parts add. Lemma 6 adds norms
instead. The first two functions give the size of start and noise together, the third adds the drift.

Source: the expansion in the proof of Lemma 6; the sum of squares in place of its triangle inequality is not in the paper.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.symbols import Array, Constants, require_beta, require_positive

NEGLIGIBLE = 1e-18
"""A decaying part of the variance that is smaller than this share is rounding error in float64."""


def noise_factor(*, beta1: ArrayLike, beta2: ArrayLike) -> Array:
    """√((1−β₁)² + β₁²(1−β₂)/(1+β₂)): root mean square of the noise in c^k after many steps, in units of σ.

    Example:
        >>> round(float(noise_factor(beta1=0.9, beta2=0.99)), 4)
        0.1186

    Raises:
        ValueError: a β outside [0, 1).
    """
    beta1, beta2 = require_beta("beta1", beta1), require_beta("beta2", beta2)
    return np.asarray(np.sqrt((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)))


def mean_noise(
    K: ArrayLike, *, beta1: ArrayLike, beta2: ArrayLike, sigma: ArrayLike, first_grad_l2: ArrayLike | None = None
) -> Array:
    """Mean over k ≤ K of the root mean square of start and noise in δ^k, from the variance bound σ².

    m⁰ = g¹: the square is σ² for k = 1 and σ²(s² + 2β₁²β₂/(1+β₂) · β₂^{2(k−2)}) for k ≥ 2.
    m⁰ = 0:  the square is σ²s² + β₁²β₂^{2(k−1)}(‖∇f(θ¹)‖² − σ²(1−β₂)/(1+β₂)).

    s is `noise_factor`. It is an upper bound on (1/K) Σ E‖start + noise‖₂ (Jensen), exact for noise of constant norm.

    Args:
        K: steps, at least 1.
        beta1: β₁.
        beta2: β₂.
        sigma: σ.
        first_grad_l2: ‖∇f(θ¹)‖₂, for m⁰ = 0; None for m⁰ = g¹.

    Raises:
        ValueError: a number outside its range.
    """
    arrays = [require_positive("K", K), require_beta("beta1", beta1), require_beta("beta2", beta2),
              require_positive("sigma", sigma, zero=True)]  # fmt: skip
    if np.any(arrays[0] < 1):
        raise ValueError(f"K = {np.min(arrays[0]):g}: expected at least one step")
    if first_grad_l2 is not None:
        arrays.append(require_positive("first_grad_l2", first_grad_l2, zero=True))
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    columns = np.stack([np.broadcast_to(array, shape).ravel() for array in arrays])
    out = np.empty(columns.shape[1])
    # One sum serves all K of equal settings, as in a curve against K.
    settings, place = np.unique(columns[1:], axis=1, return_inverse=True)
    for index, (b1, b2, s, *norm) in enumerate(settings.T.tolist()):
        chosen = np.flatnonzero(place.ravel() == index)
        out[chosen] = _means(columns[0][chosen], b1, b2, s, norm[0] if norm else None)
    return out.reshape(shape)[()]


def _means(K: Array, beta1: float, beta2: float, sigma: float, first_grad_l2: float | None) -> Array:
    """`mean_noise` for several K and one value of each other argument."""
    steady = sigma**2 * float(noise_factor(beta1=beta1, beta2=beta2)) ** 2
    lasting = math.log(NEGLIGIBLE) / (2 * math.log(beta2)) if beta2 else 0.0
    count = int(min(float(K.max()), lasting + 3))
    k = np.arange(1, count + 1, dtype=np.float64)
    if first_grad_l2 is None:
        squares = steady + sigma**2 * 2 * beta1**2 * beta2 / (1 + beta2) * beta2 ** np.maximum(2 * (k - 2), 0)
        squares[0] = sigma**2
    else:
        excess = first_grad_l2**2 - sigma**2 * (1 - beta2) / (1 + beta2)
        squares = steady + beta1**2 * excess * beta2 ** (2 * (k - 1))
    sums = np.cumsum(np.sqrt(np.maximum(squares, 0.0)))
    used = np.minimum(np.floor(K), count)
    return np.asarray((sums[used.astype(np.int64) - 1] + (K - used) * math.sqrt(steady)) / K)


def mean_drift(K: ArrayLike, *, beta1: ArrayLike, beta2: ArrayLike, lr: ArrayLike, L: ArrayLike, d: ArrayLike) -> Array:
    """Mean over k ≤ K of the bound 2β₁Lη√d (1−β₂^{k−1})/(1−β₂) on the drift in δ^k; → 2β₁Lη√d/(1−β₂) for large K.

    A step moves θ by at most 2η√d inside the box, and θ^k has made k − 1 steps.

    Raises:
        ValueError: a number outside its range.
    """
    K, d = require_positive("K", K), require_positive("d", d)
    beta1, beta2 = require_beta("beta1", beta1), require_beta("beta2", beta2)
    lr, L = require_positive("lr", lr), require_positive("L", L)
    # (1 − β₂^K)/(K(1−β₂)), at most 1: rounding must not make the drift of a single step negative.
    young = np.minimum((1 - beta2**K) / (K * (1 - beta2)), 1.0)
    return np.asarray(2 * beta1 * L * lr * np.sqrt(d) / (1 - beta2) * (1 - young))


def sharpest_constants(*, L: ArrayLike, sigma: ArrayLike, gap: ArrayLike) -> Constants:
    """The constants that minimise the K^{−¼} part of Theorem 2 with exact noise, and then its K^{−¾} part over c₁.

    c₂ = 2√2 √(LΔ)/σ and c₃ = √(Δc₂/(4L)) give 2^{9/4} = 4.757 times K^{−¼}√d(σ²LΔ)^¼. c₁ is not in the K^{−¼} part:
    for every c₁ the noise tends to σ√(c₂/2) K^{−¼}. c₁ = ¾c₂ minimises the K^{−¾} part at these c₂ and c₃.

    Example:
        >>> c = sharpest_constants(L=1, sigma=1, gap=1)
        >>> round(float(c.c1), 4), round(float(c.c2), 4), round(float(c.c3), 4)
        (2.1213, 2.8284, 0.8409)

    Source: minimisation of the inequality above (A.1) with `mean_noise` and `mean_drift`; not in the paper.
    """
    L, sigma, gap = require_positive("L", L), require_positive("sigma", sigma), require_positive("gap", gap)
    c2 = 2 * math.sqrt(2) * np.sqrt(L * gap) / sigma
    return Constants(0.75 * c2, c2, np.sqrt(gap * c2 / (4 * L)))
