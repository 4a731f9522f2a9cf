"""Tables of parameter names: this project's networks and transformers' GPT2LMHeadModel and MegatronBert.

One table for each kind of network lists the corresponding tensors and their conversion; both directions use it. A
conversion moves values and computes none, so a round trip is exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The settings of a network on which the tables depend.

    Attributes:
        kind: "gpt2" or "bert".
        num_layers: number of transformer layers.
        num_attention_heads: number of heads in a layer.
        vocab_size: size of the vocabulary without padding; transformers' embedding has no padding rows.
    """

    kind: str
    num_layers: int
    num_attention_heads: int
    vocab_size: int


@dataclass(frozen=True)
class Pair:
    """A parameter of this project's network, and its counterpart in transformers.

    Attributes:
        ours: the parameter's name in this project.
        theirs: its names in transformers; three for BERT's queries, keys and values.
        how: the conversion. "same": none. "rows": one row for each token id, padded in this project. "transposed":
            [out, in] in this project, [in, out] in GPT-2's Conv1D. "qkv": rows by head in this project (head 1's
            queries, keys, values, then head 2's), but all queries, all keys, all values in transformers.
            "qkv transposed": both.
    """

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"


def pairs(shape: Shape) -> Iterator[Pair]:
    """Yields all parameters of a network of this shape; the output embedding is tied and therefore not among them."""
    return _gpt2_pairs(shape) if shape.kind == "gpt2" else _bert_pairs(shape)


def to_huggingface(weights: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Returns the tensors under transformers' names.

    Args:
        weights: every parameter of the whole network, by this project's names.
        shape: the network's shape.

    Returns:
        Contiguous tensors of the same dtype; they share memory with `weights` if no value moves.
    """
    found: dict[str, torch.Tensor] = {}
    for pair in pairs(shape):
        tensor = weights[pair.ours]
        if pair.how == "rows":
            tensor = tensor[: shape.vocab_size]
        elif pair.how.startswith("qkv"):
            tensor = _heads_to_thirds(tensor, shape.num_attention_heads)
        if pair.how.endswith("transposed"):
            tensor = tensor.T
        parts = tensor.chunk(len(pair.theirs))
        found.update({name: part.contiguous() for name, part in zip(pair.theirs, parts, strict=True)})
    return found


def from_huggingface(read: Callable[[str], torch.Tensor], shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in this project, tensor), the embedding without padding; the inverse of `to_huggingface`.

    Args:
        read: function that returns the tensor of a name in transformers.
        shape: the network's shape.
    """
    for pair in pairs(shape):
        parts = [read(name) for name in pair.theirs]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if pair.how.endswith("transposed"):
            tensor = tensor.T
        if pair.how.startswith("qkv"):
            tensor = _thirds_to_heads(tensor, shape.num_attention_heads)
        yield pair.ours, tensor.contiguous()


def _gpt2_pairs(shape: Shape) -> Iterator[Pair]:
    yield Pair("embedding.word_embeddings.weight", ("transformer.wte.weight",), "rows")
    yield Pair("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for part in ("weight", "bias"):
            turned = " transposed" if part == "weight" else ""
            yield Pair(f"{ours}input_layernorm.{part}", (f"{theirs}ln_1.{part}",))
            yield Pair(f"{ours}self_attention.linear_qkv.{part}", (f"{theirs}attn.c_attn.{part}",), "qkv" + turned)
            for here, there in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                yield Pair(f"{ours}{here}.{part}", (f"{theirs}{there}.{part}",), turned.strip() or "same")
            yield Pair(f"{ours}pre_mlp_layernorm.{part}", (f"{theirs}ln_2.{part}",))
    for part in ("weight", "bias"):
        yield Pair(f"decoder.final_layernorm.{part}", (f"transformer.ln_f.{part}",))


def _bert_pairs(shape: Shape) -> Iterator[Pair]:
    yield Pair("embedding.word_embeddings.weight", ("bert.embeddings.word_embeddings.weight",), "rows")
    yield Pair("embedding.position_embeddings.weight", ("bert.embeddings.position_embeddings.weight",))
    yield Pair("embedding.tokentype_embeddings.weight", ("bert.embeddings.token_type_embeddings.weight",))
    yield Pair("output_layer.bias", ("cls.predictions.bias",), "rows")
    for part in ("weight", "bias"):
        for layer in range(shape.num_layers):
            ours, theirs = f"encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
            attention = tuple(f"{theirs}attention.self.{name}.{part}" for name in ("query", "key", "value"))
            yield Pair(f"{ours}self_attention.linear_qkv.{part}", attention, "qkv")
            for here, there in (
                ("input_layernorm", "attention.ln"),
                ("self_attention.linear_proj", "attention.output.dense"),
                ("pre_mlp_layernorm", "ln"),
                ("mlp.linear_fc1", "intermediate.dense"),
                ("mlp.linear_fc2", "output.dense"),
            ):
                yield Pair(f"{ours}{here}.{part}", (f"{theirs}{there}.{part}",))
        for here, there in (
            ("encoder.final_layernorm", "bert.encoder.ln"),
            ("pooler.dense", "bert.pooler.dense"),
            ("lm_head.dense", "cls.predictions.transform.dense"),
            ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
            ("binary_head", "cls.seq_relationship"),
        ):
            yield Pair(f"{here}.{part}", (f"{there}.{part}",))


def _heads_to_thirds(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders [heads × (q, k, v) × channels, …] to [(q, k, v) × heads × channels, …]."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _thirds_to_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_heads_to_thirds`."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
