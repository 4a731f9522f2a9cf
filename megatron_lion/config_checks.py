"""Checks the settings of a `RunConfig` without a device; each problem is one line that begins with its key."""

from __future__ import annotations

import math

from megatron_lion.config import RunConfig
from megatron_lion.errors import ConfigError

FP32_MAX = 3.4028234663852886e38
MAX_PACKED_BETA2 = 1 - 2**-8
"""That of optim/layouts.py, which this module must not import (it imports torch)."""


def check_config(config: RunConfig, world_size: int) -> None:
    """Raises one ConfigError that lists all invalid settings.

    Args:
        config: settings to check.
        world_size: number of processes of the job.

    Raises:
        ConfigError: a setting is invalid; one line for each problem, with the key, the requirement and the value.
    """
    problems = [
        *_check_numbers(config),
        *_check_ranges(config),
        *_check_masking(config),
        *_check_layout(config, world_size),
    ]
    if problems:
        raise ConfigError("\n".join(problems) if len(problems) > 1 else problems[0])


def _check_numbers(config: RunConfig) -> list[str]:
    problems: list[str] = []
    model, optimizer, train, probe = config.model, config.optimizer, config.train, config.probe

    def need(ok: bool, key: str, given: object, expected: str) -> None:
        if not ok:
            problems.append(f"{key}: must be {expected}, got {given}")

    for section, keys in {
        "model": ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "make_vocab_size_divisible_by"),
        "train": ("steps", "global_batch_size", "micro_batch_size", "log_every", "test_batches"),
        "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "optimizer": ("max_skipped_steps",),
    }.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            need(value == "auto" or value >= 1, f"{section}.{key}", value, "an integer of at least 1")
    for section, keys in {"train": ("test_every",), "checkpoint": ("every", "keep"), "probe": ("every",)}.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            need(value >= 0, f"{section}.{key}", value, "an integer of at least 0 (0 disables it)")
    need(0 <= config.seed < 2**63, "seed", config.seed, "an integer from 0 to 2^63 - 1")
    need(
        model.num_attention_heads >= 1 and model.hidden_size % max(1, model.num_attention_heads) == 0,
        "model.num_attention_heads",
        model.num_attention_heads,
        f"a divisor of model.hidden_size {model.hidden_size}",
    )
    for key in ("hidden_dropout", "attention_dropout"):
        need(0 <= getattr(model, key) < 1, f"model.{key}", getattr(model, key), "a number in [0, 1)")
    for key in ("lr", "weight_decay", "clip_grad", "eps"):
        value = getattr(optimizer, key)
        need(value >= 0 and value != float("inf"), f"optimizer.{key}", value, "a finite number of at least 0")
    if optimizer.name == "adamw" and 0 <= (beta := optimizer.resolved_betas()[0]) < 1:
        # AdamW divides the rate by 1 - beta1^step, and torch refuses a factor that fp32 cannot hold.
        largest = FP32_MAX * (1 - beta)
        need(not largest < optimizer.lr < math.inf, "optimizer.lr", optimizer.lr, f"at most {largest:.3g} for adamw")
    need(0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "a number in [0, 1)")
    if model.loss == "chunked" and model.kind != "gpt2":
        problems.append("model.loss: chunked needs model.kind gpt2; use fused or auto")
    if model.elementwise == "fused" and model.attention == "transformer_engine":
        problems.append("model.elementwise: fused needs model.attention sdpa, cudnn or unfused; use auto")
    # Packed master weights exist only in LION's fused step, which works on the distributed optimizer's bf16 shards.
    packed = config.master_weights != "shards"
    if packed and (
        optimizer.name != "lion" or train.precision != "bf16" or not config.parallel.use_distributed_optimizer
    ):
        problems.append(
            f"optimizer.master_weights: {optimizer.master_weights} needs optimizer.name lion, train.precision bf16 and "
            "parallel.use_distributed_optimizer; use shards"
        )
    if optimizer.momentum_dtype != "fp32" and not packed:
        problems.append(
            f"optimizer.momentum_dtype: {optimizer.momentum_dtype} needs optimizer.master_weights fp32, split32 or split24"
        )
    if optimizer.momentum_dtype != "fp32" and packed and optimizer.resolved_betas()[1] > MAX_PACKED_BETA2:
        problems.append(
            f"optimizer.betas: beta2 must be at most {MAX_PACKED_BETA2} with optimizer.momentum_dtype {optimizer.momentum_dtype} "
            f"(rounding keeps a slower momentum from shrinking), got {optimizer.resolved_betas()[1]}; or use fp32"
        )
    if not train.accumulate_allreduce_grads_in_fp32:
        key = "train.accumulate_allreduce_grads_in_fp32"
        if train.precision != "bf16":  # fp16 sums overflow; fp32 has no buffer of fewer bits
            problems.append(f"{key}: false needs train.precision bf16; use true")
        if probe.every:
            problems.append(
                f"{key}: false rounds the sums that a probe reads; set probe.every 0, and run `megatron-lion probe` on the "
                "checkpoints (it sums in fp32), or use true"
            )
    batches = probe.num_batches
    need(batches == "all" or batches >= 1, "probe.num_batches", batches, "an integer of at least 1, or all")
    need(batches != "all" or probe.mode == "frozen", "probe.num_batches", batches, "a number with probe.mode moving")
    need(
        probe.mode == "frozen" or batches == "all" or not 0 < probe.every < batches,
        "probe.every",
        probe.every,
        f"at least probe.num_batches {batches} with probe.mode moving (windows must not overlap)",
    )
    for beta in optimizer.resolved_betas():
        need(0 <= beta < 1, "optimizer.betas", beta, "two numbers in [0, 1)")
    need(
        config.data.weights is None
        or (len(config.data.weights) == len(config.data.path) and all(0 < w < math.inf for w in config.data.weights)),
        "data.weights",
        config.data.weights,
        f"one positive weight for each of the {len(config.data.path)} paths in data.path",
    )
    return problems


