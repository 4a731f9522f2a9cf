"""Fixtures of the checkpoint tests: a finished run with two checkpoints, made once per module in the module's fixture `folder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import fits, run_distributed


@pytest.fixture(scope="module")
def trained_on_cpu(folder: Path, corpus: str) -> Any:
    """Config of a finished run of 4 steps on 2 processes with checkpoints at 2 and 4; each process writes one tensor file."""
    config = tiny.tiny_config(folder / "run", corpus, **tiny.CHECKPOINTED)
    run_distributed(tiny.train_each, 2, {"": config})
    return config


@pytest.fixture(scope="module")
def size(device: str) -> int:
    """Number of processes of a run: 2, or 1 if the machine has one CUDA device."""
    return 2 if fits(device, 2) else 1


@pytest.fixture(scope="module")
def on_device(folder: Path, device: str) -> Path:
    """Folder of the runs on a device."""
    (folder / device).mkdir()
    return folder / device


@pytest.fixture(scope="module")
def trained(trained_on_cpu: Any, on_device: Path, corpus: str, device: str, size: int) -> Any:
    """The same run on the device of the test."""
    if device == "cpu":
        return trained_on_cpu
    config = tiny.tiny_config(on_device / "run", corpus, device=device, **tiny.CHECKPOINTED)
    run_distributed(tiny.train_each, size, {"": config}, device=device)
    return config
