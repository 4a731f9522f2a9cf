"""The command line: the table of verbs, and the conversion of errors to one line and an exit code.

A verb's module is imported only if that verb runs, and imports torch only after its arguments are parsed. --help and
messages about arguments therefore take about a second.
"""

from __future__ import annotations

import errno
import signal
import sys
import textwrap
from contextlib import nullcontext
from traceback import print_exc
from typing import Any

from megatron_lion import __version__
from megatron_lion.commands.verbs import VERBS, build_parser, verb_module
from megatron_lion.errors import ConfigError, MegatronLionError, StoppedOnRequest, StorageError
from megatron_lion.exit_report import UNTYPED, leave, record, report
from megatron_lion.jobs import known_rank, place_from_env
from megatron_lion.logs import install_last_resort
from megatron_lion.memory_faults import memory_fault
from megatron_lion.signals import IN_START, stop_raises
from megatron_lion.streams import guard_streams, lost_output, say

PRINTING_VERBS = {"compare", "inspect", "theory", "generate", "completion", "env", "help"}
PRINTING_FLAGS = (
    "-h", "--help", "--version", "--dry-run", "--print", "--print_config", "--explain", "--fill-mask", "--sentence-order",
)  # fmt: skip
"""With such a verb or flag the command's result is what it prints; elsewhere the result is in files."""

OTHER_VERBS = {"train": "pretrain", "eval": "evaluate", "report": "compare", "plot": "compare", "sample": "generate",
               "serve": "watch", "tokenize": "prepare", "convert": "export"}  # fmt: skip
"""What other programs call a verb."""

USAGE = """usage: megatron-lion VERB [options]      (or: python -m megatron_lion VERB …)

{verbs}

`megatron-lion VERB --help` lists a verb's options.
`megatron-lion --traceback VERB …` prints the traceback of an error.
"""


def usage() -> str:
    """Returns the text of --help without a verb."""
    width = max(map(len, VERBS)) + 4
    lines = [
        textwrap.fill(text, 79, initial_indent=f"  {verb}".ljust(width), subsequent_indent=" " * width)
        for verb, text in VERBS.items()
    ]
    return USAGE.format(verbs="\n".join(lines))


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code (docs/exit-codes.md).

    Args:
        arguments: the words of the command line; default: sys.argv without the program.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in words[:1]
    if traceback:
        words.pop(0)
    if words and words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if words and words[0] == "--version":
        sys.stdout.write(f"megatron-lion {__version__}\n")
        return 0
    install_last_resort()
    try:
        # The other verbs install such a block themselves, or SIGTERM may end them at any time.
        with stop_raises(IN_START) if words[:1] in (["pretrain"], ["import"]) else nullcontext():
            return _run_verb(words)
    except MegatronLionError as error:
        if traceback and not isinstance(error, StoppedOnRequest):
            print_exc()
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("megatron-lion: interrupted")
        return 128 + signal.SIGINT  # the shell's code for a process that SIGINT ended
    except Exception:
        if known_rank() is None:
            raise  # the interpreter prints the traceback and ends with 1
        return _record_bug()


def _run_verb(words: list[str]) -> int:
    if not words:
        say(usage().rstrip())
        return 2
    verb = words[0]
    if verb not in VERBS:
        import difflib

        close = [OTHER_VERBS[verb]] if verb in OTHER_VERBS else difflib.get_close_matches(verb, VERBS, n=1)
        raise ConfigError(
            f"no verb '{verb}'{f'; did you mean {close[0]}?' if close else ''} (verbs: {', '.join(VERBS)})"
        )
    module = verb_module(verb)
    parser = build_parser(verb, module)
    arguments = parse(parser, words[1:])
    place_from_env()  # a wrong variable is reported before anything is written
    try:
        outcome = module.run(arguments)
    except (MemoryError, RuntimeError) as error:
        if (fault := memory_fault(error, verb)) is None:
            raise
        raise fault from error
    return int(outcome or 0)


def parse(parser: Any, words: list[str]) -> Any:
    """Parses a verb's words.

    Raises:
        ConfigError: a word is wrong; the message has one line for each mistake.
    """
    from megatron_lion.configfile import one_line

    try:
        namespace = parser.parse_args(words)
    except MegatronLionError:
        raise
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise ConfigError(one_line(str(error))) from error
    namespace.parser = parser
    return namespace


def _record_bug() -> int:
    """Prints the traceback of an unexpected exception of a launched rank, and records its exit code for the launcher."""
    print_exc()
    kind, error, _ = sys.exc_info()
    record(UNTYPED, f"{kind.__name__ if kind else 'error'}: {' '.join(str(error).split())[:300]}")
    return UNTYPED


def entry() -> None:
    """Entry point of the `megatron-lion` console script and of `python -m megatron_lion`."""
    guard_streams()
    try:
        code = main()
    except SystemExit as end:  # the parser's, after --help
        if end.code:
            raise
        code = 0
    leave(code or _lost_result(sys.argv[1:]))


def _lost_result(words: list[str]) -> int:
    """Reports text of a successful command that stdout refused, and returns the exit code."""
    error = lost_output()
    if error is None or error.errno == errno.EPIPE:  # whoever closes a pipe wants no more, such as `head`
        return 0
    reason = error.strerror or str(error)
    flags = {word.partition("=")[0] for word in words}
    if PRINTING_VERBS.isdisjoint(words[:1]) and flags.isdisjoint(PRINTING_FLAGS):
        say(f"megatron-lion: the command's work is done, but stdout did not take its last lines: {reason}")
        return 0
    lost = StorageError(f"stdout: {reason}; the output is incomplete; repeat the command with another stdout")
    report(lost)
    return lost.exit_code
