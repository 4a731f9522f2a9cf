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
