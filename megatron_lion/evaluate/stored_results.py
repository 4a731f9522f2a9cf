"""The state of a model as results name it, and which stored results belong to a folder's present model."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.hf_files import model_sha256
from megatron_lion.runs.paths import evaluations_folder, has_config, step_folder
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.steps import is_committed, open_checkpoint
from megatron_lion.streams import say

_FLAGS = {
    "wikitext103": "--wikitext103",
    "wikitext103_pages": "--wikitext103",
    "text": "--text",
    "lambada": "--lambada",
}


def state_of_manifest(manifest: dict[str, Any]) -> str:
    """Returns one SHA-256 over what determines a checkpoint's logits: the weights and the settings of the network.

    The settings are those in the manifest, such as `gelu` and `layernorm_epsilon`. Paths, training settings and the
    parallel layout are not among them.
    """
    state = {"weights_fingerprint": manifest["weights_fingerprint"], "model": manifest["model"]}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def present_state(folder: Path, step: int) -> str | None:
    """Returns the state of the model in a run or Hugging Face folder, or None if the run has no checkpoint of that step.

    Raises:
        CheckpointError: the checkpoint or the model folder is damaged.
    """
    if not has_config(folder):
        return model_sha256(folder)
    return (
        state_of_manifest(open_checkpoint(step_folder(folder, step)).manifest) if is_committed(folder, step) else None
    )


def current_results(folder: Path, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the results of a folder's present model, and reports the number of others in one line.

    A result is kept if the run has no checkpoint of its step, since there is nothing to compare it with.

    Raises:
        CheckpointError: the checkpoint or the model folder is damaged.
    """
    kept, others = _divide(folder, results)
    _report(folder, others, len(results))
    return kept


def with_current_results(run: RunRecord) -> RunRecord:
    """Returns a reference with the results of its present model alone; a trained run is returned unchanged.

    Raises:
        CheckpointError: no result is of the present model, or an imported run without a checkpoint has results of several
            models.
    """
    if not run.is_reference:
        return run
    kept, others = _divide(run.folder, run.evaluations)
    if not kept:
        raise CheckpointError(
            f"{run.folder}: all results are of another state of the model; measure again: {_command(run.folder, others)}"
        )
    _report(run.folder, others, len(run.evaluations))
    if len({result.get("state_sha256") for result in kept}) > 1:
        raise CheckpointError(
            f"{run.folder}: the results are of several models, and there is no checkpoint to compare them with; copy the run's "
            "checkpoints here too"
        )
    return replace(run, evaluations=kept)


def _report(folder: Path, others: Sequence[dict[str, Any]], count: int) -> None:
    if others:
        say(
            f"{evaluations_folder(folder)}: {len(others)} of {count} results are of another state of the model and are not used; "
            f"measure again: {_command(folder, others)}"
        )


def _divide(folder: Path, results: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the results of the present model, and the others."""
    states = {step: present_state(folder, step) for step in {int(result["step"]) for result in results}}
    kept: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for result in results:
        state = states[result["step"]]
        (kept if state in (None, result.get("state_sha256")) else others).append(result)
    return kept, others


def _command(folder: Path, results: Sequence[dict[str, Any]]) -> str:
    """Returns a command that measures results again, with their files, steps and strides."""
    words: dict[str, list[str]] = {}
    for result in results:
        flag = _FLAGS.get(str(result.get("kind")))
        if flag is not None:
            path = str(result.get("text_path", "FILE"))
            words[flag] = sorted({*words.get(flag, []), path}) if flag == "--text" else [path]
    strides = sorted({result["stride"] for result in results if result.get("stride") is not None})
    steps = sorted({int(result["step"]) for result in results} - {0})
    for flag, numbers in (("--stride", strides), ("--steps", steps)):
        if numbers:
            words[flag] = [",".join(map(str, numbers))]
    return shlex.join(
        ["megatron-lion", "evaluate", str(folder), *(word for flag in words for word in (flag, *words[flag]))]
    )
