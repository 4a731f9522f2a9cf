"""Files that belong to the project but are not Python: the configs/ and launch/ folders.

In a checkout they are beside the package, so that people find and edit them; setup.py copies them into an installed
package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_lion.errors import EnvironmentFault

PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: Literal["configs", "launch"], package: Path = PACKAGE) -> Path:
    """The folder inside the installed package, else beside the checkout's.

    Args:
        name: of the folder.
        package: the package's own folder.

    Raises:
        EnvironmentFault: it is in neither place.
    """
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise EnvironmentFault(f"{package}: the package was installed without its {name}/ folder; install it again")
