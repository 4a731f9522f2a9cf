"""Paths and settings of a run folder; only runs/ spells out its file names."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lion import runs
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config, save_config
from megatron_lion.errors import CheckpointError, ConfigError, StorageError
from megatron_lion.runs import folder as run_folder
from megatron_lion.runs.folder import flatten, prepare_run_folder, read_config, write_json

ROOM = Path(runs.__file__).parent
NAMES = {"config.yaml", "run.json", "environment.json", "metrics.jsonl", "checkpoints", "eval", "probe"}


def spelled_out(path: Path) -> list[str]:
    """Returns lines that join a file name of a run folder to a path, or format a step like a file name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [part.value for part in (node.left, node.right) if isinstance(part, ast.Constant)]
            found += [f"{path.name}:{node.lineno}: {part}" for part in parts if part in NAMES]
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None and "07d" in ast.unparse(node):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_paths_of_run_folders_are_built_in_one_room() -> None:
    outside = [path for path in ROOM.parent.rglob("*.py") if path.parent != ROOM]
    assert len(outside) > 100
    assert [line for path in sorted(outside) for line in spelled_out(path)] == []
    inside = [path.name for path in ROOM.glob("*.py") if spelled_out(path)]
    assert inside == ["paths.py"]


def old_run(folder: Path, *, imported: bool = False) -> RunConfig:
    """A run folder with a metric and a checkpoint; returns its settings."""
    for step in ["step_0000002", *["step_0000000"] * imported]:
        (folder / "checkpoints" / step).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}")
    config = RunConfig(seed=7, run_dir=str(folder))
    save_config(config, folder / "config.yaml")
    return config


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on a RAM disk, which is another file system than that of tmp_path."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_a_linked_run_is_moved_aside_on_its_own_disk(tmp_path: Path, other_disk: Path) -> None:
    old_run(other_disk / "run")
    (tmp_path / "link").symlink_to(other_disk / "run")
    prepare_run_folder(RunConfig(seed=8, run_dir=str(tmp_path / "link")), fresh=True)
    assert names(tmp_path) == ["link"]
    assert (other_disk / "run.old-1" / "metrics.jsonl").read_text() == "{}"
    assert (other_disk / "run.old-1" / "checkpoints" / "step_0000002").is_dir()
    assert read_config(other_disk / "run").seed == 8


def test_linked_checkpoints_of_an_import_stay_on_their_disk(tmp_path: Path, other_disk: Path) -> None:
    config = old_run(tmp_path / "run", imported=True)
    shutil.copytree(tmp_path / "run" / "checkpoints", other_disk / "many")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").symlink_to(other_disk / "many")
    prepare_run_folder(config, fresh=True)
    assert names(other_disk) == ["many", "many.old-1", "many.old-1/step_0000002", "many/step_0000000"]
    assert (tmp_path / "run.old-1" / "checkpoints" / "step_0000002").is_dir()
    assert (tmp_path / "run" / "checkpoints" / "step_0000000").is_dir()


def test_the_current_folder_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    prepare_run_folder(RunConfig(run_dir="."), fresh=True)
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "{}"
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["..", "../../run"])
def test_a_run_is_not_moved_aside_with_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same relative path would then name the folder that was moved aside."""
    old_run(tmp_path / "run")
    before = names(tmp_path)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"the current folder is inside .*; leave it"):
        prepare_run_folder(RunConfig(run_dir=name), fresh=True)
    assert names(tmp_path) == before


def test_the_root_is_not_moved_aside() -> None:
    with pytest.raises(ConfigError, match="run_dir: / cannot be moved aside"):
        run_folder._move_aside(Path("/"))


@pytest.mark.parametrize("imported", [False, True])
def test_a_run_that_cannot_be_moved_aside_stays_as_it_was(
    imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as with a mounted folder in it."""
    config = old_run(tmp_path / "run", imported=imported)
    before = names(tmp_path)
    replace, refused = os.replace, "step_0000002" if imported else "config.yaml"

    def refuse(path: Path, target: Path) -> None:
        if path.name == refused and path.parts[-2] != "run.old-1":
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
        replace(path, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="Invalid cross-device link"):
        prepare_run_folder(config, fresh=True)
    assert names(tmp_path) == before


def test_lost_settings_can_be_made_again(tmp_path: Path) -> None:
    config = old_run(tmp_path / "run")
    lost = tmp_path / "run" / "config.yaml"
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"its config\.yaml is lost; .* add --print_config > .*config\.yaml"):
        prepare_run_folder(config, fresh=False)
    assert not lost.exists()
    lost.write_text(dump_config(config))
    prepare_run_folder(config, fresh=False)


def test_settings_are_read_from_a_run_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run folder \(no config.yaml\); give the run_dir"):
        read_config(tmp_path)
    config = RunConfig(seed=7, run_dir=str(tmp_path))
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path) == config


def test_json_is_whole_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    write_json(path, {"name": "λ", "d": 9})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "λ",\n  "d": 9\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"d": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "λ", "d": 9}
    assert [entry.name for entry in tmp_path.iterdir()] == ["it.json"]


def test_nested_settings_become_dotted_keys() -> None:
    nested = {"optimizer": {"betas": (0.9, 0.95), "lr": None}, "seed": 1, "log": {}}
    assert flatten(nested) == {"optimizer.betas": [0.9, 0.95], "optimizer.lr": None, "seed": 1}
