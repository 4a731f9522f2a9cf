"""`megatron-lion import`: makes a run from a Hugging Face GPT-2 or MegatronBert folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.streams import busy, next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "Make a run folder from a Hugging Face GPT-2 or MegatronBert folder, to evaluate, probe or train it further at any layout with "
    "`pretrain --config RUN/config.yaml`"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    from megatron_lion.configfile import add_run_config

    parser.add_argument(
        "source",
        type=str,
        metavar="FOLDER",
        help="folder with config.json, model.safetensors and the tokenizer's files; nothing is downloaded",
    )
    parser.add_argument(
        "--tokenizer", type=str, default=None, metavar="FOLDER", help="tokenizer to use instead of the folder's own"
    )
    parser.add_argument(
        "--check",
        type=bool,
        default=True,
        help="true or false: check that transformers computes the same logits before the run folder gets its name",
    )
    parser.add_argument(
        "--output", type=str, default=None, metavar="RUN", help="the same as --run_dir, named as in the other verbs"
    )
    add_run_config(parser)


def run(args: Any) -> None:
    """Writes run_dir with a checkpoint of step 0."""
    from dataclasses import fields, replace

    from megatron_lion.config import ModelConfig, ParallelConfig, RunConfig
    from megatron_lion.config_checks import check_config
    from megatron_lion.configfile import run_config_from_namespace
    from megatron_lion.errors import ConfigError
    from megatron_lion.evaluate.open_target import no_such_folder
    from megatron_lion.jobs import world_size_from_env

    if world_size_from_env() > 1:
        raise ConfigError("import runs on one process: start it without a launcher; the run loads at any layout")
    source = Path(args.source)
    if not source.is_dir():
        raise no_such_folder(source, "a Hugging Face model folder")
    config = run_config_from_namespace(args.parser, args)
    if args.output is not None:
        if config.run_dir not in (RunConfig().run_dir, args.output):
            raise ConfigError(
                f"--output {args.output} and --run_dir {config.run_dir} name two folders for one run; give one of them"
            )
        config = replace(config, run_dir=args.output)
    check_config(replace(config, parallel=ParallelConfig()), 1)  # the layout is chosen by the later training job
    with busy(f"reading {source}"):
        from megatron_lion.interop.hf_import import import_folder

        done = import_folder(source, config, tokenizer=args.tokenizer, check=args.check)
    model = done.model
    for name in (field.name for field in fields(ModelConfig)):
        given, found = getattr(config.model, name), getattr(model, name)
        if given not in (getattr(ModelConfig(), name), found):
            say(f"note: model.{name} is {found} as in {source}, not {given}")
    folder = str(done.run_dir)
    sys.stdout.write(
        f"{done.run_dir}: {model.kind}, {model.num_layers} layers, width {model.hidden_size}, {model.seq_length} positions\n"
    )
    evaluation = ["--text", "FILE"] if model.kind == "gpt2" else ["--fill-mask", "TEXT"]
    data = [] if config.data.path else ["--data.path", "[DATASET]"]
    next_steps(
        ["megatron-lion", "evaluate", folder, *evaluation],
        ["megatron-lion", "pretrain", "--config", f"{folder}/config.yaml", *data],
    )
