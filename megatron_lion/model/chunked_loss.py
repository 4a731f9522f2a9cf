"""Output layer and cross-entropy together, a few rows at a time, so that a micro-batch's logits never exist whole.

The forward pass computes the logits of CHUNK rows, reads their statistics, and computes the next ones in the same memory.
The backward pass computes each chunk's logits again, overwrites them with their gradient, and adds that chunk's part to
the gradients of the hidden states and of the output matrix. The output layer then has four matrix products instead of
three. The kernels and the formula are those of `fused_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatron_lion.model.fused_loss import over_vocabulary
from megatron_lion.model.sizes import CHUNK_ROWS


class ChunkedGpt(GPTModel):
    """megatron-core's GPTModel with the chunked loss; without labels it returns logits as ever."""

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Runs this pipeline stage, as GPTModel.forward."""
        if labels is not None:
            options["output_processor"] = self._loss
        output: torch.Tensor = super().forward(*args, labels=labels, **options)
        return output

    def _loss(
        self, *, hidden_states: torch.Tensor, output_weight: torch.Tensor, labels: torch.Tensor, **unused: Any
    ) -> torch.Tensor:
        """Returns losses [B, S] for hidden states [S, B, H], or [S/tp, B, H] with sequence parallelism."""
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        loss_SB = chunked_cross_entropy(hidden_SBH, output_weight, labels.transpose(0, 1), self.tp_group)
        return loss_SB.transpose(0, 1).contiguous()


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Returns the cross-entropy of each row of logits hidden @ weight^T; a collective call if the group has several ranks.

    Each rank's gradient of `hidden` is the part of its own columns; the caller adds these up.

    Args:
        hidden: [..., H], float32, bfloat16 or float16.
        weight: [V/tp, H], the same dtype.
        labels: ids over the whole vocabulary, int64 [...].
        group: as for `fused_loss.fused_cross_entropy`.

    Returns:
        Losses in nats, float32 [...].
    """
    losses: torch.Tensor = _ChunkedCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels, group)
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels: torch.Tensor,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        from megatron_lion.model.loss_launch import row_statistics

        def statistics(targets_N: torch.Tensor) -> torch.Tensor:
            statistics_3N = torch.empty(3, len(targets_N), dtype=torch.float32, device=hidden_NH.device)
            logits = _logits_memory(hidden_NH, weight_VH)
            for rows in _chunks(len(hidden_NH)):
                logits_CV = torch.mm(hidden_NH[rows], weight_VH.t(), out=logits[: rows.stop - rows.start])
                statistics_3N[:, rows] = row_statistics(logits_CV, targets_N[rows])
            return statistics_3N

        losses_N, targets_N, maxima_N, sums_N = over_vocabulary(statistics, labels.reshape(-1), len(weight_VH), group)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, maxima_N, sums_N)
        return losses_N.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        from megatron_lion.model.loss_launch import write_gradient

        hidden_NH, weight_VH, *per_row = ctx.saved_tensors
        per_row.append(upstream.reshape(-1).float().contiguous())
        hidden_gradient_NH = torch.empty_like(hidden_NH)
        # float32, rounded once at the end: a sum of many 16-bit parts would lose the small ones.
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        logits = _logits_memory(hidden_NH, weight_VH)
        for rows in _chunks(len(hidden_NH)):
            logits_CV = torch.mm(hidden_NH[rows], weight_VH.t(), out=logits[: rows.stop - rows.start])
            write_gradient(logits_CV, *(values[rows] for values in per_row))
            torch.mm(logits_CV, weight_VH, out=hidden_gradient_NH[rows])
            if weight_VH.dtype == torch.float32:
                weight_gradient_VH.addmm_(logits_CV.t(), hidden_NH[rows])
            else:
                weight_gradient_VH += logits_CV.t() @ hidden_NH[rows]
        return hidden_gradient_NH, weight_gradient_VH.to(weight_VH.dtype), None, None


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]


def _logits_memory(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    return hidden_NH.new_empty(min(CHUNK_ROWS, len(hidden_NH)), len(weight_VH))
