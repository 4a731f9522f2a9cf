"""`--dry-run`: previews a run (size, memory, tokens, time) from its config and data headers; writes nothing.

torch is imported only on a machine with NVIDIA's driver, to name the card and to check that LION's kernel compiles there.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from megatron_lion.config import DataConfig, RunConfig
from megatron_lion.data.manifest import NAME as MANIFEST_NAME
from megatron_lion.model.micro_batch import choose_micro_batch
from megatron_lion.model.sizes import VOCAB_SIZES, flops_per_token, memory_bytes, model_size
from megatron_lion.runs.folder import kept_choices

# What well-tuned 124M-350M runs reach on an A100 (nanoGPT, MPT), and tiny ones on a CPU, of the speed of a matrix product.
UTILISATION = 0.4
# Dense FLOP/s of an A100; torch computes float32 products there without TF32.
_ASSUMED_MEMORY = 80 * 2**30
_A100_FLOPS = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}

# More passes over a text than this give a warning. Repeating a text up to four times is almost as good as new text, and
# beyond sixteen passes repetition gains nothing (Muennighoff et al., Scaling Data-Constrained Language Models, 2023).
MANY_PASSES = 20

# One of these exists if NVIDIA's driver is loaded; containers may have only the second.
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def dry_run(config: RunConfig, world_size: int, data: str | None = None) -> str:
    """Describes the run in a few lines: parameters, batch arithmetic, tokens, memory of a process, time.

    The vocabulary size is the config's, else the data's, else the usual one of the model kind.

    Args:
        config: the checked settings.
        world_size: number of processes.
        data: the data of a run without data.path, for the reader.

    Raises:
        ConfigError, DataError: the run itself would reject its data.path.
    """
    vocab, source, train_tokens = _vocabulary(config)
    config, chosen = _settled(config, world_size, vocab)
    size = model_size(config.model, vocab)
    memory = memory_bytes(config, world_size, vocab)
    train = config.train
    tokens = train.steps * train.global_batch_size * config.model.seq_length
    flops = tokens * flops_per_token(config.model, vocab)
    warnings = [warning for warning in (passes_warning(config, train_tokens), split_warning(config)) if warning]
    lines = [
        f"run folder   {config.run_dir}",
        f"model        {config.label}: {size.num_parameters:,} parameters ({size.num_parameters_unpadded:,} without padded vocabulary, "
        f"{source} {vocab:,} ids), sqrt d {size.sqrt_d:,.1f}",
        f"optimizer    {config.optimizer.name}, lr {config.optimizer.lr:g}, {config.schedule.kind} schedule, "
        f"{config.warmup_steps:,} warm-up steps",
        f"processes    {world_size}: TP {config.parallel.tensor_model_parallel_size} x PP {config.parallel.pipeline_model_parallel_size} x "
        f"DP {config.data_parallel_size(world_size)}",
        f"batch        {batch_sentence(config, world_size)}{chosen}",
        f"tokens       {train.steps:,} steps = {tokens:,} tokens"
        + (f" = {tokens / train_tokens:,.2f} x the {train_tokens:,} of the training data" if train_tokens else ""),
        *(f"warning      {warning}" for warning in warnings),
        f"data         {', '.join(config.data.path) or data or 'none given (data.path): nothing to check'}",
        f"memory       {_size(sum(memory.values()))} of tensors in the largest process: "
        + ", ".join(f"{key} {_size(value)}" for key, value in memory.items())
        + " (estimated)",  # the last one, activations
        f"state        {_state_sentence(config, config.data_parallel_size(world_size))}",
        f"arithmetic   {flops:.3g} FLOP, without probes and held-out losses",
        *_time_lines(config, world_size, flops),
        *_kernel_lines(config),
    ]
    return "\n".join(lines)


def _settled(config: RunConfig, world_size: int, vocab: int) -> tuple[RunConfig, str]:
    """Returns the settings as the run would have them here, and what `train.micro_batch_size` was chosen for."""
    config = kept_choices(config, world_size)
    if config.train.micro_batch_size != "auto":
        return config, ""
    memory: int | None = _ASSUMED_MEMORY
    where = f"a GPU of {_ASSUMED_MEMORY >> 30} GiB (assumed)"
    if config.device == "cpu":
        memory, where = None, "a CPU"
    elif (found := _card_memory() if any(Path(name).exists() for name in DRIVER_FILES) else None) is not None:
        memory, where = found, f"{found / 2**30:.0f} GiB of device memory"
    size = choose_micro_batch(config, world_size, memory, vocab)
    return replace(config, train=replace(config.train, micro_batch_size=size)), f"; chosen for {where}"


def split_warning(config: RunConfig) -> str | None:
    """Returns a warning if data.split is set for data that `prepare` has divided, else None."""
    split = config.data.split
    if split == DataConfig().split or not any((Path(path) / MANIFEST_NAME).is_file() for path in config.data.path):
        return None
    return f"data.split {split} has no effect on a dataset folder; `prepare --split` divides a text"


def passes_warning(config: RunConfig, train_tokens: int | None) -> str | None:
    """Returns a warning if the run reads its training data more than `MANY_PASSES` times, else None.

    Args:
        config: the run's settings.
        train_tokens: tokens of the training data; None or 0 if unknown.

    Example:
        >>> from megatron_lion.config import TrainConfig
        >>> passes_warning(RunConfig(train=TrainConfig(steps=100, global_batch_size=8)), 16384)
        'the training data is read 50.0 times; 20 passes are 40 steps: set train.steps, or add data'
        >>> passes_warning(RunConfig(train=TrainConfig(steps=40, global_batch_size=8)), 16384)
    """
    a_step = config.train.global_batch_size * config.model.seq_length
    if not train_tokens or config.train.steps * a_step <= MANY_PASSES * train_tokens:
        return None
    passes = config.train.steps * a_step / train_tokens
    steps = MANY_PASSES * train_tokens // a_step
    remedy = f"{MANY_PASSES} passes are {steps:,} steps: set train.steps, or add data"
    if not steps:
        remedy = "one step reads more than that: set a smaller train.global_batch_size, or add data"
    return f"the training data is read {passes:,.{1 if passes < 1000 else 0}f} times; {remedy}"


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
        f"{config.micro_batch_size} samples a micro-batch x {data_parallel} data-parallel process{'es' * (data_parallel > 1)} x "
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


def _state_sentence(config: RunConfig, data_parallel: int) -> str:
    """Describes the forms of the optimizer's state, which determine its memory."""
    optimizer, precision = config.optimizer, config.train.precision
    state = {"adamw": "two fp32 moments", "sgd": "fp32 momentum", "lion": f"{optimizer.momentum_dtype} momentum"}
    master = "fp32 parameters without a copy"
    if precision != "fp32":
        form = "fp32" if config.master_weights == "shards" else config.master_weights
        master = f"{precision} parameters with {form} master weights"
    where = "not sharded"
    if config.parallel.use_distributed_optimizer:
        where = (
            "sharded over the data-parallel processes"
            if data_parallel > 1
            else "one data-parallel process has all of it"
        )
    return f"{master}, {state[optimizer.name]}; {where}"


