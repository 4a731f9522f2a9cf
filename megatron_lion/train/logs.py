"""RUN/log/rank00000.log, one file a process: what happened and when, for reading after the fact."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lion.files import storage_errors
from megatron_lion.runs.paths import log_folder


@contextmanager
def log_file(run_dir: Path, rank: int) -> Iterator[None]:
    """Sends the package's log messages, and every warning of the process, to this rank's file while the block runs."""
    path = log_folder(run_dir) / f"rank{rank:05d}.log"
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
