"""The full-gradient probe: ∇f over many global batches at frozen parameters, in DDP's own gradient buffers."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lion.config import RunConfig
from megatron_lion.errors import ConfigError
from megatron_lion.gradient.norms import gradient_norms
from megatron_lion.optim.megatron import TrainOptimizer
from megatron_lion.optim.shards import local_shards
from megatron_lion.parallel import Ranks, reduce_losses


class ProbedRun(Protocol):
    """What a probe needs of a run."""

    config: RunConfig
    ranks: Ranks
    model: list[Any]
    optimizer: TrainOptimizer
    forward_step: Any

    def probe_batches(self) -> Any: ...


def probe_run(run: ProbedRun) -> dict[str, float | int]:
    """Averages loss and gradient over `probe.num_batches` global batches and measures the mean gradient.

    One long accumulation: gradients of all micro-batches add up in DDP's fp32 buffers, and one reduction at the end
    leaves each rank its shard of the mean. Parameters, optimizer state and the data position of training are not
    touched; the caller puts random states back. Dropout is off unless `probe.dropout`.

    Returns:
        Values for metrics.jsonl under probe/…
    """
    config, model = run.config, run.model
    started = time.perf_counter()
    tokens = config.probe.num_batches * config.train.global_batch_size * config.model.seq_length
    if tokens >= 2**31:
        raise ConfigError(
            f"probe.num_batches: {config.probe.num_batches} x {config.train.global_batch_size} samples are {tokens:,} tokens; "
            f"at most 2^31 in one probe, that is {2**31 // (config.train.global_batch_size * config.model.seq_length)} batches"
        )
    for chunk in model:
        chunk.train(config.probe.dropout)
        chunk.zero_grad_buffer()
    settings = model[0].config
    settings.finalize_model_grads_func = finalize_model_grads
    settings.grad_scale_func = None
    outputs = get_forward_backward_func()(
        forward_step_func=run.forward_step,
        data_iterator=run.probe_batches(),
        model=model if len(model) > 1 else model[0],
        num_microbatches=config.probe.num_batches * config.num_microbatches(run.ranks.world_size),
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=False,
    )
    device = next(model[0].parameters()).device
    norms = gradient_norms(local_shards(model, run.optimizer), device)
    loss_sum, num_tokens = reduce_losses(outputs, device)
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    return {
        "probe/loss": loss_sum / max(1, num_tokens),
        "probe/grad_l1": norms.grad_l1,
        "probe/grad_l2": norms.grad_l2,
        "probe/grad_linf": norms.grad_linf,
        "probe/norm_ratio": norms.norm_ratio,
        "probe/norm_ratio_over_sqrt_d": norms.norm_ratio_over_sqrt_d,
        "probe/kkt_residual": norms.kkt_residual,
        "probe/theta_linf": norms.theta_linf,
        "probe/num_parameters": norms.num_parameters,
        "probe/sqrt_d": math.sqrt(norms.num_parameters),
        "probe/num_batches": config.probe.num_batches,
        "probe/seconds": round(time.perf_counter() - started, 3),
    }
