"""Reports progress of long jobs on stderr: a bar with MB/s on a terminal, else a log line every 30 s."""

from __future__ import annotations

import logging
import time
from typing import Protocol, Self

from megatron_lion.streams import stderr_is_terminal

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0


class Progress(Protocol):
    """Interface to which a job reports its progress."""

    def stage(self, name: str, total_bytes: int) -> None:
        """Begins a stage of `total_bytes` bytes and ends the previous one."""

    def advance(self, num_bytes: int) -> None:
        """Reports that `num_bytes` more bytes of the stage are done."""


class NoProgress:
    """Reports nothing."""

    def stage(self, name: str, total_bytes: int) -> None:
        """Does nothing."""

    def advance(self, num_bytes: int) -> None:
        """Does nothing."""


class ConsoleProgress:
    """Shows progress on stderr; use as a context manager.

    It shows a rich bar on a terminal, and one log line every 30 s otherwise (log files, batch jobs).
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        def whole() -> Column:
            return Column(no_wrap=True)  # in 80 columns the bar gets shorter, not the numbers

        console = Console(stderr=True)
        self._live = stderr_is_terminal()
        self._bar = RichProgress(
            TextColumn("{task.description:<20}", table_column=whole()),
            BarColumn(bar_width=None),
            DownloadColumn(table_column=whole()),
            TransferSpeedColumn(table_column=whole()),
            TimeElapsedColumn(table_column=whole()),
            TextColumn("left", table_column=whole()),
            TimeRemainingColumn(table_column=whole()),
            console=console,
            disable=not self._live,
        )
        self._name, self._total, self._done, self._began, self._logged = "", 0, 0, 0.0, 0.0
        self._task = self._bar.add_task("", visible=False)

    def stage(self, name: str, total_bytes: int) -> None:
        """Begins a new bar."""
        self._end_stage()
        self._name, self._total, self._done = name, total_bytes, 0
        self._began = self._logged = time.monotonic()
        self._task = self._bar.add_task(name, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Moves the bar, or logs a line if the last one is 30 s old."""
        self._done += num_bytes
        self._bar.update(self._task, advance=num_bytes)
        now = time.monotonic()
        if not self._live and now - self._logged > _LINE_EVERY_S:
            self._logged = now
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            share = 100 * self._done / max(self._total, 1)
            logger.info("%s: %.1f %% done, %.1f MB/s, %.0f s left", self._name, share, rate / 1e6, left)

    def _end_stage(self) -> None:
        self._bar.update(self._task, completed=self._total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._end_stage()
        self._bar.stop()
