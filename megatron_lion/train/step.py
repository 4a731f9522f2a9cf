"""One optimizer step, and the loss of a set of samples, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lion.config import RunConfig
from megatron_lion.model.objective import Objective
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import Ranks, reduce_sums

ForwardStep = Callable[[Iterator[dict[str, torch.Tensor]], torch.nn.Module], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class TrainStep:
    """What one optimizer step did.

    Attributes:
        loss: mean over the global batch (nats per token), before the update.
        grad_l2: norm of the mean gradient before clipping.
        num_tokens: tokens read, over all ranks (padding included, where there is any).
        skipped: nothing was changed because a gradient was not finite.
        parts: the other means of the objective over the global batch, by name.
    """

    loss: float
    grad_l2: float
    num_tokens: int
    skipped: bool
    parts: dict[str, float] = field(default_factory=dict)


def train_step(
    model: list[Any],
    optimizer: TrainOptimizer,
    batches: Iterator[dict[str, torch.Tensor]],
    objective: Objective,
    config: RunConfig,
    ranks: Ranks,
    lr: float,
    *,
    on_gradient: Callable[[], None] | None = None,
) -> TrainStep:
    """Forward and backward over the micro-batches of one global batch, then one update.

    `on_gradient` is called when the buffers hold the reduced gradient, before it is measured, clipped and used.

    Gradients are sums; megatron-core divides them by the global count of the objective after the reduction, so that
    a step is the mean over the global batch at every layout.
    """
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    optimizer.set_lr(lr)
    settings = model[0].config
    settings.finalize_model_grads_func = finalize_model_grads
    settings.grad_scale_func = optimizer.scale_loss
    try:
        outputs = get_forward_backward_func()(
            forward_step_func=objective.forward_step,
            data_iterator=batches,
            model=model if len(model) > 1 else model[0],
            num_microbatches=config.num_microbatches(ranks.world_size),
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
        )
    finally:
        # A model that refers to its optimizer is never collected: the circle goes through autograd's own nodes.
        settings.finalize_model_grads_func = settings.grad_scale_func = None
    means = objective.means(reduce_sums(outputs, objective.sum_names, next(model[0].parameters()).device))
    if on_gradient is not None:
        on_gradient()
    result = optimizer.step()
    num_tokens = config.train.global_batch_size * config.model.seq_length
    return TrainStep(means.pop("loss"), result.grad_l2, num_tokens, result.skipped, means)


@torch.no_grad()
def mean_losses(
    model: list[Any],
    batches: Iterator[dict[str, torch.Tensor]],
    objective: Objective,
    config: RunConfig,
    num_microbatches: int,
) -> dict[str, float]:
    """The objective's means by name, `loss` (nats) among them, over `num_microbatches` micro-batches a data rank.

    Dropout is off; nothing is changed.
    """
    for chunk in model:
        chunk.eval()
    outputs = get_forward_backward_func()(
        forward_step_func=objective.forward_step,
        data_iterator=batches,
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches,
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=True,
    )
    for chunk in model:
        chunk.train()
    return objective.means(reduce_sums(outputs, objective.sum_names, next(model[0].parameters()).device))
