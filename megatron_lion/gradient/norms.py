"""Norms of the gradient over shards: every coordinate once, fp32 reads, float64 sums, one reduction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lion.optim.shards import Shard

GAUSSIAN_RATIO = math.sqrt(2.0 / math.pi)
"""‖g‖₁ / (√d ‖g‖₂) of pure Gaussian noise as d grows: an under-averaged gradient shows this number by itself."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class GradientNorms:
    """What the theory of LION speaks of, for one gradient.

    Attributes:
        grad_l1, grad_l2, grad_linf: norms of ∇f over all d coordinates.
        kkt_residual: Σ over groups of λ⟨∇f, θ⟩, plus ‖∇f‖₁, with each group's own λ; zero exactly at KKT points of
            min f s.t. ‖θ‖∞ ≤ 1/λ, never negative inside the box.
        theta_linf: ‖θ‖∞.
        num_parameters: d.
    """

    grad_l1: float
    grad_l2: float
    grad_linf: float
    kkt_residual: float
    theta_linf: float
    num_parameters: int

    @property
    def norm_ratio(self) -> float:
        """r = ‖∇f‖₁ / ‖∇f‖₂, between 1 and √d (NaN where the gradient is zero)."""
        return self.grad_l1 / self.grad_l2 if self.grad_l2 > 0 else float("nan")

    @property
    def norm_ratio_over_sqrt_d(self) -> float:
        return self.norm_ratio / math.sqrt(self.num_parameters)


@torch.no_grad()
def gradient_norms(shards: Iterable[Shard], device: torch.device) -> GradientNorms:
    """Reduces the gradients in `shards` over all ranks; a collective call.

    Args:
        shards: from `local_shards`, after the gradients were reduced.
        device: of the tensors.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # Σ|g|, Σg², Σ λ g θ, count
    peaks = torch.zeros(2, dtype=torch.float64, device=device)  # max|g|, max|θ|
    for shard in shards:
        if shard.grad is None:
            continue
        for start in range(0, shard.grad.numel(), _CHUNK):
            grad = shard.grad[start : start + _CHUNK].float()
            theta = shard.main[start : start + _CHUNK].float()
            magnitude = grad.abs()
            sums[0] += magnitude.sum(dtype=torch.float64)
            sums[1] += grad.double().square_().sum()
            sums[2] += shard.weight_decay * (grad.double() * theta).sum()
            sums[3] += grad.numel()
            torch.maximum(peaks, torch.stack([magnitude.max(), theta.abs().max()]).double(), out=peaks)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    l1, squares, weighted, count = sums.tolist()
    return GradientNorms(l1, math.sqrt(squares), float(peaks[0]), weighted + l1, float(peaks[1]), int(count))
