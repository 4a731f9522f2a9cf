"""Log handlers: one file per process in the run folder, and a fallback that prints warnings to stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from megatron_lion.files import make_folder, open_own, storage_errors
from megatron_lion.streams import say


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to the `sys.stderr` of the moment of each message.

    rich replaces `sys.stderr` while a progress bar is drawn, and prints above the bar what is written to the new one. A
    handler that keeps the stream it began with would write into the bar's line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class LastResort(_CurrentStderr):
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
def messages_on_stderr() -> Iterator[None]:
    """Prints the package's messages to stderr during the block, unless the program has log handlers of its own."""
    if not only_last_resort():
        yield
        return
    package = logging.getLogger("megatron_lion")
    handler = _CurrentStderr()
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate


class _LogFile(logging.FileHandler):
    """Appends to a log file, and reports once if the disk refuses a message.

    No code reads a log back, so a full disk does not end the run here. If there is no space for metrics or checkpoints,
    their writers raise a StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.reported = False
        super().__init__(path, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        return open(open_own(self.baseFilename, os.O_WRONLY | os.O_APPEND), "a", encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.reported:  # a stream keeps what the disk refused, and would grow
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # the stream writes what it could not write before
            self._report(error)

    def _report(self, error: OSError) -> None:
        if not self.reported:
            self.reported = True
            say(
                f"megatron-lion: {self.baseFilename}: cannot be written: {error.strerror or error}; "
                "log messages are missing from here on, and the run continues"
            )


def warn(logger: logging.Logger, text: str, *, shown: bool = True) -> None:
    """Logs a warning and, if `shown`, prints it to stderr, also while `log_file` sends the log to a file."""
    logger.warning("%s", text)
    if shown and not only_last_resort():
        say(text)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Writes the package's log messages, and every warning of the process, to a file while the block runs.

    An exception that ends the block is logged and raised again. A message that the disk refuses is lost, with one line on stderr.

    Raises:
        StorageError: the file cannot be created.
    """
    make_folder(path.parent)
    with storage_errors(path):
        handler = _LogFile(path)
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
