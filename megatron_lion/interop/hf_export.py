"""Exports a checkpoint as a Hugging Face folder: weights, config, tokenizer, generation config, model card.

The folder is written under a temporary name beside its final place. Transformers then loads it and must compute the
same logits as this project's network. Only then is the folder renamed.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import ConfigError, StorageError
from megatron_lion.evaluate.hf_files import SINGLE
from megatron_lion.evaluate.open_run import RestoredRun
from megatron_lion.files import storage_errors, sync_file, write_whole
from megatron_lion.folder_swap import replace_folder, work_folder
from megatron_lion.interop.hf_folder import CLASSES, shape_of, write_model_config
from megatron_lion.interop.logit_check import compare_logits
from megatron_lion.interop.model_card import model_card
from megatron_lion.interop.weight_names import to_huggingface
from megatron_lion.runs.folder import write_json


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        folder: the model folder.
        step: step of the exported checkpoint.
        num_parameters: number of parameters in model.safetensors, each tied tensor once.
        dtype: dtype of the weights, as torch names it.
        logit_difference: largest difference to transformers' logits over the largest logit, or None if not checked.
    """

    folder: Path
    step: int
    num_parameters: int
    dtype: str
    logit_difference: float | None


def export_checkpoint(
    run: RestoredRun, step: int, output: Path, *, dtype: str | None = None, overwrite: bool = False, check: bool = True
) -> Export:
    """Writes one checkpoint as a folder that transformers' `from_pretrained` loads.

    Args:
        run: a run opened in fp32, on one process.
        step: step of the checkpoint.
        output: the new folder.
        dtype: "fp32" or "bf16"; default: the checkpoint's dtype, which makes the export bit-exact.
        overwrite: whether to replace an earlier export at `output`.
        check: whether to compare logits with transformers before the rename.

    Raises:
        CheckpointError: the checkpoint is damaged, or transformers computes other logits.
        ConfigError: `output` exists, and it is no export or `overwrite` is False.
        StorageError: the file system refused.
    """
    if output.exists() and not (overwrite and (output / "config.json").is_file() and (output / SINGLE).is_file()):
        remedy = "give --overwrite to replace it" if (output / SINGLE).is_file() else "choose another folder"
        raise ConfigError(f"--output {output}: already exists; {remedy}")
    run.load(step)
    manifest = run.manifest(step)
    stored = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or manifest["precision"], torch.float16)
    shape = shape_of(run.config.model, run.vocab_size)
    weights = {name: tensor.to(stored) for name, tensor in to_huggingface(run.named_weights(), shape).items()}
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    with work_folder(output) as temporary:
        with storage_errors(output):
            _write(run, step, manifest, weights, str(stored).removeprefix("torch."), temporary)
        difference = None
        if check:
            run.round_weights(stored)  # both networks compute in fp32 on the values in the file
            difference = compare_logits(run, temporary, CLASSES[run.config.model.kind], output)
        replace_folder(temporary, output)
    return Export(output, step, num_parameters, str(stored).removeprefix("torch."), difference)


def _write(
    run: RestoredRun, step: int, manifest: dict[str, Any], weights: dict[str, torch.Tensor], dtype: str, folder: Path
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    special = huggingface_special_ids(run.tokenizer, run.config.model.kind)
    config = write_model_config(run.config.model, run.vocab_size, special, dtype)
    facts = {
        "step": str(step),
        "weights_fingerprint": manifest["weights_fingerprint"],
        "tokenizer_sha256": run.tokenizer.sha256,
    }
    path = folder / SINGLE
    metadata = {"format": "pt", **{f"megatron_lion.{key}": value for key, value in facts.items()}}
    try:
        save_file(weights, path, metadata=metadata)
    except SafetensorError as error:  # its form of an OSError
        raise StorageError(
            f"{path}: cannot be written ({error}), as happens on a full disk; make room there, then give the same command again"
        ) from error
    sync_file(path)  # before the rename: a crash must not leave a whole folder with an empty file
    write_json(folder / "config.json", dict(sorted(config.items())))
    # safetensors 0.8 makes its file readable for the owner alone; the others have the mode that the umask leaves.
    path.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
    if run.config.model.kind == "gpt2":
        ids = {f"{name}_token_id": index for name, index in special.items() if index is not None}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    run.tokenizer.save(folder)
    card = model_card(run.run_dir, run.config, manifest, run.vocab_size, dtype)
    write_whole(folder / "README.md", card.encode())


def huggingface_special_ids(tokenizer: Tokenizer, kind: str) -> dict[str, int | None]:
    """Returns the ids of Hugging Face's special tokens: bos and eos of GPT-2, both the end-of-document token; pad of BERT.

    An id is None if the tokenizer has no such token.
    """
    if kind == "bert":
        return {"pad": tokenizer.backend.token_to_id("[PAD]")}
    end = tokenizer.backend.token_to_id(tokenizer.eod_token) if tokenizer.eod_token is not None else None
    return {"bos": end, "eos": end}
