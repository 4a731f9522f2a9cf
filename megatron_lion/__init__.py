"""LION in Megatron-Core's distributed optimizer, and the full-gradient measurements of its convergence theory.

Public names are loaded on first use, so importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lion.optim.lion import Lion

__version__ = "0.2.0"

_LAZY = {"Lion": "megatron_lion.optim.lion"}

__all__ = ["Lion", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'megatron_lion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
