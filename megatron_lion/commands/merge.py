"""`megatron-lion merge`: joins dataset folders into one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "join dataset folders of one tokenizer into one; documents that another dataset holds out are left out of train"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("datasets", type=str, nargs="+", help="dataset folders that prepare made, in the order of their documents")
    add("--output", type=str, required=True, metavar="DIR", help="dataset folder to make")
    add("--deduplicate", action="store_true", help="leave out documents that equal an earlier one of their split")
    add("--overwrite", action="store_true", help="replace a dataset folder that was made in another way")


def run(args: Any) -> None:
    """Joins the datasets and prints a summary on stdout."""
    from megatron_lion.commands.prepare import summary
    from megatron_lion.errors import StoppedOnRequest
    from megatron_lion.logs import messages_on_stderr
    from megatron_lion.prepare.merge_datasets import merge_datasets
    from megatron_lion.prepare.progress import ConsoleProgress
    from megatron_lion.streams import next_steps

    try:
        with messages_on_stderr(), ConsoleProgress() as progress:
            manifest = merge_datasets(
                args.datasets, args.output, deduplicate=args.deduplicate, overwrite=args.overwrite, progress=progress
            )
    except KeyboardInterrupt:
        raise StoppedOnRequest("stopped; nothing was written; run the same command again") from None
    sys.stdout.write(summary(args.output, manifest))
    next_steps(["megatron-lion", "inspect", args.output])
