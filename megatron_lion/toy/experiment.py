"""Simulates LION on the two-dimensional problem and computes both sides of the theorems.

f(θ) = θ₁² + θ₂² + 5 cos θ₁ cos θ₂ has Hessian eigenvalues 2 − 5 cos(θ₁ ± θ₂) in [−3, 7], so L = 7. Its minima
(0, ±2.125), (±2.125, 0) have f* = 1.884. The gradient comes with N(0, 1) noise per coordinate: σ² = 2, d = 2.

Two experiments, averaged over starts and repeats: 'constrained' starts on the border of the box (θ₁ = 1/λ)
and measures the KKT residual of Theorem 2; 'unconstrained' starts anywhere and measures ½‖∇f‖₁ of Theorem 4.

All runs advance together as rows of one array. The operations are those of `megatron_lion.optim.lion.Lion` in
float64, in the same order, so both give the same bits.

Source: the toy problem of the journal edition of "Convergence Rate Analysis of LION" (Appendix A.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_lion.theory import bounds
from megatron_lion.theory.lemma import initial_error
from megatron_lion.theory.symbols import Array, require_positive
from megatron_lion.toy.problem import DIMENSION, SMOOTHNESS, gradient, loss, minimum, simulate_lion

EXPERIMENTS: tuple[Experiment, ...] = ("constrained", "unconstrained")
START_HALF_WIDTH = 10.0
"""Unconstrained starts are uniform in [−10, 10]², or in the box if it is smaller."""

type Experiment = Literal["constrained", "unconstrained"]


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """Settings of a toy experiment.

    Attributes:
        lr: η.
        weight_decay: λ; 0 removes the box (then there is no constrained experiment).
        betas: (β₁, β₂).
        init_exp_avg: m⁰: 'zeros' or 'first_gradient'.
        noise_std: standard deviation of the noise of each coordinate; σ² = 2 noise_std².
        steps: K.
        starts: number of different θ¹.
        repeats: noise sequences for each start.
        seed: seed of starts and noise.

    Raises:
        ValueError: a number outside its range, or λη > 1: a step could then leave the box ‖θ‖∞ ≤ 1/λ.
    """

    lr: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    init_exp_avg: str = "zeros"
    noise_std: float = 1.0
    steps: int = 2000
    starts: int = 5
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("lr", self.lr)
        require_positive("weight_decay", self.weight_decay, zero=True)
        require_positive("noise_std", self.noise_std)
        for name, beta in zip(("beta1", "beta2"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} = {beta:g}: expected a number in [0, 1)")
        if self.init_exp_avg not in ("zeros", "first_gradient"):
            raise ValueError(f"init_exp_avg = {self.init_exp_avg!r}: expected zeros or first_gradient")
        for name in ("steps", "starts", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected an integer of at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: expected an integer of at least 0")
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                f"lr = {self.lr:g}: expected lr <= 1/weight_decay = {1 / self.weight_decay:g}, else one step "
                "leaves the box"
            )

    @property
    def box(self) -> float:
        """1/λ, the half width of the box; infinite if λ = 0."""
        return 1 / self.weight_decay if self.weight_decay else float("inf")

    @property
    def sigma(self) -> float:
        """σ = √2 noise_std."""
        return 2**0.5 * self.noise_std


def draw_starts(experiment: Experiment, settings: ToySettings) -> Array:
    """θ¹ of each start, shape (starts, 2): on the border of the box, or in [−10, 10]² within the box.

    Raises:
        ValueError: a constrained start without a box (λ = 0).
    """
    # Separate streams for starts (0) and noise (1), so that they are independent.
    generator = np.random.default_rng([settings.seed, EXPERIMENTS.index(experiment), 0])
    if experiment == "constrained":
        if settings.weight_decay == 0:
            raise ValueError("weight_decay = 0: the constrained experiment needs a box, so a number > 0")
        half_width = settings.box
    else:
        half_width = min(START_HALF_WIDTH, settings.box)
    theta = generator.uniform(-half_width, half_width, (settings.starts, DIMENSION))
    if experiment == "constrained":
        theta[:, 0] = half_width
    return theta


def draw_noise(experiment: Experiment, settings: ToySettings, steps: int | None = None) -> Array:
    """Gradient noise g − ∇f, shape (steps, starts × repeats, 2); `steps` replaces that of the settings."""
    generator = np.random.default_rng([settings.seed, EXPERIMENTS.index(experiment), 1])
    shape = (steps or settings.steps, settings.starts * settings.repeats, DIMENSION)
    return generator.standard_normal(shape) * settings.noise_std


@dataclass(frozen=True)
class ToyResult:
    """Both sides of the inequality along the runs of one experiment.

    Arrays of shape (steps, runs) have the running means over k' ≤ k at [k − 1]. A run is start × repeat; the
    repeats of a start are adjacent. Arrays of shape (runs,) belong to θ¹ or to the whole run.

    Attributes:
        experiment: 'constrained' or 'unconstrained'.
        settings: settings of the simulation.
        path: θ¹ … θ^{K+1}, shape (steps + 1, runs, 2).
        kkt: running mean of R(θ) = λ⟨∇f, θ⟩ + ‖∇f‖₁.
        half_l1: running mean of ½‖∇f‖₁.
        gap: Δ = f(θ¹) − f*.
        k_min: K_min of Corollary 3.
        corollary: right side of Corollaries 3 and 5 at K = k, also below K_min, where it is not a bound.
        own_bound: `bounds.any_settings` with the run's own η and β.
        max_abs: largest ‖θ_k‖∞.
    """

    experiment: Experiment
    settings: ToySettings
    path: Array = field(repr=False)
    kkt: Array = field(repr=False)
    half_l1: Array = field(repr=False)
    gap: Array = field(repr=False)
    k_min: Array = field(repr=False)
    corollary: Array = field(repr=False)
    own_bound: Array = field(repr=False)
    max_abs: Array = field(repr=False)

    @property
    def left(self) -> Array:
        """Left side of the experiment's theorem: `kkt` (Theorem 2) or `half_l1` (Theorem 4)."""
        return self.kkt if self.experiment == "constrained" else self.half_l1

    @property
    def theorem4_applies(self) -> float:
        """Share of the runs with λ ≤ 1/(2C), where C is the run's largest ‖θ_k‖∞: the condition of Theorem 4."""
        return float(np.mean(self.settings.weight_decay * self.max_abs <= 0.5))

    def by_start(self, values: Array) -> Array:
        """Averages the repeats of each start: shape (steps, runs) to (steps, starts)."""
        return np.asarray(values.reshape(len(values), -1, self.settings.repeats).mean(axis=2))

    def first_crossing(self) -> int | None:
        """The smallest k from which on the mean left side is at most the corollary's mean right side, or None."""
        above = np.flatnonzero(self.left.mean(axis=1) > self.corollary.mean(axis=1))
        if len(above) == 0:
            return 1
        return int(above[-1]) + 2 if above[-1] + 1 < len(self.left) else None


