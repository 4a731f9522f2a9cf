"""Checks before the first stage, so that a wrong argument does not cost minutes of a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import version_of

from .stage import ROWS, SAME, read_rows

REQUIRED = ("megatron-core", "jsonargparse", "docstring_parser")
# These stages import megatron-core or the parser of config files; the others need only torch and triton.
NEED_PACKAGES = {"correct", "loop", "run", "bert"}


def problem_of(args: argparse.Namespace, facts: dict[str, Any], stages: Sequence[str]) -> str | None:
    """Returns the first reason not to start, with its remedy in one line, or None."""
    missing = [package for package in REQUIRED if version_of(package) is None]
    if missing and NEED_PACKAGES.intersection(stages):
        return (
            f"{', '.join(missing)} not found; run from the checkout's root with PYTHONPATH=.:wheels (benchmarks/gpu_wheels.py "
            "makes the folder wheels), or choose --only facts kernel peers"
        )
    if args.data is not None and (reason := _not_a_dataset(args.data)):
        return f"--data {args.data}: {reason}; give a folder made by `megatron-lion prepare` or benchmarks/gpu_data.py"
    if args.text is not None and not args.text.is_file():
        return f"--text {args.text}: not a file; give a text such as wiki.test.tokens"
    path = args.output / ROWS
    try:
        rows = read_rows(path)
    except ValueError as error:
        return f"{error}; remove the line, or give another --output"
    for key in SAME:
        found = {row.get(key) for row in rows} - {facts.get(key, args.rehearse)}
        if found:
            return (
                f"{path}: its rows have {key} {', '.join(sorted(map(str, found)))}, this run has {facts.get(key, args.rehearse)}; "
                "give another --output"
            )
    return None


def _not_a_dataset(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable manifest.json ({type(error).__name__})"
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return None if kind == "gpt" else f"a dataset of kind {kind}, not gpt"
