"""Finds the weight files of a Hugging Face folder, as transformers chooses them, and hashes what defines the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_lion.errors import CheckpointError
from megatron_lion.files import sha256_file
from megatron_lion.plain_text import is_file_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
CONVERT = (
    'convert the weights to safetensors: python -c "from transformers import AutoModelForPreTraining as M; '
    "M.from_pretrained('OLD').save_pretrained('NEW')\""
)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files with a folder's weights: model.safetensors, else the files that the index names.

    Raises:
        CheckpointError: the folder has neither, the index is damaged, or it names a path outside the folder; or the
            folder has an adapter.
    """
    # If peft is installed, transformers loads the adapter too: the weight files alone are another model.
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: the folder has a PEFT adapter, which is not applied here; merge it into the weights with peft's "
            "merge_and_unload() and give the folder of save_pretrained; for the model without it, remove this file from a copy"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: no {SINGLE}; {CONVERT}")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if not is_file_name(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: damaged ({error}); copy the folder again") from None
    # The index comes from outside: a path in it must not open a file elsewhere.
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is no file of this folder")
    return [folder / name for name in names]


def unread_weights(folder: Path) -> str | None:
    """Returns a note if a folder has a second set of weights, which transformers ignores too; otherwise None."""
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        return f"note: {folder}: {SINGLE} is read; {INDEX} and its files are not, as in transformers"
    return None


def model_sha256(folder: Path) -> str:
    """Returns one SHA-256 over the files that determine a model's logits: the weight files, their index, config.json.

    Raises:
        CheckpointError: a file cannot be read, or the index is damaged.
    """
    files = weight_files(folder)
    index = [] if files == [folder / SINGLE] else [folder / INDEX]
    digest = hashlib.sha256()
    try:
        for path in (folder / CONFIG, *index, *files):
            digest.update(f"{sha256_file(path)}  {path.name}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); copy the folder again") from None
    return digest.hexdigest()