def run_toy(experiment: Experiment, settings: ToySettings | None = None) -> ToyResult:
    """Simulates one experiment and evaluates both sides of its inequality for every k.

    Args:
        experiment: 'constrained' or 'unconstrained'.
        settings: settings; the defaults are the paper's values as far as it states them.

    Returns:
        Running means and bounds.

    Raises:
        ValueError: a constrained experiment with λ = 0.
    """
    settings = settings or ToySettings()
    theta = np.repeat(draw_starts(experiment, settings), settings.repeats, axis=0)
    path = simulate_lion(
        theta,
        draw_noise(experiment, settings),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        init_exp_avg=settings.init_exp_avg,
    )
    kkt, half_l1 = running_means(path, settings.weight_decay)
    # `minimum` is numerical: a start at the minimum must not give Δ ≤ 0, which the bounds reject.
    gap = np.maximum(loss(theta) - minimum(settings.box), 1e-12)
    k = np.arange(1, settings.steps + 1)[:, None]
    problem: dict[str, Any] = {"L": SMOOTHNESS, "sigma": settings.sigma, "gap": gap}
    first_error = initial_error(
        beta1=settings.betas[0],
        sigma=settings.sigma,
        grad_l2=np.linalg.norm(gradient(theta), axis=1),
        first_gradient=settings.init_exp_avg == "first_gradient",
    )
    return ToyResult(
        experiment=experiment,
        settings=settings,
        path=path,
        kkt=kkt,
        half_l1=half_l1,
        gap=gap,
        k_min=bounds.k_min(**problem),
        corollary=bounds.corollary3(k, d=DIMENSION, below_k_min=True, **problem),
        own_bound=bounds.any_settings(
            k,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.lr,
            d=DIMENSION,
            first_error=first_error,
            **problem,
        ),
        max_abs=np.abs(path[:-1]).max(axis=(0, 2)),
    )


def running_means(path: Array, weight_decay: float) -> tuple[Array, Array]:
    """Running means over k of R(θ_k) = λ⟨∇f, θ⟩ + ‖∇f‖₁ and of ½‖∇f‖₁, each of shape (steps, runs)."""
    theta = path[:-1]
    grad = gradient(theta)
    l1 = np.abs(grad).sum(axis=-1)
    residual = weight_decay * (grad * theta).sum(axis=-1) + l1
    k = np.arange(1, len(theta) + 1)[:, None]
    return residual.cumsum(axis=0) / k, l1.cumsum(axis=0) / (2 * k)
