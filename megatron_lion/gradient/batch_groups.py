"""Sums of gradient sketches over disjoint groups of batches, and the scalars from which noise is estimated.

One vector per level is merged like the digits of a binary counter, so every batch, every pair, every group of four, …
occurs once, in memory that grows with the logarithm of the number of batches. From a level on at which no more than 32
groups remain, the groups are kept: leaving out one of them at a time gives standard errors (the jackknife).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_lion.gradient.batch_sums import BatchGroups, Prefix, Sums
from megatron_lion.gradient.part_sums import PartSums, Segments, contrasts_of, group_table
from megatron_lion.gradient.sketch import GradientSketch

MOST_GROUPS = 32
"""Most groups that are kept; a standard error from 32 groups has itself an error of 1/√(2·31) = 13 %."""
MOST_FOLDS = 8
"""Most groups of `BatchGroups.folds`: with more, the products of the signs and the groups scatter more."""

Group = tuple[torch.Tensor, int, int]
"""(summed sketch, number of batches, count) of a group of batches."""


class GroupedBatches:
    """Follows an accumulation batch by batch.

    Args:
        sketch: sketch of the model's buffers.
        num_batches: number n of batches that will be added.
    """

    def __init__(self, sketch: GradientSketch, num_batches: int) -> None:
        self.sketch = sketch
        self._segments = Segments(sketch)
        self.keep_level = max(0, math.ceil(math.log2(num_batches / MOST_GROUPS)))
        self._before: torch.Tensor | None = None
        self._levels: list[_Sum | None] = [None] * self.keep_level
        self._kept: list[_Sum] = []
        self._ratios: dict[int, list[torch.Tensor]] = {}

    def rebase(self) -> None:
        """Records the current buffers as the state before the next batch. Call it after every reduction."""
        self._before = self.sketch.local()

    @torch.no_grad()
    def add_batch(self, count: int, loss_scale: float = 1.0) -> None:
        """Records the change of the buffers since the last call as the gradient of one global batch; a collective call.

        Args:
            count: what the loss function counted over the batch, on all ranks.
            loss_scale: factor that the buffers carry (fp16 loss scale).
        """
        now = self.sketch.local()
        gained = now.clone() if self._before is None else now - self._before
        self._before = now
        gained /= loss_scale
        if dist.is_initialized() and dist.get_world_size() > 1:
            # The same vector length on every rank, whatever tensors it holds: contributions only add up.
            dist.all_reduce(gained)
        self.add(gained, count)

    def add(self, vector: torch.Tensor, count: int) -> None:
        """Adds the sketch of one batch's gradient sum, which is overwritten."""
        scatter = self.sketch.squares(vector) / max(1, count)
        sampled_C = self.sketch.sampled(vector).cpu().double()
        scatter_PS = self._segments.sum(sampled_C.square()[None])[0] / max(1, count)
        entry = _Sum(vector, 1, count, scatter, scatter_PS)
        self._note_ratio(0, entry.vector)
        for level in range(self.keep_level):
            other = self._levels[level]
            if other is None:
                self._levels[level] = entry
                return
            self._levels[level] = None
            entry = other.plus(entry)
            self._note_ratio(level + 1, entry.vector)
        self._kept.append(entry)

    @torch.no_grad()
    def finish(self, rungs: list[int]) -> BatchGroups:
        """Computes all scalars; the batches so far must be all that were announced.

        Args:
            rungs: numbers of batches of the ladder, ascending; the last is the number of all batches.
        """
        groups = self._groups()
        self._merge_kept()
        folds = _folds(groups)
        parts = self._parts(groups, folds)
        size = 1 << self.keep_level
        prefixes = {}
        for k in rungs:
            if k == rungs[-1]:
                prefixes[k] = self._prefix(groups)
            elif k % size == 0 and k // size <= len(self._kept):
                prefixes[k] = self._prefix(groups[: k // size])
        ratios = {level: torch.stack(found).tolist() for level, found in self._ratios.items()}
        return BatchGroups(
            prefixes,
            ratios,
            self.sketch.relative_error,
            self._prefix(folds, is_folded=True),
            parts.contrasts_JP2.sum(1),
            parts=parts,
        )

    def sums(self) -> list[Group]:
        """Returns (summed sketch, number of batches, count) of each kept group; call it once, after the last batch."""
        return [(entry.vector, entry.batches, entry.count) for entry in self._groups()]

    def _groups(self) -> list[_Sum]:
        rest = [entry for entry in reversed(self._levels) if entry is not None]
        groups = list(self._kept)
        if rest:  # the last group is smaller if n is no multiple of the group size
            last = rest[0]
            for entry in rest[1:]:
                last = last.plus(entry)
            groups.append(last)
        return groups

    def _parts(self, groups: list[_Sum], folds: list[_Sum]) -> PartSums:
        """The sums of each tensor, from the sampled coordinates."""
        tables = []
        for entries in (groups, folds):
            # float64: a row of an embedding that only one group has must be 0 without it, not a rounding error.
            vectors_GC = torch.stack([self.sketch.sampled(entry.vector) for entry in entries]).cpu().double()
            scatter_GPS = torch.stack([entry.scatter_PS for entry in entries])
            batches, counts = [entry.batches for entry in entries], [entry.count for entry in entries]
            tables.append(
                group_table(self._segments, vectors_GC, scatter_GPS, batches, counts, is_folded=entries is folds)
            )
            if entries is groups:
                contrasts_JP2 = contrasts_of(self._segments, vectors_GC, counts)
        return PartSums(self._segments.names, self._segments.unseen_P, tables[0], tables[1], contrasts_JP2)

    def _merge_kept(self) -> None:
        """Records the ratios of groups above the level at which they are kept."""
        groups, level = [entry.vector for entry in self._kept], self.keep_level
        while len(groups) >= 2:
            groups = [first + second for first, second in zip(groups[::2], groups[1::2], strict=False)]
            level += 1
            for vector in groups:
                self._note_ratio(level, vector)

    def _prefix(self, groups: list[_Sum], is_folded: bool = False) -> Prefix:
        total = groups[0].vector.clone()
        for entry in groups[1:]:
            total += entry.vector
        batches, count = sum(entry.batches for entry in groups), sum(entry.count for entry in groups)
        scatter = float(torch.stack([entry.scatter for entry in groups]).sum())
        by_group, left_out = self._aligned(groups) if is_folded else ([], [])
        without = []
        for number, entry in enumerate(groups if len(groups) > 1 else ()):
            left = count - entry.count
            l1, squares = self._norms(total - entry.vector, left)
            aligned = left_out[number] / max(1, left) if is_folded else math.nan
            without.append(Sums(batches - entry.batches, left, l1, squares, scatter - float(entry.scatter), aligned))
        aligned = sum(by_group) / max(1, count) if is_folded else math.nan
        means = tuple(value / max(1, entry.count) for value, entry in zip(by_group, groups, strict=False))
        return Prefix(batches, count, *self._norms(total, count), scatter, aligned, tuple(without), means)

    def _aligned(self, groups: list[_Sum]) -> tuple[list[float], list[float]]:
        """⟨sign(G − G_j), G_j⟩ of each group j, and the sum of these over the other groups if G is without group k."""
        # float64: a row of an embedding that only groups j and k have must be 0 without both, not a rounding error.
        vectors_GC = torch.stack([self.sketch.sampled(entry.vector) for entry in groups]).double()
        total_C, weights_C = vectors_GC.sum(0), self.sketch.weights_C.double()

        def products(sum_C: torch.Tensor) -> torch.Tensor:
            return ((sum_C - vectors_GC).sign_() * vectors_GC).matmul(weights_C)

        left_out = []
        for number, vector_C in enumerate(vectors_GC):
            found = products(total_C - vector_C)
            found[number] = 0.0
            left_out.append(float(found.sum()))
        return products(total_C).tolist(), left_out

    def _norms(self, total: torch.Tensor, count: int) -> tuple[float, float]:
        """‖·‖₁ and ‖·‖₂² of the mean."""
        return float(self.sketch.l1(total)) / max(1, count), float(self.sketch.squares(total)) / max(1, count) ** 2

    def _note_ratio(self, level: int, vector: torch.Tensor) -> None:
        self._ratios.setdefault(level, []).append(self.sketch.l1(vector) / self.sketch.squares(vector).sqrt())


class _Sum:
    """A summed vector with its number of batches, its count and Σ ‖g_i‖²/c_i: of all coordinates, float64 scalar, and of
    the sampled ones of each tensor, float64 [P, S]."""

    def __init__(
        self, vector: torch.Tensor, batches: int, count: int, scatter: torch.Tensor, scatter_PS: torch.Tensor
    ) -> None:
        self.vector, self.batches, self.count = vector, batches, count
        self.scatter, self.scatter_PS = scatter, scatter_PS

    def plus(self, other: _Sum) -> _Sum:
        """The sum of both; this one's vector is overwritten, because the older half is not needed any more."""
        return _Sum(
            self.vector.add_(other.vector),
            self.batches + other.batches,
            self.count + other.count,
            self.scatter + other.scatter,
            self.scatter_PS + other.scatter_PS,
        )


def difference_of(later: list[Group], earlier: list[Group], sketch: GradientSketch) -> BatchGroups:
    """Scalars of the differences between two gradients of each group; each group counts as one batch.

    Args:
        later, earlier: from `GroupedBatches.sums`, over the same batches.
        sketch: the sketch of both.
    """
    found = GroupedBatches(sketch, len(later))
    for (after, *batches), (before, *others) in zip(later, earlier, strict=True):
        if batches != others:
            raise ValueError(f"groups of {batches} and {others} (batches, count) are not of the same batches")
        found.add(after - before, batches[1])
    return found.finish([len(later)])


def _folds(groups: list[_Sum]) -> list[_Sum]:
    """Merges neighbouring groups into at most `MOST_FOLDS` of nearly equal size."""
    number = min(MOST_FOLDS, len(groups))
    bounds = [round(fold * len(groups) / number) for fold in range(number + 1)]
    folds = []
    for first, end in pairwise(bounds):
        entry = groups[first]
        if end > first + 1:  # `plus` overwrites the vector of its left side, which is still needed
            entry = _Sum(entry.vector.clone(), entry.batches, entry.count, entry.scatter, entry.scatter_PS)
        for other in groups[first + 1 : end]:
            entry = entry.plus(other)
        folds.append(entry)
    return folds