def _check_ranges(config: RunConfig) -> list[str]:
    """Checks numbers with individual ranges, and those of the schedule, which limit each other."""
    model, schedule, train = config.model, config.schedule, config.train
    positive, share = "a finite number above 0", "a number in [0, 1]"
    count = "an integer of at least 1, or null"
    rules: list[tuple[str, object, bool, str]] = [
        ("model.init_method_std", model.init_method_std, 0 < model.init_method_std < math.inf, positive),
        ("model.layernorm_epsilon", model.layernorm_epsilon, 0 < model.layernorm_epsilon < math.inf, positive),
        ("model.ffn_hidden_size", model.ffn_hidden_size, model.ffn_hidden_size is None or model.ffn_hidden_size >= 1, count),
        ("model.vocab_size", model.vocab_size, model.vocab_size is None or model.vocab_size >= 1, count),
        ("data.num_workers", config.data.num_workers, (config.data.num_workers or 0) >= 0, "an integer of at least 0, or null"),
        ("train.stop_after", train.stop_after, train.stop_after is None or train.stop_after >= 1, count),
        ("parallel.timeout_s", config.parallel.timeout_s, 0 < config.parallel.timeout_s < math.inf, positive + " (seconds)"),
        ("checkpoint.at_steps", config.checkpoint.at_steps, min(config.checkpoint.at_steps, default=1) >= 1, "steps of at least 1"),
        ("schedule.warmup_fraction", schedule.warmup_fraction, 0 <= schedule.warmup_fraction <= 1, share),
        ("schedule.wsd_decay_fraction", schedule.wsd_decay_fraction, 0 <= schedule.wsd_decay_fraction <= 1, share),
        ("schedule.min_lr", schedule.min_lr, schedule.kind != "constant" or not schedule.min_lr > 0, "0 with schedule.kind constant"),
        ("schedule.min_lr", schedule.min_lr, 0 <= schedule.min_lr <= config.optimizer.lr, f"in [0, optimizer.lr {config.optimizer.lr}]"),
    ]  # fmt: skip
    problems = [f"{key}: must be {wanted}, got {given}" for key, given, ok, wanted in rules if not ok]
    if not any(problem.startswith("schedule.") for problem in problems):
        decay = round(schedule.wsd_decay_fraction * train.steps) if schedule.kind == "wsd" else 0
        if not 0 <= config.warmup_steps <= train.steps - decay:
            before = f", without the last {decay}, over which wsd decays" if decay else ""
            problems.append(
                f"schedule.warmup_steps: must be between 0 and {train.steps - decay} (train.steps {train.steps}{before}), "
                f"got {config.warmup_steps}"
            )
    return problems


