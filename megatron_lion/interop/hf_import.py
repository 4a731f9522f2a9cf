"""Imports a Hugging Face folder as a run folder whose checkpoint of step 0 has the imported weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import ModelConfig, RunConfig, padded_vocab_size
from megatron_lion.configfile import save_config
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.device import DTYPES, select_device
from megatron_lion.errors import CheckpointError, ConfigError, NumericsError
from megatron_lion.evaluate.hf_files import unread_weights
from megatron_lion.evaluate.open_run import open_run
from megatron_lion.folder_swap import replace_folder, work_folder
from megatron_lion.interop.hf_folder import read_model_config, shape_of
from megatron_lion.interop.hf_weights import StoredWeights
from megatron_lion.interop.logit_check import compare_logits
from megatron_lion.interop.weight_names import from_huggingface
from megatron_lion.model.build import build_model
from megatron_lion.optim.parameter_shards import named_global_parameters
from megatron_lion.parallel import process_groups
from megatron_lion.runs.identity import new_run_id
from megatron_lion.runs.paths import config_file, tokenizer_folder
from megatron_lion.streams import say
from megatron_lion.train.checkpoint import layout_facts, save_checkpoint
from megatron_lion.train.fingerprint import weights_fingerprint
from megatron_lion.train.model_state import model_facts, model_sharded_state, unwrap


def import_folder(folder: Path, config: RunConfig, *, tokenizer: str | None = None, check: bool = True) -> RunConfig:
    """Makes a run folder from a Hugging Face folder, on one process; the checkpoint then loads at any layout.

    The rows that pad the embedding are the mean of the others. Their logit is then the mean logit. Because
    exp(mean) ≤ mean(exp), they get at most padded/vocabulary of the probability: 47/50257 for GPT-2, 0.0009 nats.

    Args:
        folder: a folder with config.json, model.safetensors (or its index), and a tokenizer.
        config: the run's settings; config.json replaces the architecture in its `model` section.
        tokenizer: a tokenizer to use instead of the folder's own.
        check: whether to compare logits with transformers before the run folder gets its name.

    Returns:
        The saved settings.

    Raises:
        CheckpointError: the model is no GPT-2 or MegatronBert with all its heads, has a tensor or setting that this
            project's network does not have, or has a tokenizer that does not fit; or transformers computes other
            logits.
        ConfigError: the run folder is not empty.
        DataError: no tokenizer is found.
    """
    model, class_name, note = read_model_config(folder)
    run_dir = Path(config.run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"run_dir: {run_dir} is not empty; choose another folder for the imported run with --output")
    stored = StoredWeights(folder, model.kind)
    loaded = load_tokenizer(tokenizer or folder)
    vocab_size = int(model.vocab_size or 0)
    if loaded.vocab_size > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {loaded.vocab_size} ids, the model {vocab_size}; give the model's own with --tokenizer"
        )
    if (loaded.kind == "WordPiece") != (model.kind == "bert"):
        raise CheckpointError(
            f"{folder}: a {model.kind} model, and a {loaded.kind} tokenizer; give the model's own with --tokenizer"
        )
    # These settings decide how the network is computed, not what it is, so config.json does not contain them.
    kept = config.model
    model = replace(model, make_vocab_size_divisible_by=kept.make_vocab_size_divisible_by, attention=kept.attention,
                    loss=kept.loss, recompute=kept.recompute)  # fmt: skip
    config = replace(config, model=model, name=config.name or folder.resolve().name)
    try:
        weights = dict(from_huggingface(stored, shape_of(model, vocab_size)))
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the shapes of the weights differ from config.json: {error}") from None
    stored.refuse_unread(shape_of(model, vocab_size))
    for line in filter(None, (note, unread_weights(folder))):
        say(line)
    with work_folder(run_dir) as temporary:
        _save(folder, class_name, config, loaded, weights, vocab_size, temporary)
        if check:
            with open_run(temporary, device=config.device, precision="fp32") as run:
                run.load(0)
                compare_logits(run, folder, class_name, folder)
        replace_folder(temporary, run_dir)
    return config


def _save(
    folder: Path, class_name: str, config: RunConfig, tokenizer: Tokenizer, weights: dict[str, torch.Tensor], vocab_size: int,
    run_dir: Path,
) -> None:  # fmt: skip
    """Writes the run folder with its checkpoint, in bf16 if all weights are bf16, else in fp32."""
    precision = "bf16" if all(tensor.dtype == torch.bfloat16 for tensor in weights.values()) else "fp32"
    device = select_device(config.device)
    with process_groups(device) as ranks:
        one = replace(config, train=replace(config.train, precision=precision), parallel=type(config.parallel)())  # type: ignore[arg-type]
        chunks = build_model(one, device, vocab_size)
        _fill(chunks, weights, config.model, vocab_size, folder)
        try:
            fingerprint = weights_fingerprint(chunks)
        except NumericsError as error:
            raise CheckpointError(f"{folder}: {error}; a model with such a weight predicts nothing") from error
        facts: dict[str, Any] = {
            "run_id": new_run_id(),
            "consumed_samples": 0, "seed": config.seed, "layout": layout_facts(ranks), "state_layout": None, "optimizer": None,
            "optimizer_state": None, "precision": precision, "model": model_facts(config, vocab_size), "buckets": None,
            "data_digest": None, "tokenizer_sha256": tokenizer.sha256, "weights_fingerprint": fingerprint,
            "source": f"{folder.resolve().name} ({class_name})",
        }  # fmt: skip
        tokenizer.save(tokenizer_folder(run_dir))
        save_checkpoint(run_dir, 0, {"model": model_sharded_state(chunks)}, {}, facts, ranks)
        save_config(config, config_file(run_dir))


@torch.no_grad()
def _fill(
    chunks: list[Any], weights: dict[str, torch.Tensor], model: ModelConfig, vocab_size: int, folder: Path
) -> None:
    rows = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by)
    dtype = DTYPES["fp32"]
    for name, parameter in named_global_parameters(unwrap(chunks[0])):
        tensor = weights.pop(name)
        # Zero rows would not do: GPT-2's logits are far below zero, and 47 tokens of logit 0 would get nearly all
        # probability. The mean is computed in fp32 and rounded once.
        if len(tensor) == vocab_size != rows and parameter.shape[0] == rows:
            padding = tensor.to(dtype).mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, padding.expand(rows - vocab_size, *tensor.shape[1:])])
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but config.json gives {tuple(parameter.shape)}; "
                "use the weights and the config.json of one model"
            )
        parameter.copy_(tensor)
    assert not weights, "the name table has tensors that the network lacks"
