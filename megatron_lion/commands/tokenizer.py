"""`megatron-lion tokenizer train`: trains a vocabulary on one's own text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.commands.prepare import add_reading_flags
from megatron_lion.streams import next_steps

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "tokenizer train: train a byte-level BPE (GPT-2: vocab.json, merges.txt) or a WordPiece vocabulary (BERT: vocab.txt) on text "
    "(jsonl, json, txt, parquet, arrow; plain or compressed); the same text gives the same files"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the subcommand's flags to its parser."""
    add = parser.add_argument
    add("action", type=Literal["train"], help="train")
    add_reading_flags(parser)
    add(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="number of ids; at least 258 for bpe and 200 for wordpiece; usual: 2,048 for a novel, 8,192 for 10 MB, 50,257 for 1 GB",
    )
    add("--output", type=str, required=True, metavar="DIR", help="folder to make")
    add(
        "--kind",
        type=Literal["bpe", "wordpiece"],
        default="bpe",
        help="bpe: for GPT-2; wordpiece: for BERT, in lower case",
    )
    add("--overwrite", action="store_true", help="replace another tokenizer of the same kind in the folder")


def run(args: Any) -> None:
    """Trains the tokenizer and prints its size and the next command."""
    from megatron_lion.errors import StoppedOnRequest
    from megatron_lion.logs import messages_on_stderr
    from megatron_lion.prepare.progress import ConsoleProgress
    from megatron_lion.prepare.train_tokenizer import FILES, TrainOptions, train_tokenizer

    options = TrainOptions(
        inputs=args.input,
        vocab_size=args.vocab_size,
        output=args.output,
        kind=args.kind,
        json_key=args.json_key,
        format=args.format,
        on_error=args.on_error,
        overwrite=args.overwrite,
    )
    try:
        with messages_on_stderr(), ConsoleProgress() as progress:
            tokenizer = train_tokenizer(options, progress)
    except KeyboardInterrupt:
        raise StoppedOnRequest("stopped; nothing was written") from None
    sys.stdout.write(f"{args.output}: {tokenizer.vocab_size:,} ids ({args.kind}: {', '.join(FILES[args.kind])})\n")
    next_steps(next_words(args))


def next_words(args: Any) -> list[str]:
    """Returns the words of the `prepare` command that encodes the same text with the tokenizer."""
    words = ["megatron-lion", "prepare", "--input", *args.input, "--tokenizer", args.output, "--output", "data/my"]
    if args.kind == "wordpiece":
        words += ["--task", "bert"]
    for flag, value, default in (("--json-key", args.json_key, "text"), ("--format", args.format, "auto"),
                                 ("--on-error", args.on_error, "stop")):  # fmt: skip
        if value != default:
            words += [flag, value]
    return words
