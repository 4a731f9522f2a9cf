"""How much the full gradient changes along steps of the optimizer: smoothness in ℓ∞ and ℓ2, curvature, noise.

For two points θ and θ' of a run with D = θ' − θ and y = ∇f(θ') − ∇f(θ),

    ‖y‖₁ / ‖D‖_∞ ≤ L_∞        ‖y‖₂ / ‖D‖₂ ≤ L₂

for the constants of f in both geometries: one pair of points gives a lower bound on each. Both gradients are measured over
the same samples, so most of their noise cancels. What is left is the noise of the difference, which is estimated like that
of a gradient (`noise.py`), from differences of sketches of the same batches.

Source: L₂ is Assumption 1 of Dong, Li, Lin, "Convergence Rate Analysis of LION" (arXiv 2411.07724); ℓ∞-smoothness for sign
updates: Balles, Pedregosa, Le Roux, "The Geometry of Sign Gradient Descent" (arXiv 2002.08056).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_lion.gradient.accumulate import FullGradient
from megatron_lion.gradient.batch_groups import Group, GroupedBatches, difference_of
from megatron_lion.gradient.batch_sums import BatchGroups
from megatron_lion.gradient.blocks import Read, mean_and_error
from megatron_lion.gradient.full_gradient import ProbedRun, nothing_counted, standard_error
from megatron_lion.gradient.noise import estimate_noise, l1_bounds, rungs_of, unseen
from megatron_lion.gradient.norms import GradientNorms, NormTable, norm_table
from megatron_lion.gradient.parameter_kinds import in_group, kind_of, layer_of
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.optim.parameter_shards import Shard


@dataclass(frozen=True)
class PointGradient:
    """The mean gradient at one point; each rank has its own slices.

    Attributes:
        means: mean gradient of each slice, fp32 [N] in the host's memory.
        sketch, groups: sketches of the sums over groups of batches.
        losses: (loss sum in nats, count) of each batch.
        reads: (batches, count, ⟨mean gradient so far, D⟩) at each rung.
        shards: slices of the model's own weights; their `grad` is not that of `means`.
    """

    means: list[torch.Tensor]
    sketch: GradientSketch
    groups: list[Group]
    losses: list[tuple[float, int]]
    reads: list[Read]
    shards: list[Shard]


def own_weights(run: ProbedRun) -> list[torch.Tensor]:
    """Copies this rank's slices of the model's own weights, at which gradients are computed, fp32 [N] in the host's memory."""
    full = _accumulation(run, None)
    return [shard.main.detach().float().cpu().clone() for shard in full.shards()]


