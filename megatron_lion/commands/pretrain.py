"""`megatron-lion pretrain`: trains a run, or resumes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import add_run_config, dump_config, run_config_from_namespace
from megatron_lion.errors import ConfigError

HELP = (
    "Pretrain GPT-2 or BERT. The same command resumes from the newest checkpoint. megatron-lion starts one process; for N processes "
    "use python -m megatron_lion.launcher --processes N pretrain …"
)


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    add_run_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check settings and data, print model size, memory and time, and exit"
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved settings as YAML, ready for --config, and exit"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="rename an earlier run in run_dir (to RUN.old-1, …) and start a new one"
    )
    parser.add_argument(
        "--fall-back",
        action="store_true",
        help="if the newest checkpoint is damaged, incomplete or foreign, move it aside and resume from the newest intact one",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        default=None,
        help="save a checkpoint and exit after this step; the schedule still spans train.steps",
    )


def run(args: Any) -> None:
    """Trains or resumes the run, or prints its settings or size."""
    from dataclasses import replace

    from megatron_lion.jobs import rank_from_env, world_size_from_env
    from megatron_lion.runs.steps import list_steps

    config: RunConfig = run_config_from_namespace(args.parser, args)
    if args.fresh and args.fall_back:
        raise ConfigError("--fresh and --fall-back: give one of them; the first starts over, the second resumes")
    if args.max_steps is not None:
        config = replace(config, train=replace(config.train, stop_after=args.max_steps))
    check_config(config, world_size_from_env())
    if args.print_config:
        sys.stdout.write(dump_config(config))
        return
    if args.dry_run:
        from megatron_lion.train.dryrun import dry_run

        if rank_from_env() == 0:
            sys.stdout.write(dry_run(config, world_size_from_env()) + "\n")
        return
    from megatron_lion.train.loop import pretrain

    pretrain(config, fresh=args.fresh, fall_back=args.fall_back)
    if rank_from_env() == 0:
        # The newest checkpoint's step: beyond stop_after if the run had already been there, or if that step was skipped.
        steps = list_steps(Path(config.run_dir))[-1]
        sys.stdout.write(f"done: {steps:,} of {config.train.steps:,} steps in {config.run_dir}\n")
