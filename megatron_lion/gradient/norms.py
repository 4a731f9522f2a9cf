"""Gradient norms over shards: each coordinate counted once, one read, fp32 block partials, float64 sums.

A table has one row per parameter. Sums over rows are the norms of the whole model, of a layer, of a kind of
parameter, or of the model without its embeddings or without the rows that pad the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.gradient.parameter_kinds import PADDING, in_group, is_vocabulary
from megatron_lion.optim.parameter_shards import Shard, counts_here, named_global_parameters
from megatron_lion.parallel import Ranks

GAUSSIAN_RATIO = math.sqrt(2.0 / math.pi)
"""Limit of ‖g‖₁ / (√d ‖g‖₂) for pure Gaussian noise as d grows; an under-averaged gradient shows this value."""

BOX_MARGIN = 0.01
"""A weight with |θ| ≥ (1 − BOX_MARGIN)/λ counts as at the edge of the box ‖θ‖∞ ≤ 1/λ."""

_BLOCK = 1024  # elements per fp32 partial sum: its rounding error stays near 1e-7 of the block's sum
_CHUNK_CPU, _CHUNK_CUDA = 1 << 18, 1 << 22  # stays in cache between the reductions, so memory is read once
_SUMS = ("l1", "squares", "dot", "decayed_dot", "count", "decayed", "at_edge")
_PEAKS = ("linf", "theta_linf")


@dataclass(frozen=True)
class GradientNorms:
    """The quantities of LION's theory, for one gradient over one set of coordinates.

    Attributes:
        grad_l1, grad_l2, grad_linf: norms of ∇f.
        grad_dot_theta: ⟨∇f, θ⟩.
        kkt_residual: Σ_i λ_i g_i θ_i + |g_i| with each parameter group's λ (0 for exempt ones, whose share is |g_i|).
            Zero exactly at KKT points of min f s.t. ‖θ‖∞ ≤ 1/λ, never negative inside the box. None if no coordinate
            has a λ: then there is no box and the residual is undefined.
        theta_linf: ‖θ‖∞.
        box_fraction: share of the coordinates with a λ whose |θ| is at least 0.99/λ; None if no coordinate has a λ.
        num_parameters: number of coordinates (d).
    """

    grad_l1: float
    grad_l2: float
    grad_linf: float
    grad_dot_theta: float
    kkt_residual: float | None
    theta_linf: float
    box_fraction: float | None
    num_parameters: int

    @property
    def norm_ratio(self) -> float:
        """r = ‖∇f‖₁ / ‖∇f‖₂, between 1 and √d (NaN if the gradient is zero)."""
        return self.grad_l1 / self.grad_l2 if self.grad_l2 > 0 else float("nan")

    @property
    def norm_ratio_over_sqrt_d(self) -> float:
        """r / √d, at most 1 (NaN if the gradient is zero)."""
        return self.norm_ratio / math.sqrt(self.num_parameters) if self.num_parameters else float("nan")

    def as_dict(self) -> dict[str, float | int | None]:
        """Returns every number by name, including the ratios."""
        return {**self.__dict__, "norm_ratio": self.norm_ratio, "norm_ratio_over_sqrt_d": self.norm_ratio_over_sqrt_d}


@dataclass(frozen=True)
class NormTable:
    """Sums and peaks of each parameter over all ranks, from which norms over any set of parameters follow.

    Attributes:
        names: one per row; padded vocabulary rows have a separate table row, whose name ends in `PADDING`.
        sums: float64 [P, 7] over g: Σ|g|, Σg², Σgθ, Σλgθ, and counts of coordinates, of those with λ > 0, of those at the edge.
        peaks: float64 [P, 2]: max|g|, max|θ|.
        scale: factor from g to the mean gradient (1 / number of tokens if g is a sum over tokens).
    """

    names: tuple[str, ...]
    sums: torch.Tensor
    peaks: torch.Tensor
    scale: float = 1.0

    def norms(self, keep: Callable[[str], bool] = lambda name: True) -> GradientNorms:
        """Returns norms over the parameters whose name `keep` accepts."""
        rows = [row for row, name in enumerate(self.names) if keep(name)]
        l1, squares, dot, decayed_dot, count, decayed, at_edge = self.sums[rows].sum(0).tolist()
        linf, theta_linf = self.peaks[rows].amax(0).tolist() if rows else (0.0, 0.0)
        return GradientNorms(
            grad_l1=l1 * self.scale,
            grad_l2=math.sqrt(squares) * self.scale,
            grad_linf=linf * self.scale,
            grad_dot_theta=dot * self.scale,
            kkt_residual=(decayed_dot + l1) * self.scale if decayed else None,
            theta_linf=theta_linf,
            box_fraction=at_edge / decayed if decayed else None,
            num_parameters=int(count),
        )

    def grouped(self, group_of: Callable[[str], str]) -> dict[str, GradientNorms]:
        """Returns norms of each group of parameters, in the order in which the groups first appear."""
        groups = dict.fromkeys(group_of(name) for name in self.names)
        return {group: self.norms(in_group(group_of, group)) for group in groups}


def parameter_rows(model: Sequence[Any]) -> tuple[str, ...]:
    """Returns the row names of a model's table, equal on every rank, in network order; a collective call."""
    own = [name for chunk in model for name, parameter in named_global_parameters(chunk) if counts_here(parameter)]
    parts: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    names = dict.fromkeys(name for part in parts for name in part)
    return tuple(row for name in names for row in ((name, name + PADDING) if is_vocabulary(name) else (name,)))


