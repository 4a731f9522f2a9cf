"""Finds the project's folders without Python code, configs/ and launch/, in a checkout or an installed package.

In a checkout they are beside the package, where users find and edit them. setup.py copies them into an installed
package.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from megatron_lion.errors import ConfigError, EnvironmentFault

KNOWN_FILES = {"configs": "gpt2_small.yaml", "launch": "torchrun.sh"}
SCHEMA = "schema.json"
SCHEMA_LINE = "# yaml-language-server: $schema="
"""The comment by which an editor finds the JSON schema of the settings."""
PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: Literal["configs", "launch"], package: Path = PACKAGE) -> Path:
    """Returns the folder inside the installed package, or else beside the package in a checkout.

    Args:
        name: name of the folder.
        package: folder of the package.

    Raises:
        EnvironmentFault: the folder is in neither place.
    """
    for folder in (package / name, package.parent / name):
        # A known file: a folder of this name beside an installed package may belong to another project.
        if (folder / KNOWN_FILES[name]).is_file():
            return folder
    raise EnvironmentFault(
        f"{package}: the package was installed without its {name}/ folder; install the package again"
    )


def shipped_configs(package: Path = PACKAGE) -> dict[str, Path]:
    """Returns the shipped configs by name: "gpt2-tiny" for configs/gpt2_tiny.yaml, in alphabetical order.

    Args:
        package: folder of the package.

    Raises:
        EnvironmentFault: the folder configs/ is missing.
    """
    folder = shipped_folder("configs", package)
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.yaml"))}


def shipped_name(path: Path) -> str | None:
    """Returns the name of a shipped config, such as "gpt2-tiny", or None if the file is another one."""
    return next((name for name, shipped in shipped_configs().items() if shipped.resolve() == path.resolve()), None)


def config_file(text: str) -> Path:
    """Returns the path of a config: `text` itself if such a file exists, else the shipped config of that name.

    Accepted names: gpt2-tiny, gpt2_tiny, gpt2_tiny.yaml. A path that does not exist and is no such name is returned as
    it is, for the caller's message.

    Args:
        text: what was given as --config.
    """
    path = Path(text)
    if path.exists() or path.parent != Path():
        return path
    return shipped_configs().get(_plain_name(text), path)


def shipped_config(name: str) -> Path:
    """Returns the path of the shipped config of a name, in the spellings that `config_file` accepts.

    Args:
        name: such as gpt2-tiny.

    Raises:
        ConfigError: no config has this name; the message suggests a similar one and lists all.
    """
    found = shipped_configs()
    plain = _plain_name(name)
    if plain not in found:
        close = difflib.get_close_matches(plain, found, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no shipped config is named '{name}'{meant} (names: {', '.join(found)})")
    return found[plain]


def _plain_name(text: str) -> str:
    return text.removesuffix(".yaml").replace("_", "-")


def purpose(config: Path) -> str:
    """Returns the first comment line of a config, which describes it, or "" if it begins with a setting."""
    for line in config.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith(SCHEMA_LINE):
            return line.removeprefix("#").strip() if line.startswith("#") else ""
    return ""


def with_absolute_schema(config: Path) -> str:
    """Returns a config's text; the line that names its JSON schema for editors gets the schema's absolute path."""
    text = config.read_text(encoding="utf-8")
    return text.replace(SCHEMA_LINE + SCHEMA, SCHEMA_LINE + str(config.with_name(SCHEMA)))
