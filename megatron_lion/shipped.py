"""Finds the project's folders without Python code, configs/ and launch/, in a checkout or an installed package.

In a checkout they are beside the package, where users find and edit them. setup.py copies them into an installed
package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_lion.errors import EnvironmentFault

KNOWN_FILES = {"configs": "gpt2_small.yaml", "launch": "torchrun.sh"}
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
    return shipped_configs().get(text.removesuffix(".yaml").replace("_", "-"), path)
