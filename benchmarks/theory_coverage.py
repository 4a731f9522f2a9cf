"""Measures how often the intervals of `megatron-lion theory` hold on simulated LION runs with known L, σ² and Δ.

    python benchmarks/theory_coverage.py [--runs 400] [--output benchmarks/results/theory_coverage]

Each run minimises f(θ) = 1 + ½ Σ h_i θ_i² with LION. Curvatures h_i are between 0.01 and L, so L is the smoothness
constant, f* = 1, and Δ = f(θ¹) − 1. A training step adds noise of variance σ² to ∇f and logs the norm. A probe averages
B batches and logs what a frozen probe logs; its standard error of σ² is the delete-one-batch jackknife.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import heading, shown, surroundings, write_results
from numpy.typing import NDArray

from megatron_lion.compare.table import markdown_grid
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.series import Series
from megatron_lion.theory.estimate import estimate_gap, estimate_smoothness, estimate_variance
from megatron_lion.theory.probe_noise import l2_norms, read_probe_noise
from megatron_lion.theory.rates import c_lion, c_sgd

L, FLOOR, WEIGHT_DECAY = 3.0, 1.0, 0.01
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One problem and one way of measuring it.

    Attributes:
        name: label in the tables.
        noise_variance: σ² at θ¹.
        batches: B of each probe.
        noise: "equal" in all coordinates, "few" (nearly all in three of them), "heavy" (Student's t with 5 degrees of
            freedom, drawn for each coordinate of each batch, so that the size of a batch's whole noise hardly scatters) or
            "falling" (σ² falls with the loss, to a tenth).
        size_spread: s of the lognormal factor exp(s z) that multiplies all noise of a batch; the mean square is kept.
        fixed: whether every probe uses the same samples.
        steps, every, lr: length of the run, distance of its probes, and learning rate.
        start: standard deviation of each coordinate of θ¹; the minimum is at 0.
        dimension: number of parameters.
    """

    name: str
    noise_variance: float = 0.5
    batches: int = 20
    noise: str = "equal"
    size_spread: float = 0.0
    fixed: bool = False
    steps: int = 400
    every: int = 50
    lr: float = 0.01
    start: float = 1.0
    dimension: int = 40


SCENARIOS = (
    Scenario(name="low noise", noise_variance=0.02),
    Scenario(name="moderate noise"),
    Scenario(name="high noise", noise_variance=20.0),
    Scenario(name="same samples in every probe", fixed=True),
    Scenario(name="4 batches a probe", batches=4),
    Scenario(name="100 batches a probe", batches=100),
    Scenario(name="noise in 3 coordinates", noise="few"),
    Scenario(name="heavy-tailed coordinates", noise="heavy"),
    Scenario(name="σ² falls with the loss", noise="falling"),
    Scenario(name="starts near the minimum", noise_variance=20.0, start=0.05, lr=0.001),
    Scenario(name="probes every 2 steps, high noise", noise_variance=20.0, steps=40, every=2, lr=0.001),
    *(Scenario(name=f"batches of unequal noise, s = {s:g}", size_spread=s) for s in (0.25, 0.5, 1.0)),
    *(Scenario(name=f"the same, s = {s:g}, same samples", size_spread=s, fixed=True) for s in (0.25, 0.5, 1.0)),
)
ABOUT = (
    "d = 40, L = 3, σ² = 0.5 (low 0.02, high 20), 20 batches a probe and a probe every 50 of 400 steps, unless the line states "
    "another number. The interval of the first probe alone has no margin for choosing the largest of nine. In the lines with s, a "
    "lognormal factor exp(s z) multiplies all noise of a batch. The earlier estimator compares training norms with interpolated "
    "probes; its mean and ± 2 standard errors are those of the values that it trusts."
)
LOSS_DEVIATION = 0.3
"""Standard deviation of the mean loss of one batch."""


@dataclass(frozen=True)
class Simulated:
    """Runs as records, and the truth: σ² at the probes (largest), Δ, and ‖∇f‖₁ and ‖∇f‖₂ at each probe."""

    records: list[RunRecord]
    noise_variance: Floats
    gap: Floats
    l1: Floats
    l2: Floats


