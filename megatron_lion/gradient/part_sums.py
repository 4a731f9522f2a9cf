"""Sums over the sampled coordinates of each tensor, from which the noise in any part of the model follows.

The buckets of a sketch mix the whole model; its sampled coordinates belong to one tensor each. All sums from which noise
is estimated add up over coordinates, so the sums of a layer are those of its tensors. A part's norms are known exactly
(`NormTable`); the sample gives the noise's share in them, as a ratio of two sums over the same coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_lion.gradient.batch_sums import BatchGroups, Prefix, Sums
from megatron_lion.gradient.norms import GradientNorms
from megatron_lion.intervals import jackknife_error

SUBSAMPLES = 8
"""Interleaved subsamples of the coordinates; leaving out one at a time gives the error of the sample."""


class SampledSketch(Protocol):
    """The attributes of a `GradientSketch` that describe its sampled coordinates."""

    names: tuple[str, ...]
    sampled_counts: tuple[int, ...]
    weights_C: torch.Tensor


class Segments:
    """Adds up values of the sampled coordinates by tensor and subsample, on the CPU.

    On CUDA, `index_add_` adds in any order, and two probes of one checkpoint would differ in their last bits.

    Args:
        sketch: the sketch whose coordinates are summed.
    """

    def __init__(self, sketch: SampledSketch) -> None:
        self.names = sketch.names
        counts_P = torch.tensor(sketch.sampled_counts)
        tensor_C = torch.repeat_interleave(torch.arange(len(counts_P)), counts_P)
        self._index_C = tensor_C * SUBSAMPLES + torch.arange(len(tensor_C)) % SUBSAMPLES
        self._weights_C = sketch.weights_C.cpu().double()
        sizes_P = torch.zeros(len(counts_P), dtype=torch.float64)
        sizes_P.index_add_(0, tensor_C, self._weights_C)
        self.unseen_P = (1 - counts_P / sizes_P).clamp_(min=0.0)

    def sum(self, values_RC: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sums of float64 rows, float64 [R, P, SUBSAMPLES]."""
        sums = values_RC.new_zeros(len(values_RC), len(self.names) * SUBSAMPLES)
        sums.index_add_(1, self._index_C, values_RC * self._weights_C)
        return sums.view(len(values_RC), len(self.names), SUBSAMPLES)


@dataclass(frozen=True)
class GroupTable:
    """Sums of each tensor over groups of batches; G groups, P tensors, S subsamples of the coordinates, float64.

    Attributes:
        batches, counts: number of batches and the loss's count of each group.
        l1_PS, squares_PS: ‖·‖₁ and ‖·‖₂² of the sum of all groups.
        l1_GP, squares_GP: the same without each group.
        scatter_GPS: Σ ‖g_i‖₂²/c_i over the batches of each group.
        aligned_GPS, aligned_GP: ⟨sign(G − G_j), G_j⟩ of each group j, and their sum over the other groups if G is without
            group k; empty unless asked for.
    """

    batches: list[int]
    counts: list[int]
    l1_PS: torch.Tensor
    squares_PS: torch.Tensor
    l1_GP: torch.Tensor
    squares_GP: torch.Tensor
    scatter_GPS: torch.Tensor
    aligned_GPS: torch.Tensor
    aligned_GP: torch.Tensor

    def prefix(self, part_P: torch.Tensor, scale: float) -> Prefix:
        """Returns the sums of a part of the model.

        Args:
            part_P: which tensors belong to it, bool [P].
            scale: factor of the squares, which a sample of the coordinates needs.
        """
        has_aligned = bool(self.aligned_GPS.numel())
        scatter_G = (self.scatter_GPS[:, part_P].sum((1, 2)) * scale).tolist()
        aligned_G = self.aligned_GPS[:, part_P].sum((1, 2)).tolist() if has_aligned else []
        left_l1_G, left_squares_G = (table[:, part_P].sum(1).tolist() for table in (self.l1_GP, self.squares_GP))
        left_aligned_G = self.aligned_GP[:, part_P].sum(1).tolist() if has_aligned else [math.nan] * len(scatter_G)
        count, num_batches, scatter = sum(self.counts), sum(self.batches), math.fsum(scatter_G)
        without = [
            Sums(num_batches - batches, count - own, l1 / max(1, count - own), squares * scale / max(1, count - own) ** 2,
                 scatter - own_scatter, aligned / max(1, count - own))
            for batches, own, l1, squares, own_scatter, aligned in zip(
                self.batches, self.counts, left_l1_G, left_squares_G, scatter_G, left_aligned_G, strict=True
            )
        ]  # fmt: skip
        return Prefix(
            num_batches,
            count,
            float(self.l1_PS[part_P].sum()) / max(1, count),
            float(self.squares_PS[part_P].sum()) * scale / max(1, count) ** 2,
            scatter,
            math.fsum(aligned_G) / max(1, count) if has_aligned else math.nan,
            tuple(without) if len(without) > 1 else (),
            tuple(value / max(1, own) for value, own in zip(aligned_G, self.counts, strict=False)),
        )


