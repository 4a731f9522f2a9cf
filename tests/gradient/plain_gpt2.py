"""Reference GPT-2 in float64 on named weights, written from the equations, for comparison with the sharded model."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy, embedding, gelu, layer_norm


def loss_sum(weights, tokens_BS, labels_BS, *, num_layers, num_heads):
    """Σ over tokens of -log p(label), nats; `weights` by global name, float64."""
    word = weights["embedding.word_embeddings.weight"]
    seq = tokens_BS.shape[1]
    x_BSH = embedding(tokens_BS, word) + weights["embedding.position_embeddings.weight"][:seq]
    for layer in range(num_layers):
        part = {name.removeprefix(f"decoder.layers.{layer}."): value for name, value in weights.items()}
        x_BSH = x_BSH + attention(part, norm(x_BSH, part, "input_layernorm"), num_heads)
        hidden = linear(norm(x_BSH, part, "pre_mlp_layernorm"), part, "mlp.linear_fc1")
        x_BSH = x_BSH + linear(gelu(hidden, approximate="tanh"), part, "mlp.linear_fc2")
    logits_BSV = norm(x_BSH, weights, "decoder.final_layernorm") @ word.T
    return cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum")


def attention(part, x_BSH, num_heads):
    batch, seq, hidden = x_BSH.shape
    qkv = linear(x_BSH, part, "self_attention.linear_qkv").view(batch, seq, num_heads, 3, hidden // num_heads)
    query, key, value = (qkv[:, :, :, index].transpose(1, 2) for index in range(3))
    scores = query @ key.transpose(2, 3) / math.sqrt(hidden // num_heads)
    scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, seq, hidden)
    return linear(mixed, part, "self_attention.linear_proj")


def linear(x, part, name):
    return x @ part[f"{name}.weight"].T + part[f"{name}.bias"]


def norm(x, part, name):
    return layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], 1e-5)
