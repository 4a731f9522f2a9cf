"""The key's part of an attention's bias, whose true gradient is 0, and a way to keep it where it is.

A bias b of the keys adds ⟨q, b⟩ to all scores of a query q. The softmax ignores such a shift, so no output depends on b
and ∇f is 0 there. A computed gradient is rounding, about 1e-7 of its neighbours. SGD ignores it; a sign update, and Adam's,
move the coordinate by the full learning rate at every step, in directions that differ between layouts and machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def is_qkv_bias(name: str) -> bool:
    """Whether a parameter is the joint bias of queries, keys and values.

    Example:
        >>> is_qkv_bias("decoder.layers.0.self_attention.linear_qkv.bias"), is_qkv_bias("decoder.layers.0.mlp.linear_fc1.bias")
        (True, False)
    """
    return name.endswith("linear_qkv.bias")


def key_part(start: int, length: int, settings: Any) -> torch.Tensor:
    """Returns which elements of a slice of a joint bias belong to the keys, bool [length].

    Each group of heads has its queries, one key and one value, each of `kv_channels` elements, one after the other.

    Args:
        start: place of the slice's first element in the local tensor.
        length: number of elements.
        settings: megatron-core's settings of the model.
    """
    groups = settings.num_query_groups or settings.num_attention_heads
    queries = settings.num_attention_heads // groups
    return (start + torch.arange(length)) // settings.kv_channels % (queries + 2) == queries


@torch.no_grad()
def zero_key_gradients(model: Iterable[Any]) -> None:
    """Sets the gradients of the key biases to 0 in the gradient buffers; call it after their reduction.

    LION's direction is then 0 as long as the momentum is, and sign(0) = 0. A run starts with a momentum of 0.

    Args:
        model: DDP-wrapped chunks.
    """
    for chunk in model:
        settings = chunk.config
        channels, groups = settings.kv_channels, settings.num_query_groups or settings.num_attention_heads
        queries = settings.num_attention_heads // groups
        for name, parameter in chunk.named_parameters():
            if is_qkv_bias(name):
                parameter.main_grad.view(-1, queries + 2, channels)[:, queries].zero_()
