"""Suggestions for unknown settings and flags: similar names, and what other training programs call the same setting."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

FOREIGN = {
    # transformers' TrainingArguments and common scripts
    "learning_rate": "optimizer.lr",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "total_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "device_batch_size": "train.micro_batch_size",
    "max_steps": "train.steps",
    "epochs": "train.steps",
    "num_epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "num_steps": "train.steps",
    "num_iterations": "train.steps",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "output": "run_dir",
    "logging_steps": "train.log_every",
    "log_interval": "train.log_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "train.test_every",
    "eval_interval": "train.test_every",
    "eval_iters": "train.test_batches",
    "warmup_ratio": "schedule.warmup_fraction",
    "warmup_iters": "schedule.warmup_steps",
    "lr_scheduler_type": "schedule.kind",
    "scheduler": "schedule.kind",
    "max_grad_norm": "optimizer.clip_grad",
    "grad_clip": "optimizer.clip_grad",
    "optim": "optimizer.name",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "gradient_checkpointing": "model.recompute",
    "report_to": "log.wandb_project",
    "wandb_log": "log.wandb_project",
    "dataset": "data.path",
    "train_data": "data.path",
    "dtype": "train.precision",
    "mixed_precision": "train.precision",
    "bf16": "train.precision bf16",
    "fp16": "train.precision fp16",
    "fp32": "train.precision fp32",
    "resume_from_checkpoint": "run_dir",
    "gpus": "--processes of python -m megatron_lion.launcher",
    "num_gpus": "--processes of python -m megatron_lion.launcher",
    "nproc_per_node": "--processes of python -m megatron_lion.launcher",
    # nanoGPT and transformers' GPT2Config
    "n_layer": "model.num_layers",
    "n_head": "model.num_attention_heads",
    "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size",
    "block_size": "model.seq_length",
    "context_length": "model.seq_length",
    "n_positions": "model.seq_length",
    "sequence_length": "model.seq_length",
    "max_seq_length": "model.seq_length",
    "dropout": "model.hidden_dropout",
    "max_iters": "train.steps",
    "min_learning_rate": "schedule.min_lr",
    "num_hidden_layers": "model.num_layers",
    "intermediate_size": "model.ffn_hidden_size",
    # Megatron-LM
    "train_iters": "train.steps",
    "data_path": "data.path",
    "save": "run_dir",
    "load": "run_dir",
    "save_interval": "checkpoint.every",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_fraction": "schedule.warmup_fraction",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_warmup_samples": "schedule.warmup_steps",
    "sgd_momentum": "optimizer.momentum",
    "lion_beta1": "optimizer.betas",
    "lion_beta2": "optimizer.betas",
    "max_position_embeddings": "model.seq_length",
    "recompute_activations": "model.recompute",
    "tensorboard_dir": "log.tensorboard",
    "vocab_file": "data.tokenizer",
    "tokenizer_model": "data.tokenizer",
    "transformer_impl": "model.attention",
    "grad_reduce_in_fp32": "train.accumulate_allreduce_grads_in_fp32",
    "grad_reduce_in_bf16": "train.accumulate_allreduce_grads_in_fp32 false",
    "no_gradient_accumulation_fusion": "train.gradient_accumulation_fusion false",
    "cross_entropy_loss_fusion": "model.loss",
    "cross_entropy_fusion_impl": "model.loss",
}
"""Names of other programs, in lower case with underscores, and this project's setting of the same meaning. A flag that is
no setting is written in words."""


OF_GENERATE = {
    "max_length": "max-new-tokens",
    "max_tokens": "max-new-tokens",
    "num_return_sequences": "count",
    "num_samples": "count",
}
"""As `FOREIGN`, for the flags of `generate`; the names are transformers' and common scripts'."""

_NAMES = {"optimizer": "optimizer.name", "model": "model.kind", "schedule": "schedule.kind", "data": "data.path"}
"""The setting that says which one it is, of each group that a user may give such a value."""

NO_DATA = (
    "data.path: no dataset given; `megatron-lion pretrain --text FILE` trains on a text; or make a dataset with "
    "`megatron-lion prepare` and pass --data.path '[FOLDER]'"
)
"""The error of a training without data."""

TEXT_ENDINGS = (".txt", ".jsonl", ".gz", ".zst", ".bz2", ".xz", ".parquet", ".arrow")
"""Endings of files that are texts or data, and that somebody may give in place of a config."""


def suggest(name: str, known: Sequence[str]) -> str | None:
    """Returns what the user probably meant by an unknown name, or None.

    In this order: another program's name for a setting (`max_steps` is train.steps, although a flag is called --max-steps),
    the same setting in another spelling or group (`num-layers`, `lr`), and a name with similar letters.

    Args:
        name: the unknown key or flag, without leading dashes.
        known: dotted keys of a config, or a verb's flags without dashes.

    Example:
        >>> suggest("num-layers", ["model.num_layers"]), suggest("learning_rate", ["optimizer.lr"])
        ('model.num_layers', 'optimizer.lr')
        >>> suggest("inputs", ["input", "output"]), suggest("zzz", ["input"])
        ('input', None)
    """
    plain = _plain(name)
    last = _last(plain)
    foreign = OF_GENERATE.get(last) if OF_GENERATE.get(last) in known else FOREIGN.get(last)
    if foreign is not None and (foreign.partition(" ")[0] in known or foreign.startswith("--")):
        return foreign
    same = [key for key in known if _plain(key) == plain] or [key for key in known if _last(key) == last]
    if same and same[0] != name:
        return same[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close and close[0] != name else None


def other_words(text: str, known: Sequence[str]) -> str | None:
    """Returns a parser's message in words that name what to type, or None if it is none of those that are known.

    Args:
        text: the message, in one line.
        known: the parser's flags without dashes.

    Example:
        >>> other_words("the following arguments are required: target, output", ["output"])
        'missing: TARGET, --output; --help explains them'
        >>> other_words("optimizer: Unable to load config 'adamw' - more words", [])
        "optimizer: 'adamw' is no file with settings of this group (did you mean --optimizer.name adamw?)"
        >>> other_words("optimizer.name: expected one of 'lion', 'sgd', given Lion", [])
        "optimizer.name: expected one of 'lion', 'sgd', given Lion (did you mean lion?)"
    """
    required = re.match(r"the following arguments are required: (.*)$", text)
    if required:
        names = [name.strip() for name in required[1].split(",")]
        flags = {_plain(flag): f"--{flag}" for flag in known}
        shown = ", ".join(flags.get(_plain(name), name.upper()) for name in names)
        return f"missing: {shown}; --help explains {'them' if len(names) > 1 else 'it'}"
    group = re.match(r"(\w+): Unable to load config '([^']*)'", text)
    if group:
        key = _NAMES.get(group[1])
        meant = f" (did you mean --{key} {group[2]}?)" if key else ""
        return f"{group[1]}: {group[2]!r} is no file with settings of this group{meant}"
    pair = re.match(r"([\w.]+): expected tuple\[float, float\].*given [(\[]?([\d.e-]+)[, ]+([\d.e-]+)[)\]]?$", text)
    if pair:
        return f"{text}; write --{pair[1]} '[{pair[2]}, {pair[3]}]'"
    choice = re.search(r"expected one of ('.*'), given (\S+)$", text)
    if choice:
        names = re.findall(r"'([^']*)'", choice[1])
        close = difflib.get_close_matches(choice[2].lower(), names, n=1, cutoff=0.6)
        return f"{text} (did you mean {close[0]}?)" if close else None
    return None


def hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Returns " (did you mean …?)" for an unknown name, or "".

    Args:
        name: the unknown key or flag, without leading dashes.
        known: see `suggest`.
        dashes: "--" if the answer is a flag.
    """
    found = suggest(name, list(known))
    if found is None:
        return ""
    return f" (did you mean {'' if found.startswith('--') else dashes}{found}?)"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _last(name: str) -> str:
    """Returns a name without its group: "lr" of "optimizer.lr"."""
    return _plain(name).rpartition(".")[2]