def gradient_along(
    run: ProbedRun,
    batches: Iterator[dict[str, torch.Tensor]],
    step_of: list[torch.Tensor],
    *,
    on_batch: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PointGradient | None:
    """Measures the mean gradient over the probe's batches and its product with D; a collective call.

    Args:
        run: the run, at one of the two points.
        batches: micro-batches of the probe, the same at both points.
        step_of: D of each slice, fp32 [N], in the order of `own_weights`.
        on_batch, should_stop: as for `probe_run`.

    Returns:
        The gradient, or None if any process was asked to stop.

    Raises:
        DataError: the loss counts nothing in a batch, or a part of it nothing in all batches; on all ranks.
    """
    total = run.probe_samples.num_batches
    rungs = rungs_of(total)
    groups = GroupedBatches(GradientSketch(run.model), total)
    reads: list[Read] = []
    with _accumulation(run, groups) as full:
        while full.num_batches < total:
            if full.add(batches, stop=should_stop()):
                return None
            if not full.losses[-1][1]:
                raise nothing_counted(run.config, f"batch {full.num_batches}", "num_tokens")
            if full.num_batches in rungs:
                scale = full.read().scale
                along = _table(full, _with_main(full.shards(), step_of), scale).norms().grad_dot_theta
                reads.append((full.num_batches, full.count, along))
            on_batch(full.num_batches)
        if (name := run.objective.uncounted(full.counts)) is not None:
            raise nothing_counted(run.config, f"all {full.num_batches} batches", name)
        shards = list(full.shards())
        means = [(shard.grad.float() * scale).cpu() for shard in shards if shard.grad is not None]
    return PointGradient(means, groups.sketch, groups.sums(), full.losses, reads, shards)


def smoothness(
    run: ProbedRun, first: PointGradient, second: PointGradient, step_of: list[torch.Tensor]
) -> dict[str, Any]:
    """Compares the gradients at both ends of a step; a collective call.

    Args:
        run: the run.
        first, second: the gradients at θ and at θ' = θ + D.
        step_of: D of each slice, fp32 [N].

    Returns:
        The statistics, ready for JSON; docs/assumptions.md lists the keys.
    """
    full = _accumulation(run, None)
    samples, config = run.probe_samples, run.config
    changes = [after - before for before, after in zip(first.means, second.means, strict=True)]
    change = _table(full, _with_main(_with_grad(first.shards, changes), step_of), 1.0)
    moved = _table(full, _with_grad(first.shards, step_of), 1.0)
    batch = config.train.global_batch_size
    population = samples.population / batch if samples.population is not None else None
    groups = difference_of(second.groups, first.groups, first.sketch)
    # The groups of batches replace the batches of a probe; the data set has so many of them.
    per_group = samples.num_batches / len(second.groups)
    in_groups = None if population is None else population / per_group

    def of(keep: Callable[[str], bool], sums: BatchGroups | None) -> dict[str, Any]:
        return _block(change.norms(keep), moved.norms(keep), sums, round(per_group * batch), in_groups)

    def part(keep: Callable[[str], bool]) -> dict[str, Any]:
        norms = change.norms(keep)
        return of(keep, groups.parts.of(keep, norms) if groups.parts is not None and norms.grad_l2 > 0 else None)

    def by(group_of: Callable[[str], str]) -> dict[str, Any]:
        return {group: part(in_group(group_of, group)) for group in dict.fromkeys(map(group_of, change.names))}

    known = math.sqrt(unseen(samples.num_batches, population))
    differences = [
        (later - earlier, count) for (earlier, count), (later, _) in zip(first.losses, second.losses, strict=True)
    ]
    error = standard_error(differences)
    slope, slope_error = mean_and_error(first.reads, population)
    curve, curve_error = mean_and_error(
        [
            (n, count, after - before)
            for (n, count, before), (_, _, after) in zip(first.reads, second.reads, strict=True)
        ],
        population,
    )
    count = sum(count for _, count in first.losses)
    return {
        "loss_before": sum(loss for loss, _ in first.losses) / count,
        "loss_after": sum(loss for loss, _ in second.losses) / count,
        "loss_change": sum(loss for loss, _ in differences) / count,
        "loss_change_standard_error": None if error is None else error * known,
        "first_order_change": slope,
        "first_order_change_standard_error": slope_error,
        "curvature": curve,
        "curvature_standard_error": curve_error,
        "num_blocks": len(first.reads),
        "all": of(lambda name: True, groups),
        "without_embeddings": part(lambda name: kind_of(name) != "embedding"),
        "layers": by(layer_of),
        "kinds": by(kind_of),
    }


def _block(
    change: GradientNorms,
    moved: GradientNorms,
    groups: BatchGroups | None,
    batch_samples: int,
    population: float | None,
) -> dict[str, Any]:
    """The statistics of one set of parameters."""
    noise = estimate_noise(groups, change, batch_samples=batch_samples, population=population) if groups else None
    clean = noise.grad_l2_corrected if noise else None
    clean_error = (
        noise.signal_standard_error / (2 * clean)
        if noise and clean and noise.signal_standard_error is not None
        else None
    )
    low, low_error, high, high_error = (
        l1_bounds(groups, change, population) if groups and noise else (None, None, None, None)
    )
    peak, length = moved.grad_linf, moved.grad_l2

    def over(value: float | None, divisor: float) -> float | None:
        return None if value is None or not divisor else value / divisor

    return {
        "num_parameters": change.num_parameters,
        "step_linf": peak, "step_l2": length, "step_l1": moved.grad_l1,
        "change_l1": change.grad_l1, "change_l2": change.grad_l2,
        "change_l1_low": low, "change_l1_low_standard_error": low_error,
        "change_l1_high": high, "change_l1_high_standard_error": high_error,
        "change_l2_corrected": clean, "change_l2_standard_error": clean_error,
        "noise_share": noise.noise_share if noise else None,
        "noise_share_standard_error": noise.noise_share_standard_error if noise else None,
        "is_resolved": noise.is_resolved if noise else None, "num_groups": noise.num_groups if noise else None,
        "smoothness_linf_low": over(low, peak), "smoothness_linf_low_standard_error": over(low_error, peak),
        "smoothness_linf_high": over(high, peak), "smoothness_linf_high_standard_error": over(high_error, peak),
        "smoothness_l2": over(clean, length), "smoothness_l2_standard_error": over(clean_error, length),
    }  # fmt: skip


def _accumulation(run: ProbedRun, groups: GroupedBatches | None) -> FullGradient:
    config = run.config
    # The model's own weights: in half precision the gradient is that at the rounded weights, not at the master weights.
    return FullGradient(
        run.model, run.optimizer, run.forward_step, run.ranks,
        num_microbatches=config.num_microbatches(run.ranks.world_size), micro_batch_size=config.micro_batch_size,
        seq_length=config.model.seq_length, vocab_size=run.corpora.vocab_size, groups=groups, master_weights=False,
        count_names=run.objective.count_names,
    )  # fmt: skip


def _table(full: FullGradient, shards: Iterator[Shard], scale: float) -> NormTable:
    return norm_table(
        shards, full.rows, vocab_size=full.vocab_size, ranks=full.ranks, device=full.device, scale=scale
    )  # fmt: skip


def _with_grad(shards: list[Shard], values: list[torch.Tensor]) -> Iterator[Shard]:
    for shard, value_N in zip(shards, values, strict=True):
        yield replace(shard, grad=value_N.to(shard.main.device), main=torch.zeros_like(shard.main), weight_decay=0.0)


def _with_main(shards: Iterator[Shard], values: list[torch.Tensor]) -> Iterator[Shard]:
    for shard, value_N in zip(shards, values, strict=True):
        yield replace(shard, main=value_N.to(shard.main.device), weight_decay=0.0)
