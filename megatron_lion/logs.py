"""Log handlers: one file per process in the run folder, and a fallback that prints warnings to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_lion.files import storage_errors


class LastResort(logging.StreamHandler[TextIO]):
    """Prints warnings to stderr while the root logger has no other handler, as `logging.lastResort` does.

    It is a handler of the root logger. A package that finds the root logger without one adds its own, such as absl, a
    dependency of emerging-optimizers. That handler would print every message of the log file a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return super().filter(record) if only_last_resort() else False


def only_last_resort() -> bool:
    """Whether the root logger has no handler except the last resort."""
    return all(isinstance(handler, LastResort) for handler in logging.getLogger().handlers)


def install_last_resort() -> None:
    """Adds the last resort to a root logger that has no handler."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(LastResort())


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Writes the package's log messages, and every warning of the process, to a file while the block runs.

    An exception that ends the block is logged and raised again.

    Raises:
        StorageError: the file cannot be created.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("megatron_lion")
    level = package.level
    package.setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        package.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        root.removeHandler(handler)
        package.setLevel(level)
        handler.close()