@dataclass(frozen=True)
class PartSums:
    """What a probe keeps of its batches for each tensor.

    Attributes:
        names: the tensors.
        unseen_P: share of the coordinates of each tensor that were not sampled, float64 [P].
        groups, folds: sums over the groups for the jackknife, and over fewer groups with `aligned`.
        contrasts_JP2: ‖·‖₁ and ‖·‖₂² of realizations of the noise, float64 [J, P, 2].
    """

    names: tuple[str, ...]
    unseen_P: torch.Tensor
    groups: GroupTable
    folds: GroupTable
    contrasts_JP2: torch.Tensor

    def of(self, keep: Callable[[str], bool], norms: GradientNorms) -> BatchGroups | None:
        """Returns the sums of the tensors whose name `keep` accepts, or None if their gradient is 0 or not sampled.

        Args:
            keep: accepts names of tensors.
            norms: exact norms of the mean gradient of these tensors.
        """
        part_P = torch.tensor([keep(name) for name in self.names], dtype=torch.bool)
        sampled = float(self.groups.squares_PS[part_P].sum()) / max(1, sum(self.groups.counts)) ** 2
        if not (0 < sampled < math.inf and math.isfinite(norms.grad_l2)):
            return None
        scale = norms.grad_l2**2 / sampled
        whole, folds = self.groups.prefix(part_P, scale), self.folds.prefix(part_P, scale)
        unseen_P = self.unseen_P[part_P]
        return BatchGroups(
            {whole.num_batches: whole},
            {},
            self._error_of_variance(part_P) * math.sqrt(float(unseen_P.max())),
            folds,
            self.contrasts_JP2[:, part_P].sum(1),
            self._error_of_alignment(part_P) * math.sqrt(float(unseen_P.max())),
        )

    def _error_of_variance(self, part_P: torch.Tensor) -> float:
        """Relative standard error of σ²/‖ḡ‖² from the sample of coordinates."""
        squares_S = self.groups.squares_PS[part_P].sum(0)
        scatter_S = self.groups.scatter_GPS[:, part_P].sum((0, 1)) - squares_S / max(1, sum(self.groups.counts))
        return _ratio_error(scatter_S, squares_S)

    def _error_of_alignment(self, part_P: torch.Tensor) -> float:
        """Relative standard error of the lower bound on ‖∇f‖₁, in units of ‖ḡ‖₁, from the sample of coordinates."""
        return _ratio_error(self.folds.aligned_GPS[:, part_P].sum((0, 1)), self.folds.l1_PS[part_P].sum(0))


def group_table(
    segments: Segments, vectors_GC: torch.Tensor, scatter_GPS: torch.Tensor, batches: list[int], counts: list[int],
    *, is_folded: bool = False,
) -> GroupTable:  # fmt: skip
    """Computes the sums of each tensor over groups of batches.

    Args:
        segments: adds up by tensor.
        vectors_GC: sampled coordinates of the gradient sum of each group, float64.
        scatter_GPS: Σ ‖g_i‖₂²/c_i over the batches of each group.
        batches, counts: number of batches and the loss's count of each group.
        is_folded: also compute `aligned`.
    """
    total_C = vectors_GC.sum(0)
    left_GC = total_C - vectors_GC
    whole_2C = torch.stack([total_C.abs(), total_C.square()])
    l1_PS, squares_PS = segments.sum(whole_2C)
    aligned_GPS, aligned_GP = torch.zeros(0), torch.zeros(0)
    if is_folded:
        aligned_GPS = segments.sum(left_GC.sign() * vectors_GC)
        left_out = []
        for number, vector_C in enumerate(vectors_GC):
            products_GC = (left_GC - vector_C).sign() * vectors_GC
            products_GC[number] = 0.0
            left_out.append(segments.sum(products_GC.sum(0, keepdim=True)).sum((0, 2)))
        aligned_GP = torch.stack(left_out)
    return GroupTable(
        batches, counts, l1_PS, squares_PS,
        segments.sum(left_GC.abs()).sum(2), segments.sum(left_GC.square()).sum(2),
        scatter_GPS, aligned_GPS, aligned_GP,
    )  # fmt: skip


def contrasts_of(segments: Segments, vectors_GC: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Returns ‖·‖₁ and ‖·‖₂² by tensor of G − 1 realizations of the noise of a mean over all batches, float64 [G − 1, P, 2].

    A contrast Σ_j q_j G_j/√c_j of the groups' sums G_j with counts c_j has no signal if Σ_j q_j √c_j = 0. With Σ q_j² = 1
    its variance is that of one counted term. The G − 1 contrasts are orthogonal, so their noise is uncorrelated. Every
    group enters each of them, as in ḡ, so sums of many batches are as near to normal as the noise of ḡ.

    Args:
        segments: adds up by tensor.
        vectors_GC: sampled coordinates of the gradient sum of each group, float64.
        counts: the loss's count of each group.
    """
    number = len(counts)
    roots_G = torch.tensor([max(1, count) for count in counts], dtype=torch.float64).sqrt()
    place_G = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    waves_GJ = torch.cos(math.pi * place_G[:, None] * torch.arange(1, number, dtype=torch.float64))
    basis_GG, _ = torch.linalg.qr(torch.cat([roots_G[:, None], waves_GJ], dim=1))
    weights_JG = (basis_GG[:, 1:] / roots_G[:, None]).T
    noise_JC = weights_JG @ vectors_GC
    return torch.stack([segments.sum(noise_JC.abs()).sum(2), segments.sum(noise_JC.square()).sum(2)], dim=-1)


def _ratio_error(above_S: torch.Tensor, below_S: torch.Tensor) -> float:
    """Relative jackknife error of Σ above / Σ below over the subsamples; 0 if the ratio is 0 or not finite."""
    above, below = above_S.tolist(), below_S.tolist()
    left = [(math.fsum(above) - a, math.fsum(below) - b) for a, b in zip(above, below, strict=True)]
    if not math.fsum(above) or not math.fsum(below) or not all(b > 0 for _, b in left):
        return 0.0
    ratio = math.fsum(above) / math.fsum(below)
    error = abs(jackknife_error(ratio, [a / b for a, b in left], [1] * len(left)) / ratio)
    return error if math.isfinite(error) else 0.0
