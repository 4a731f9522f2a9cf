"""Cross-entropy of logits that are split over tensor-parallel ranks, with the gradient written over the logits.

For a row x of logits with the target t, M = max x and S = Σ exp(x - M):

    loss = log S - (x_t - M)        d loss / d x_j = exp(x_j - M) / S - [j = t]

It is megatron-core's `vocab_parallel_cross_entropy` in value, also in the cases that the formula leaves open:

- a target outside of the vocabulary counts as the row's largest logit in the loss, and gives no -1 in the gradient
- a row with NaN or +inf, or of -inf only, has the loss NaN and the gradient NaN, whatever its upstream gradient is
- a row of other logits and upstream gradient 0, a masked one, has the gradient 0.

megatron-core copies 16-bit logits to fp32 and passes over the copy a dozen times. Here the forward pass reads the logits
once, and the backward pass reads them once more and overwrites them. M and S are kept apart instead of as log S + M: the
loss is then as exact for logits around -100 as for those around 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def fused_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Returns the cross-entropy of each row; a collective call if the group has several ranks.

    The backward pass overwrites the logits with their gradient, so they must not be used after it, and it runs once.

    Args:
        logits: [..., V/tp], float32, bfloat16 or float16, on a CUDA device (on a CPU in Triton's interpreter only).
        labels: ids over the whole vocabulary, int64 [...].
        group: the ranks that hold parts of the vocabulary, in its order; None if this process holds all of it.

    Returns:
        Losses in nats, float32 [...].

    Raises:
        RuntimeError: a second backward pass.
    """
    losses: torch.Tensor = _FusedCrossEntropy.apply(logits, labels, group)
    return losses


class WithFusedLoss:
    """Base of a megatron-core language model, before megatron-core's class, that computes its loss here."""

    tp_group: dist.ProcessGroup

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each token, float32 [B, S], from labels [B, S] and logits [S, B, V/tp]."""
        loss_SB = fused_cross_entropy(logits, labels.transpose(0, 1), self.tp_group)
        return loss_SB.transpose(0, 1).contiguous()


def plain_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same formula in torch, for a whole vocabulary: what the kernels are to compute, in the logits' dtype.

    Args:
        logits: [N, V].
        labels: int64 [N], all inside of the vocabulary.
    """
    maxima = logits.amax(dim=-1)
    sums = torch.exp(logits - maxima[:, None]).sum(dim=-1)
    return torch.log(sums) - (logits.gather(-1, labels[:, None])[:, 0] - maxima)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        from megatron_lion.model.loss_launch import (
            row_statistics,  # not above: only a run with this loss needs its kernels
        )

        logits = logits.contiguous()
        losses_N, targets_N, maxima_N, sums_N = over_vocabulary(
            functools.partial(row_statistics, logits), labels.reshape(-1), logits.shape[-1], group
        )
        ctx.is_spent = False
        ctx.save_for_backward(logits, targets_N, maxima_N, sums_N)
        return losses_N.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.is_spent:
            raise RuntimeError(
                "fused_cross_entropy: a second backward pass is not possible, because the first one wrote the gradient over "
                "the logits; run the forward pass again, or use model.loss megatron"
            )
        from megatron_lion.model.loss_launch import write_gradient

        logits, targets_N, maxima_N, sums_N = ctx.saved_tensors
        ctx.is_spent = True
        # Autograd now refuses any other operation that saved these logits; it does not see what a kernel writes.
        torch.autograd.graph.increment_version(logits)
        write_gradient(logits, targets_N, maxima_N, sums_N, upstream.reshape(-1).float().contiguous())
        return logits.detach(), None, None


def over_vocabulary(
    statistics: Callable[[torch.Tensor], torch.Tensor],
    labels_N: torch.Tensor,
    width: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, ...]:
    """Returns the losses, and what the gradient needs: this rank's targets, and M and S over the whole vocabulary, [N] each.

    Args:
        statistics: returns the statistics [3, N] of `loss_launch.row_statistics` for this rank's targets.
        labels_N: ids over the whole vocabulary.
        width: columns of each rank.
        group: as for `fused_cross_entropy`; one collective if it has several ranks.
    """
    ranks = 1 if group is None else group.size()
    first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(
        width, 0 if group is None else group.rank(), ranks
    )
    targets_N = labels_N - first
    parts = own_3N = statistics(targets_N)
    if ranks > 1:
        parts = own_3N.new_empty(ranks * 3, own_3N.shape[1])
        dist.all_gather_into_tensor(parts, own_3N, group=group)
    maxima_RN, sums_RN, target_logits_RN = parts.view(ranks, 3, -1).unbind(dim=1)
    maxima_N = maxima_RN.amax(dim=0)
    # -inf - -inf is NaN: a row without a finite logit has no softmax. A rank whose part is -inf adds 0 to other rows.
    sums_N = (sums_RN * torch.exp(maxima_RN - maxima_N)).sum(dim=0)
    is_known = (labels_N >= 0) & (labels_N < width * ranks)
    losses_N = torch.log(sums_N) - torch.where(is_known, target_logits_RN.sum(dim=0) - maxima_N, 0.0)
    return losses_N, targets_N, maxima_N, sums_N
