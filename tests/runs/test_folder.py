"""Paths and settings of a run folder; only runs/ spells out its file names."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from megatron_lion import runs
from megatron_lion.config import RunConfig
from megatron_lion.configfile import save_config
from megatron_lion.errors import CheckpointError
from megatron_lion.runs.folder import flatten, read_config, write_json

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
