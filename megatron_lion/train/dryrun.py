"""`--dry-run`: previews a run (size, memory, tokens, time) from its config and data headers; writes nothing.

torch is imported only on a machine with NVIDIA's driver, to check that LION's kernel compiles there.
"""

from __future__ import annotations

from pathlib import Path

from megatron_lion.config import RunConfig
from megatron_lion.model.sizes import VOCAB_SIZES, flops_per_token, memory_bytes, model_size

# Dense bf16 FLOP/s of one A100 at 40 % utilisation: what well-tuned 124M-350M runs reach (nanoGPT, MPT).
_ASSUMED_FLOPS = 0.4 * 312e12

# One of these exists if NVIDIA's driver is loaded; containers may have only the second.
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def dry_run(config: RunConfig, world_size: int) -> str:
    """Describes the run in a few lines: parameters, batch arithmetic, tokens, memory per process, time.

    The vocabulary size is the config's, else the data's, else the usual one of the model kind.

    Args:
        config: the checked settings.
        world_size: number of processes.

    Raises:
        ConfigError, DataError: the run itself would reject its data.path.
    """
    vocab, source, train_tokens = _vocabulary(config)
    size = model_size(config.model, vocab)
    memory = memory_bytes(config, world_size, vocab)
    train = config.train
    tokens = train.steps * train.global_batch_size * config.model.seq_length
    gib = {key: value / 2**30 for key, value in memory.items()}
    flops = tokens * flops_per_token(config.model, vocab)
    seconds = flops / (_ASSUMED_FLOPS * world_size)
    lines = [
        f"run folder   {config.run_dir}",
        f"model        {config.label}: {size.num_parameters:,} parameters ({size.num_parameters_unpadded:,} without padded vocabulary, "
        f"{source} {vocab:,} ids), sqrt d {size.sqrt_d:,.1f}",
        f"optimizer    {config.optimizer.name}, lr {config.optimizer.lr:g}, {config.schedule.kind} schedule, "
        f"{config.warmup_steps:,} warm-up steps",
        f"processes    {world_size}: TP {config.parallel.tensor_model_parallel_size} x PP {config.parallel.pipeline_model_parallel_size} x "
        f"DP {config.data_parallel_size(world_size)}",
        f"batch        {batch_sentence(config, world_size)}",
        f"tokens       {train.steps:,} steps = {tokens:,} tokens"
        + (f" = {tokens / train_tokens:.2f} x the {train_tokens:,} of the training data" if train_tokens else ""),
        f"data         {', '.join(config.data.path) if config.data.path else 'none given (data.path): nothing to check'}",
        f"memory       {sum(gib.values()):.2f} GiB a process: "
        + ", ".join(f"{key} {value:.2f}" for key, value in gib.items())
        + " (activations estimated)",
        f"arithmetic   {flops:.3g} FLOP; about {_duration(seconds)} on {world_size} x A100 at 40 % of peak",
        *_kernel_lines(config),
    ]
    return "\n".join(lines)


def batch_sentence(config: RunConfig, world_size: int) -> str:
    """Describes the batch arithmetic in one sentence.

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


def may_use_triton(config: RunConfig) -> bool:
    """Whether the run may launch LION's Triton kernel on this machine, decided without importing torch."""
    return (
        config.optimizer.name == "lion" and config.device != "cpu" and any(Path(name).exists() for name in DRIVER_FILES)
    )


def _kernel_lines(config: RunConfig) -> list[str]:
    if not may_use_triton(config):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    from megatron_lion.optim.triton_check import triton_kernel

    found = triton_kernel()
    slower = "; LION uses its slower foreach path" if found.startswith("not available") else ""
    return [f"kernel       Triton: {found}{slower}"]


def _vocabulary(config: RunConfig) -> tuple[int, str, int | None]:
    """Returns (ids before padding, their origin, training tokens); opens and checks the data if there is a path."""
    if config.data.path:
        from megatron_lion.data.corpora import open_corpora

        corpora = open_corpora(config.data, config.model)
        whose = "the config's" if config.model.vocab_size else "the data's"
        return corpora.vocab_size, whose, corpora.train_tokens
    if config.model.vocab_size:
        return config.model.vocab_size, "the config's", None
    return VOCAB_SIZES[config.model.kind], "the usual", None


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
