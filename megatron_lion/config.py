"""Settings of a run as typed dataclasses with their --help texts, and sizes that follow from them.

A config is read by `megatron_lion.configfile`, checked by `config_checks`, saved in the run folder with all defaults
filled in, and not changed after that. Counts are optimizer steps unless the name shows another unit; `seq_length` is in
tokens; losses are in nats per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


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
    """Tokens of a sample, and the number of learned positions."""
    vocab_size: int | None = None
    """Number of token ids before padding; null takes it from the dataset's manifest."""
    make_vocab_size_divisible_by: int = 128
    """The embedding's number of rows is the vocabulary size rounded up to a multiple of this."""
    hidden_dropout: float = 0.1
    """Dropout after embeddings, attention and MLP."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output layers of each block use std / sqrt(2 x num_layers)."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the layer norms."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """Form of the GELU: tanh (as in GPT-2 and Megatron's fused kernel) or erf (exact, as in some published BERTs)."""
    attention: Literal["auto", "sdpa", "cudnn", "unfused", "transformer_engine"] = "auto"
    """Attention core: sdpa (torch's scaled_dot_product_attention, with the kernel that torch chooses), cudnn (the same, with
    cuDNN's kernel if it can run), unfused (megatron-core's), transformer_engine, or auto: Transformer Engine if it is installed
    and CUDA is used, else sdpa."""
    loss: Literal["auto", "megatron", "fused", "chunked"] = "auto"
    """Computation of the cross-entropy, the same in value: megatron (megatron-core's, with fp32 copies of the logits), fused
    (one Triton kernel a pass, the gradient in place of the logits), chunked (GPT-2: fused, with the logits of 4,096 tokens at
    a time, computed again in the backward pass), or auto: fused on CUDA if Triton works there, else megatron."""
    elementwise: Literal["auto", "megatron", "fused"] = "auto"
    """Computation of LayerNorm, GELU, dropout, biases and residual sums in a layer, equal up to rounding: megatron
    (megatron-core's operations, compiled on CUDA), fused (a Triton kernel for each place between two matrix products), or auto:
    fused on CUDA if Triton works there and Transformer Engine's layers are not used, else megatron."""
    recompute: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: corpora, sampling and masking."""

    path: list[str] = field(default_factory=list)
    """Dataset folders made by `megatron-lion prepare`, or prefixes of Megatron .bin/.idx files (without extension)."""
    weights: list[float] | None = None
    """Relative frequency of samples from each path, in the order of data.path; null draws in proportion to their sizes."""
    split: str = "99.9,0.05,0.05"
    """Train, validation and test shares, by document, for plain prefixes; dataset folders are already split."""
    tokenizer: str | None = None
    """Tokenizer (folder, tokenizer.json, vocab.txt, or vocab.json beside merges.txt); null takes the one in the dataset
    folder."""
    cache: str | None = None
    """Folder for index caches, keyed by the data's content; null takes RUN/cache."""
    num_workers: int | None = None
    """Number of processes that read ahead, on each rank; as many more read the held-out samples and stay until the run ends.
    null takes 2 with CUDA and 0 on CPU."""
    mask_probability: float = 0.15
    """BERT: share of the tokens that are masked, as whole words."""
    mask_max_ngram: int = 3
    """BERT: largest number of consecutive words that are masked together."""
    short_sequence_probability: float = 0.1
    """BERT: share of the samples that are cut to a random shorter length."""
    masking: Literal["auto", "megatron", "vectorized"] = "auto"
    """BERT: how masked words are drawn: vectorized (Megatron's rule in few numpy calls), megatron (its own function, with other
    draws and slower), or auto: vectorized for a new run; a run that has begun keeps what it has, and one of an earlier version,
    which stores none, has megatron."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["lion", "sgd", "adamw"] = "lion"
    """lion, sgd (momentum) or adamw."""
    lr: float = 1e-4
    """Peak learning rate. LION needs a rate 3-10 x smaller than AdamW's."""
    betas: tuple[float, float] | None = None
    """(beta1, beta2); null takes (0.9, 0.95) for lion and for adamw."""
    weight_decay: float = 0.01
    """Decoupled decay lambda. LION needs one 3-10 x larger than AdamW's, which keeps lr x weight_decay unchanged."""
    decay_all: bool = False
    """Also decay biases and one-dimensional parameters (Megatron exempts them)."""
    momentum: float = 0.9
    """SGD's momentum."""
    coupled_weight_decay: bool = False
    """SGD only: add weight_decay x parameter to the gradient instead of shrinking the parameter by lr x weight_decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    init_exp_avg: Literal["zeros", "first_gradient"] = "zeros"
    """LION's momentum before the first step: zeros (common practice) or first_gradient (as in the proof of Lemma 6)."""
    master_weights: Literal["auto", "shards", "fp32", "split32", "split24"] = "auto"
    """Storage of master weights in bf16 training: shards (Megatron's fp32 shards, 4 bytes per parameter and a copy each step).
    In LION's fused step: fp32 (4 bytes), split32 (2 bytes, the same fp32 values bit for bit), split24 (1 byte, 24 bits). auto:
    split32 for LION in bf16 with the distributed optimizer, else shards; a run that resumes keeps what it has."""
    momentum_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Storage of momentum in LION's fused step: 4, 2 or 1.06 bytes per parameter; needs master_weights other than shards."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down after the norm is logged. 0 disables clipping."""
    freeze_key_bias: bool = False
    """Set the gradients of the attention's key biases to 0: no output depends on them, but sign updates move them by the full
    rate at every step, on rounding errors."""
    max_skipped_steps: int = 3
    """Stop after this many consecutive steps with NaN or infinite gradients (ten times as many in fp16), or whose loss counts no
    token. Each such step is skipped, and nothing is saved until a step is taken."""

    def resolved_master_weights(self, precision: str, *, is_sharded: bool) -> str:
        """Returns the form of the master weights, with the choice for auto.

        Args:
            precision: `train.precision`.
            is_sharded: `parallel.use_distributed_optimizer`.
        """
        if self.master_weights != "auto":
            return self.master_weights
        return "split32" if self.name == "lion" and precision == "bf16" and is_sharded else "shards"

    def resolved_betas(self) -> tuple[float, float]:
        """Returns (beta1, beta2), with the default for null."""
        return self.betas if self.betas is not None else (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time."""

    kind: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warm-up; wsd holds the peak and decays in the last wsd_decay_fraction of the steps."""
    warmup_fraction: float = 0.01
    """Linear warm-up over this share of the steps (ignored if warmup_steps is given)."""
    warmup_steps: int | None = None
    """Linear warm-up over this many steps."""
    min_lr: float = 0.0
    """Learning rate at the last step (cosine, linear, wsd), or lower bound (inverse_sqrt). With 0 the last step moves no weight."""
    wsd_decay_fraction: float = 0.2
    """Share of the steps in which wsd decays; 0 holds the peak to the end."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length, batches and precision of the run."""

    steps: int = 50_000
    """Optimizer steps."""
    global_batch_size: int = 640
    """Samples of a step over all processes: micro_batch_size x data-parallel size x number of micro-batches."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Samples of a forward pass on one process. auto: the most that fit into the memory of the device and divide the process's
    share of the global batch (on a CPU at most 8); a run that resumes keeps its number if the share allows it."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """bf16 and fp16 keep exact fp32 master weights; fp16 scales the loss dynamically. All run on a CPU as well."""
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Add weight gradients of linear layers to the fp32 buffer inside of the matrix product, without a 16-bit copy in between.
    auto: on CUDA in bf16 and fp16, if torch can; a run that resumes keeps what it has."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Sum and reduce gradients in fp32. false (with bf16 only): in bf16, which halves the buffer and the reduction's bytes, and rounds
    the sum after each micro-batch and in the reduction; docs/performance.md has the measured error. It allows no probe in training."""
    deterministic: bool = False
    """Make runs of the same command at the same layout bitwise reproducible on CUDA, with slower kernels; on CPU they always are."""
    test_every: int = 1000
    """Interval in steps between measurements of the validation and test loss; 0 disables them."""
    test_batches: int = 10
    """Number of global batches in each measurement of the test loss (always the same samples)."""
    log_every: int = 10
    """Interval in steps between lines of metrics."""
    stop_after: int | None = None
    """Save and exit after this step, as after a stop signal; the schedule still covers all of `steps`."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Distribution of the model and the data over processes."""

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
    timeout_s: float = 600
    """Seconds that a process waits in a collective for its peers before the job ends with code 8."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Interval, number and layout of checkpoints."""

    every: int = 1000
    """Interval in steps between checkpoints; 0 saves only at_steps and the last step."""
    at_steps: list[int] = field(default_factory=list)
    """Additional steps at which to save; these checkpoints are never removed."""
    keep: int = 2
    """Number of newest periodic checkpoints to keep; 0 keeps all."""
    layout: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """fully_reshardable loads at any layout; dp_reshardable needs no exchange between ranks, but only the data-parallel size can
    change."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The full gradient: norms, KKT residual, signal and noise."""

    every: int = 0
    """Interval in steps between probes, with one before the first step; 0 disables them."""
    num_batches: int | Literal["all"] = 100
    """Number of global batches over which the gradient is averaged (100 x 640 = 64,000 samples in the paper); all: every
    sample of the data set once, the exact full gradient."""
    mode: Literal["frozen", "moving"] = "frozen"
    """frozen: extra forward/backward passes at fixed parameters; no extra memory. moving: the mean gradient of the last
    num_batches training steps; no extra passes, but 4 bytes per parameter of each process's shard while a window is open."""
    data: Literal["fixed", "fresh", "test"] = "fixed"
    """Samples: fixed (training samples, the same in every probe), fresh (other training samples in each), or test split."""
    dropout: bool = False
    """Keep dropout active during probes."""
    ladder: bool = True
    """Separate signal from noise: also read the sum after 1, 2, 4, ... batches (one reduction each) and sample coordinates."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Outputs for metrics in addition to metrics.jsonl."""

    tensorboard: bool | None = None
    """Write TensorBoard events to RUN/tensorboard; null writes them if the package tensorboard is installed."""
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project."""
    progress: bool = True
    """Show a progress line on the first process."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run; saved as RUN/config.yaml with all defaults filled in."""

    run_dir: str = "runs/default"
    """Folder of this run: config, metrics, checkpoints. The same command resumes it."""
    name: str | None = None
    """Label of the model in tables and figures, e.g. gpt2-small; null takes kind, layers and width."""
    seed: int = 1234
    """Seed of initial weights, data order, dropout and masking (each has a separate derived stream)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto uses CUDA if it is visible."""
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
        """Label of the model in tables and figures."""
        return self.name or f"{self.model.kind}-{self.model.num_layers}x{self.model.hidden_size}"

    @property
    def warmup_steps(self) -> int:
        """Number of steps of linear warm-up."""
        schedule = self.schedule
        return (
            schedule.warmup_steps
            if schedule.warmup_steps is not None
            else round(schedule.warmup_fraction * self.train.steps)
        )

    def resolved(self) -> RunConfig:
        """Returns the same settings with the values that null stands for, as far as they do not depend on data or device."""
        model, optimizer, data = self.model, self.optimizer, self.data
        return dataclasses.replace(
            self,
            data=dataclasses.replace(data, masking="vectorized" if data.masking == "auto" else data.masking),
            model=dataclasses.replace(model, ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size),
            optimizer=dataclasses.replace(
                optimizer, betas=optimizer.resolved_betas(), master_weights=self.master_weights
            ),
        )

    @property
    def master_weights(self) -> Any:
        """Form of the master weights, with the choice for auto."""
        return self.optimizer.resolved_master_weights(
            self.train.precision, is_sharded=self.parallel.use_distributed_optimizer
        )

    @property
    def micro_batch_size(self) -> int:
        """Samples of a forward pass on one process; only once `megatron_lion.train.choices` has replaced auto."""
        size = self.train.micro_batch_size
        assert size != "auto", "train.micro_batch_size is still auto"
        return size

    def num_microbatches(self, world_size: int) -> int:
        """Returns the number of micro-batches that each process runs in a step."""
        return self.train.global_batch_size // (self.micro_batch_size * self.data_parallel_size(world_size))

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the number of data-parallel replicas among `world_size` processes."""
        parallel = self.parallel
        return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Returns the rows of the embedding: `vocab_size` rounded up to `multiple`, the same at every layout.

    Example:
        >>> padded_vocab_size(50257, 128)
        50304
    """
    return -(-vocab_size // multiple) * multiple


def to_dict(config: RunConfig) -> dict[str, object]:
    """Converts a config to nested dictionaries of plain values, for YAML or JSON."""
    return dataclasses.asdict(config)
