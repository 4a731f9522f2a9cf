"""A Hugging Face folder is identified by all its weights: other weights must not get the results of these."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.hf_model import _weights_sha256

INDEX = "model.safetensors.index.json"


def in_parts(folder: Path) -> Path:
    for number in range(3):
        (folder / f"part{number}.safetensors").write_bytes(bytes([number]) * 100)
    places = {f"weight{number}": f"part{number % 3}.safetensors" for number in range(7)}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_every_part_counts(tmp_path: Path) -> None:
    in_parts(tmp_path)
    seen = {_weights_sha256(tmp_path)}
    assert _weights_sha256(tmp_path) in seen
    for number in range(3):
        path = tmp_path / f"part{number}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"x")
        seen.add(_weights_sha256(tmp_path))
        path.write_bytes(whole)
    (tmp_path / "part0.safetensors").rename(tmp_path / "kept")
    (tmp_path / "part1.safetensors").rename(tmp_path / "part0.safetensors")
    (tmp_path / "kept").rename(tmp_path / "part1.safetensors")
    seen.add(_weights_sha256(tmp_path))
    assert len(seen) == 5
    (tmp_path / "unrelated.safetensors").write_text("x")
    assert _weights_sha256(tmp_path) in seen


def test_one_file_is_identified_by_its_hash(tmp_path: Path) -> None:
    """As before, so that earlier results stay valid; transformers, too, prefers it to the parts."""
    in_parts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert _weights_sha256(tmp_path) == hashlib.sha256(b"weights").hexdigest()


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
        _weights_sha256(tmp_path)
