"""Writes metrics.jsonl, repairs its torn last line, and forwards numbers to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig, to_dict
from megatron_lion.errors import EnvironmentFault
from megatron_lion.files import storage_errors
from megatron_lion.runs.paths import metrics_file
from megatron_lion.runs.series import parse_line


class MetricsWriter:
    """Appends one JSON object per line to RUN/metrics.jsonl and forwards it to the enabled sinks.

    Only the first rank writes; on other ranks every call does nothing.

    Args:
        run_dir: the run's folder.
        config: the run's settings; the section log enables the sinks.
        is_main: whether this process is the first rank.

    Raises:
        EnvironmentFault: the package of an enabled sink is not installed.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, is_main: bool) -> None:
        self.path = metrics_file(run_dir)
        self.is_main = is_main
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_main:
            return
        _end_last_line(self.path)
        if config.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise EnvironmentFault(
                    "log.tensorboard: install it with `pip install megatron-lion[tensorboard]`"
                ) from error
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        if config.log.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise EnvironmentFault(
                    "log.wandb_project: install it with `pip install megatron-lion[wandb]`"
                ) from error
            self._wandb = wandb.init(
                project=config.log.wandb_project,
                id=_wandb_id(run_dir),
                dir=str(run_dir),
                config=to_dict(config),
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Writes values of one step. Non-finite numbers are written as null, because JSON cannot represent them."""
        if not self.is_main:
            return
        line = {"step": step, "time": round(time.time(), 3), **{key: _jsonable(value) for key, value in values.items()}}
        # Opened and closed for each line: a killed process loses no line that it has written.
        with storage_errors(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(run_dir: Path) -> str:
    """Returns the run's Weights & Biases id; it is stored in the run folder, so a resumed run keeps it."""
    path = run_dir / "wandb_id"
    with storage_errors(path):
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="ascii")
        return path.read_text(encoding="ascii").strip()


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value


def _end_last_line(path: Path) -> None:
    """Completes a last line without a line end, or removes it if a kill truncated it; readers apply the same test."""
    with storage_errors(path):
        if not path.exists():
            return
        with open(path, "rb+") as stream:
            content = stream.read()
            start = content.rfind(b"\n") + 1
            if parse_line(content[start:]) is not None:
                stream.write(b"\n")
            else:
                stream.truncate(start)
