"""The function of the toy problem, its minimum, and LION, SGD and AdamW on it, vectorised over runs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from megatron_lion.theory.symbols import Array

SMOOTHNESS = 7.0
"""L of the toy function: its Hessian's eigenvalues are in [−3, 7]."""
DIMENSION = 2


def loss(theta: Array) -> Array:
    """f(θ) for θ of shape (..., 2).

    Example:
        >>> float(loss(np.array([0.0, 0.0])))
        5.0
    """
    return theta[..., 0] ** 2 + theta[..., 1] ** 2 + 5 * np.cos(theta[..., 0]) * np.cos(theta[..., 1])


def gradient(theta: Array) -> Array:
    """∇f(θ) = (2θ₁ − 5 sin θ₁ cos θ₂, 2θ₂ − 5 cos θ₁ sin θ₂), shape as `theta`.

    Example:
        >>> gradient(np.array([np.pi / 2, np.pi])).round(3).tolist()
        [8.142, 6.283]
    """
    sine, cosine = np.sin(theta), np.cos(theta)
    return np.asarray(2 * theta - 5 * sine * cosine[..., ::-1])


@lru_cache
def minimum(half_width: float) -> float:
    """f* = min f over the box ‖θ‖∞ ≤ half_width.

    Example:
        >>> round(minimum(10.0), 3), round(minimum(1.0), 3)
        (1.884, 3.46)
    """
    # f ≥ ‖θ‖² − 5 and f* ≤ f(0) = 5, so every minimum has ‖θ‖∞ ≤ √10. Each of the six grids is 25 times finer.
    reach = min(half_width, 10**0.5)
    centre, width, best = np.zeros(2), reach, np.inf
    for _ in range(6):
        axes = [np.clip(np.linspace(c - width, c + width, 201), -reach, reach) for c in centre]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        values = loss(grid)
        index = np.unravel_index(values.argmin(), values.shape)
        centre, best, width = grid[index], float(values[index]), width / 25
    return best


def simulate_lion(
    theta: Array,
    noise: Array,
    *,
    lr: ArrayLike,
    betas: tuple[ArrayLike, ArrayLike],
    weight_decay: float,
    init_exp_avg: str = "zeros",
) -> Array:
    """Algorithm 1 on the toy function, vectorised over runs.

    c_k = β₁ m_{k−1} + (1−β₁) g_k,  θ_{k+1} = θ_k − η (sign(c_k) + λ θ_k),  m_k = β₂ m_{k−1} + (1−β₂) g_k

    Args:
        theta: θ¹ of each run, shape (runs, 2).
        noise: g_k − ∇f(θ_k), shape (steps, runs, 2).
        lr: η, a number or shape (runs, 1).
        betas: (β₁, β₂), each a number or shape (runs, 1).
        weight_decay: λ.
        init_exp_avg: m⁰ = 0 ('zeros') or g₁ ('first_gradient').

    Returns:
        θ¹ … θ^{K+1}, shape (steps + 1, runs, 2).

    Source: Algorithm 1.
    """
    beta1, beta2 = (np.asarray(beta, dtype=np.float64) for beta in betas)
    rest1, rest2, lr = 1 - beta1, 1 - beta2, np.asarray(lr, dtype=np.float64)
    path = np.empty((len(noise) + 1, *theta.shape))
    path[0] = theta
    exp_avg = np.zeros_like(theta)
    for k, noise_k in enumerate(noise):
        grad = gradient(path[k]) + noise_k
        if k == 0 and init_exp_avg == "first_gradient":
            exp_avg = grad.copy()
        # The order of operations is that of optim.lion.Lion, so both give the same bits.
        c = exp_avg * beta1 + grad * rest1
        path[k + 1] = path[k] - (np.sign(c) + path[k] * weight_decay) * lr
        exp_avg = exp_avg * beta2 + grad * rest2
    return path


def simulate_sgd(theta: Array, noise: Array, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> Array:
    """SGD with momentum and decoupled decay, for comparison; arguments and result as `simulate_lion`."""
    path = np.empty((len(noise) + 1, *theta.shape))
    path[0] = theta
    velocity = np.zeros_like(theta)
    for k, noise_k in enumerate(noise):
        velocity = velocity * momentum + gradient(path[k]) + noise_k
        path[k + 1] = path[k] * (1 - lr * weight_decay) - lr * velocity
    return path


def simulate_adamw(
    theta: Array,
    noise: Array,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Array:
    """AdamW with bias correction, for comparison; arguments and result as `simulate_lion`."""
    path = np.empty((len(noise) + 1, *theta.shape))
    path[0] = theta
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for k, noise_k in enumerate(noise):
        grad = gradient(path[k]) + noise_k
        first = first * betas[0] + grad * (1 - betas[0])
        second = second * betas[1] + grad**2 * (1 - betas[1])
        corrected = np.sqrt(second / (1 - betas[1] ** (k + 1))) + eps
        step = first / (1 - betas[0] ** (k + 1)) / corrected
        path[k + 1] = path[k] * (1 - lr * weight_decay) - lr * step
    return path
