"""`megatron-lion export`: writes a checkpoint as a Hugging Face model folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.streams import busy, next_steps

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "Write a checkpoint as a folder that transformers loads: GPT-2 as GPT2LMHeadModel, BERT as MegatronBertForPreTraining; with "
    "safetensors, config, tokenizer, and a model card with the run's evaluation results"
)

_ARCHITECTURES = {"gpt2": "gpt2", "megatron-bert": "bert"}


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("target", type=str, help="run folder, or one checkpoint of it (RUN/checkpoints/step_…)")
    add("--output", type=str, required=True, metavar="FOLDER", help="new model folder")
    add("--step", type=str, default="latest", help="latest, or the step of a complete checkpoint")
    add(
        "--dtype",
        type=str,
        default="stored",
        choices=["stored", "fp32", "bf16"],
        help="dtype of the weights; stored keeps the checkpoint's, bit for bit",
    )
    add(
        "--architecture",
        type=str,
        default="auto",
        choices=["auto", "gpt2", "megatron-bert", "bert"],
        help="fail if the run has another architecture; bert always fails, because it is post-LN",
    )
    add(
        "--tokenizer",
        type=str,
        default=None,
        metavar="FOLDER",
        help="tokenizer to use instead of the one in the run folder",
    )
    add(
        "--check",
        type=bool,
        default=True,
        help="before the folder gets its name, check that transformers computes the same logits",
    )
    add("--overwrite", action="store_true", help="replace an earlier export in FOLDER")
    add("--device", type=str, default="auto", choices=["auto", "cuda", "cpu"], help="device of the check")


def run(args: Any) -> None:
    """Writes the folder and prints its size and the result of the check."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.evaluate.open_target import split_target
    from megatron_lion.jobs import world_size_from_env
    from megatron_lion.runs.folder import read_config
    from megatron_lion.runs.steps import choose_step

    if world_size_from_env() > 1:
        raise ConfigError("export runs on one process: start it without a launcher")
    folder, step_word = split_target(Path(args.target), args.step)
    check_architecture(args.architecture, read_config(folder).model.kind)
    with busy(f"reading {folder}, checking what is written" if args.check else f"reading {folder}"):
        from megatron_lion.evaluate.open_run import open_run
        from megatron_lion.interop.hf_export import export_checkpoint

        with open_run(folder, device=args.device, precision="fp32", tokenizer=args.tokenizer) as model:
            step = choose_step(step_word, model.steps)
            dtype = None if args.dtype == "stored" else args.dtype
            done = export_checkpoint(
                model, step, Path(args.output), dtype=dtype, overwrite=args.overwrite, check=args.check
            )
    checked = (
        f"transformers computes the same logits (relative difference {done.logit_difference:.1e})"
        if done.logit_difference is not None
        else "not compared with transformers"
    )
    sys.stdout.write(f"{done.folder}: step {done.step}, {done.num_parameters:,} parameters, {done.dtype}; {checked}\n")
    loader = "AutoModelForCausalLM" if read_config(folder).model.kind == "gpt2" else "AutoModelForPreTraining"
    code = f"from transformers import {loader}; model = {loader}.from_pretrained({json.dumps(str(done.folder))})"
    next_steps(["python", "-c", code])


def check_architecture(wanted: str, kind: str) -> None:
    """Checks that a kind of run fits a Hugging Face architecture.

    Args:
        wanted: "auto", "gpt2", "megatron-bert" or "bert".
        kind: model.kind of the run.

    Raises:
        ConfigError: they do not fit; the message names the architecture that does.
    """
    from megatron_lion.errors import ConfigError

    if wanted == "bert":
        raise ConfigError(
            "--architecture bert: Hugging Face's BERT normalises after each block (post-LN), this project's before it (pre-LN); "
            "export as megatron-bert"
        )
    if wanted != "auto" and _ARCHITECTURES[wanted] != kind:
        fits = next(name for name, ours in _ARCHITECTURES.items() if ours == kind)
        raise ConfigError(f"--architecture {wanted}: the run is a {kind}; omit the flag or give {fits}")
