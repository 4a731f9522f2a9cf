"""Each reason to refuse a checkpoint's manifest.json has a message of its own; the metadata's pickle and random states."""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from megatron_lion.errors import CheckpointError
from megatron_lion.parallel import Ranks
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.checkpoint_tensors import check_metadata

ALONE = Ranks(0, 1, 0, 1, 0, 1, 0, 1)


def written(folder: Path, **changes: Any) -> Path:
    """A manifest with a digest that fits."""
    return tiny.write_manifest(folder, 3, **changes)


def test_a_whole_manifest_opens_without_its_digest(tmp_path: Path) -> None:
    opened = ckpt.open_checkpoint(written(tmp_path))
    assert opened.step == 3
    assert "sha256" not in opened.manifest


@pytest.mark.parametrize("found", [2, 0, None, "1"])
def test_another_format_is_refused(tmp_path: Path, found: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}: format {found}; this version reads format 1"):
        ckpt.open_checkpoint(written(tmp_path, format=found))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"manifest\.json: damaged \(Expecting value.*move this step's folder away"),
        (b"\xff\xfe", r"manifest\.json: damaged \('utf-8' codec"),
        (b"9" * 5000, r"manifest\.json: damaged \(Exceeds the limit"),
        (b"[]", "format None; this version reads format 1"),
        (b"null", "format None; this version reads format 1"),
        (b"{}", "format None; this version reads format 1"),
        (b'{"format": 1, "step": 3}', r"manifest\.json: does not match its own sha256: .*move this step's folder away"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        ckpt.open_checkpoint(tmp_path)


def test_a_changed_value_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match="does not match its own sha256"):
        ckpt.open_checkpoint(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so the checkpoint is not complete"):
        ckpt.open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged \(.*Is a directory"):
        ckpt.open_checkpoint(tmp_path)


LAYOUTS = {
    "one": ({"world_size": 1, "dp_size": 1, "tp_size": 1, "pp_size": 1}, ALONE),
    "DP2": ({"world_size": 2, "dp_size": 2, "tp_size": 1, "pp_size": 1}, Ranks(0, 2, 0, 2, 0, 1, 0, 1)),
    "TP2": ({"world_size": 2, "dp_size": 1, "tp_size": 2, "pp_size": 1}, Ranks(0, 2, 0, 1, 0, 2, 0, 1)),
    "PP2": ({"world_size": 2, "dp_size": 1, "tp_size": 1, "pp_size": 2}, Ranks(0, 2, 0, 1, 0, 1, 0, 2)),
}


@pytest.mark.parametrize("saved_at", list(LAYOUTS))
def test_random_states_are_read_at_their_own_layout_only(tmp_path: Path, saved_at: str) -> None:
    state = torch.arange(5, dtype=torch.uint8)
    save_file({"torch": state}, tmp_path / "rng_00000.safetensors")
    checkpoint = ckpt.open_checkpoint(written(tmp_path, layout=LAYOUTS[saved_at][0]))
    for name, (_, ranks) in LAYOUTS.items():
        found = ckpt.read_rng(checkpoint, ranks)
        assert (found is not None) == (name == saved_at), name
        assert found is None or torch.equal(found["torch"], state)
    (tmp_path / "rng_00000.safetensors").unlink()
    assert ckpt.read_rng(checkpoint, LAYOUTS[saved_at][1]) is None


@pytest.mark.parametrize("named", [os.system, eval, torch.load, torch.Tensor, Counter, Path])
def test_metadata_that_only_names_something_else_is_refused(tmp_path: Path, named: Any) -> None:
    """Nothing is called here, so that just the list of known names can refuse it."""
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, planner_data=torch.float16, storage_data={})))
    check_metadata(path, [])
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, planner_data=named, storage_data={})))
    name = re.escape(named.__qualname__)
    with pytest.raises(CheckpointError, match=rf"not plain checkpoint metadata \(it references \S+\.{name}\)"):
        check_metadata(path, [])
