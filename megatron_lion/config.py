"""The settings of a run: typed dataclasses whose field texts are the --help, and the checks that need no device.

A config is read by `megatron_lion.configfile`, saved resolved in the run folder, and never changed after that.
Counts are optimizer steps unless a name says otherwise; `seq_length` is in tokens; losses are nats per token.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_lion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    kind: Literal["gpt2", "bert"] = "gpt2"
    """Architecture: gpt2 (pre-LN decoder) or bert (pre-LN encoder with token types, masked-LM head and sentence-order head); both
    with learned positions, tied embeddings and tanh GELU."""
    num_layers: int = 12
    """Transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Attention heads; must divide hidden_size."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null takes 4 x hidden_size."""
    seq_length: int = 1024
    """Tokens a sample, and the number of learned positions."""
    vocab_size: int | None = None
    """Ids of the tokenizer before padding; null takes it from the dataset's manifest."""
    make_vocab_size_divisible_by: int = 128
    """The embedding has this many rows or a multiple: the vocabulary is padded up to it."""
    hidden_dropout: float = 0.1
    """Dropout after embeddings, attention and MLP."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output layers of each block use std / sqrt(2 x num_layers)."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the layer norms."""
    attention: Literal["auto", "sdpa", "unfused", "transformer_engine"] = "auto"
    """Attention core: sdpa (torch's scaled_dot_product_attention), unfused (megatron-core's own), transformer_engine,
    or auto: Transformer Engine where it is installed with CUDA, else sdpa."""
    recompute: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpora."""

    path: list[str] = field(default_factory=list)
    """Dataset folders made by `megatron-lion prepare`, or prefixes of Megatron .bin/.idx files (without extension)."""
    weights: list[float] | None = None
    """How often to draw from each path, in the same order; null draws in proportion to their sizes."""
    split: str = "99.9,0.05,0.05"
    """Train, validation and test shares, by document, for plain prefixes; a dataset folder brings its own split."""
    tokenizer: str | None = None
    """Tokenizer (folder, tokenizer.json, vocab.txt, or vocab.json beside merges.txt); null takes the one in the dataset
    folder."""
    cache: str | None = None
    """Folder for index caches, keyed by the data's content; null takes RUN/cache."""
    num_workers: int | None = None
    """Processes that read ahead; null takes 2 with CUDA and 0 on CPU."""
    mask_probability: float = 0.15
    """BERT: share of the tokens that are masked, as whole words."""
    mask_max_ngram: int = 3
    """BERT: at most so many words in a row are masked together."""
    short_sequence_probability: float = 0.1
    """BERT: share of the samples that are cut to a random shorter length."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["lion", "sgd", "adamw"] = "lion"
    """lion, sgd (momentum) or adamw."""
    lr: float = 1e-4
    """Peak learning rate. LION wants a rate 3-10 x smaller than AdamW's."""
    betas: tuple[float, float] | None = None
    """(beta1, beta2); null takes (0.9, 0.95) for lion and for adamw."""
    weight_decay: float = 0.01
    """Decoupled decay lambda. LION wants one 3-10 x larger than AdamW's, so that lr x weight_decay stays."""
    decay_all: bool = False
    """Decay biases and one-dimensional parameters too (Megatron exempts them)."""
    momentum: float = 0.9
    """SGD's momentum."""
    coupled_weight_decay: bool = False
    """SGD only: add weight_decay x parameter to the gradient instead of shrinking the parameter by lr x weight_decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    init_exp_avg: Literal["zeros", "first_gradient"] = "zeros"
    """LION's momentum before the first step: zeros (practice) or the first gradient (the proof of Lemma 6)."""
    master_weights: Literal["shards", "fp32", "split32", "split24"] = "shards"
    """Where bf16 training keeps master weights: shards (Megatron's fp32 shards, 4 bytes a parameter and a copy each step), or in
    LION's own fused step: fp32 (4 bytes), split32 (2 bytes, the same fp32 values bit for bit), split24 (1 byte, 24 bits)."""
    momentum_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """How LION's fused step stores its momentum: 4, 2 or 1.06 bytes a parameter; needs master_weights other than shards."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this, after it was measured; 0 switches clipping off."""
    max_skipped_steps: int = 3
    """Give up after this many steps in a row with NaN or infinite gradients (each such step changes nothing)."""

    def resolved_betas(self) -> tuple[float, float]:
        return self.betas if self.betas is not None else (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time."""

    kind: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warm-up; wsd holds the peak and decays in the last wsd_decay_fraction of the steps."""
    warmup_fraction: float = 0.01
    """Linear warm-up over this share of the steps (ignored where warmup_steps is given)."""
    warmup_steps: int | None = None
    """Linear warm-up over this many steps."""
    min_lr: float = 0.0
    """The rate at the last step (cosine, linear, wsd)."""
    wsd_decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length, batches and precision of the run."""

    steps: int = 50_000
    """Optimizer steps."""
    global_batch_size: int = 640
    """Samples a step over all processes: micro_batch_size x data-parallel size x number of micro-batches."""
    micro_batch_size: int = 8
    """Samples a forward pass on one process."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """bf16 and fp16 keep exact fp32 master weights; fp16 scales the loss dynamically."""
    test_every: int = 1000
    """Measure the validation and test loss every so many steps; 0 never."""
    test_batches: int = 10
    """Global batches a measurement of the test loss reads (always the same samples)."""
    log_every: int = 10
    """Write metrics every so many steps."""
    stop_after: int | None = None
    """Save and leave after this step, as if a signal had come; the schedule still spans `steps`."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the data are spread over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the layers."""
    sequence_parallel: bool = False
    """Shard activations of norms and dropout along the sequence (with tensor_model_parallel_size > 1)."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel processes (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs (needs overlap_grad_reduce)."""
    timeout_s: float = 1800
    """How long a process waits for its peers before the job ends (seconds)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 1000
    """Save every so many steps; 0 saves only at_steps and the end."""
    at_steps: list[int] = field(default_factory=list)
    """Save at these steps too; they are never removed."""
    keep: int = 2
    """Keep this many of the newest periodic checkpoints; 0 keeps all."""
    layout: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """fully_reshardable loads at any layout; dp_reshardable saves faster and loads at another data-parallel size only."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The full gradient: norms, KKT residual, signal and noise."""

    every: int = 0
    """Probe every so many steps and before the first; 0 never."""
    num_batches: int = 100
    """Global batches to average the gradient over (100 x 640 = 64,000 samples in the paper)."""
    mode: Literal["frozen", "moving"] = "frozen"
    """frozen: passes of its own at one point, no memory besides. moving: the mean gradient of the last num_batches training
    steps, no passes besides, but 4 bytes a parameter in each process's shard while a window is open."""
    data: Literal["fixed", "fresh", "test"] = "fixed"
    """Training samples, the same in every probe (fixed) or others each time (fresh), or the test split."""
    dropout: bool = False
    """Keep dropout on while probing."""
    ladder: bool = True
    """Tell signal from noise: read the sum at 1, 2, 4, ... batches too (a reduction each), and follow a sample of coordinates."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events to RUN/tensorboard."""
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project."""
    progress: bool = True
    """Show a progress line on the first process."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs; saved resolved as RUN/config.yaml."""

    run_dir: str = "runs/default"
    """Folder of this run: config, metrics, checkpoints. The same command resumes it."""
    name: str | None = None
    """Label of the model in tables and figures, e.g. gpt2-small; null takes kind, layers and width."""
    seed: int = 1234
    """One seed for initial weights, data order, dropout and masking (a derived stream each)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it is visible."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def label(self) -> str:
        return self.name or f"{self.model.kind}-{self.model.num_layers}x{self.model.hidden_size}"

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        schedule = self.schedule
        return (
            schedule.warmup_steps
            if schedule.warmup_steps is not None
            else round(schedule.warmup_fraction * self.train.steps)
        )

    def num_microbatches(self, world_size: int) -> int:
        """Micro-batches a process runs each step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    def data_parallel_size(self, world_size: int) -> int:
        parallel = self.parallel
        return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to `multiple`, the same at every layout.

    Example:
        >>> padded_vocab_size(50257, 128)
        50304
    """
    return -(-vocab_size // multiple) * multiple


def check_config(config: RunConfig, world_size: int) -> None:
    """Refuses impossible settings; all problems are told in one message.

    Args:
        config: the resolved settings.
        world_size: number of processes of the job.

    Raises:
        ConfigError: one line a problem, each with the key, what was given and what is possible.
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
            problems.append(f"{key}: {given} is not possible; expected {expected}")

    for section, keys in {
        "model": ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "make_vocab_size_divisible_by"),
        "train": ("steps", "global_batch_size", "micro_batch_size", "log_every", "test_batches"),
        "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "probe": ("num_batches",),
        "optimizer": ("max_skipped_steps",),
    }.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            need(value >= 1, f"{section}.{key}", value, "an integer of at least 1")
    for section, keys in {"train": ("test_every",), "checkpoint": ("every", "keep"), "probe": ("every",)}.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            need(value >= 0, f"{section}.{key}", value, "an integer of at least 0 (0 switches it off)")
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
    need(0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "a number in [0, 1)")
    packed = optimizer.master_weights != "shards"
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
    need(
        probe.mode == "frozen" or not 0 < probe.every < probe.num_batches,
        "probe.every",
        probe.every,
        f"at least probe.num_batches {probe.num_batches} with probe.mode moving: windows must not overlap",
    )
    for beta in optimizer.resolved_betas():
        need(0 <= beta < 1, "optimizer.betas", beta, "two numbers in [0, 1)")
    need(
        config.data.weights is None
        or (len(config.data.weights) == len(config.data.path) and all(0 < w < math.inf for w in config.data.weights)),
        "data.weights",
        config.data.weights,
        f"one positive weight for each of the {len(config.data.path)} data.path",
    )
    return problems


