"""Weights and config.json identify a Hugging Face folder: another model must not get the results of this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.hf_files import model_sha256, unread_weights, weight_files

INDEX = "model.safetensors.index.json"


def in_parts(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    for number in range(3):
        (folder / f"part{number}.safetensors").write_bytes(bytes([number]) * 100)
    places = {f"weight{number}": f"part{number % 3}.safetensors" for number in range(7)}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_every_part_counts(tmp_path: Path) -> None:
    in_parts(tmp_path)
    seen = {model_sha256(tmp_path)}
    assert model_sha256(tmp_path) in seen
    for number in range(3):
        path = tmp_path / f"part{number}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"x")
        seen.add(model_sha256(tmp_path))
        path.write_bytes(whole)
    (tmp_path / "part0.safetensors").rename(tmp_path / "kept")
    (tmp_path / "part1.safetensors").rename(tmp_path / "part0.safetensors")
    (tmp_path / "kept").rename(tmp_path / "part1.safetensors")
    seen.add(model_sha256(tmp_path))
    assert len(seen) == 5
    (tmp_path / "unrelated.safetensors").write_text("x")
    assert model_sha256(tmp_path) in seen


def test_every_setting_counts(tmp_path: Path) -> None:
    in_parts(tmp_path)
    before = model_sha256(tmp_path)
    (tmp_path / "config.json").write_text('{"layer_norm_epsilon": 0.1}')
    assert model_sha256(tmp_path) != before


def test_one_file_comes_before_parts(tmp_path: Path) -> None:
    """As in transformers. If a folder has two sets of weights, a note names the one that is read."""
    in_parts(tmp_path)
    assert unread_weights(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    before = model_sha256(tmp_path)
    (tmp_path / "part0.safetensors").write_bytes(b"other")
    assert model_sha256(tmp_path) == before
    note = unread_weights(tmp_path)
    assert note is not None
    assert INDEX in note


@pytest.mark.parametrize(
    ("index", "says"),
    [("{", "damaged"), ("[]", "damaged"),
     ('{"weight_map": {"a": 1}}', "names 1, which is no file of this folder"), ('{"weight_map": {"a": "../b"}}', "no file of this folder"),
     ('{"weight_map": {"a": "/etc/hostname"}}', "no file of this folder"), ('{"weight_map": {"a": "gone"}}', "gone: cannot be read")],
)  # fmt: skip
def test_a_bad_index_is_named(index: str, says: str, tmp_path: Path) -> None:
    in_parts(tmp_path)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=says):
        model_sha256(tmp_path)
