"""Checks the Python and its packages before anything else is imported, and lists their versions.

This file, __main__.py and __init__.py must run on Python 3.8, so that an old Python gives one line and no traceback.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence

OLDEST = (3, 12)
EXIT_CODE = 9
"""The exit code of EnvironmentFault, whose file does not load on an old Python."""

REQUIRED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "triton": "triton",
    "numpy": "numpy",
    "scipy": "scipy",
    "jsonargparse": "jsonargparse",
    "docstring-parser": "docstring_parser",
    "shtab": "shtab",
    "PyYAML": "yaml",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "safetensors": "safetensors",
    "orjson": "orjson",
    "gigatoken": "gigatoken",
    "filelock": "filelock",
    "psutil": "psutil",
    "absl-py": "absl",
}
"""The dependencies in pyproject.toml, each with a module that it provides."""

OPTIONAL_EXTRAS = ("data", "tensorboard", "wandb")
OPTIONAL = ("transformer-engine", "apex", "deepspeed")
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def versions() -> dict[str, str | None]:
    """Returns the version of each required and optional package; None if it is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing() -> list[str]:
    """Returns the required packages that this Python cannot import, without importing any."""
    return [name for name, module in REQUIRED.items() if not _has(module)]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no parent package; a module of sys.modules without a spec
        return module in sys.modules


def unsuitable() -> list[str]:
    """Returns "NAME VERSION, needs RANGE" for each installed package of a version that pyproject.toml does not allow.

    Empty if the package was not installed by pip, or if the package `packaging` is missing.
    """
    from importlib import metadata

    try:
        from packaging.requirements import Requirement
    except ImportError:
        return []
    found = []
    for requirement in map(Requirement, _required()):
        # An optional package is checked too if it is installed: its extra may have been requested.
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *OPTIONAL_EXTRAS)
        ):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    return found


def install_command(names: Sequence[str]) -> str:
    """Returns the shell command that installs missing packages for this Python: the pinned ones, in a checkout.

    Args:
        names: names from `missing`.
    """
    words = [sys.executable or "python3", "-m", "pip", "install"]
    if _in_checkout():
        return _line([*words, "-c", os.path.join(_ROOT, "constraints.txt"), "-e", _ROOT])
    return _line([*words, *_requirements(names)])


def check(arguments: Sequence[str], module: str = "megatron_lion") -> None:
    """Ends the process with one line and EXIT_CODE if the Python is too old or a required package is missing.

    Args:
        arguments: the words of the command line, for the command that the line recommends.
        module: the module that was started with `python -m`.
    """
    problem = _problem(arguments, module)
    if problem is not None:
        if sys.stderr is not None:
            sys.stderr.write("megatron-lion: " + problem + "\n")
        sys.exit(EXIT_CODE)


def _problem(arguments: Sequence[str], module: str) -> str | None:
    own = os.path.join(_ROOT, ".venv", "bin", "python")
    this = sys.executable or "python3"
    other = os.path.isfile(own) and os.path.abspath(this) != own
    command = _line([_shown(own), "-m", module, *arguments])
    if sys.version_info < OLDEST:
        what = f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and {this} is {platform.python_version()}"
        if other:
            return f"{what}; run {command}"
        remedy = f"make setup in {_ROOT}, then {command}" if _in_checkout() else "the same command with a newer Python"
        return f"{what}; run {remedy}"
    names = missing()
    if not names:
        return None
    more = f" and {len(names) - 1} more packages are" if len(names) > 2 else f" and {names[-1]} are"
    what = f"{names[0]}{more if len(names) > 1 else ' is'} not installed for {this}"
    if other:
        return f"{what}; run {command}"
    setup = f"make setup in {_ROOT}, or " if _in_checkout() else ""
    return f"{what}; run {setup}{install_command(names)}"


def _in_checkout() -> bool:
    return os.path.isfile(os.path.join(_ROOT, "pyproject.toml")) and os.path.isfile(os.path.join(_ROOT, "Makefile"))


def _shown(path: str) -> str:
    """Returns a path as a user can type it here: relative if it is inside the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _required() -> list[str]:
    """Returns the requirements of the installed package, or nothing if it was not installed by pip."""
    from importlib import metadata

    try:
        return metadata.requires("megatron-lion") or []
    except metadata.PackageNotFoundError:
        return []


def _requirements(names: Sequence[str]) -> list[str]:
    """Returns the names with the versions that the installed package requires, if they are known."""
    found = []
    for name in names:
        fits = [text for text in _required() if re.match(re.escape(name) + r"[^A-Za-z0-9._-]", text, re.IGNORECASE)]
        found.append(fits[0].replace(" ", "") if fits else name)
    return found


def _line(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
