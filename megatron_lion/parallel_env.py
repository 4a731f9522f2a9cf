"""What torchrun says in the environment, without importing torch."""

from __future__ import annotations

import os


def world_size_from_env() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_env() -> int:
    """This process's number among them; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