def simulate(scenario: Scenario, runs: int, seed: int) -> Simulated:
    """Simulates LION runs; all arrays have the runs along their first axis."""
    rng, d, B = np.random.default_rng(seed), scenario.dimension, scenario.batches
    curvature = np.linspace(0.01, L, d)
    shape = np.full(d, 1.0)
    if scenario.noise == "few":
        shape[3:] = 0.01
    shape *= math.sqrt(scenario.noise_variance) / np.linalg.norm(shape)

    def draw(*size: int) -> Floats:
        if scenario.noise == "heavy":
            return rng.standard_t(5, (*size, d)) / math.sqrt(5 / 3) * shape
        noise = rng.standard_normal((*size, d)) * shape
        if spread := scenario.size_spread:
            noise *= np.exp(spread * rng.standard_normal((*size, 1)) - spread**2)
        return noise

    def loss_of(theta: Floats) -> Floats:
        return np.asarray(FLOOR + 0.5 * theta**2 @ curvature)

    theta, exp_avg = scenario.start * rng.standard_normal((runs, d)), np.zeros((runs, d))
    start = loss_of(theta)
    samples, losses = (draw(runs, B), rng.standard_normal((runs, B))) if scenario.fixed else (None, None)

    def factor() -> Floats:
        """Size of the noise at θ, relative to θ¹."""
        if scenario.noise != "falling":
            return np.ones(runs)
        return np.asarray(np.sqrt(0.1 + 0.9 * np.minimum(1.0, (loss_of(theta) - FLOOR) / (start - FLOOR))))

    probes: dict[str, list[Floats]] = {}
    training: dict[str, list[Floats]] = {"optim/grad_l2": []}
    truth: dict[str, list[Floats]] = {"l1": [], "l2": [], "variance": []}

    def probe() -> None:
        grad, size = curvature * theta, factor()
        noise = (draw(runs, B) if samples is None else samples) * size[:, None, None]
        mean_noise = noise.mean(axis=1)
        mean = grad + mean_noise
        parts = ((noise - mean_noise[:, None]) ** 2).sum(axis=-1)
        total = parts.sum(axis=1)
        variance = total / (B - 1)
        left_out = (total[:, None] - parts * B / (B - 1)) / (B - 2)
        error = np.sqrt((B - 1) * left_out.var(axis=1))
        singles = loss_of(theta)[:, None] + LOSS_DEVIATION * (
            rng.standard_normal((runs, B)) if losses is None else losses
        )
        norm = np.linalg.norm(mean, axis=1)
        row = {
            "loss": singles.mean(axis=1), "loss_standard_error": singles.std(axis=1, ddof=1) / math.sqrt(B),
            "grad_l1": np.abs(mean).sum(axis=1), "grad_l2": norm, "theta_linf": np.abs(theta).max(axis=1),
            "num_batches": np.full(runs, float(B)), "noise_variance": variance, "noise_variance_standard_error": error,
            "noise_groups": np.full(runs, float(B)), "noise_share": variance / B / norm**2,
            "grad_l2_corrected": np.sqrt(np.maximum(norm**2 - variance / B, 0.0)), "is_moving": np.zeros(runs),
        }  # fmt: skip
        for key, values in row.items():
            probes.setdefault(f"probe/{key}", []).append(values)
        truth["l1"].append(np.abs(grad).sum(axis=1))
        truth["l2"].append(np.linalg.norm(grad, axis=1))
        truth["variance"].append(scenario.noise_variance * size**2)

    probe()
    for step in range(1, scenario.steps + 1):
        grad = curvature * theta + draw(runs) * factor()[:, None]
        training["optim/grad_l2"].append(np.linalg.norm(grad, axis=1))
        theta = theta - scenario.lr * (np.sign(0.9 * exp_avg + 0.1 * grad) + WEIGHT_DECAY * theta)
        exp_avg = 0.99 * exp_avg + 0.01 * grad
        if step % scenario.every == 0:
            probe()
    every, each = range(0, scenario.steps + 1, scenario.every), range(1, scenario.steps + 1)
    records = []
    for run in range(runs):
        metrics = {key: Series(tuple(every), tuple(float(row[run]) for row in rows)) for key, rows in probes.items()}
        metrics |= {key: Series(tuple(each), tuple(float(row[run]) for row in rows)) for key, rows in training.items()}
        metrics["optim/lr"] = Series((1, scenario.steps), (scenario.lr, scenario.lr))
        settings = {"optimizer.weight_decay": WEIGHT_DECAY, "train.steps": scenario.steps}
        records.append(
            RunRecord(folder=Path(f"run{run}"), model="quadratic", optimizer="lion", num_parameters=d, facts={},
                      settings=settings, environment={}, metrics=metrics, evaluations=[])
        )  # fmt: skip
    true = {key: np.stack(rows, axis=1) for key, rows in truth.items()}
    return Simulated(records, true["variance"].max(axis=1), start - FLOOR, true["l1"], true["l2"])


