"""The theorems' constants, settings and terms, and the checks that numbers are in the range a theorem needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
"""A float64 array; a numpy scalar for scalar arguments."""


def require_positive(name: str, value: ArrayLike, *, zero: bool = False) -> Array:
    """Returns `value` as float64 if every entry is finite and positive.

    Args:
        name: name of the value in the message.
        value: number or array.
        zero: whether 0 is allowed.

    Raises:
        ValueError: an entry is not finite or not positive; the message has the name, the entry and the range.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: expected a number") from None
    wrong = ~(np.isfinite(array) & (array >= 0 if zero else array > 0))
    if wrong.any():
        given = array[wrong].flat[0] if array.ndim else float(array)
        raise ValueError(f"{name} = {given:g}: expected a finite number {'>= 0' if zero else '> 0'}")
    return array


def require_beta(name: str, value: ArrayLike) -> Array:
    """Returns `value` as float64; raises ValueError unless every entry is in [0, 1)."""
    array = np.asarray(value, dtype=np.float64)
    wrong = ~((array >= 0) & (array < 1))
    if wrong.any():
        given = array[wrong].flat[0] if array.ndim else float(array)
        raise ValueError(f"{name} = {given:g}: expected a number in [0, 1)")
    return array


@dataclass(frozen=True)
class Constants:
    """The constants of Theorem 2, independent of K and d: β₁ = 1 − c₁/√K, β₂ = 1 − c₂/√K, η = c₃/(√d K^¾)."""

    c1: Any
    c2: Any
    c3: Any

    def settings(self, K: ArrayLike, d: ArrayLike) -> Settings:
        """The β₁, β₂ and η that these constants give for a run of K steps.

        Raises:
            ValueError: c₁ or c₂ exceeds √K, which makes a β negative.

        Example:
            >>> s = Constants(c1=1.0, c2=1.0, c3=2.0).settings(K=10_000, d=4)
            >>> float(s.beta1), float(s.beta2), float(s.lr)
            (0.99, 0.99, 0.001)
        """
        K, d = require_positive("K", K), require_positive("d", d)
        betas = []
        for name, c in (("c1", self.c1), ("c2", self.c2)):
            beta = 1 - require_positive(name, c) / np.sqrt(K)
            if np.any(beta < 0):
                raise ValueError(
                    f"{name} = {np.max(c):g}: beta = 1 - {name}/sqrt(K) is negative at K = {np.min(K):g}; "
                    f"expected {name} <= sqrt(K), that is K >= {float(np.max(c)) ** 2:g}"
                )
            betas.append(beta)
        return Settings(betas[0], betas[1], require_positive("c3", self.c3) / (np.sqrt(d) * K**0.75))


@dataclass(frozen=True)
class Settings:
    """β₁, β₂ and η of Algorithm 1."""

    beta1: Any
    beta2: Any
    lr: Any

    def constants(self, K: ArrayLike, d: ArrayLike) -> Constants:
        """The c₁, c₂, c₃ that give these settings for a run of K steps."""
        K, d = require_positive("K", K), require_positive("d", d)
        beta1, beta2 = require_beta("beta1", self.beta1), require_beta("beta2", self.beta2)
        lr = require_positive("lr", self.lr)
        return Constants((1 - beta1) * np.sqrt(K), (1 - beta2) * np.sqrt(K), lr * np.sqrt(d) * K**0.75)


@dataclass(frozen=True)
class Terms:
    """The five summands on the right of Theorem 2, in its order, and their sum.

    Attributes:
        gap: Δ√d/(c₃K^¼), from the distance between f(θ¹) and f*.
        start: 2σ√d/(c₂K^½), from the error of the momentum at the first step.
        drift: 4Lc₃√d/(c₂K^¼), from the lag of the momentum behind a moving θ.
        noise: 2σ(2c₁+c₂)√d/(√c₂K^¼), from the gradient noise that remains in the momentum.
        step: 2Lc₃√d/K^¾, from the curvature along one step.
    """

    gap: Any
    start: Any
    drift: Any
    noise: Any
    step: Any

    @property
    def total(self) -> Any:
        return self.gap + self.start + self.drift + self.noise + self.step
