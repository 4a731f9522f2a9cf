"""Writes the generated pages of docs/reference/ from the code: settings, commands, metrics.

python docs/update_reference.py            writes the pages
python docs/update_reference.py --check    ends with 1 and names the pages that are not up to date
"""

from __future__ import annotations

import re
import sys
import textwrap
from argparse import SUPPRESS, Action
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from megatron_lion.commands.verbs import VERBS, build_parser, verb_module
from megatron_lion.compare.table import markdown_grid
from megatron_lion.runs.metric_keys import METRIC_KEYS
from megatron_lion.setting_texts import Setting, group_texts, settings

FOLDER = Path(__file__).resolve().parent / "reference"
MADE = "<!-- Made by docs/update_reference.py; changes here are lost. -->\n"
WIDTH = 116


def main(words: list[str]) -> int:
    """Writes the pages, or checks them; returns the exit code."""
    pages = {"settings.md": settings_page(), "commands.md": commands_page(), "metrics.md": metrics_page()}
    stale = [name for name, text in pages.items() if _old(FOLDER / name) != text]
    if "--check" in words:
        for name in stale:
            sys.stderr.write(f"docs/reference/{name} is not up to date; run: python docs/update_reference.py\n")
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(pages[name], encoding="utf-8")
    return 0


def _old(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def settings_page() -> str:
    """Returns the page of all settings of a run, by group, with type and default."""
    groups = {"": "Settings of the run as a whole.", **group_texts()}
    lines = [
        MADE,
        "# Settings\n",
        "Every setting of `megatron-lion pretrain`, with its type and default. In a config file the part before the dot is",
        "a section. On the command line the name is a flag, such as `--optimizer.lr 1e-4`. `megatron-lion configs` lists",
        "the shipped configs. `megatron-lion pretrain CONFIG --print_config` prints one with all settings explained.\n",
    ]
    for group, text in groups.items():
        lines += [f"## {group or 'Run'}\n", f"{text}\n"]
        for item in settings():
            if item.key.rpartition(".")[0] == group:
                lines += _entry(f"`{item.key}`", f"{kind_text(item.kind)} · default {_default(item)}", item.text)
    return "\n".join(lines)


def _default(item: Setting) -> str:
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    return f"`{yaml_text(value)}`"


def yaml_text(value: Any) -> str:
    """Returns a value as a config file spells it, on one line.

    >>> yaml_text([0.9, 0.95]), yaml_text(None), yaml_text(""), yaml_text(1e-5)
    ('[0.9, 0.95]', 'null', "''", '1e-05')
    """
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def kind_text(kind: Any) -> str:
    """Returns an annotation in words.

    >>> kind_text(float | None), kind_text(Literal["lion", "sgd"]), kind_text(list[str])
    ('number or null', '`lion`, `sgd`', 'list of text')
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return " or ".join(kind_text(member) for member in members)
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin is list:
        return f"list of {kind_text(members[0])}"
    if origin is tuple:
        return f"{len(members)} × {kind_text(members[0])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}[kind]


def commands_page() -> str:
    """Returns the page of all verbs with their arguments and flags."""
    lines = [
        MADE,
        "# Commands\n",
        "`megatron-lion VERB …` and `python -m megatron_lion VERB …` are the same. `megatron-lion VERB --help` prints the",
        "text below in a terminal. All verbs have the same [exit codes](../exit-codes.md). `megatron-lion --traceback VERB …`",
        "prints the traceback of an error too.\n",
    ]
    keys = {item.key for item in settings()}
    for verb in VERBS:
        module = verb_module(verb)
        lines += [f"## {verb}\n", *_wrapped(_sentence(module.HELP)), ""]
        parser = build_parser(verb, module)
        shown = [action for action in parser._actions if action.help != SUPPRESS and action.dest not in ("help",)]
        flags = [action for action in shown if action.dest not in keys and not _is_group(action)]
        for action in flags:
            lines += _entry(*_flag(action), action.help or "")
        if any(action.dest in keys for action in shown):
            lines += ["All [settings](settings.md) are flags too.\n"]
        elif not flags:
            lines += ["No flags.\n"]
    return "\n".join(lines)


def _is_group(action: Action) -> bool:
    """Whether the flag reads a file for a whole section of settings, such as --optimizer FILE."""
    return type(action).__name__ == "_ActionConfigLoad"


def _flag(action: Action) -> tuple[str, str]:
    """Returns a flag or argument as the user types it, and its default."""
    name = ", ".join(action.option_strings) or str(action.dest)
    if action.nargs != 0 and action.option_strings:
        metavar = action.metavar or str(action.dest).upper().replace("-", "_")
        name += f" {' '.join(metavar) if isinstance(metavar, tuple) else metavar}"
    name += " …" if action.nargs in ("+", "*") else ""
    if action.nargs == 0:
        return f"`{name}`", "switch"
    if not action.option_strings and action.nargs != "?":
        return f"`{name}`", "argument"
    return f"`{name}`", f"default `{yaml_text(action.default)}`"


def metrics_page() -> str:
    """Returns the page of the keys of metrics.jsonl."""
    lines = [
        MADE,
        "# Metrics\n",
        "The keys of `RUN/metrics.jsonl`. [Logging](../logging.md) describes the file. The keys `probe/…` are explained in",
        "[full gradient](../full-gradient.md). `null` is a value that is not finite, not known or undefined.\n",
    ]
    for when in dict.fromkeys(item.when for item in METRIC_KEYS):
        rows = [[f"`{item.key}`", item.unit, item.text] for item in METRIC_KEYS if item.when == when]
        lines += [f"## {when[:1].upper()}{when[1:]}\n", markdown_grid(["key", "unit", "meaning"], rows).rstrip() + "\n"]
    return "\n".join(lines)


def _entry(name: str, facts: str, text: str) -> list[str]:
    """Returns a list item: the name and its facts, and the explanation below."""
    # Four spaces make the text a part of the list item.
    return [f"- **{name}** · {facts}", "", *_wrapped(_sentence(text), "    "), ""]


def _wrapped(text: str, indent: str = "") -> list[str]:
    # Markdown would read these characters as markup.
    escaped = re.sub(r"([<*\[\]])", r"\\\1", text)
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return wrapper.wrap(escaped)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text + ("" if text.endswith((".", ":")) else ".") if text else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
