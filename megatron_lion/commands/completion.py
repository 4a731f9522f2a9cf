"""`megatron-lion completion`: prints a script that completes verbs, flags, choices and file names in a shell."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal, get_args, get_origin

HELP = 'print a completion script for a shell; bash: eval "$(megatron-lion completion bash)" in ~/.bashrc, zsh the same in ~/.zshrc'
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.add_argument("shell", type=str, choices=SHELLS, help="shell to complete in")


def run(args: Any) -> None:
    """Prints the script to stdout."""
    import shtab

    sys.stdout.write(shtab.complete(whole_parser(), args.shell, preamble=_preamble(args.shell)))


def _preamble(shell: str) -> str:
    """Returns the shell function that completes --config with the shipped configs by name and with files; tcsh has none."""
    from megatron_lion.shipped import shipped_configs

    names = " ".join(shipped_configs())
    bodies = {
        "bash": f'compgen -W \'{names}\' -- "$1"\n  compgen -f -- "$1"',
        "zsh": f"_alternative 'names:config:({names})' 'files:file:_files'",
    }
    return f"{CONFIG[shell]}() {{\n  {bodies[shell]}\n}}\n" if shell in bodies else ""


CONFIG = {"bash": "_megatron_lion_config", "zsh": "_megatron_lion_config", "tcsh": "f"}


def whole_parser() -> argparse.ArgumentParser:
    """Returns an argparse parser of all verbs that is good for completion only: names, choices, help."""
    import shtab

    from megatron_lion.commands.verbs import VERBS, build_parser, verb_module

    parser = argparse.ArgumentParser(prog="megatron-lion")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", title="verbs")
    for verb, text in VERBS.items():
        one = verbs.add_parser(verb, help=_escaped(text), description=text, add_help=False)
        source = build_parser(verb, verb_module(verb))
        if source.takes_config_first:
            _complete_with(one.add_argument("config_file", nargs="?"), CONFIG)
        for action in source.actions():
            options: dict[str, Any] = {"help": _escaped(action.help or "")}
            choices = _choices(action)
            if action.nargs == 0:
                options["action"] = "store_true"
            elif choices:
                options["choices"] = choices
            if action.nargs and not action.option_strings:
                options["nargs"] = action.nargs
            added = one.add_argument(*(action.option_strings or [action.dest]), **options)
            if action.nargs != 0 and not choices:
                _complete_with(added, CONFIG if action.dest == "config" else shtab.FILE)
    return parser


def _complete_with(action: argparse.Action, function: Any) -> None:
    """Sets the shell function that completes an argument, by shell: shtab reads it from an attribute of its own."""
    vars(action)["complete"] = function


def _choices(action: argparse.Action) -> list[str]:
    """Returns the words that a flag accepts: the members of a Literal, or true and false."""
    kind = getattr(action, "_typehint", None)
    if get_origin(kind) is Literal:
        return [str(member) for member in get_args(kind)]
    return ["true", "false"] if kind is bool else [str(choice) for choice in action.choices or ()]


def _escaped(text: str) -> str:
    # argparse fills in % in a help text; shtab asks for the first line only.
    return text.replace("%", "%%").split(";")[0]
