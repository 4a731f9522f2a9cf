"""Listing a run's checkpoints and selecting steps by flag, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lion import runs
from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.steps import choose_step, choose_steps, is_committed, list_steps, run_and_step, step_folder


def test_steps_are_chosen_by_name_or_number() -> None:
    assert choose_steps("all", [1, 2]) == [1, 2]
    assert choose_steps("latest", [1, 2]) == [2]
    assert choose_steps("10_000,2,2", [2, 10000]) == [2, 10000]
    with pytest.raises(ConfigError, match="give all, latest"):
        choose_steps("soon", [])
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        choose_steps("latest", [])
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 3 \(there are: 1, 2\)"):
        choose_steps("1,3", [1, 2])


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path: Path) -> None:
    assert list_steps(tmp_path) == []
    names = ("step_0000010", "step_0000002", "step_0000004.tmp-1", "step_5", "other")
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_0000020").mkdir()
    assert list_steps(tmp_path) == [2, 10]
    assert [is_committed(tmp_path, step) for step in (2, 4, 10, 20)] == [True, False, True, False]


def test_a_checkpoint_folder_names_its_run_and_step(tmp_path: Path) -> None:
    assert run_and_step(step_folder(tmp_path, 12_345_678)) == (tmp_path, 12_345_678)
    assert run_and_step(tmp_path / "checkpoints" / "step_0000004.tmp-1") is None
    assert run_and_step(tmp_path / "step_0000004") is None


def test_the_room_needs_no_torch() -> None:
    names = [f"megatron_lion.runs.{path.stem}" for path in Path(runs.__file__).parent.glob("[a-z]*.py")]
    assert len(names) > 5
    code = f"import sys, {', '.join(names)}; print(*({{'torch', 'megatron', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("asked", ["all", "10,20", "soon"])
def test_one_step_is_one_step(asked: str) -> None:
    """Several would silently become the last one."""
    assert (choose_step("latest", [10, 20]), choose_step("10", [10, 20])) == (20, 10)
    with pytest.raises(ConfigError, match=f"--step {asked}: give latest, or one step"):
        choose_step(asked, [10, 20])
    with pytest.raises(CheckpointError, match="--step 30: no complete checkpoint of step 30"):
        choose_step("30", [10, 20])