def measure(scenario: Scenario, runs: int, seed: int = 0) -> dict[str, Any]:
    """Shares of the runs in which each interval holds, for the present and the earlier estimates, and their errors."""
    found = simulate(scenario, runs, seed)
    row: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for key, value in values.items():
            row.setdefault(key, []).append(float(value))

    for index, run in enumerate(found.records):
        truth, gap_truth = found.noise_variance[index], found.gap[index]
        noise, training = read_probe_noise(run), estimate_variance(run)
        assert noise is not None
        assert training is not None
        interval = noise.interval()
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        add(
            variance_holds=interval.low <= truth <= interval.high, variance_low=interval.low / truth,
            variance_high=interval.high / truth, variance_largest=noise.largest / truth, variance_median=noise.median / truth,
        )  # fmt: skip
        alone = replace(noise, **{name.name: getattr(noise, name.name)[:1] for name in fields(noise)}).interval()
        assert alone is not None
        assert alone.low is not None
        assert alone.high is not None
        add(variance_alone_holds=alone.low <= scenario.noise_variance <= alone.high)
        trusted = training.trusted
        add(training_trusted=trusted.mean())
        if trusted.any() and scenario.noise != "falling":
            gaps = np.abs(training.values[trusted] - truth)
            add(
                training_mean=training.values[trusted].mean() / truth,
                training_2se=(gaps <= 2 * training.std[trusted]).mean(),
            )
        bound, gap = estimate_smoothness(run, noise), estimate_gap(run)
        assert bound is not None
        assert bound.bound is not None
        assert gap is not None
        assert gap.low_bound is not None
        assert gap.high_bound is not None
        add(
            smoothness_holds=bound.bound <= L, smoothness_bound=bound.bound / L, smoothness_point_holds=bound.low <= L,
            smoothness_point=bound.low / L, gap_holds=gap.low_bound <= gap_truth <= gap.high_bound,
            gap_low_holds=gap.low <= gap_truth, gap_low_bound_holds=gap.low_bound <= gap_truth,
        )  # fmt: skip
        steps, raw = run.need("probe/grad_l2").arrays()
        _, corrected, _ = l2_norms(run)
        exact, exact_lion = (
            c_sgd(steps, found.l2[index]).value,
            c_lion(steps, found.l1[index], scenario.dimension).value,
        )
        add(
            sgd_raw=c_sgd(steps, raw).value / exact, sgd_corrected=c_sgd(steps, corrected).value / exact,
            lion=c_lion(steps, run.need("probe/grad_l1").arrays()[1], scenario.dimension).value / exact_lion,
            noise_share=float(np.median(run.need("probe/noise_share").values)),
        )  # fmt: skip
    return {
        "scenario": scenario.name,
        "runs": runs,
        **{key: round(float(np.mean(all_)), 4) for key, all_ in row.items()},
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The results as two Markdown tables."""
    first = [
        [
            row["scenario"], f"{row['variance_holds']:.1%}", f"{row['variance_alone_holds']:.1%}",
            f"{shown(row.get('variance_low'), '.3g')}–{shown(row.get('variance_high'), '.3g')}",
            *(shown(row.get(key), ".3g") for key in ("variance_largest", "variance_median")),
            shown(row.get("training_trusted"), ".0%"), shown(row.get("training_mean"), ".3g"),
            shown(row.get("training_2se"), ".0%"),
        ]
        for row in rows
    ]  # fmt: skip
    second = [
        [
            row["scenario"], f"{row['smoothness_holds']:.1%}",
            *(shown(row.get(key), ".3g") for key in ("smoothness_bound", "smoothness_point")),
            shown(row.get("smoothness_point_holds"), ".0%"), f"{row['gap_holds']:.1%}", shown(row.get("gap_low_holds"), ".0%"),
            f"{row['noise_share']:.2g}", *(shown(row.get(key), ".3g") for key in ("sgd_raw", "sgd_corrected", "lion")),
        ]
        for row in rows
    ]  # fmt: skip
    heads = (
        ["runs", "95 % interval of σ² holds", "of the first probe alone", "ends from all probes / σ²", "largest / σ²",
         "median / σ²", "earlier estimator: trusted", "mean / σ²", "± 2 se holds"],
        ["runs", "L: 95 % bound holds", "bound / L", "point / L", "point holds", "Δ: 95 % bounds hold",
         "f(θ¹) − lowest probe ≤ Δ", "noise share", "c_SGD raw", "corrected", "c_LION"],
    )  # fmt: skip
    return "\n\n".join([markdown_grid(heads[0], first), markdown_grid(heads[1], second)]) + "\n"


def main() -> None:
    """Measures all scenarios and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="simulated runs of each scenario")
    parser.add_argument("--output", help="writes OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    facts = surroundings("cpu")
    rows = [measure(scenario, args.runs, seed) for seed, scenario in enumerate(SCENARIOS)]
    command = f"`python benchmarks/theory_coverage.py --runs {args.runs}`"
    means = f"Means over {args.runs} runs of each line; ratios are to the true value. {ABOUT}"
    text = f"{command}. {heading(facts)}.\n\n{means}\n\n{report(rows)}"
    sys.stdout.write(text)
    write_results(args.output, "Coverage of the intervals of `megatron-lion theory`", text, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
