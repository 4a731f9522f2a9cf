"""Moving-window probe: the mean gradient of the last training steps, each at its own parameters.

It uses training's own gradients and adds no passes. The sum needs separate memory: 4 bytes for each parameter of this
rank's shard, from the first step of a window to its probe, and one addition over the shard per step. Dropout is on as in
training. Because the parameters move, noise cannot be separated from signal.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from megatron_lion.config import RunConfig
from megatron_lion.gradient.full_gradient import probe_facts, standard_error, warn_of
from megatron_lion.gradient.norms import norm_table, parameter_rows
from megatron_lion.gradient.probe_result import ProbeResult
from megatron_lion.optim.parameter_shards import Shard, local_shards
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import Ranks, all_reduce_sum


class MovingWindow:
    """Sums the gradients of the last `probe.num_batches` training steps before each probe.

    A resumed run starts with an empty window; the next probe reports the number of steps it covers.

    Args:
        config: the run's settings; `probe.every` must not be smaller than `probe.num_batches`.
        model: DDP-wrapped chunks.
        optimizer: the run's optimizer.
        ranks: this process's ranks.
        vocab_size: number of ids before padding.
    """

    def __init__(
        self, config: RunConfig, model: list[Any], optimizer: TrainOptimizer, ranks: Ranks, vocab_size: int
    ) -> None:
        self.config, self.model, self.optimizer, self.ranks, self.vocab_size = (
            config,
            model,
            optimizer,
            ranks,
            vocab_size,
        )
        self.device = next(model[0].parameters()).device
        self.rows = parameter_rows(model)
        self._sums: list[torch.Tensor] = []
        self._losses: list[tuple[float, int]] = []
        self._num_tokens = 0
        self._steps = 0

    def wants(self, step: int) -> bool:
        """Whether the gradient of this step (counted from 1) belongs to the next probe's window."""
        every = self.config.probe.every
        return every > 0 and -step % every < _length(self.config)

    @torch.no_grad()
    def add(self) -> None:
        """Adds the step's gradient; call it after the reduction, before clipping and the update. A collective call.

        A gradient that is not finite is not added, because its step will be skipped.
        """
        shards = self._shards()
        if not self._sums:
            self._sums = [torch.zeros_like(shard.main, dtype=torch.float32) for shard in shards]
        finite = torch.stack(
            [torch.isfinite(_grad(shard)).all() for shard in shards]
            or [torch.ones((), dtype=torch.bool, device=self.device)]
        )
        # All ranks must decide alike: otherwise their windows would cover different numbers of steps.
        bad = all_reduce_sum((~finite.all()).to(torch.float64))
        if bad.item():
            return
        # The buffers still carry the fp16 loss scale, which may change between the steps of a window.
        scale = 1.0 / float(self.optimizer.scale_loss(torch.ones(1, device=self.device)))
        for total, shard in zip(self._sums, shards, strict=True):
            total.add_(_grad(shard), alpha=scale)
        self._steps += 1

    def add_loss(self, loss: float, num_tokens: int) -> None:
        """Adds the step's mean loss (nats per token) and token count."""
        self._losses.append((loss * num_tokens, num_tokens))

    def take(self, step: int) -> ProbeResult | None:
        """Measures the window's mean gradient and frees its memory; a collective call. Returns None for an empty window."""
        if not self._steps:
            return None
        started = time.perf_counter()
        summed = [replace(shard, grad=total) for shard, total in zip(self._shards(), self._sums, strict=True)]
        table = norm_table(
            summed, self.rows, vocab_size=self.vocab_size, ranks=self.ranks, device=self.device, scale=1.0 / self._steps
        )
        tokens = sum(count for _, count in self._losses)
        result = ProbeResult(
            step=step, mode="moving", data="training", dropout=self.config.model.hidden_dropout + self.config.model.attention_dropout > 0,
            num_batches=self._steps, num_samples=self._steps * self.config.train.global_batch_size, num_tokens=tokens,
            loss=sum(loss for loss, _ in self._losses) / max(1, tokens), loss_standard_error=standard_error(self._losses),
            table=table, seconds=time.perf_counter() - started, facts=probe_facts(self.config, self.ranks),
        )  # fmt: skip
        self._sums, self._losses, self._steps = [], [], 0
        warn_of(result, self.ranks)
        return result

    def _shards(self) -> list[Shard]:
        return [shard for shard in local_shards(self.model, self.optimizer) if shard.grad is not None]


def window_cost(config: RunConfig, num_parameters: int, ranks: Ranks) -> str:
    """Describes in one sentence what the moving mode costs this run."""
    shards = ranks.tp_size * ranks.pp_size * (ranks.dp_size if config.parallel.use_distributed_optimizer else 1)
    mebibytes = 4 * num_parameters / shards / 2**20
    return (
        f"probe.mode moving: the last {_length(config):,} steps before every {config.probe.every:,}th use "
        f"{mebibytes:,.1f} MiB more per process (4 bytes per parameter of its shard) and read its gradient once more; no extra passes"
    )


def _length(config: RunConfig) -> int:
    """Steps of a window."""
    assert config.probe.num_batches != "all", "config_checks refuses it with probe.mode moving"
    return config.probe.num_batches


def _grad(shard: Shard) -> torch.Tensor:
    assert shard.grad is not None
    return shard.grad
