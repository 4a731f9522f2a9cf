"""The full gradient at frozen parameters, accumulated in DDP's own gradient buffers.

Gradients of all micro-batches of all global batches are added in the fp32 buffers that training uses anyway. Nothing is
reduced until the sum is read. A read reduces the buffers, so that each rank holds its shard of the sum over all ranks.
Each rank then keeps its shard, sets every other copy to zero and continues to accumulate. At any time the sum of the
buffers over all ranks is the sum of the gradients of all samples so far, without extra memory per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.norms import NormTable, norm_table, parameter_rows
from megatron_lion.optim.parameter_shards import Shard, local_shards
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import Ranks


class FullGradient:
    """Sums loss and gradient over global batches while nothing else of the run changes. A context manager.

    Inside the block the accumulation owns the gradient buffers. At the end they are zero and the model is in training
    mode, as a training step expects. Parameters, optimizer state and data positions do not change. With dropout on, the
    random states change, and the caller restores them.

    Args:
        model: DDP-wrapped chunks.
        optimizer: for master weights, λ and the loss scale.
        forward_step: as for megatron-core's schedules. Its loss function must return (loss sum, count,
            {"loss_sum": …, "num_tokens": the same count}), with sums, not means.
        ranks: this process's ranks.
        num_microbatches: micro-batches of a global batch on one data rank.
        micro_batch_size: samples of a micro-batch.
        seq_length: tokens of a sample.
        vocab_size: number of ids before padding.
        dropout_seed: seed of the dropout masks, or None for no dropout.
        master_weights: whether θ is the optimizer's fp32 master weights; otherwise the model's own weights.
        groups: follows sketches of the sums over disjoint groups of batches, or None.
        count_names: further scalars of the loss function's dictionary to sum into `counts`.

    Attributes:
        num_batches: global batches summed so far.
        count: divisor of the mean: everything that the loss function counted (tokens of GPT-2, samples of BERT).
        losses: (loss sum in nats, count) of each batch.
        counts: sums of `count_names` over all batches.

    Example:
        with FullGradient(model, optimizer, forward_step, ranks, ...) as full:
            while full.num_batches < 100:
                full.add(batches)
            norms = full.read().norms()
    """

    def __init__(
        self,
        model: list[Any],
        optimizer: TrainOptimizer,
        forward_step: Callable[..., Any],
        ranks: Ranks,
        *,
        num_microbatches: int,
        micro_batch_size: int,
        seq_length: int,
        vocab_size: int,
        dropout_seed: int | None = None,
        groups: GroupedBatches | None = None,
        master_weights: bool = True,
        count_names: Sequence[str] = (),
    ) -> None:
        self.model, self.optimizer, self.forward_step, self.ranks = model, optimizer, forward_step, ranks
        self.num_microbatches, self.micro_batch_size, self.seq_length = num_microbatches, micro_batch_size, seq_length
        self.vocab_size, self.dropout_seed, self.groups = vocab_size, dropout_seed, groups
        self.master_weights = master_weights
        self.device = next(model[0].parameters()).device
        self.rows = parameter_rows(model)
        self.num_batches = 0
        self.losses: list[tuple[float, int]] = []
        self.counts = dict.fromkeys(count_names, 0.0)
        self._stack = ExitStack()

    @property
    def count(self) -> int:
        return sum(count for _, count in self.losses)

    @property
    def loss(self) -> float:
        """Mean loss so far (nats)."""
        return sum(loss for loss, _ in self.losses) / max(1, self.count)

    def __enter__(self) -> Self:
        settings = self.model[0].config
        self._stack.callback(
            _put_back, settings, settings.no_sync_func, settings.grad_scale_func, settings.finalize_model_grads_func
        )
        self._stack.callback(self._leave)
        # No bucket may be reduced between batches, overlapped or not. The schedules' own no_sync_func would enable the
        # reduction for the last micro-batch of each call, so it is disabled once for the whole accumulation.
        for chunk in self.model:
            chunk.zero_grad_buffer()
            self._stack.enter_context(chunk.no_sync())
            set_dropout(chunk, on=self.dropout_seed is not None)
        settings.no_sync_func = None
        settings.finalize_model_grads_func = None
        settings.grad_scale_func = self.optimizer.scale_loss
        # Constant during the block, because only an optimizer step changes the fp16 loss scale.
        self._loss_scale = float(self.optimizer.scale_loss(torch.ones(1, device=self.device)))
        if self.dropout_seed is not None:
            # Different masks on every data rank and stage. Tensor-parallel ranks share the seed; megatron-core's tracker
            # adds their offset where their masks must differ.
            seed = self.dropout_seed + 1_000_003 * self.ranks.dp_rank + 101 * self.ranks.pp_rank
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        if self.groups is not None:
            self.groups.rebase()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _leave(self) -> None:
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()

    def add(self, batches: Iterator[dict[str, torch.Tensor]], *, stop: bool = False) -> bool:
        """Adds loss and gradient of one global batch; a collective call.

        Args:
            batches: yields this rank's micro-batches.
            stop: whether this process was asked to stop.

        Returns:
            Whether any process was asked to stop.
        """
        outputs = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches,
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=self.num_microbatches,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=False,
        )
        # float64 holds counts exactly up to 2^53; megatron-core's own token counters are int32. The stop flag is in the same
        # tensor, so that all ranks learn it from one all-reduce and leave after the same batch.
        totals = torch.zeros(3 + len(self.counts), dtype=torch.float64, device=self.device)
        if self.ranks.tp_rank == 0:  # only the last stage has losses; all tensor-parallel ranks have the same ones
            for output in outputs:
                totals[0] += output["loss_sum"]
                totals[1] += output["num_tokens"]
                for place, name in enumerate(self.counts, start=3):
                    totals[place] += output[name]
        totals[2] = float(stop)
        if self.ranks.world_size > 1:
            dist.all_reduce(totals)
        loss_sum, count, asked, *counts = totals.tolist()
        for name, value in zip(self.counts, counts, strict=True):
            self.counts[name] += value
        self.losses.append((loss_sum, int(count)))
        self.num_batches += 1
        if self.groups is not None:
            self.groups.add_batch(int(count), self._loss_scale)
        return asked > 0

    @torch.no_grad()
    def read(self) -> NormTable:
        """Reduces the buffers and returns norms of the mean gradient over all batches so far; a collective call."""
        self._reduce()
        scale = 1.0 / (max(1, self.count) * self._loss_scale)
        table = norm_table(
            self.shards(), self.rows, vocab_size=self.vocab_size, ranks=self.ranks, device=self.device, scale=scale
        )
        for chunk in self.model:
            keep_own_shard(chunk)
        if self.groups is not None:
            self.groups.rebase()
        return table

    def shards(self) -> Iterator[Shard]:
        """Yields this rank's slices; after `read`, `grad` holds the sum over all samples times the loss scale."""
        for shard in local_shards(self.model, self.optimizer):
            if self.master_weights:
                yield shard
            else:
                own = shard.parameter.detach().view(-1)[shard.start : shard.start + shard.main.numel()]
                yield replace(shard, main=own)

    def _reduce(self) -> None:
        groups = [group for chunk in self.model for group in _bucket_groups(chunk)]
        gathered = [group.param_gather_dispatched for group in groups]
        for chunk in self.model:
            if chunk.ddp_config.overlap_grad_reduce:
                # Backward hooks normally start the reduction; no_sync prevented it, and finalize only waits for it.
                chunk.start_grad_sync()
        # Called without num_tokens, so it does not divide: the buffers must keep the sum, to which more is added.
        finalize_model_grads(self.model)
        for group, was_gathered in zip(groups, gathered, strict=True):
            # A finished reduction marks parameters as not gathered and the reduction as done. Here the parameters are
            # unchanged, and later reads reduce again.
            group.param_gather_dispatched = was_gathered
            group.grad_reduce_finished = False


