"""Opens a command line's model: a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.folder import read_config
from megatron_lion.runs.paths import has_config, metrics_file
from megatron_lion.runs.steps import run_and_step


def split_target(target: Path, steps: str) -> tuple[Path, str]:
    """Returns the run or model folder, and the steps; a checkpoint's folder determines its step.

    Args:
        target: the folder given on the command line.
        steps: the value of --step or --steps.

    Raises:
        ConfigError: the target is a checkpoint of another step than `steps`.

    >>> split_target(Path("run/checkpoints/step_0000100"), "latest")
    (PosixPath('run'), '100')
    """
    found = run_and_step(target)
    if found is None:
        return target, steps
    run_dir, own = found
    if steps not in ("latest", "all", str(own)):
        raise ConfigError(f"{target}: is step {own}, but {steps} was requested; give {run_dir} for other steps")
    return run_dir, str(own)


def choose_precision(wanted: str, device: str) -> str:
    """Returns the precision of a forward pass: for "auto" bf16 on CUDA and fp32 on a CPU.

    Args:
        wanted: "auto", "fp32", "tf32" or "bf16".
        device: "auto", "cuda" or "cpu".

    Raises:
        ConfigError: the device has no TF32 products.
    """
    import torch

    on_cuda = device != "cpu" and torch.cuda.is_available()
    if wanted == "tf32" and not on_cuda:
        raise ConfigError("--precision tf32: needs a CUDA device; use fp32")
    return ("bf16" if on_cuda else "fp32") if wanted == "auto" else wanted


@contextmanager
def open_model(folder: Path, *, device: str, precision: str, tokenizer: str | None) -> Iterator[Any]:
    """Opens a model that predicts next tokens: a GPT-2 run or a Hugging Face GPT-2 folder, by the folder's files.

    Args:
        folder: run or model folder.
        device: "auto", "cuda" or "cpu".
        precision: "fp32", "bf16", or "tf32": fp32 weights whose products CUDA rounds to 10 bits of mantissa.
        tokenizer: a tokenizer to use instead of the folder's own.

    Yields:
        A `RestoredRun` or a `HuggingFaceModel`.

    Raises:
        CheckpointError: the folder is neither.
        ConfigError: the folder is a BERT run.
    """
    options: dict[str, Any] = {"device": device, "tokenizer": tokenizer}
    options["precision"] = "fp32" if precision == "tf32" else precision
    if has_config(folder):
        _need_next_token_model(folder)
        from megatron_lion.evaluate.open_run import open_run

        opened: AbstractContextManager[Any] = open_run(folder, **options)
    elif (folder / "config.json").is_file():
        from megatron_lion.evaluate.hf_model import open_huggingface

        opened = open_huggingface(folder, **options)
    elif not folder.is_dir():
        raise no_such_folder(folder, "the run_dir of a `megatron-lion pretrain`")
    else:
        raise CheckpointError(
            f"{folder}: contains neither a run (config.yaml) nor a Hugging Face model (config.json); give the run_dir of a "
            "`megatron-lion pretrain`"
        )
    with opened as model, _matrix_products("high" if precision == "tf32" else "highest"):
        yield model


@contextmanager
def _matrix_products(precision: str) -> Iterator[None]:
    """Sets how torch multiplies fp32 matrices on CUDA: "high" with TF32, "highest" without."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def no_such_folder(folder: Path, wanted: str) -> CheckpointError:
    """Returns the error for a folder that does not exist; hf:NAME, which names a tokenizer, gets the command that downloads.

    Args:
        folder: what was given.
        wanted: the folder that is needed, for the message.
    """
    name = str(folder)
    if name.startswith("hf:"):
        place = shlex.quote(name.rpartition("/")[2].removeprefix("hf:"))
        command = f"hf download {shlex.quote(name.removeprefix('hf:'))} --local-dir {place}"
        return CheckpointError(f"{name}: models are not downloaded; run `{command}`, then give {place}")
    return CheckpointError(f"{folder}: no such folder; give {wanted}")


def _need_next_token_model(folder: Path) -> None:
    """Rejects a BERT run: it predicts masked tokens from both sides, so it has no next-token perplexity."""
    kind = read_config(folder).model.kind
    if kind != "gpt2":
        # An imported run has no losses until it is trained.
        losses = f"for its losses, run megatron-lion compare {folder}; " if metrics_file(folder).is_file() else ""
        raise ConfigError(
            f"{folder}: a {kind} run predicts masked tokens, not next ones; {losses}for its predictions, run megatron-lion evaluate "
            f"{folder} --fill-mask TEXT or --sentence-order A B"
        )