def _check_ranges(config: RunConfig) -> list[str]:
    """Numbers that have a range of their own, and those of the schedule, which bound each other."""
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
        ("schedule.min_lr", schedule.min_lr, 0 <= schedule.min_lr <= config.optimizer.lr, f"0 to optimizer.lr {config.optimizer.lr}"),
    ]  # fmt: skip
    problems = [f"{key}: {given} is not possible; expected {wanted}" for key, given, ok, wanted in rules if not ok]
    if not any(problem.startswith("schedule.") for problem in problems):
        decay = round(schedule.wsd_decay_fraction * train.steps) if schedule.kind == "wsd" else 0
        if not 0 <= config.warmup_steps <= train.steps - decay:
            before = f" before the last {decay} that wsd decays over" if decay else ""
            problems.append(
                f"schedule.warmup_steps: {config.warmup_steps} is not possible; expected 0 to {train.steps - decay} of train.steps "
                f"{train.steps}{before}"
            )
    return problems


def _check_masking(config: RunConfig) -> list[str]:
    """What BERT's samples need."""
    if config.model.kind != "bert":
        return []
    data, length, probability = config.data, config.model.seq_length, config.data.mask_probability
    short = data.short_sequence_probability
    # [CLS] A [SEP] B [SEP]: what three marks leave must be worth one masked token.
    least = 3 + (math.ceil(1 / probability) if 0 < probability < 1 else 2)
    segments = f"at least {least} tokens: [CLS], two segments with a [SEP] each, one masked token at data.mask_probability {probability}"
    rules: list[tuple[str, object, bool, str]] = [
        ("data.mask_probability", probability, 0 < probability < 1, "a number in (0, 1)"),
        ("data.mask_max_ngram", data.mask_max_ngram, data.mask_max_ngram >= 1, "an integer of at least 1"),
        ("data.short_sequence_probability", short, 0 <= short <= 1, "a number in [0, 1]"),
        ("model.seq_length", length, length >= least, segments),
    ]  # fmt: skip
    return [f"{key}: {given} is not possible; expected {wanted}" for key, given, ok, wanted in rules if not ok]


def _check_layout(config: RunConfig, world_size: int) -> list[str]:
    problems: list[str] = []
    model, train, parallel = config.model, config.train, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if tp < 1 or pp < 1 or train.micro_batch_size < 1:
        return problems
    if world_size % (tp * pp):
        problems.append(
            f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} = {tp * pp} does not divide "
            f"the {world_size} process{'es' if world_size > 1 else ''} of this job"
        )
    else:
        per_pass = train.micro_batch_size * config.data_parallel_size(world_size)
        if train.global_batch_size % per_pass:
            problems.append(
                f"train.global_batch_size: {train.global_batch_size} is not divisible by train.micro_batch_size "
                f"{train.micro_batch_size} x data-parallel size {config.data_parallel_size(world_size)} = {per_pass}; "
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
    if train.precision == "fp16" and config.device == "cpu":
        problems.append("train.precision: fp16 needs CUDA; use bf16 or fp32 with device cpu")
    return problems


def to_dict(config: RunConfig) -> dict[str, object]:
    """Plain nested dictionary of a config, ready for YAML or JSON."""
    return dataclasses.asdict(config)
