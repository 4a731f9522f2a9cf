"""Gradient sums over disjoint groups of batches, for a fixed sample of the coordinates.

The buffers contain only the running sum, so batch 7 alone, or batches 5 to 8, cannot be read from them. For a fixed
sample of coordinates they can: the values before and after a batch differ by that batch's gradient. One vector per
level, as long as the sample, is merged like the digits of a binary counter. This gives every batch, every pair, every
group of four, … once each. The sample's size is constant; it does not grow with the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared

from megatron_lion.optim.parameter_shards import counts_here, named_global_parameters

SAMPLED_COORDINATES = 1 << 18
"""Coordinates sampled per process: about 1 MiB per level, and one more level for every doubling of the batches."""

_AT_LEAST = 256  # per tensor: norms and biases are small and contain much of the gradient's energy


@dataclass(frozen=True)
class Group:
    """Sums over one group of 2^level consecutive batches, on the sampled coordinates, scaled up to the whole model.

    Attributes:
        level: base-2 logarithm of the number of batches in the group.
        l1, squares: estimates of ‖ḡ‖₁ and ‖ḡ‖₂² of the group's mean gradient.
        count: divisor of the group's mean (tokens or samples).
        dot: ⟨ḡ_a, ḡ_b⟩ of the two halves' mean gradients, or None for a single batch.
    """

    level: int
    l1: float
    squares: float
    count: int
    dot: float | None


class CoordinateSample:
    """Follows a sample of the coordinates through an accumulation.

    Args:
        model: DDP-wrapped chunks; every data rank samples the same coordinates of its copy.
        size: approximate number of coordinates on this process, at least 256 of every tensor; all if there are fewer.
    """

    def __init__(self, model: list[Any], size: int = SAMPLED_COORDINATES) -> None:
        entries = [(name, parameter) for chunk in model for name, parameter in named_global_parameters(chunk)]
        device = entries[0][1].device
        total = sum(parameter.numel() for _, parameter in entries)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._parts: list[tuple[Any, torch.Tensor | None]] = []
        self._summed_over_tp: list[slice] = []
        self._tied: list[slice] = []
        weights = []
        start = 0
        for name, parameter in entries:
            count = (
                min(parameter.numel(), _AT_LEAST + size * parameter.numel() // total)
                if total > size
                else parameter.numel()
            )
            split = getattr(parameter, "tensor_model_parallel", False)
            # Replicas draw the same coordinates on every tensor-parallel rank, because sequence parallelism sums their
            # gradients over the ranks coordinate by coordinate.
            index = _spread(parameter.numel(), count, f"{name}:{tp_rank if split else 0}")
            self._parts.append((parameter, index.to(device) if count < parameter.numel() else None))
            # Each sampled coordinate represents numel / count of its tensor. Replicas weigh 0 on all ranks but one.
            weight = parameter.numel() / count if counts_here(parameter) else 0.0
            weights.append(torch.full((count,), weight, device=device))
            place = slice(start, start + count)
            if model[0].config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
                self._summed_over_tp.append(place)
            if not param_is_not_shared(parameter) or getattr(parameter, "shared_embedding", False):
                self._tied.append(place)
            start += count
        self._weights_M = torch.cat(weights)
        self._total = total
        self._before_M = torch.zeros(0)
        self._levels: list[tuple[torch.Tensor, int] | None] = []
        self._records: list[tuple[int, int, torch.Tensor, int, int]] = []

    @property
    def fraction(self) -> float:
        """Share of this process's coordinates in the sample."""
        return self._weights_M.numel() / self._total

    @torch.no_grad()
    def rebase(self) -> None:
        """Records the current buffers as the state before the next batch. Call it after every reduction."""
        self._before_M = self._values()

    @torch.no_grad()
    def add_batch(self, count: int, loss_scale: float = 1.0) -> None:
        """Records the change of the buffers since the last call as the gradient of one global batch; a collective call.

        Args:
            count: what the loss function counted over the batch, on all ranks.
            loss_scale: factor that the buffers carry (fp16 loss scale).
        """
        now_M = self._values()
        gained_M = (now_M - self._before_M) / loss_scale
        self._before_M = now_M
        self._sum_over_ranks(gained_M)
        vector_M, count, level = gained_M, count, 0
        self._record(0, vector_M, count, 0, 0, None)
        while level < len(self._levels) and (other := self._levels[level]) is not None:
            first_M, first_count = other
            self._levels[level] = None
            dot = (self._weights_M * first_M * vector_M).sum(dtype=torch.float64)
            sum_M = first_M.add_(vector_M)  # in place: the older half is not needed any more
            level += 1
            self._record(level, sum_M, first_count + count, first_count, count, dot)
            vector_M, count = sum_M, first_count + count
        if level == len(self._levels):
            self._levels.append(None)
        self._levels[level] = (vector_M, count)

    @torch.no_grad()
    def groups(self) -> tuple[list[Group], Group]:
        """Returns every group so far and the group of all batches (level -1), over all ranks; a collective call."""
        rest = [entry for entry in self._levels if entry is not None]
        whole_M = torch.stack([vector_M for vector_M, _ in rest]).sum(0)
        local = torch.stack([*(sums for _, _, sums, _, _ in self._records), self._sums(whole_M, None)])
        if parallel_state.get_data_parallel_rank() > 0:  # all data ranks hold the same sums: count them once
            local.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(local)
        *rows, (l1, squares, _) = local.tolist()
        count = max(1, sum(number for _, number in rest))
        whole = Group(-1, l1 / count, squares / count**2, count, None)
        found = []
        for (level, number, _, first, second), (l1, squares, dot) in zip(self._records, rows, strict=True):
            inner = dot / max(1, first) / max(1, second) if level else None
            found.append(Group(level, l1 / max(1, number), squares / max(1, number) ** 2, number, inner))
        return found, whole

    def _record(
        self, level: int, sum_M: torch.Tensor, count: int, first: int, second: int, dot: torch.Tensor | None
    ) -> None:
        self._records.append((level, count, self._sums(sum_M, dot), first, second))

    def _sums(self, sum_M: torch.Tensor, dot: torch.Tensor | None) -> torch.Tensor:
        weighted_M = self._weights_M * sum_M
        l1 = weighted_M.abs().sum(dtype=torch.float64)
        squares = (weighted_M * sum_M).sum(dtype=torch.float64)
        return torch.stack([l1, squares, dot if dot is not None else torch.zeros_like(l1)])

    def _values(self) -> torch.Tensor:
        flats = ((parameter.main_grad.view(-1), index) for parameter, index in self._parts)
        return torch.cat([flat if index is None else flat.index_select(0, index) for flat, index in flats])

    def _sum_over_ranks(self, gained_M: torch.Tensor) -> None:
        """Sums over the same groups as `finalize_model_grads`: data ranks, sequence-parallel norms, tied embedding."""
        _all_reduce(gained_M, parallel_state.get_data_parallel_group(with_context_parallel=True))
        _all_reduce_slices(gained_M, self._summed_over_tp, parallel_state.get_tensor_model_parallel_group())
        if self._tied and parallel_state.is_rank_in_embedding_group():
            _all_reduce_slices(gained_M, self._tied, parallel_state.get_embedding_group())


def _all_reduce(values: torch.Tensor, group: Any) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)


def _all_reduce_slices(values: torch.Tensor, slices: Iterable[slice], group: Any) -> None:
    pieces = [values[place] for place in slices]
    if not pieces or dist.get_world_size(group) == 1:
        return
    packed = torch.cat(pieces)  # one all-reduce instead of one per tensor
    dist.all_reduce(packed, group=group)
    for piece, summed in zip(pieces, packed.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(summed)


def _spread(numel: int, count: int, key: str) -> torch.Tensor:
    """Returns `count` of `numel` indices, int64: one in each of `count` equal intervals, at positions that depend on `key`."""
    # A CPU generator gives the same indices on every device. float64, because float32 is exact only up to 2^24.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = ((torch.arange(count, dtype=torch.float64) + places) * (numel / count)).long()
    return index.clamp_(max=numel - 1)
