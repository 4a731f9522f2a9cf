"""Reads and writes config.json of Hugging Face model folders, and reads their safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import ModelConfig
from megatron_lion.errors import CheckpointError
from megatron_lion.interop.weight_names import Shape
from megatron_lion.plain_text import is_file_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GELU_NAMES = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
WRITTEN_GELU = {"tanh": "gelu_new", "erf": "gelu"}
# Settings that change what a network computes and that this project's networks do not have: name, required value.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "megatron-bert": {
        "type_vocab_size": 2,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
_KINDS = {"gpt2": "gpt2", "megatron-bert": "bert"}


def read_model_config(folder: Path) -> tuple[ModelConfig, str]:
    """Reads the network of a folder's config.json.

    Returns:
        The network's settings, and the name of the transformers class whose weights the folder must contain.

    Raises:
        CheckpointError: no such file, another kind of model, or a setting that this project's networks do not have.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind == "bert":
        raise CheckpointError(
            f"{path}: model_type bert is post-LN, but this project's BERT is pre-LN; give a megatron-bert model"
        )
    if kind not in _KINDS:
        raise CheckpointError(f"{path}: model_type {kind} is not supported; expected gpt2 or megatron-bert")
    for name, fits in _FIXED[kind].items():
        if found.get(name, fits) != fits:
            raise CheckpointError(f"{path}: {name} must be {fits!r}, got {found[name]!r}")
    gelu = found.get(
        "activation_function" if kind == "gpt2" else "hidden_act", "gelu_new" if kind == "gpt2" else "gelu"
    )
    if gelu not in GELU_NAMES:
        raise CheckpointError(f"{path}: activation must be one of {', '.join(GELU_NAMES)}, got {gelu!r}")
    try:
        model = _gpt2(found) if kind == "gpt2" else _bert(found)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    names = {"gpt2": "GPT2LMHeadModel", "megatron-bert": "MegatronBertForPreTraining"}
    return ModelConfig(**model, gelu=GELU_NAMES[gelu]), names[kind]  # type: ignore[arg-type]


def _gpt2(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "gpt2", "num_layers": found["n_layer"], "hidden_size": found["n_embd"], "num_attention_heads": found["n_head"],
        "ffn_hidden_size": found.get("n_inner"), "seq_length": found["n_positions"], "vocab_size": found["vocab_size"],
        "layernorm_epsilon": found.get("layer_norm_epsilon", 1e-5), "hidden_dropout": found.get("resid_pdrop", 0.1),
        "attention_dropout": found.get("attn_pdrop", 0.1), "init_method_std": found.get("initializer_range", 0.02),
    }  # fmt: skip


def _bert(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "bert", "num_layers": found["num_hidden_layers"], "hidden_size": found["hidden_size"],
        "num_attention_heads": found["num_attention_heads"], "ffn_hidden_size": found["intermediate_size"],
        "seq_length": found["max_position_embeddings"], "vocab_size": found["vocab_size"],
        "layernorm_epsilon": found.get("layer_norm_eps", 1e-12), "hidden_dropout": found.get("hidden_dropout_prob", 0.1),
        "attention_dropout": found.get("attention_probs_dropout_prob", 0.1), "init_method_std": found.get("initializer_range", 0.02),
    }  # fmt: skip


def write_model_config(
    model: ModelConfig, vocab_size: int, special: dict[str, int | None], dtype: str
) -> dict[str, Any]:
    """Returns the content of a network's config.json.

    Args:
        model: the network's settings.
        vocab_size: size of the vocabulary without padding.
        special: ids of bos, eos and pad tokens; None if the tokenizer has no such token.
        dtype: dtype of the weights, as torch names it ("float32", "bfloat16").
    """
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    ids = {f"{name}_token_id": index for name, index in special.items()}
    if model.kind == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": model.num_layers, "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads, "n_inner": ffn, "n_positions": model.seq_length, "n_ctx": model.seq_length,
            "vocab_size": vocab_size, "activation_function": WRITTEN_GELU[model.gelu],
            "layer_norm_epsilon": model.layernorm_epsilon, "initializer_range": model.init_method_std,
            "resid_pdrop": model.hidden_dropout, "embd_pdrop": model.hidden_dropout, "attn_pdrop": model.attention_dropout,
            "tie_word_embeddings": True, "use_cache": True, "dtype": dtype, **ids,
        }  # fmt: skip
    return {
        "architectures": ["MegatronBertForPreTraining"], "model_type": "megatron-bert", "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads, "intermediate_size": ffn,
        "max_position_embeddings": model.seq_length, "type_vocab_size": 2, "vocab_size": vocab_size,
        "hidden_act": WRITTEN_GELU[model.gelu], "layer_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std, "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout, "tie_word_embeddings": True, "dtype": dtype, **ids,
    }  # fmt: skip


def shape_of(model: ModelConfig, vocab_size: int) -> Shape:
    """Returns the settings of a network that the name tables need."""
    return Shape(model.kind, model.num_layers, model.num_attention_heads, vocab_size)


def read_weights(folder: Path, kind: str) -> Callable[[str], torch.Tensor]:
    """Opens a folder's safetensors files without reading their tensors.

    Args:
        folder: a folder with model.safetensors, or with its index and the files that it names.
        kind: "gpt2" or "bert"; older GPT-2 files omit the prefix "transformer." of the names.

    Returns:
        A function that reads the tensor of a name; it raises CheckpointError if the tensor is missing.

    Raises:
        CheckpointError: the folder has no safetensors, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    opened: dict[str, Any] = {}
    try:
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise CheckpointError(f"{folder}: no {SINGLE}; convert the weights to safetensors first")
        for name in names:
            # The index comes from outside: a path in it must not open a file elsewhere.
            if not is_file_name(name):
                raise CheckpointError(f"{folder / INDEX}: names {name!r}, which is no file of this folder")
            file = safe_open(folder / name, framework="pt")
            opened.update(dict.fromkeys(file.keys(), file))
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error}); copy the folder again") from None
    bare = kind == "gpt2" and "wte.weight" in opened

    def read(name: str) -> torch.Tensor:
        stored = name.removeprefix("transformer.") if bare else name
        if stored not in opened:
            heads = (
                "; a model without its heads (such as MegatronBertModel) cannot be trained further here"
                if "cls." in name
                else ""
            )
            raise CheckpointError(f"{folder}: the weights have no {stored}{heads}")
        tensor: torch.Tensor = opened[stored].get_tensor(stored)
        return tensor

    return read
