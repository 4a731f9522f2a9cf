"""Entry point of `python -m megatron_lion` and of the console script; the launcher starts it as its ranks.

This file must parse on Python 3.8: it reports an old Python, and missing packages, before it imports anything else.
"""

import sys

from megatron_lion.installation import OLDEST, check, missing

WITHOUT_PACKAGES = ("-h", "--help", "help", "--version", "env")


def start() -> None:
    """Runs the command line, after a check of the Python and its packages; `env` lists them instead."""
    words = sys.argv[2:] if sys.argv[1:2] == ["--traceback"] else sys.argv[1:]
    if sys.version_info < OLDEST or (words and words[0] not in WITHOUT_PACKAGES):
        check(sys.argv[1:])
    elif words[:1] == ["env"] and missing():
        from megatron_lion.commands.env import print_without_packages

        print_without_packages()
        return
    from megatron_lion.cli import entry

    entry()


if __name__ == "__main__":
    start()
