"""`megatron-lion pretrain`: trains a run, or resumes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.config_hints import NO_DATA
from megatron_lion.configfile import add_run_config, dump_config, run_config_from_namespace
from megatron_lion.errors import ConfigError
from megatron_lion.jobs import rank_from_env, world_size_from_env
from megatron_lion.streams import load, next_steps, say

HELP = (
    "Pretrain GPT-2 or BERT. The same command resumes from the newest checkpoint. megatron-lion starts one process; for N processes "
    "use python -m megatron_lion.launcher --processes N pretrain …"
)


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.takes_config_first = True
    add_run_config(parser)
    parser.add_argument(
        "--text",
        type=str,
        nargs="+",
        default=None,
        metavar="FILE",
        help="train on this text (.txt, .jsonl, …; files or folders): make a tokenizer and a dataset in RUN.text first. "
        "Without --config, the model is a tiny GPT-2 and run_dir is runs/NAME",
    )
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
    if args.text is not None:
        _run_on_text(args)
        return
    config = _config_of(args)
    if not _shown(args, config):
        _train(args, config)


def _run_on_text(args: Any) -> None:
    """Prepares the text of --text if it is not prepared, and trains on it."""
    from megatron_lion.commands import own_text

    with own_text.advice_for_texts():
        text = own_text.open_text(args.text, world_size_from_env())
    words = list(args.parser.words)
    settings = own_text.settings_line(text, words)
    parser = args.parser
    args = parser.parse_args(own_text.default_words(text, words))
    args.parser = parser
    config = _config_of(args)
    with_data = own_text.with_data(config)
    prepared = own_text.is_prepared(config, text, fresh=args.fresh)
    if args.dry_run and not args.print_config:
        sys.stdout.write(own_text.preview(config, text, prepared=prepared))
    note = settings if settings is not None else own_text.config_note(config)
    if note is not None and not args.print_config:
        say(note)
    known = prepared or args.print_config
    shown = with_data if known else own_text.without_data(config, text)
    if _shown(args, shown, data=None if known else own_text.data_preview(config, text)):
        return
    if not prepared:
        from megatron_lion.device import select_device
        from megatron_lion.runs.folder import check_settings

        check_settings(with_data, may_differ=True)
        select_device(config.device)  # before minutes of preparation
        with own_text.advice_for_texts():
            own_text.prepare_text(config, text)
    _train(args, with_data, hints=False)
    sys.stdout.write(f"samples: {own_text.sample_command(config, text)}\n")
    if config.model.kind == "gpt2":
        next_steps(
            ["megatron-lion", "evaluate", config.run_dir, "--text", "FILE"],
            ["megatron-lion", "export", config.run_dir, "--output", "FOLDER"],
        )


def _config_of(args: Any) -> RunConfig:
    """Returns the checked settings of the run."""
    from dataclasses import replace

    config: RunConfig = run_config_from_namespace(args.parser, args)
    if args.fresh and args.fall_back:
        raise ConfigError("--fresh and --fall-back: give one of them; the first starts over, the second resumes")
    if args.max_steps is not None:
        config = replace(config, train=replace(config.train, stop_after=args.max_steps))
    check_config(config, world_size_from_env())
    return config


def _shown(args: Any, config: RunConfig, data: str | None = None) -> bool:
    """Prints the settings or the size of the run if a flag asks for it; returns whether one does.

    Args:
        args: the parsed flags.
        config: the run's settings.
        data: see `dry_run`.
    """
    if args.print_config:
        from megatron_lion.setting_texts import commented

        sys.stdout.write(commented(dump_config(config)))
    elif args.dry_run:
        from megatron_lion.runs.folder import check_settings
        from megatron_lion.train.dryrun import dry_run

        if rank_from_env() == 0:
            if not args.fresh and data is None:
                check_settings(config)
            _check_splits(config)
            sys.stdout.write(dry_run(config, world_size_from_env(), data) + "\n")
    return bool(args.print_config or args.dry_run)


def _check_splits(config: RunConfig) -> None:
    """Rejects data that lack a split that the run will read; the run itself finds that when it builds its datasets."""
    if config.data.path:
        from megatron_lion.data.corpora import check_splits, open_corpora

        probes_test = config.probe.data == "test" and bool(config.probe.every) and config.probe.mode == "frozen"
        corpora = open_corpora(config.data, config.model)
        held_out = int(config.train.test_every > 0)
        check_splits(corpora, [1, held_out, held_out])
        check_splits(corpora, [0, 0, int(probes_test)])


def _losses(config: RunConfig, step: int) -> str:
    """Returns the losses that the run measured at a step, as the end of a sentence."""
    from megatron_lion.runs.paths import metrics_file
    from megatron_lion.runs.series import read_metrics

    path = metrics_file(Path(config.run_dir))
    series = read_metrics(path) if path.is_file() else {}
    found = []
    for key, name in (("train/loss", "training"), ("valid/loss", "validation"), ("test/loss", "test")):
        values = dict(zip(series[key].steps, series[key].values, strict=True)) if key in series else {}
        if step in values:
            found.append(f"{name} {values[step]:.4f}")
    return f"; loss: {', '.join(found)}" if found else ""


def _train(args: Any, config: RunConfig, *, hints: bool = True) -> None:
    """Trains, prints how far the run is, and then the next commands if `hints`."""
    from megatron_lion.data.corpora import check_paths

    if not config.data.path:
        raise ConfigError(NO_DATA)
    check_paths(config.data.path)  # before torch is imported and a run folder is made
    load("megatron_lion.train.loop", shown=rank_from_env() == 0)
    from megatron_lion.runs.steps import list_steps
    from megatron_lion.train.loop import pretrain

    pretrain(config, fresh=args.fresh, fall_back=args.fall_back)
    if rank_from_env() == 0:
        # The newest checkpoint's step: beyond stop_after if the run had already been there, or if that step was skipped.
        steps = list_steps(Path(config.run_dir))[-1]
        sys.stdout.write(
            f"done: {steps:,} of {config.train.steps:,} steps in {config.run_dir}{_losses(config, steps)}\n"
        )
        if hints and steps >= config.train.steps:
            text = (
                ["--wikitext103", "wiki.test.tokens"]
                if config.model.kind == "gpt2"
                else ["--fill-mask", "It was a [MASK] day."]
            )
            next_steps(
                ["megatron-lion", "evaluate", config.run_dir, *text],
                ["megatron-lion", "compare", config.run_dir],
            )
