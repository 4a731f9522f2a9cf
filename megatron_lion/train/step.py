"""One optimizer step, and the mean losses of a set of samples, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lion.config import RunConfig
from megatron_lion.model.objective import Objective
from megatron_lion.optim.key_bias import zero_key_gradients
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import Ranks, reduce_sums, sum_on_device

ForwardStep = Callable[[Iterator[dict[str, torch.Tensor]], torch.nn.Module], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class TrainStep:
    """Result of one optimizer step.

    Attributes:
        loss: mean over the global batch before the update (nats per token).
        grad_l2: ℓ2 norm of the mean gradient before clipping.
        num_tokens: tokens read, over all ranks, padding included.
        skipped: whether the step changed nothing, because a gradient was not finite or the loss counted nothing.
        uncounted: the objective's count that was 0, if that is why the step was skipped.
        parts: the other means of the objective over the global batch, by name.
    """

    loss: float
    grad_l2: float
    num_tokens: int
    skipped: bool
    uncounted: str | None = None
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

    Gradients are sums. After the reduction they are divided by the objective's global count, so a step uses the mean over
    the global batch at every layout. megatron-core divides the buffer, or the fused kernel each gradient as it reads it;
    both have the same bits in an fp32 buffer, and a bf16 buffer rounds the quotient once more. The host reads the losses
    and the norm together, after it has launched the update: a read before would leave the device idle while the host
    prepares it. A collective call.

    Args:
        model: DDP-wrapped chunks.
        optimizer: from `build_optimizer`.
        batches: yields this rank's micro-batches.
        objective: the loss to minimise.
        config: the run's settings.
        ranks: this process's ranks.
        lr: learning rate of this step.
        on_gradient: called when the buffers contain the reduced mean gradient, before it is measured, clipped and used;
            not called if the loss counted nothing.
    """
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()  # DDP adds every micro-batch to its buffers and never clears them itself
    optimizer.zero_grad()
    optimizer.set_lr(lr)
    settings = model[0].config
    divides = optimizer.divides_by_count and on_gradient is None
    settings.finalize_model_grads_func = _reduce if divides else finalize_model_grads
    settings.grad_scale_func = optimizer.scale_loss
    try:
        outputs = get_forward_backward_func()(
            forward_step_func=objective.forward_step,
            data_iterator=batches,
            model=model if len(model) > 1 else model[0],
            num_microbatches=config.num_microbatches(ranks.world_size),
            seq_length=config.model.seq_length,
            micro_batch_size=config.micro_batch_size,
            forward_only=False,
        )
    finally:
        # A model that refers to its optimizer is never garbage-collected: the cycle passes through autograd's own nodes.
        settings.finalize_model_grads_func = settings.grad_scale_func = None
    if config.optimizer.freeze_key_bias:
        zero_key_gradients(model)
    names = objective.sum_names
    totals = sum_on_device(outputs, names, next(model[0].parameters()).device)
    # The sums are over all ranks, so that all of them skip alike. A gradient of nothing is zero, or 0 · NaN, and LION would
    # move every weight by its old momentum.
    if on_gradient is not None or optimizer.changes_with_gradient:
        sums = dict(zip(names, totals.tolist(), strict=True))
        uncounted = objective.uncounted(sums)
        if uncounted is None and on_gradient is not None:
            on_gradient()
        result = optimizer.step() if uncounted is None else optimizer.skip()
    else:
        divisor = totals[names.index("num_tokens")].view(1) if divides else None
        norm = optimizer.start_step(divisor=divisor, counts=totals[objective.count_places()])
        *values, grad_l2 = torch.cat([totals, norm.view(1)]).tolist()  # the only wait of the step
        sums = dict(zip(names, values, strict=True))
        uncounted = objective.uncounted(sums)
        result = optimizer.end_step(grad_l2, undefined=uncounted is not None)
    means = objective.means(sums)
    num_tokens = config.train.global_batch_size * config.model.seq_length
    return TrainStep(means.pop("loss"), result.grad_l2, num_tokens, result.skipped, uncounted, means)


def _reduce(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron-core's finalize_model_grads without its pass over the buffer that divides it by `num_tokens`."""
    finalize_model_grads(model, None, **options)


@torch.no_grad()
def mean_losses(
    model: list[Any],
    batches: Iterator[dict[str, torch.Tensor]],
    objective: Objective,
    config: RunConfig,
    num_microbatches: int,
    *,
    what: str = "held-out loss",
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the objective's means by name, including `loss` (nats), or None if it was stopped; a collective call.

    Dropout is off. Weights and gradients do not change; the model is in training mode afterwards.

    Args:
        model: DDP-wrapped chunks.
        batches: yields this rank's micro-batches.
        objective: the loss to measure.
        config: the run's settings.
        num_microbatches: micro-batches per data rank.
        what: what is measured, for the message.
        should_stop: called before each global batch; gives the same answer on all ranks.

    Raises:
        DataError: the loss counts nothing in these samples; on all ranks.
    """
    for chunk in model:
        chunk.eval()
    outputs: list[dict[str, torch.Tensor]] = []
    per_batch = num_microbatches // config.train.test_batches
    stopped = False
    # One global batch at a time, because nothing can end megatron-core's schedule in the middle: with pipeline stages,
    # ranks would wait for each other's activations.
    for _ in range(config.train.test_batches):
        if stopped := should_stop():
            break
        outputs += get_forward_backward_func()(
            forward_step_func=objective.forward_step,
            data_iterator=batches,
            model=model if len(model) > 1 else model[0],
            num_microbatches=per_batch,
            seq_length=config.model.seq_length,
            micro_batch_size=config.micro_batch_size,
            forward_only=True,
        )
    for chunk in model:
        chunk.train()
    if stopped:
        return None
    sums = reduce_sums(outputs, objective.sum_names, next(model[0].parameters()).device)
    objective.require_counts(sums, what)
    return objective.means(sums)
