"""Where log messages go that nobody listens to."""

from __future__ import annotations

import logging
from typing import TextIO


class LastResort(logging.StreamHandler[TextIO]):
    """Warnings on stderr while no other handler is there: `logging.lastResort`, but one that is seen.

    Packages that find the root logger without a handler (absl, of emerging-optimizers) put one there, and that one prints
    every message a second time beside the log file's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return super().filter(record) if alone() else False


def alone() -> bool:
    """Whether nothing but the last resort listens to the root logger."""
    return all(isinstance(handler, LastResort) for handler in logging.getLogger().handlers)


def install() -> None:
    """Puts the last resort on a root logger that has no handler."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(LastResort())
