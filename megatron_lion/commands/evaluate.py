"""`megatron-lion evaluate`: zero-shot perplexity of a run's checkpoints, each number with its convention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.commands.spot_checks import spot_checks
from megatron_lion.runs.paths import evaluations_folder
from megatron_lion.streams import load, next_steps, say, stderr_is_terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.compare.table import Cell
    from megatron_lion.evaluate.evaluate_steps import Outcome
    from megatron_lion.evaluate.tasks import Task

HELP = "Measure the zero-shot perplexity of a run's checkpoints, or of a Hugging Face GPT-2, on WikiText-103, LAMBADA or any text"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add(
        "target",
        type=str,
        help="run folder, one checkpoint of it (RUN/checkpoints/step_…), or Hugging Face GPT-2 folder",
    )
    add("--steps", type=str, default="latest", help="all, latest, or a list such as 10000,20000")
    add(
        "--wikitext103",
        type=str,
        default=None,
        metavar="FILE",
        help="wiki.test.tokens, wiki.test.raw, or a Parquet or JSON file with a line in each row; measured by Megatron's "
        "convention and page by page",
    )
    add(
        "--text",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 text files, encoded without changes, or JSON, Parquet or Arrow files, read as documents",
    )
    add(
        "--json-key",
        type=str,
        default="text",
        help="key (JSON) or column (table) of the text in the files of --wikitext103, --text and --lambada",
    )
    add(
        "--lambada",
        type=str,
        default=None,
        metavar="FILE",
        help="LAMBADA as JSON lines or Parquet with a passage in each line or row, or as .txt with one on each line",
    )
    add(
        "--stride",
        type=str,
        default="32",
        help="tokens that each window after the first scores; full means no overlap; a list such as 32,full measures both",
    )
    add(
        "--pages",
        type=bool,
        default=True,
        help="with --wikitext103, also measure word and byte perplexity page by page, as lm-evaluation-harness does",
    )
    add("--batch-size", type=int, default=16, help="windows in one forward pass on one process")
    add(
        "--max-tokens",
        type=int,
        default=None,
        help="score only this many first tokens of --wikitext103 and --text, for a quick check; the result is marked",
    )
    add(
        "--precision",
        type=str,
        default="auto",
        choices=["auto", "fp32", "tf32", "bf16"],
        help="precision of the forward pass; auto takes fp32 on a CPU and bf16 on CUDA; tf32, on CUDA, keeps fp32 weights",
    )
    add(
        "--device",
        type=str,
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto takes CUDA if a device is visible",
    )
    add(
        "--tokenizer",
        type=str,
        default=None,
        metavar="FOLDER",
        help="tokenizer to use instead of the one in the target folder",
    )
    add(
        "--watch",
        action="store_true",
        help="wait for the checkpoints of a run in training and evaluate each until the last step",
    )
    add(
        "--explain",
        type=float,
        default=None,
        metavar="NUMBER",
        help="print the convention of a published perplexity, and the result of the same convention, if measured",
    )
    add(
        "--fill-mask",
        type=str,
        nargs="+",
        default=[],
        metavar="TEXT",
        help="BERT runs: print the likeliest tokens for every [MASK] of each text",
    )
    add(
        "--sentence-order",
        type=str,
        nargs=2,
        default=None,
        metavar=("FIRST", "SECOND"),
        help="BERT runs: print the probability that the first passage comes before the second",
    )


def run(args: Any) -> None:
    """Measures, writes TARGET/eval/*.json and prints a table with one line for each result."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.evaluate.open_target import choose_precision, open_model, split_target
    from megatron_lion.evaluate.train_overlap import with_train_overlaps
    from megatron_lion.evaluate.wikitext import check_is_file
    from megatron_lion.jobs import rank_from_env
    from megatron_lion.runs.paths import has_config
    from megatron_lion.signals import stop_raises

    folder, steps = split_target(Path(args.target), args.steps)
    _check_flags(args)
    if args.fill_mask or args.sentence_order:
        spot_checks(folder, steps, args)
        return
    if not (args.wikitext103 or args.text or args.lambada):
        if args.explain is None:
            raise ConfigError("nothing to evaluate on: give --wikitext103 FILE, --text FILE or --lambada FILE")
        sys.stdout.write(_explain(args.explain, folder) + "\n")
        return
    for path in filter(None, [args.wikitext103, *args.text, args.lambada]):
        check_is_file(path)
    stopped = "stopped; finished results are kept; the same command measures the others"
    with stop_raises(stopped):
        load("megatron_lion.evaluate.open_run", shown=rank_from_env() == 0)
        args.precision = choose_precision(args.precision, args.device)
        with open_model(folder, device=args.device, precision=args.precision, tokenizer=args.tokenizer) as model:
            chosen = _chosen_steps(model, folder, steps, watch=args.watch)
            outcomes = _evaluate(model, folder, chosen, with_train_overlaps(_tasks(model, args), folder), args)
            if model.rank == 0:
                _print_outcomes(outcomes, folder, args.precision)
                if args.explain is not None:
                    sys.stdout.write("\n" + _explain(args.explain, folder) + "\n")
                next_steps(["megatron-lion", "compare", str(folder), *([] if has_config(folder) else ["RUN"])])


# Defaults of the flags that have no effect with --fill-mask and --sentence-order.
_OF_MEASUREMENTS: dict[str, Any] = {
    "--json-key": "text", "--stride": "32", "--pages": True, "--batch-size": 16, "--max-tokens": None, "--watch": False, "--explain": None,
}  # fmt: skip


def _value(args: Any, flag: str) -> Any:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def _check_flags(args: Any) -> None:
    """Rejects a batch size below 1, and flags that have no effect together with the other flags.

    Raises:
        ConfigError: a flag is rejected; the message names it.
    """
    from megatron_lion.errors import ConfigError

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: must be at least 1")
    texts = {"--wikitext103": args.wikitext103, "--text": args.text, "--lambada": args.lambada}
    given = [flag for flag, value in texts.items() if value]
    spot_checks = [
        flag for flag, value in (("--fill-mask", args.fill_mask), ("--sentence-order", args.sentence_order)) if value
    ]
    others = [*given, *(flag for flag, default in _OF_MEASUREMENTS.items() if _value(args, flag) != default)]
    if spot_checks and others:
        raise ConfigError(f"{spot_checks[0]} prints predictions and measures nothing; remove {', '.join(others)}")
    if args.json_key != "text" and not given:
        raise ConfigError(
            f"--json-key {args.json_key}: names the text in a file; give --wikitext103, --text or --lambada"
        )
    if args.max_tokens is not None and given == ["--lambada"]:
        raise ConfigError(f"--max-tokens {args.max_tokens}: applies to --wikitext103 and --text, not to --lambada")


def _tasks(model: Any, args: Any) -> list[Task]:
    """Reads and encodes the texts; every rank does this for itself and has the same tasks."""
    from megatron_lion.evaluate.lambada import read_passages
    from megatron_lion.evaluate.tasks import Reader, lambada_task, pages_task, stream_task
    from megatron_lion.evaluate.wikitext import read_text

    reader = Reader(
        tokenizer=model.tokenizer,
        tokenizer_sha256=model.tokenizer.sha256,
        seq_length=model.seq_length,
        precision=args.precision,
        max_tokens=args.max_tokens,
    )
    strides = _strides(args.stride, model.seq_length)
    tasks: list[Task] = []
    if args.wikitext103:
        text = read_text(args.wikitext103, "wikitext103", args.json_key)
        tasks += [stream_task(reader, text, stride) for stride in strides]
        if args.pages and args.max_tokens is None and getattr(model.tokenizer, "eod_token", None):
            tasks.append(pages_task(reader, text))
    for path in args.text:
        text = read_text(path, "text", args.json_key)
        tasks += [stream_task(reader, text, stride) for stride in strides]
    if args.wikitext103 and model.rank == 0:
        _note_wikitext(tasks, args)
    if args.lambada:
        tasks.append(lambada_task(reader, read_passages(args.lambada, args.json_key)))
    if model.rank == 0:
        _warn_of_short_texts(tasks, model.seq_length)
    return tasks


def _note_wikitext(tasks: list[Task], args: Any) -> None:
    """Reports facts that the table does not show: an unknown text, and omitted page-by-page results."""
    from megatron_lion.evaluate.known_texts import UNKNOWN

    if tasks[0].conditions["text_version"] == UNKNOWN:
        say(
            f"{args.wikitext103}: not a published WikiText file (by its hash); the result is no WikiText-103 perplexity"
        )
    if args.pages and args.max_tokens is not None:
        say("--max-tokens: page-by-page results need the whole text and are omitted")


def _warn_of_short_texts(tasks: list[Task], seq_length: int) -> None:
    for task in tasks:
        if task.kind in ("wikitext103", "text") and len(task.segments) == 1 and task.forward_tokens < seq_length:
            say(
                f"{task.conditions['text_path']}: {task.forward_tokens + 1} tokens are fewer than one window of "
                f"{seq_length}; the loss is measured with short contexts only"
            )


def _strides(words: str, seq_length: int) -> list[int]:
    """Returns the strides of --stride without duplicates, in order."""
    from megatron_lion.errors import ConfigError

    try:
        strides = [seq_length if word.strip() == "full" else int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"--stride {words}: give a number of tokens, full, or several separated by commas") from None
    return list(dict.fromkeys(strides))


def _chosen_steps(model: Any, folder: Path, asked: str, *, watch: bool) -> Iterable[int]:
    """Returns the steps to evaluate; with --watch, an iterator that waits for new checkpoints."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.evaluate.evaluate_steps import follow
    from megatron_lion.runs.folder import read_config
    from megatron_lion.runs.paths import has_config
    from megatron_lion.runs.steps import choose_steps, list_steps

    if not watch:
        return choose_steps(asked, model.steps)
    if not has_config(folder):
        raise ConfigError(f"--watch: {folder} is not a run in training; give a run folder")
    return follow(model, lambda: list_steps(folder), read_config(folder).train.steps)


def _evaluate(model: Any, folder: Path, steps: Iterable[int], tasks: list[Task], args: Any) -> list[Outcome]:
    """Measures every task on every step, with a progress bar on rank 0."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from megatron_lion.evaluate.evaluate_steps import evaluate_step

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[windows]}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    outcomes: list[Outcome] = []
    is_shown = model.rank == 0 and stderr_is_terminal()
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown, transient=True) as bars:

        def progress(task: Task, step: int) -> Callable[[int, int], None]:
            bar = bars.add_task(f"step {step}  {task.kind}", total=None, windows="reading the text")
            return lambda done, total: bars.update(
                bar, completed=done, total=total, windows=f"{done:,}/{total:,} windows", visible=done < total
            )

        for step in steps:
            for outcome in evaluate_step(
                model, step, tasks, evaluations_folder(folder), batch_size=args.batch_size, progress=progress
            ):
                outcomes.append(outcome)
                if args.watch and model.rank == 0:
                    bars.console.print(_line(outcome), soft_wrap=True)
    return outcomes


def _print_outcomes(outcomes: list[Outcome], folder: Path, precision: str) -> None:
    """Prints a table to stdout, with one line for each result; all have the same precision."""
    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.compare.table import Table

    table = Table(
        slug="evaluation",
        title=f"Zero-shot evaluation of {folder}, forward pass in {precision}",
        columns=["step", "measured", "text", "stride", "loss (nats)", "perplexity", "ln ppl", "further", "was"],
        rows=[_cells(outcome) for outcome in outcomes],
        formats={"step": "d", "stride": "d", "loss (nats)": ".4f", "perplexity": _PERPLEXITY, "ln ppl": ".4f"},
        num_keys=3,
    )
    print_tables([table])
    sys.stdout.write(f"results: {evaluations_folder(folder)}\n")


_PERPLEXITY = ",.6g"


def _cells(outcome: Outcome) -> list[Cell]:
    """Returns the cells of a result: its step, what was measured, on which text, and the numbers."""
    from megatron_lion.evaluate.train_overlap import overlap_text

    record = outcome.record
    kind = record["kind"]
    text = record["text_version"] if record["text_version"] != "unknown" else Path(record["text_path"]).name
    if kind == "lambada":
        level, ppl, log_ppl = "word", record["word_ppl"], record["log_word_ppl"]
        further = f"accuracy {record['accuracy']:.2%}, last token {record['last_token_accuracy']:.2%}"
    elif kind.endswith("_pages"):
        level, ppl, log_ppl = "word", record["word_ppl"], record["log_word_ppl"]
        further = f"{record['bits_per_byte']:.4f} bits/byte"
    else:
        level, ppl, log_ppl = "token", record["token_ppl"], record["log_token_ppl"]
        further = f"adjusted {_perplexity(record['adjusted_ppl']):{_PERPLEXITY}}"
    if record.get("max_tokens"):
        further += f", first {record['max_tokens']} tokens only"
    if overlap := overlap_text(record):
        further += f", {overlap}"
    return [record["step"], f"{kind} ({level})", text, record["stride"], record["loss"], _perplexity(ppl), log_ppl, further,
            "new" if outcome.is_new else "found"]  # fmt: skip


def _perplexity(value: float | None) -> float:
    """Returns a perplexity; None, which means beyond float64, becomes infinity."""
    return float("inf") if value is None else value


def _line(outcome: Outcome) -> str:
    """Returns a result as one line, for --watch."""
    step, measured, text, stride, loss, ppl, log_ppl, further, was = _cells(outcome)
    return (
        f"{step}  {measured}  {text}  {'' if stride is None else stride}  {loss:.4f}  {ppl:{_PERPLEXITY}}  {log_ppl:.4f}  "
        f"{further}  {was}"
    )


def _explain(value: float, folder: Path) -> str:
    """Returns the text of --explain over the results of a folder's present model."""
    from megatron_lion.errors import CheckpointError, ConfigError
    from megatron_lion.evaluate.published_results import explain
    from megatron_lion.evaluate.stored_results import current_results
    from megatron_lion.runs.sealed_json import read_sealed

    results = []
    for path in sorted(evaluations_folder(folder).glob("*.json")):
        try:
            results.append(read_sealed(path))
        except (OSError, ValueError) as error:
            say(f"{path}: ignored: {error}")
    try:
        return explain(value, current_results(folder, results))
    except (CheckpointError, ConfigError) as error:
        say(f"{evaluations_folder(folder)}: ignored: {error}")
        return explain(value, [])
