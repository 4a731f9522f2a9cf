"""The runs that may be compared, and their labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.compare.labels import differing_settings
from megatron_lion.compare.selection import read_runs
from megatron_lion.errors import CheckpointError, ConfigError


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = read_runs(
        [
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", lr=5e-4),
            write_run(tmp_path / "c", optimizer="sgd"),
            write_run(tmp_path / "d", model="gpt2-medium"),
        ]
    )
    assert [run.label for run in runs] == ["LION lr=0.001", "LION lr=0.0005", "SGD", "LION"]
    same = read_runs([write_run(tmp_path / "e"), write_run(tmp_path / "f")])
    assert [run.label for run in same] == ["LION e", "LION f"]


def test_only_settings_that_matter_are_compared(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", seed=7)])
    assert set(differing_settings(runs)) == {"seed", "optimizer.name", "optimizer.lr"}


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", model="one", tokenizer="1" * 64, text="1" * 64)
    b = write_run(tmp_path / "b", model="two", tokenizer="2" * 64, text="2" * 64)
    with pytest.raises(CheckpointError, match="nothing in common"):
        read_runs([a, b])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([a, a])
    with pytest.raises(ConfigError, match="no run folder given"):
        read_runs([])
    assert len(read_runs([a])) == 1