@torch.no_grad()
def norm_table(
    shards: Iterable[Shard],
    rows: Sequence[str],
    *,
    vocab_size: int,
    ranks: Ranks,
    device: torch.device,
    scale: float = 1.0,
) -> NormTable:
    """Reduces the gradients in `shards` over all ranks; a collective call.

    Args:
        shards: from `local_shards`, after the gradients were reduced; `grad` [N] and `main` [N] of each are used.
        rows: from `parameter_rows`.
        vocab_size: number of ids before padding.
        ranks: this process's ranks.
        device: device of the tensors.
        scale: factor from the values in the buffers to the mean gradient.
    """
    index = {name: row for row, name in enumerate(rows)}
    sums = torch.zeros(len(rows), len(_SUMS), dtype=torch.float64, device=device)
    peaks = torch.zeros(len(rows), len(_PEAKS), dtype=torch.float64, device=device)
    for shard in shards:
        if shard.grad is None:
            continue
        for name, piece in vocabulary_pieces(shard, vocab_size, ranks):
            grad, theta = shard.grad[piece], shard.main[piece]
            if grad.numel():
                _add_block_sums(grad, theta, shard.weight_decay, sums[index[name]], peaks[index[name]])
    # Every rank contributes to every row, with zeros for parameters it has no shard of: one collective each for all rows.
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return NormTable(tuple(rows), sums.cpu(), peaks.cpu(), scale)


def vocabulary_pieces(shard: Shard, vocab_size: int, ranks: Ranks) -> Iterator[tuple[str, slice]]:
    """Yields (row name, slice) of a shard; tensors over the vocabulary are split at the start of the padding."""
    length = shard.main.numel()
    if not is_vocabulary(shard.name):
        yield shard.name, slice(0, length)
        return
    rows, columns = shard.parameter.shape[0], shard.parameter[0].numel()
    first_row = ranks.tp_rank * rows if getattr(shard.parameter, "tensor_model_parallel", False) else 0
    boundary = min(max((vocab_size - first_row) * columns - shard.start, 0), length)
    yield shard.name, slice(0, boundary)
    yield shard.name + PADDING, slice(boundary, length)


def _add_block_sums(
    grad: torch.Tensor, theta: torch.Tensor, weight_decay: float, sums: torch.Tensor, peaks: torch.Tensor
) -> None:
    """Adds a slice's sums to its row."""
    chunk = _CHUNK_CUDA if grad.is_cuda else _CHUNK_CPU
    whole = grad.numel() // _BLOCK * _BLOCK
    for start in range(0, whole, chunk):
        end = min(start + chunk, whole)
        _add_blocks(grad[start:end].view(-1, _BLOCK), theta[start:end].view(-1, _BLOCK), weight_decay, sums, peaks)
    if whole < grad.numel():
        _add_blocks(grad[whole:].view(1, -1), theta[whole:].view(1, -1), weight_decay, sums, peaks)


def _add_blocks(
    grad_RB: torch.Tensor, theta_RB: torch.Tensor, weight_decay: float, sums: torch.Tensor, peaks: torch.Tensor
) -> None:
    grad_RB, theta_RB = grad_RB.float(), theta_RB.float()
    norm = torch.linalg.vector_norm
    dot = torch.linalg.vecdot(grad_RB, theta_RB).sum(dtype=torch.float64)
    l1 = norm(grad_RB, 1, dim=1).sum(dtype=torch.float64)
    squares = norm(grad_RB, 2, dim=1).double().square_().sum()
    count = torch.full_like(l1, grad_RB.numel())
    decayed, at_edge = torch.zeros_like(l1), torch.zeros_like(l1)
    theta_low, theta_high = torch.aminmax(theta_RB)
    if weight_decay > 0:
        decayed = count
        edge = (1 - BOX_MARGIN) / weight_decay
        # On CPU the peaks are already known, and most blocks need no second read. On CUDA, reading them would synchronise.
        if grad_RB.is_cuda or max(-float(theta_low), float(theta_high)) >= edge:
            at_edge = (theta_RB.abs() >= edge).sum().double()
    sums += torch.stack([l1, squares, dot, weight_decay * dot, count, decayed, at_edge])
    grad_low, grad_high = torch.aminmax(grad_RB)
    found = torch.stack([torch.maximum(-grad_low, grad_high), torch.maximum(-theta_low, theta_high)]).double()
    torch.maximum(peaks, found, out=peaks)
