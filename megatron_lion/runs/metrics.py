"""Writes metrics.jsonl, repairs its torn last line, and forwards numbers to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig, to_dict
from megatron_lion.errors import EnvironmentFault, StorageError
from megatron_lion.files import append_line, open_own, storage_errors, sync_folder, write_whole
from megatron_lion.logs import warn
from megatron_lion.runs.paths import metrics_file
from megatron_lion.runs.series import parse_line

logger = logging.getLogger(__name__)

WANDB_STEP = "optimizer_step"
"""The metric over which Weights & Biases draws the others."""
_BLOCK_BYTES = 1 << 16


class MetricsWriter:
    """Appends one JSON object per line to RUN/metrics.jsonl and forwards it to the enabled sinks.

    Only the first rank writes; on other ranks every call does nothing.

    Args:
        run_dir: the run's folder.
        config: the run's settings; the section log enables the sinks.
        is_main: whether this process is the first rank.
        start: the step that the run starts after; sinks drop what an earlier job wrote behind it.

    Attributes:
        failure: the error of the first line that could not be written. `write` keeps it for its caller, since only the
            first rank meets it and all ranks must raise it together; no further line is written.

    Raises:
        EnvironmentFault: the package of an enabled sink is not installed, or the sink refuses to start.
        StorageError: a file cannot be written.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, is_main: bool, start: int = 0) -> None:
        self.path = metrics_file(run_dir)
        self.is_main = is_main
        self.failure: StorageError | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_main:
            return
        _end_last_line(self.path)
        if writer := _summary_writer(config.log.tensorboard):
            folder = run_dir / "tensorboard"
            # After a crash, the steps after the checkpoint are repeated. TensorBoard hides earlier events from purge_step on.
            # The held-out loss and the probe of step 0 are repeated too.
            with storage_errors(folder):
                self._tensorboard = writer(str(folder), purge_step=start + 1 if start else 0)
        if config.log.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise EnvironmentFault(
                    "log.wandb_project: install it with `pip install megatron-lion[wandb]`"
                ) from error
            identity = _wandb_id(run_dir)
            try:
                with storage_errors(run_dir), _service_faults():
                    self._wandb = wandb.init(
                        project=config.log.wandb_project,
                        id=identity,
                        dir=str(run_dir),
                        config=to_dict(config),
                        resume="allow",
                    )
                    # W&B's own step may only increase, and it drops lines of earlier ones: those that a run repeats
                    # after a crash.
                    self._wandb.define_metric("*", step_metric=WANDB_STEP)
            except _ServiceFault as fault:
                raise EnvironmentFault(
                    f"log.wandb_project: Weights & Biases does not start: {fault}; WANDB_MODE=offline keeps the metrics here "
                    "until `wandb sync`"
                ) from fault

    def write(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Writes values of one step. Non-finite numbers are written as null, because JSON cannot represent them."""
        if not self.is_main or self.failure is not None:
            return
        line = {"step": step, "time": round(time.time(), 3), **{key: _jsonable(value) for key, value in values.items()}}
        try:
            append_line(self.path, json.dumps(line, allow_nan=False))
            self._forward(step, {key: value for key, value in values.items() if isinstance(value, int | float)})
        except StorageError as error:
            self.failure = error

    def sync(self) -> None:
        """Makes the lines durable; call it before a checkpoint of their steps is committed.

        A run that resumes does not write them again, so that a power failure after the checkpoint would leave a gap.

        Raises:
            StorageError: the file system refused.
        """
        if not self.is_main or not self.path.exists():
            return
        with storage_errors(self.path):
            handle = open_own(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(self.path.parent)

    def _forward(self, step: int, numbers: dict[str, float | int]) -> None:
        if self._tensorboard is not None:
            with storage_errors(self.path.parent / "tensorboard"):
                for key, value in numbers.items():
                    self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            try:
                with storage_errors(self.path.parent / "wandb"), _service_faults():
                    self._wandb.log({**numbers, WANDB_STEP: step})
            except _ServiceFault as fault:
                self._lose_wandb(fault)

    def close(self) -> None:
        """Writes what the sinks have buffered.

        Raises:
            StorageError: a sink could not write it; only if no line failed before.
        """
        try:
            with storage_errors(self.path.parent):
                if self._tensorboard is not None:
                    self._tensorboard.close()
                if self._wandb is not None:
                    with _service_faults():
                        self._wandb.finish()
        except _ServiceFault as fault:
            self._lose_wandb(fault)
        except StorageError:
            if self.failure is None:
                raise

    def _lose_wandb(self, fault: _ServiceFault) -> None:
        """Goes on without W&B: metrics.jsonl has all lines, and no run of weeks ends for a service."""
        self._wandb = None
        warn(
            logger,
            f"warning: Weights & Biases gets no further metrics of this job: {fault}; {self.path} has all of them",
        )


class _ServiceFault(Exception):
    """A failure of a sink's package or service; not of the disk."""


@contextmanager
def _service_faults() -> Iterator[None]:
    """Raises what Weights & Biases raises as _ServiceFault, except an error of the disk."""
    try:
        yield
    except Exception as error:  # its own classes, and those of its HTTP and protocol packages
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _ServiceFault(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def _wandb_id(run_dir: Path) -> str:
    """Returns the run's Weights & Biases id; it is stored in the run folder, so a resumed run keeps it."""
    path = run_dir / "wandb_id"
    with storage_errors(path):
        found = path.read_text(encoding="ascii").strip() if path.exists() else ""
    if not found:
        found = uuid.uuid4().hex[:12]
        write_whole(path, f"{found}\n".encode())
    return found


def _summary_writer(wanted: bool | None) -> Any:
    """Returns torch's SummaryWriter, or None if no events are to be written.

    Raises:
        EnvironmentFault: events are asked for, and TensorBoard cannot be imported.
    """
    if wanted is False or (wanted is None and find_spec("tensorboard") is None):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # a package of another version may raise anything when it is imported
        if wanted:
            raise EnvironmentFault(
                f"log.tensorboard: cannot be imported ({error}); install it with `pip install megatron-lion[tensorboard]`"
            ) from error
        warn(logger, f"TensorBoard is installed but cannot be imported ({error}); no events are written")
        return None
    return SummaryWriter


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value


def _end_last_line(path: Path) -> None:
    """Completes a last line without a line end, or removes it if a kill truncated it; readers apply the same test."""
    if not path.exists() and not path.is_symlink():
        return
    with storage_errors(path), open(open_own(path, os.O_RDWR), "rb+") as stream:
        # From the end, in blocks: the file of a long run has a gigabyte, and its last line a kilobyte.
        start = stream.seek(0, os.SEEK_END)
        last = b""
        while start > 0 and b"\n" not in last:
            size = min(_BLOCK_BYTES, start)
            start = stream.seek(start - size)
            last = stream.read(size) + last
        torn = last.rfind(b"\n") + 1
        if parse_line(last[torn:]) is not None:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
        else:
            stream.truncate(start + torn)
