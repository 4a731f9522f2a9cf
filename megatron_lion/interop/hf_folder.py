"""Reads and writes config.json of Hugging Face model folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from megatron_lion.config import ModelConfig
from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.hf_errors import cause, importing_transformers, refusal
from megatron_lion.interop.weight_names import Shape

GELU_NAMES: dict[str, Literal["tanh", "erf"]] = {
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "erf",
}
WRITTEN_GELU = {"tanh": "gelu_new", "erf": "gelu"}
_KINDS = {"gpt2": "gpt2", "megatron-bert": "bert"}
CLASSES = {"gpt2": "GPT2LMHeadModel", "bert": "MegatronBertForPreTraining"}
"""The classes of transformers that correspond to this project's networks."""
# Settings that change what a network computes, each with the one value that this project's networks support.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True, "is_encoder_decoder": False, "pruned_heads": {},
    },
    "megatron-bert": {
        "type_vocab_size": 2, "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True,
        "is_encoder_decoder": False, "pruned_heads": {}, "position_embedding_type": "absolute",
    },
}  # fmt: skip
# Settings that do not change the logits: text generation, other heads, the file's history, the way of computing.
_WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "cross_attention_hidden_size", "decoder_start_token_id", "directionality", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "predict_special_tokens", "prefix", "problem_type", "remove_invalid_values", "reorder_and_upcast_attn", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
_INTEGERS = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")
_DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "megatron-bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
_SCALES = {
    "gpt2": ("layer_norm_epsilon", "initializer_range"),
    "megatron-bert": ("layer_norm_eps", "initializer_range"),
}
_INNER = {"gpt2": "n_inner", "megatron-bert": "intermediate_size"}
_WIDTH_AND_HEADS = {"gpt2": ("n_embd", "n_head"), "megatron-bert": ("hidden_size", "num_attention_heads")}


def read_model_config(folder: Path) -> tuple[ModelConfig, str, str | None]:
    """Reads a network's settings from a folder's config.json, with the defaults and aliases of transformers' class.

    Returns:
        The settings; the name of the transformers class whose weights the folder must contain; and a note if a training
        setting cannot be kept, otherwise None.

    Raises:
        CheckpointError: the file is missing or damaged, the model is of another kind, or a setting is unknown or not
            supported by this project's networks.
    """
    with importing_transformers():
        import transformers

    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind == "bert":
        raise CheckpointError(
            f"{path}: model_type bert is post-LN, but this project's BERT is pre-LN; give a megatron-bert model"
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"{path}: model_type {kind} is not supported; expected gpt2 or megatron-bert")
    for name, fits in _FIXED[kind].items():
        if found.get(name, fits) != fits:
            raise CheckpointError(f"{path}: {name} must be {fits!r}, got {found[name]!r}")
    class_name = CLASSES[_KINDS[kind]]
    config_class = transformers.GPT2Config if kind == "gpt2" else transformers.MegatronBertConfig
    known = {*config_class().to_dict(), *config_class.attribute_map, *_FIXED[kind], *_WITHOUT_EFFECT}
    unknown = sorted(set(found) - known)
    if unknown:
        raise CheckpointError(
            f"{path}: unknown setting {unknown[0]}, which may change what the model computes; if it does not, remove it from a copy of "
            "the folder"
        )
    try:
        config = config_class(**found)
    except Exception as error:  # transformers raises classes of its own for values of a wrong type
        raise refusal(error, f"{path}: transformers rejects it: {cause(error)}") from None
    gelu = config.activation_function if kind == "gpt2" else config.hidden_act
    if gelu not in GELU_NAMES:
        raise CheckpointError(f"{path}: activation must be one of {', '.join(GELU_NAMES)}, got {gelu!r}")
    model = _gpt2(config) if kind == "gpt2" else _bert(config)
    for name in _INTEGERS:
        if type(model[name]) is not int or model[name] < 1:
            raise CheckpointError(f"{path}: {name} must be an integer of at least 1, got {model[name]!r}")
    _check_numbers(path, kind, config)
    note = None
    if kind == "gpt2" and config.embd_pdrop != config.resid_pdrop:
        note = (
            f"note: {path}: embd_pdrop is {config.embd_pdrop:g} and resid_pdrop {config.resid_pdrop:g}; a run has one dropout for both: "
            f"model.hidden_dropout {config.resid_pdrop:g}"
        )
    return ModelConfig(**model, gelu=GELU_NAMES[gelu]), class_name, note


def _check_numbers(path: Path, kind: str, config: Any) -> None:
    """Rejects numbers with which no network can be built.

    Raises:
        CheckpointError: names the setting.
    """
    for name in _DROPOUTS[kind]:
        value = getattr(config, name)
        if not (_is_number(value) and 0 <= value < 1):
            raise CheckpointError(f"{path}: {name} must be at least 0 and less than 1, got {value!r}")
    for name in _SCALES[kind]:
        value = getattr(config, name)
        if not (_is_number(value) and 0 <= value < math.inf):
            raise CheckpointError(f"{path}: {name} must be a finite number of at least 0, got {value!r}")
    inner = getattr(config, _INNER[kind])
    if inner is not None and (type(inner) is not int or inner < 1):
        raise CheckpointError(f"{path}: {_INNER[kind]} must be an integer of at least 1, got {inner!r}")
    width, heads = _WIDTH_AND_HEADS[kind]
    if getattr(config, width) % getattr(config, heads):
        raise CheckpointError(
            f"{path}: {heads} must divide {width}, got {getattr(config, heads)} and {getattr(config, width)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "kind": "gpt2", "num_layers": config.n_layer, "hidden_size": config.n_embd, "num_attention_heads": config.n_head,
        "ffn_hidden_size": config.n_inner, "seq_length": config.n_positions, "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.layer_norm_epsilon, "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop, "init_method_std": config.initializer_range,
    }  # fmt: skip


def _bert(config: Any) -> dict[str, Any]:
    return {
        "kind": "bert", "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads, "ffn_hidden_size": config.intermediate_size,
        "seq_length": config.max_position_embeddings, "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.layer_norm_eps, "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob, "init_method_std": config.initializer_range,
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
