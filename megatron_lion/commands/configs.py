"""`megatron-lion configs`: lists, prints or copies the configs that are shipped with the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "List the shipped configs, print one (show NAME), or copy one to a file of your own (copy NAME [DEST]); "
    "--config NAME uses one without a copy"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add(
        "action",
        type=str,
        nargs="?",
        default="list",
        choices=["list", "show", "copy"],
        help="list: names, purposes and paths; show: print the file; copy: write it to DEST, for editing",
    )
    add("config_name", type=str, nargs="?", default=None, metavar="NAME", help="name in the list, such as gpt2-tiny")
    add(
        "dest",
        type=str,
        nargs="?",
        default=None,
        metavar="DEST",
        help="new file, or an existing folder to put it in; default: the current folder",
    )
    add("--overwrite", action="store_true", help="copy: replace an existing file")


def run(args: Any) -> None:
    """Prints the list or the config to stdout, or writes the copy."""
    from megatron_lion.errors import ConfigError

    if args.action == "list" and args.config_name is not None:
        raise ConfigError(
            f"configs list takes no name; to print one config: megatron-lion configs show {args.config_name}"
        )
    if args.action != "list" and args.config_name is None:
        raise ConfigError(f"configs {args.action}: a name is missing; `megatron-lion configs` lists the names")
    if args.action != "copy" and args.dest is not None:
        raise ConfigError(
            f"configs {args.action}: unexpected word {args.dest}; "
            f"to write a file: megatron-lion configs copy {args.config_name} {args.dest}"
        )
    if args.action != "copy" and args.overwrite:
        raise ConfigError(f"--overwrite has no effect with configs {args.action}; omit it")
    if args.action == "list":
        sys.stdout.write(_listing())
        return
    from megatron_lion.shipped import shipped_config

    source = shipped_config(args.config_name)
    if args.action == "show":
        sys.stdout.write(source.read_text(encoding="utf-8"))
    else:
        dest = args.dest or ""
        _copy(source, Path(dest, source.name) if dest.endswith(os.sep) else Path(dest), args.overwrite)


def _listing() -> str:
    from megatron_lion.shipped import purpose, shipped_configs

    entries = [f"{name}\n  {purpose(path)}\n  {path}\n" for name, path in shipped_configs().items()]
    return "\n".join(
        [*entries, "use one:  megatron-lion pretrain --config NAME …\nedit one: megatron-lion configs copy NAME\n"]
    )


def _copy(source: Path, target: Path, overwrite: bool) -> None:
    """Writes a config to a new file, with the path of its JSON schema made absolute.

    Raises:
        ConfigError: the file exists, and `overwrite` is False.
        StorageError: the file system refused.
    """
    from megatron_lion.errors import ConfigError
    from megatron_lion.files import make_folder, write_whole
    from megatron_lion.jobs import shell_line, typed_path
    from megatron_lion.shipped import with_absolute_schema

    if target.is_dir():
        target /= source.name
    if os.path.lexists(target) and not overwrite:
        raise ConfigError(f"{target}: already exists; give another DEST, or --overwrite to replace it")
    make_folder(target.parent)
    write_whole(target, with_absolute_schema(source).encode())
    command = shell_line(["megatron-lion", "pretrain", "--config", typed_path(target)])
    sys.stdout.write(f"{target}: a copy of {source.name}; edit it, then: {command} …\n")
