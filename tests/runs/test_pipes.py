"""A named pipe in place of a file of a run is refused; nothing waits for its writer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.errors import CheckpointError, StorageError
from megatron_lion.runs.checkpoint_manifest import read_manifest
from megatron_lion.runs.folder import recorded_newest
from megatron_lion.runs.identity import read_run_id
from megatron_lion.runs.series import read_metrics
from megatron_lion.runs.steps import find_latest, newest_whole

CASES: dict[str, tuple[str, Callable[[Path], Any], type[Exception]]] = {
    "metrics": ("metrics.jsonl", lambda run: read_metrics(run / "metrics.jsonl"), CheckpointError),
    "facts": ("run.json", read_run_id, CheckpointError),
    "record": ("newest_checkpoint", recorded_newest, StorageError),
    "manifest": ("manifest.json", read_manifest, CheckpointError),
}


def hangs(work: Callable[[Path], Any], run: Path) -> bool:
    """Whether a call waits for ever; it is made in a forked process, which is ended."""
    child = multiprocessing.get_context("fork").Process(target=quietly, args=(work, run))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def quietly(work: Callable[[Path], Any], run: Path) -> None:
    with contextlib.suppress(CheckpointError, StorageError):
        work(run)


@pytest.mark.parametrize("case", list(CASES))
def test_a_pipe_is_refused(case: str, tmp_path: Path) -> None:
    name, read, error = CASES[case]
    os.mkfifo(tmp_path / name)
    assert not hangs(read, tmp_path)
    with pytest.raises(error, match="Not a regular file") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_are_looked_at_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert not hangs(find_latest, tmp_path)


def test_a_fall_back_that_failed_is_not_advised_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_0000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="found no whole checkpoint, and moved nothing") as caught:
        newest_whole(tmp_path, lambda checkpoint: None)
    assert "give pretrain --fall-back" not in str(caught.value)
    assert "restore a checkpoint from a copy; or give --fresh to start over" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "zz"])
def test_a_damaged_record_is_not_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "newest_checkpoint").write_text(text)
    with pytest.raises(CheckpointError, match="holds no checkpoint, but one was saved"):
        find_latest(tmp_path)
