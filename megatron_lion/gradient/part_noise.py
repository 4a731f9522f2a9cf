"""Bounds on the noise-free norm ratio of each part of the model: layers, kinds, and all but the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_lion.gradient.batch_sums import BatchGroups
from megatron_lion.gradient.noise import estimate_noise
from megatron_lion.gradient.norms import GAUSSIAN_RATIO, NormTable
from megatron_lion.gradient.parameter_kinds import KINDS, kind_of, layer_of

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

    layers = dict.fromkeys(map(layer_of, table.names))
    found: dict[str, Any] = {
        "without_embeddings": of(lambda name: kind_of(name) != "embedding"),
        "layers": {layer: of(lambda name, layer=layer: layer_of(name) == layer) for layer in layers},  # type: ignore[misc]
        "kinds": {kind: of(lambda name, kind=kind: kind_of(name) == kind) for kind in KINDS},  # type: ignore[misc]
        "layers_by_kind": {
            layer: _known({
                kind: of(lambda name, layer=layer, kind=kind: (layer_of(name), kind_of(name)) == (layer, kind))  # type: ignore[misc]
                for kind in KINDS
            })
            for layer in layers
        },
    }  # fmt: skip
    return {name: _known(value) if name in ("layers", "kinds") else value for name, value in found.items()}


def _known(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None}
