"""The batch arithmetic in words; no torch, so that --dry-run can say it too."""

from __future__ import annotations

from megatron_lion.config import RunConfig


def batch_sentence(config: RunConfig, world_size: int) -> str:
    """The batch arithmetic in one sentence.

    Example:
        >>> from megatron_lion.config import TrainConfig
        >>> batch_sentence(RunConfig(train=TrainConfig(global_batch_size=640, micro_batch_size=8)), 16)
        '8 samples a micro-batch x 16 data-parallel processes x 5 micro-batches = 640 samples, 655,360 tokens a step'
    """
    train, data_parallel = config.train, config.data_parallel_size(world_size)
    microbatches = config.num_microbatches(world_size)
    return (
        f"{train.micro_batch_size} samples a micro-batch x {data_parallel} data-parallel process{'es' * (data_parallel > 1)} x "
        f"{microbatches} micro-batch{'es' * (microbatches > 1)} = "
        f"{train.global_batch_size} samples, {train.global_batch_size * config.model.seq_length:,} tokens a step"
    )