def _check_masking(config: RunConfig) -> list[str]:
    """Checks the settings of BERT's samples."""
    if config.model.kind != "bert":
        return []
    data, length, probability = config.data, config.model.seq_length, config.data.mask_probability
    short = data.short_sequence_probability
    # [CLS] A [SEP] B [SEP]: without the three marks, mask_probability x length must be at least one token.
    least = 3 + (math.ceil(1 / probability) if 0 < probability < 1 else 2)
    segments = f"at least {least} tokens ([CLS], two segments with a [SEP] each, one masked token at data.mask_probability {probability})"
    rules: list[tuple[str, object, bool, str]] = [
        ("data.mask_probability", probability, 0 < probability < 1, "a number in (0, 1)"),
        ("data.mask_max_ngram", data.mask_max_ngram, data.mask_max_ngram >= 1, "an integer of at least 1"),
        ("data.short_sequence_probability", short, 0 <= short <= 1, "a number in [0, 1]"),
        ("model.seq_length", length, length >= least, segments),
    ]  # fmt: skip
    return [f"{key}: must be {wanted}, got {given}" for key, given, ok, wanted in rules if not ok]


def _check_layout(config: RunConfig, world_size: int) -> list[str]:
    problems: list[str] = []
    model, train, parallel = config.model, config.train, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    # auto takes what fits; a single sample always does if the data ranks share the batch.
    micro_batch = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    if tp < 1 or pp < 1 or micro_batch < 1:
        return problems
    if world_size % (tp * pp):
        problems.append(
            f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} = {tp * pp} does not divide "
            f"the {world_size} process{'es' if world_size > 1 else ''} of this job"
        )
    else:
        per_pass = micro_batch * config.data_parallel_size(world_size)
        if train.global_batch_size % per_pass:
            divisor = f"data-parallel size {config.data_parallel_size(world_size)}"
            if train.micro_batch_size != "auto":
                divisor = f"train.micro_batch_size {micro_batch} x {divisor} = {per_pass}"
            problems.append(
                f"train.global_batch_size: {train.global_batch_size} is not divisible by {divisor}; "
                f"try {-(-train.global_batch_size // per_pass) * per_pass}"
            )
    problems += [
        f"model.{key}: {getattr(model, key)} is not divisible by parallel.tensor_model_parallel_size {tp}"
        for key in ("num_attention_heads", "hidden_size", "ffn_hidden_size")
        if (getattr(model, key) or 0) % tp
    ]
    if model.make_vocab_size_divisible_by % tp:
        problems.append(
            f"model.make_vocab_size_divisible_by: {model.make_vocab_size_divisible_by} is not divisible by "
            f"parallel.tensor_model_parallel_size {tp}"
        )
    if model.num_layers % pp:
        problems.append(
            f"model.num_layers: {model.num_layers} is not divisible by parallel.pipeline_model_parallel_size {pp}"
        )
    if parallel.sequence_parallel and (tp == 1 or model.seq_length % tp):
        problems.append(
            "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size > 1 and a model.seq_length "
            f"divisible by it (given {tp} and {model.seq_length})"
        )
    if parallel.overlap_param_gather and not (parallel.overlap_grad_reduce and parallel.use_distributed_optimizer):
        problems.append(
            "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce and parallel.use_distributed_optimizer"
        )
    return problems
