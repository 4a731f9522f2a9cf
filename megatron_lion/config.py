"""The settings of a run: typed dataclasses whose field texts are the --help; `config_checks` says which are possible.

A config is read by `megatron_lion.configfile`, saved resolved in the run folder, and never changed after that.
Counts are optimizer steps unless a name says otherwise; `seq_length` is in tokens; losses are nats per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    kind: Literal["gpt2", "bert"] = "gpt2"
    """Architecture: gpt2 (pre-LN decoder) or bert (pre-LN encoder with token types, masked-LM head and sentence-order head); both
    with learned positions and tied embeddings."""
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
    gelu: Literal["tanh", "erf"] = "tanh"
    """Form of the GELU: tanh (GPT-2's, Megatron's fused kernel) or erf (the exact one, as some published BERTs have it)."""
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
    deterministic: bool = False
    """Make runs of the same command at the same layout bitwise reproducible on CUDA, using slower kernels; on a CPU they always are."""
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


def to_dict(config: RunConfig) -> dict[str, object]:
    """Plain nested dictionary of a config, ready for YAML or JSON."""
    return dataclasses.asdict(config)