def _put_back(settings: Any, no_sync: Any, grad_scale: Any, finalize: Any) -> None:
    settings.no_sync_func, settings.grad_scale_func, settings.finalize_model_grads_func = no_sync, grad_scale, finalize


def set_dropout(chunk: torch.nn.Module, *, on: bool) -> None:
    """Sets training mode with dropout, or evaluation mode that keeps activation recomputation.

    TransformerBlock recomputes activations only if its own training flag is set. The flag stays set without dropout, too:
    a model that needs recomputation to fit in memory would otherwise not fit during the probe.
    """
    chunk.train(on)
    for module in chunk.modules():
        if isinstance(module, TransformerBlock):
            module.training = True


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


@torch.no_grad()
def keep_own_shard(chunk: Any) -> None:
    """After a reduction, keeps each element of the sum on one rank and sets all its copies to zero.

    The next reduction adds the buffers of all ranks again, so every copy would be counted once more.
    """
    sharded = chunk.ddp_config.use_distributed_optimizer
    for group in _bucket_groups(chunk):
        for bucket in group.buckets:
            if sharded:
                # A reduce-scatter leaves the sum in this rank's part and unreduced values in the rest of the bucket.
                size = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
                first = group.intra_distributed_optimizer_instance_rank * size
                bucket.grad_data[:first].zero_()
                bucket.grad_data[first + size :].zero_()
            elif group.data_parallel_group.rank() > 0:
                bucket.grad_data.zero_()
    # finalize_model_grads also sums the tied embedding over its two stages, and norms over tensor-parallel ranks if
    # sequence parallelism is on: the first copy is kept.
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for parameter in chunk.parameters():
        summed_over_tp = chunk.config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        if not param_is_not_shared(parameter) or (summed_over_tp and tp_rank > 0):
            parameter.main_grad.zero_()
