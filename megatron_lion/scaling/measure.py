"""Reads the probes of a family's runs, and chooses the number of batches at which their noise share is that aimed at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_lion.runs.probes import longest_ladder, probe_file, read_probe
from megatron_lion.runs.steps import is_committed

PARTS = {"all": "all parameters", "without_embeddings": "without embeddings", "embeddings": "embeddings"}
"""Parts of the model for which an exponent is fitted, each with its own d."""
MARGIN, GROWTH, MULTIPLE = 1.1, 1.5, 8
"""Batches of the next probe: more than the estimate by `MARGIN`, as the estimate has an error; at least `GROWTH` times the
last one, so that few probes are made; rounded up to a multiple of `MULTIPLE`."""


@dataclass(frozen=True, kw_only=True)
class PartRatio:
    """r = ‖∇f‖₁/‖∇f‖₂ over one part of the parameters.

    Attributes:
        d: number of coordinates, padding included.
        ratio: r of the averaged gradient, which contains noise.
        ratio_error: its standard error, or None. That of a part is the whole model's relative one, since a probe measures
            no other.
        low, high: bounds on r without noise; None if they are not known, or the signal is not resolved.
        low_error, high_error: standard errors of the bounds, if the probe gives them.
        noise_ratio: r of the noise alone, or None.
        source: where the bounds are from: "exact" (all samples were read: both are r), or "bounds" (of the probe's noise
            estimate); "" without bounds.
    """

    d: int
    ratio: float
    ratio_error: float | None
    low: float | None
    high: float | None
    low_error: float | None
    high_error: float | None
    noise_ratio: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The full gradient of one run at one step.

    Attributes:
        step: optimizer steps before it.
        loss: mean loss over the samples, nats per token.
        num_batches: global batches averaged.
        passes: passes over the training data that they are, in (0, 1].
        noise_share: share of noise in the squared norm of the averaged gradient; None if it is not known.
        parts: r by name of the part.
    """

    step: int
    loss: float
    num_batches: int
    passes: float
    noise_share: float | None
    parts: dict[str, PartRatio]


def longest_probe(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The content of the probe result of a step with the most batches; None if the step was not probed.

    Raises:
        DataError: a result is damaged.
    """
    own = probe_file(run_dir, step)
    return longest_ladder(run_dir, read_probe(own)) if own.is_file() else None


def next_batches(
    content: dict[str, Any], noise_share: float, max_batches: int | Literal["all"]
) -> int | Literal["all"] | None:
    """The number of batches of the next probe of a step, or None if none is needed or allowed.

    n batches of the N of the data set have an expected share of noise of v/(‖∇f‖² + v) with v = σ² (1/n − 1/N), so that n
    = 1/(1/N + q/(1 − q) ‖∇f‖²/σ²) gives the share q. σ² and ‖∇f‖² are the unbiased estimates of the last probe, which may
    be wrong; the next probe is judged again.

    Args:
        content: the step's probe result with the most batches.
        noise_share: the share q that is aimed at.
        max_batches: most batches, or "all".
    """
    noise, done = content["noise"], int(content["num_batches"])
    population = content["population_samples"] / content["global_batch_size"]
    is_whole = content["num_samples"] == content["population_samples"]
    if noise is None or is_whole or noise["noise_share"] <= noise_share:
        return None
    most = math.ceil(population) if max_batches == "all" else min(max_batches, math.ceil(population))
    if done >= most:
        return None
    signal, variance = noise["signal_l2_squared"], noise["noise_variance"]
    ratio = max(0.0, signal) / variance
    wanted = max(1 / (1 / population + noise_share / (1 - noise_share) * ratio) * MARGIN, done * GROWTH)
    number = min(math.ceil(wanted / MULTIPLE) * MULTIPLE, most)
    return "all" if number >= population else number


def missing_probes(
    run_dir: Path, steps: tuple[int, ...], noise_share: float, max_batches: int | Literal["all"]
) -> dict[int | Literal["all"], list[int]]:
    """Steps that need a longer probe, by its number of batches. Step 0 has no checkpoint and keeps its first probe.

    Raises:
        DataError: a result is damaged.
    """
    found: dict[int | Literal["all"], list[int]] = {}
    for step in steps:
        content = longest_probe(run_dir, step) if is_committed(run_dir, step) else None
        number = next_batches(content, noise_share, max_batches) if content is not None else None
        if number is not None:
            found.setdefault(number, []).append(step)
    return found


def measurement(content: dict[str, Any]) -> Measurement:
    """The norm ratios of a probe result, with what is known of their noise."""
    noise = content["noise"] or {}
    samples, population = int(content["num_samples"]), int(content["population_samples"])
    share = noise.get("noise_share")
    return Measurement(
        step=int(content["step"]), loss=float(content["loss"]), num_batches=int(content["num_batches"]),
        passes=samples / population, noise_share=share,
        parts={name: _part(content, name) for name in PARTS},
    )  # fmt: skip


def _part(content: dict[str, Any], name: str) -> PartRatio:
    norms = content["kinds"]["embedding"] if name == "embeddings" else content[name]
    ratio = float(norms["norm_ratio"])
    whole = content["all"]["norm_ratio"]
    error = content["ladder"][-1]["norm_ratio_standard_error"] if content["ladder"] else None
    noise = _noise_of(content, name)
    low, high, low_error, high_error, source = _bounds(content, ratio, noise)
    return PartRatio(
        d=int(norms["num_parameters"]), ratio=ratio, ratio_error=None if error is None else error / whole * ratio,
        low=low, high=high, low_error=low_error, high_error=high_error, noise_ratio=noise.get("norm_ratio_noise"),
        source=source,
    )  # fmt: skip


def _noise_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The noise and the bounds of a part; empty if the probe does not give them."""
    if name == "all":
        return content["noise"] or {}
    parts = content.get("noise_by_part") or {}
    return (parts.get("kinds", {}).get("embedding") if name == "embeddings" else parts.get(name)) or {}


def _bounds(
    content: dict[str, Any], ratio: float, noise: dict[str, Any]
) -> tuple[float | None, float | None, float | None, float | None, str]:
    """(low, high, error of low, error of high, source) of a part's r without noise."""
    if content["num_samples"] == content["population_samples"]:
        return ratio, ratio, 0.0, 0.0, "exact"
    low, high = noise.get("norm_ratio_low"), noise.get("norm_ratio_high")
    if low is None or high is None:
        return None, None, None, None, ""
    return low, high, noise.get("norm_ratio_low_standard_error"), noise.get("norm_ratio_high_standard_error"), "bounds"
