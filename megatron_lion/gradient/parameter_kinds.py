"""A parameter's kind and layer, derived from its name, and whether a table row is vocabulary padding."""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_lion.optim.parameter_shards import TIED_OUTPUT, TOKEN_EMBEDDING

PADDING = "#padding"
"""Suffix of the table row for a vocabulary tensor's padded rows."""

KINDS = ("embedding", "attention", "MLP", "norm", "bias", "other")


def is_padding(name: str) -> bool:
    """Whether a table row is vocabulary padding."""
    return name.endswith(PADDING)


def is_vocabulary(name: str) -> bool:
    """Whether the first dimension of the tensor is the padded vocabulary."""
    return name in (TOKEN_EMBEDDING, TIED_OUTPUT, "output_layer.bias")


def kind_of(name: str) -> str:
    """Returns the kind of a parameter, one of `KINDS`.

    Gains and shifts of norms are "norm"; all other biases, including those of attention and MLP, are "bias".

    Example:
        >>> kind_of("decoder.layers.3.mlp.linear_fc1.weight"), kind_of("decoder.layers.3.mlp.linear_fc1.bias")
        ('MLP', 'bias')
        >>> kind_of("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
        'norm'
        >>> kind_of("embedding.word_embeddings.weight#padding")
        'embedding'
    """
    name = name.removesuffix(PADDING)
    if re.search(r"layer_?norm", name):
        return "norm"
    if name.endswith("bias"):
        return "bias"
    for part, kind in (
        ("embedding", "embedding"),
        ("output_layer", "embedding"),
        ("attention", "attention"),
        ("mlp", "MLP"),
    ):
        if part in name:
            return kind
    return "other"


def layer_of(name: str) -> str:
    """Returns a parameter's layer: "layer 0", "layer 1", …, "final norm", or the first part of its name.

    Example:
        >>> layer_of("decoder.layers.3.mlp.linear_fc1.weight"), layer_of("decoder.final_layernorm.bias")
        ('layer 3', 'final norm')
        >>> layer_of("embedding.position_embeddings.weight")
        'embedding'
    """
    found = re.search(r"\blayers\.(\d+)\.", name)
    if found:
        return f"layer {found[1]}"
    return "final norm" if "final_layernorm" in name else name.removesuffix(PADDING).split(".")[0]


def in_group(group_of: Callable[[str], str], group: str) -> Callable[[str], bool]:
    """Returns a function that accepts the names in a group, such as a layer.

    Example:
        >>> in_group(layer_of, "layer 3")("decoder.layers.3.mlp.linear_fc1.weight")
        True
    """
    return lambda name: group_of(name) == group