def _time_lines(config: RunConfig, world_size: int, flops: float) -> list[str]:
    """Estimates the time of the steps on this machine's card or CPU, and on A100s if the card's speed is unknown."""
    precision = config.train.precision
    may_use_cuda = config.device != "cpu" and any(Path(name).exists() for name in DRIVER_FILES)
    card = _card() if may_use_cuda else None
    lines = []
    if card is None and config.device != "cuda":
        lines.append("not estimated for 16 bits on a CPU; the first steps show it")
        if precision == "fp32":
            seconds = flops / (UTILISATION * _cpu_flops(world_size))
            lines[0] = f"{_duration(seconds, 'roughly')} on this machine's CPU, if nothing else runs there"
    if card is not None or config.device != "cpu":
        peak = None
        if card is not None:
            from megatron_lion.device import peak_flops_of

            peak = peak_flops_of(card, precision)
        seconds = flops / (UTILISATION * (peak or _A100_FLOPS[precision]) * world_size)
        name = card if peak else "A100 (assumed)"
        unknown = f"; the {precision} peak of {card} is not known" if card is not None and not peak else ""
        lines.append(
            f"{_duration(seconds, 'about')} on {world_size} x {name} at {UTILISATION:.0%} of its {precision} peak{unknown}"
        )
    return [f"time         {line}" for line in lines]


def _card() -> str | None:
    """Returns the name of the first CUDA device, or None if torch cannot use one."""
    import torch

    try:
        return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    except (AssertionError, RuntimeError):  # a torch without CUDA, or a driver that it cannot use
        return None


def _card_memory() -> int | None:
    """Returns the bytes of the first CUDA device, or None if torch cannot use one."""
    import torch

    try:
        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    except (AssertionError, RuntimeError):  # a torch without CUDA, or a driver that it cannot use
        return None


def _cpu_flops(world_size: int) -> float:
    """Measures in a tenth of a second how fast this machine's processors multiply float32 matrices, in FLOP/s.

    The matrices are so small that numpy uses one thread. With several threads a busy machine made the result a hundred
    times too small. The fastest of thousands of products counts, because other programs interrupt only some of them.
    """
    import numpy as np

    size, best = 64, float("inf")
    matrix, product = np.ones((size, size), np.float32), np.empty((size, size), np.float32)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.1:
        before = time.perf_counter()
        np.matmul(matrix, matrix, out=product)
        best = min(best, time.perf_counter() - before)
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    used = min(cores, world_size * int(threads)) if threads.isdigit() and int(threads) else cores
    return used * 2.0 * size**3 / best


def _size(count: int) -> str:
    """Formats bytes.

    Example:
        >>> _size(3 * 2**29), _size(5000), _size(0)
        ('1.50 GiB', '0.00477 MiB', '0 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 0.97 * 2**30 else f"{count / 2**20:.3g} MiB"


def _duration(seconds: float, word: str) -> str:
    """Formats an estimated time to two or three digits, after a word such as "about".

    Example:
        >>> [_duration(seconds, "about") for seconds in (0.2, 1.2, 100, 7300)]
        ['less than a second', 'about a second', 'about 100 seconds', 'about 2.0 hours']
    """
    for unit, length in (("years", 31557600), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{word} {seconds / length:,.1f} {unit}"
    if seconds < 1:
        return "less than a second"
    return f"{word} {seconds:.0f} seconds" if seconds >= 1.5 else f"{word} a second"
