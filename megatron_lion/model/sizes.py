"""Parameter counts, FLOPs and memory of a model, computed from its config without torch (for a fast --dry-run)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lion.config import ModelConfig, RunConfig, padded_vocab_size

VOCAB_SIZES = {"gpt2": 50257, "bert": 30522}
"""Usual vocabulary size of each kind of model, before padding (BERT: uncased WordPiece)."""
BERT_MASKED = 0.15
CHUNK_ROWS = 4096
"""Tokens whose logits the chunked loss holds at a time; at GPT-2's vocabulary 0.4 GB of 16-bit logits."""


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of the whole model; each tied tensor counts once.

    Attributes:
        num_parameters: d of the theory, padded vocabulary rows included.
        num_parameters_unpadded: the same without the padded rows.
        embedding_parameters: parameters of token, position and, in BERT, token-type embeddings.
    """

    num_parameters: int
    num_parameters_unpadded: int
    embedding_parameters: int

    @property
    def sqrt_d(self) -> float:
        """√d, the scale of ‖∇f‖₁/‖∇f‖₂ in the theory."""
        return math.sqrt(self.num_parameters)


def model_size(model: ModelConfig, vocab_size: int | None = None) -> ModelSize:
    """Counts the parameters of a model.

    Args:
        model: the network's settings.
        vocab_size: ids before padding; default `model.vocab_size`, else the usual size of the kind.

    Example:
        >>> model_size(ModelConfig()).num_parameters
        124475904
        >>> medium = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16)
        >>> model_size(medium).num_parameters
        354871296
        >>> model_size(ModelConfig(kind="bert", seq_length=512)).num_parameters
        110160258
    """
    vocab = vocab_size or model.vocab_size or VOCAB_SIZES[model.kind]
    rows = _rows(model, vocab)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size or 4 * model.hidden_size
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * ffn + ffn + hidden
    norms = 4 * hidden
    embeddings = (rows + model.seq_length) * hidden
    total = embeddings + model.num_layers * (attention + mlp + norms) + 2 * hidden
    if model.kind == "bert":
        dense = hidden * hidden + hidden
        embeddings += 2 * hidden  # token types
        total += (
            2 * hidden + (dense + 2 * hidden) + rows + dense + (2 * hidden + 2)
        )  # masked-LM head, its bias, pooler, 2-way head
        return ModelSize(total, total - (rows - vocab) * (hidden + 1), embeddings)
    return ModelSize(total, total - (rows - vocab) * hidden, embeddings)


def flops_per_token(model: ModelConfig, vocab_size: int | None = None) -> float:
    """Returns the floating-point operations of a training step per token: 6 N + 12 L H S (PaLM, appendix B).

    N excludes the position embeddings, which are not multiplied. Attention is counted in full, although the causal mask
    halves it. BERT's pooler runs once a sample and is not counted. Its masked-LM head, with the output matrix, runs for
    the share `BERT_MASKED` of the tokens and counts for that share.
    """
    size = model_size(model, vocab_size)
    matmul: float = size.num_parameters - model.seq_length * model.hidden_size
    if model.kind == "bert":
        hidden = model.hidden_size
        matmul -= hidden * (hidden + 5) + 2  # token types, pooler, 2-way head
        matmul -= (1 - BERT_MASKED) * (size.embedding_parameters - (model.seq_length + 2) * hidden + hidden * hidden)
    return 6 * matmul + 12 * model.num_layers * model.hidden_size * model.seq_length


@dataclass(frozen=True)
class _Tensor:
    """One parameter of a process.

    Attributes:
        numel: its elements on this tensor-parallel rank.
        is_split: whether the tensor-parallel ranks hold different parts of it.
        is_shared: whether another pipeline stage holds the tied copy; megatron-core gives it a bucket of its own.
        is_copy: whether the other stage's copy is the one that a probe counts.
    """

    numel: int
    is_split: bool = False
    is_shared: bool = False
    is_copy: bool = False


def memory_bytes(config: RunConfig, world_size: int, vocab_size: int | None = None) -> dict[str, int]:
    """Returns the bytes of tensors that the process with the largest total holds.

    `parameters`, `gradients` and `optimizer` (state and master weights), and `probe` if `probe.mode` is moving, are what
    is allocated, padding included: tests/model/test_memory.py compares them with the tensors of built models. With
    Transformer Engine the parameters have another order, so that the padding may differ: by less than 64 elements a
    parameter, and by none if hidden_size / tensor_model_parallel_size is a multiple of 64.

    `activations` is an estimate, after Korthikanti et al. 2022, eq. 2 and 4, without the attention matrix, which
    scaled_dot_product_attention does not store. Logits count once with the fused loss, which `model.loss` auto is assumed
    to choose unless the device is cpu. Temporary tensors, communication buffers, the libraries and
    fragmentation come in addition.
    """
    parallel = config.parallel
    pipeline, data = parallel.pipeline_model_parallel_size, config.data_parallel_size(world_size)
    processes = [
        process_memory(config, world_size, vocab_size, stage=stage, data_ranks=range(data))
        for stage in sorted({0, 1 % pipeline, pipeline - 1})  # the stages between are like the second
    ]
    return max((memory for stage in processes for memory in stage), key=lambda memory: sum(memory.values()))


def process_memory(
    config: RunConfig,
    world_size: int,
    vocab_size: int | None = None,
    *,
    stage: int = 0,
    tensor_rank: int = 0,
    data_ranks: Sequence[int] = (0,),
) -> list[dict[str, int]]:
    """Returns what `memory_bytes` does, for processes of one pipeline stage and tensor-parallel rank.

    Args:
        config: the run's settings.
        world_size: number of processes.
        vocab_size: ids before padding, as for `model_size`.
        stage: pipeline stage, from 0.
        tensor_rank: tensor-parallel rank. Only the first one counts replicated tensors in a probe's window.
        data_ranks: data-parallel ranks, one entry of the result each.
    """
    parallel, is_sharded = config.parallel, config.parallel.use_distributed_optimizer
    data_parallel = config.data_parallel_size(world_size)
    rows = _rows(config.model, vocab_size)
    tensors = _stage_tensors(config, rows, stage)
    width = 4 if config.train.precision == "fp32" else 2
    if is_sharded:
        bucket_size = (
            max(40_000_000, 1_000_000 * data_parallel) if parallel.overlap_grad_reduce and stage == 0 else None
        )
        buffer, pieces = _shards(tensors, bucket_size, data_parallel)
    else:
        buffer = sum(tensor.numel for tensor in tensors)
        pieces = {rank: [(tensor, tensor.numel) for tensor in tensors] for rank in data_ranks}
    activations = _activation_bytes(config, world_size, rows, stage)
    found = []
    for rank in data_ranks:
        memory = {
            "parameters": buffer * width,
            "gradients": buffer * (4 if config.train.accumulate_allreduce_grads_in_fp32 else width),
            "optimizer": sum(_optimizer_bytes(config, numel) for _, numel in pieces[rank]),
        }
        if config.probe.every and config.probe.mode == "moving":
            counts = is_sharded or rank == 0  # without shards only the first data-parallel rank adds gradients up
            memory["probe"] = sum(
                4 * numel
                for tensor, numel in pieces[rank]
                if counts and not tensor.is_copy and (tensor.is_split or tensor_rank == 0)
            )
        found.append({**memory, "activations": activations})
    return found


def _rows(model: ModelConfig, vocab_size: int | None) -> int:
    return padded_vocab_size(
        vocab_size or model.vocab_size or VOCAB_SIZES[model.kind], model.make_vocab_size_divisible_by
    )


def _stage_tensors(config: RunConfig, rows: int, stage: int) -> list[_Tensor]:
    """Returns the parameters of a pipeline stage in the order in which megatron-core's local layers hold them."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    hidden, ffn = model.hidden_size, model.ffn_hidden_size or 4 * model.hidden_size
    is_bert, is_last = model.kind == "bert", stage == pipeline - 1

    def split(numel: int) -> _Tensor:
        return _Tensor(numel // tp, is_split=True)

    whole, norm = _Tensor, [_Tensor(hidden), _Tensor(hidden)]
    attention = [split(hidden * hidden), whole(hidden), split(3 * hidden * hidden), split(3 * hidden)]
    mlp = [split(ffn * hidden), split(ffn), split(hidden * ffn), whole(hidden)]
    tensors = []
    if stage == 0:
        tensors += [
            _Tensor(rows * hidden // tp, is_split=True, is_shared=pipeline > 1),
            whole(model.seq_length * hidden),
        ]
        tensors += [whole(2 * hidden)] * is_bert  # token types
    tensors += [*norm, *attention, *norm, *mlp] * (model.num_layers // pipeline)
    if is_last:
        dense = [whole(hidden * hidden), whole(hidden)]
        tensors += norm
        tensors += [*dense, *norm] * is_bert  # the masked-LM head before its output matrix
        tensors += [_Tensor(rows * hidden // tp, is_split=True, is_shared=True, is_copy=True)] * (pipeline > 1)
        tensors += [split(rows), whole(2 * hidden), whole(2), *dense] * is_bert  # output bias, order head, pooler
    return tensors


def _shards(
    tensors: Sequence[_Tensor], bucket_size: int | None, data_parallel: int
) -> tuple[int, dict[int, list[tuple[_Tensor, int]]]]:
    """Lays parameters out as megatron-core's DistributedOptimizer does.

    From the last parameter to the first; each starts at a multiple of 64 elements, and each bucket ends at a multiple
    of 128 and of the data-parallel size. Every data-parallel rank owns an equal part of each bucket.

    Args:
        tensors: the parameters of a process.
        bucket_size: elements at which a bucket ends, or None for a single one.
        data_parallel: number of data-parallel ranks.

    Returns:
        Elements of the buffer, and for each data-parallel rank its non-empty pieces as (tensor, elements).
    """
    buckets: list[tuple[int, int, list[tuple[_Tensor, int]]]] = []
    divisor = math.lcm(data_parallel, 128)
    begin, position = 0, 0
    inside: list[tuple[_Tensor, int]] = []

    def end_bucket() -> None:
        nonlocal begin, position, inside
        end = -(-position // divisor) * divisor
        buckets.append((begin, end, inside))
        begin, position, inside = end, end, []

    for tensor in reversed(tensors):
        position = -(-position // 64) * 64
        if tensor.is_shared and inside:
            end_bucket()
        inside.append((tensor, position))
        position += tensor.numel
        if tensor.is_shared or (bucket_size is not None and position - begin >= bucket_size):
            end_bucket()
    if inside:
        end_bucket()
    pieces: dict[int, list[tuple[_Tensor, int]]] = {rank: [] for rank in range(data_parallel)}
    for begin, end, members in buckets:
        share = (end - begin) // data_parallel
        for tensor, start in members:
            stop = start + tensor.numel
            for rank in range((start - begin) // share, (stop - 1 - begin) // share + 1):
                first = begin + rank * share
                pieces[rank].append((tensor, min(stop, first + share) - max(start, first)))
    return buckets[-1][1], pieces


def _optimizer_bytes(config: RunConfig, numel: int) -> int:
    """Returns the bytes of the state and master weights of one piece of a parameter."""
    optimizer = config.optimizer
    masters = {"shards": 4 * (config.train.precision != "fp32"), "fp32": 4, "split32": 2, "split24": 1}
    master = numel * masters[config.master_weights]
    if optimizer.name == "adamw":
        return master + 8 * numel + 4  # and the number of steps
    if optimizer.name == "lion" and optimizer.momentum_dtype == "int8":
        return master + -(-numel // 32) * 34  # blocks of 32 bytes and a bfloat16 scale
    return master + numel * (2 if optimizer.name == "lion" and optimizer.momentum_dtype == "bf16" else 4)


def _activation_bytes(config: RunConfig, world_size: int, rows: int, stage: int) -> int:
    model, parallel = config.model, config.parallel
    tp, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = 4 if config.train.precision == "fp32" else 2
    tokens = config.micro_batch_size * model.seq_length
    # In units of one 16-bit value of the residual stream: 10 are whole on each tensor-parallel rank, 24 are split.
    layer = tokens * model.hidden_size * (34 / tp if parallel.sequence_parallel else 10 + 24 / tp) * width / 2
    layers = model.num_layers / pipeline
    # The first stage starts as many micro-batches as there are stages before the first backward pass.
    in_flight = min(pipeline - stage, max(1, config.num_microbatches(world_size)))
    kept = layers * tokens * model.hidden_size * width if model.recompute else layers * layer
    total = in_flight * kept + (layer if model.recompute else 0)
    if stage == pipeline - 1:
        total += _logit_bytes(config, tokens * (BERT_MASKED if model.kind == "bert" else 1), rows / tp, width)
    return round(total)


def _logit_bytes(config: RunConfig, tokens: float, columns: float, width: int) -> float:
    """Returns the bytes of a tensor-parallel rank's logits and their gradient."""
    loss = config.model.loss
    if loss == "chunked":  # the logits of a chunk, and the output matrix's gradient in float32
        return columns * (min(tokens, CHUNK_ROWS) * width + config.model.hidden_size * 4)
    is_fused = loss == "fused" or (loss == "auto" and config.device != "cpu")
    # Both losses write the gradient over the logits that they read, but megatron-core's over an fp32 copy of 16-bit ones.
    return tokens * columns * (width if is_fused or width == 4 else 2 + 4)
