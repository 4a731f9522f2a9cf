"""Launches of the kernels of the fused loss; they never wait for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton import JITFunction

from megatron_lion.model.loss_kernels import BLOCK, NUM_WARPS, gradient_kernel, statistics_kernel


def row_statistics(logits: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Returns maximum, sum of exp(logit - maximum) and target's logit (0 if it is in no column) of each row, float32 [3, N].

    Args:
        logits: contiguous, [..., V] with N rows.
        targets_N: columns, int64; numbers outside of [0, V) are in none.
    """
    rows, width = len(targets_N), logits.shape[-1]
    statistics_3N = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        with _on(logits.device):
            statistics_kernel[(rows,)](
                _as_read(logits), targets_N, statistics_3N, rows, width, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return statistics_3N


def write_gradient(
    logits: torch.Tensor,
    targets_N: torch.Tensor,
    maxima_N: torch.Tensor,
    sums_N: torch.Tensor,
    upstream_N: torch.Tensor,
) -> None:
    """Overwrites the logits with the gradient, (softmax - onehot) * upstream.

    Args:
        logits, targets_N: as for `row_statistics`.
        maxima_N, sums_N: over the whole vocabulary, float32.
        upstream_N: gradient of each row's loss, float32.
    """
    rows, width = len(targets_N), logits.shape[-1]
    if rows:
        with _on(logits.device):
            gradient_kernel[(rows,)](
                _as_read(logits), targets_N, maxima_N, sums_N, upstream_N, width, BLOCK=BLOCK, num_warps=NUM_WARPS
            )


def _as_read(logits: torch.Tensor) -> torch.Tensor:
    """Returns the logits as the kernels take them: bfloat16 as int16 in Triton's interpreter."""
    is_interpreted = not isinstance(gradient_kernel, JITFunction)
    return logits.detach().view(torch.int16) if is_interpreted and logits.dtype == torch.bfloat16 else logits.detach()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the logits'.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
