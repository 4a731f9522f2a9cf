"""Parameter counts, FLOPs and memory of a model, computed from its config without torch (for a fast --dry-run)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lion.config import ModelConfig, RunConfig, padded_vocab_size

VOCAB_SIZES = {"gpt2": 50257, "bert": 30522}
"""Usual vocabulary size of each kind of model, before padding (BERT: uncased WordPiece)."""
BERT_MASKED = 0.15


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
    rows = padded_vocab_size(vocab, model.make_vocab_size_divisible_by)
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


def optimizer_state_tensors(name: str) -> int:
    """Returns the number of fp32 state tensors per parameter, without the master copy."""
    return {"lion": 1, "sgd": 1, "adamw": 2}[name]


def memory_bytes(config: RunConfig, world_size: int, vocab_size: int | None = None) -> dict[str, int]:
    """Returns the bytes a process needs for parameters, gradients, optimizer and activations (estimated).

    Parameters and gradients are divided by the tensor- and pipeline-parallel sizes. With the distributed optimizer,
    master weights and state are also divided by the data-parallel size. Activations follow Korthikanti et al. 2022,
    eq. 2, without the attention matrix, which scaled_dot_product_attention does not store.
    """
    parallel = config.parallel
    shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    size = model_size(config.model, vocab_size)
    local = size.num_parameters // shards
    data_shards = config.data_parallel_size(world_size) if parallel.use_distributed_optimizer else 1
    low_precision = config.train.precision != "fp32"
    width = 2 if low_precision else 4
    model, batch = config.model, config.train.micro_batch_size
    tokens = batch * model.seq_length
    layers = math.ceil(model.num_layers / parallel.pipeline_model_parallel_size)
    per_layer = tokens * model.hidden_size * 34 * width // 2
    rows = padded_vocab_size(
        vocab_size or model.vocab_size or VOCAB_SIZES[model.kind], model.make_vocab_size_divisible_by
    )
    logits = round(tokens * (BERT_MASKED if model.kind == "bert" else 1)) * rows * 8
    states = optimizer_state_tensors(config.optimizer.name) + (1 if low_precision else 0)
    return {
        "parameters": local * width,
        "gradients": local * 4,
        "optimizer": local * 4 * states // data_shards,
        "activations": (layers * per_layer if not model.recompute else layers * tokens * model.hidden_size * width)
        + logits,
    }
