"""Bounds on the noise-free norm ratio of each part of the model: layers, kinds, and all but the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron_lion.gradient.batch_sums import BatchGroups
from megatron_lion.gradient.noise import estimate_noise
from megatron_lion.gradient.norms import GAUSSIAN_RATIO, NormTable
from megatron_lion.gradient.parameter_kinds import KINDS, in_group, kind_of, layer_of

STORED = (
    "noise_share", "noise_share_standard_error", "is_resolved", "norm_ratio_low", "norm_ratio_low_standard_error",
    "norm_ratio_high", "norm_ratio_high_standard_error", "norm_ratio_noise", "norm_ratio_noise_standard_error", "num_groups",
)  # fmt: skip
"""Attributes of `NoiseEstimate` that a probe file has for each part."""


def noise_by_part(
    groups: BatchGroups, table: NormTable, *, batch_samples: int, population: float | None = None
) -> dict[str, Any]:
    """Returns the noise and the bounds on r of each part, ready for JSON.

    Args:
        groups: from `GroupedBatches.finish`.
        table: norms of the mean gradient over all batches.
        batch_samples, population: as `estimate_noise`.

    Returns:
        "without_embeddings", and "layers", "kinds" and "layers_by_kind" with an entry for each part that has a gradient:
        `STORED`, `num_parameters` d, and `noise_density`, (E‖ξ‖₁)²/(0.637 d E‖ξ‖₂²). For normal noise with standard
        deviations σ_i this is ‖σ‖₁²/(d ‖σ‖₂²): 1 if all coordinates have equal noise, k/d if k of them have all.
        Values are null as in `NoiseEstimate`, and for a part without noise.
    """

    def of(keep: Callable[[str], bool]) -> dict[str, Any] | None:
        norms = table.norms(keep)
        own = groups.parts.of(keep, norms) if groups.parts is not None and norms.num_parameters else None
        noise = estimate_noise(own, norms, batch_samples=batch_samples, population=population) if own else None
        if noise is None:
            return None
        ratio = noise.norm_ratio_noise
        density = None if ratio is None else (ratio / GAUSSIAN_RATIO) ** 2 / norms.num_parameters
        return {
            "num_parameters": norms.num_parameters,
            **{name: getattr(noise, name) for name in STORED},
            "noise_density": density,
        }

    def each(group_of: Callable[[str], str], groups: Iterable[str], keep: Callable[[str], bool]) -> dict[str, Any]:
        found = {group: of(both(keep, in_group(group_of, group))) for group in groups}
        return {group: part for group, part in found.items() if part is not None}

    layers = dict.fromkeys(map(layer_of, table.names))
    return {
        "without_embeddings": of(lambda name: kind_of(name) != "embedding"),
        "layers": each(layer_of, layers, any_name),
        "kinds": each(kind_of, KINDS, any_name),
        "layers_by_kind": {layer: each(kind_of, KINDS, in_group(layer_of, layer)) for layer in layers},
    }


def any_name(name: str) -> bool:
    """Accepts every name."""
    return True


def both(first: Callable[[str], bool], second: Callable[[str], bool]) -> Callable[[str], bool]:
    """Returns a function that accepts what both accept."""
    return lambda name: first(name) and second(name)
