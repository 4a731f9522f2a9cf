"""Each reason to refuse a checkpoint's manifest.json has a message of its own; the metadata's pickle and random states."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from safetensors.torch import save, save_file
from torch.distributed.checkpoint.metadata import Metadata

from megatron_lion.configfile import dump_config
from megatron_lion.errors import CheckpointError
from megatron_lion.parallel import Ranks
from megatron_lion.runs.identity import deciding_settings
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.checkpoint_tensors import check_metadata

ALONE = Ranks(0, 1, 0, 1, 0, 1, 0, 1)


def written(folder: Path, **changes: Any) -> Path:
    """A manifest with a digest that fits."""
    return tiny.write_manifest(folder, changes.pop("step", 3), **changes)


def test_a_whole_manifest_opens_without_its_digest(tmp_path: Path) -> None:
    opened = ckpt.open_checkpoint(written(tmp_path))
    assert opened.step == 3
    assert "sha256" not in opened.manifest


@pytest.mark.parametrize("found", [2, 0, None, "1", True])
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
    listed = {"rng_00000.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    checkpoint = ckpt.open_checkpoint(written(tmp_path, layout=LAYOUTS[saved_at][0], files=listed))
    for name, (_, ranks) in LAYOUTS.items():
        found = ckpt.read_rng(checkpoint, ranks)
        assert (found is not None) == (name == saved_at), name
        assert found is None or torch.equal(found["torch"], state)
    ranks, path = LAYOUTS[saved_at][1], tmp_path / "rng_00000.safetensors"
    for content in (b"", b"garbage", b"\xff" * 100, save({"torch": state.float()}), save({"other": state})):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"rng_00000\.safetensors: holds (no|other tensors than) random states"
        ):
            ckpt.read_rng(checkpoint, ranks)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rng_00000\.safetensors: holds no random states"):
        ckpt.read_rng(checkpoint, ranks)
    unlisted = ckpt.open_checkpoint(written(tmp_path, layout=LAYOUTS[saved_at][0]))
    with pytest.raises(CheckpointError, match=r"rng_00000\.safetensors: manifest\.json does not list it"):
        ckpt.read_rng(unlisted, ranks)


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


def test_each_fault_of_a_checkpoints_files_is_named(tmp_path: Path) -> None:
    """One rank alone reads no file that is not its share, but compares the size of each."""
    contents = {
        ".metadata": pickle.dumps(Metadata(state_dict_metadata={}, planner_data=None, storage_data={})), "a": b"content",
    }  # fmt: skip
    facts = {name: {"bytes": len(it), "sha256": hashlib.sha256(it).hexdigest()} for name, it in contents.items()}

    def message(files: dict[str, Any], **changes: bytes) -> tuple[str, str]:
        for name, content in {**contents, **changes}.items():
            (tmp_path / name).write_bytes(content)
        return tiny.error_of(ckpt._verify_files, ckpt.open_checkpoint(written(tmp_path, files=files)))

    assert message(facts) == ("", "")
    assert "manifest.json: lists no .metadata;" in message({"a": facts["a"]})[1]
    assert "a: its SHA-256 does not match manifest.json" in message(facts, a=b"kontent")[1]
    assert "a: 8 bytes, manifest.json lists 7" in message(facts, a=b"contents")[1]
    assert "b: missing;" in message({**facts, "b": facts["a"]})[1]
    (tmp_path / "linked").symlink_to("a")
    assert "linked: is no plain file but a link" in message({**facts, "linked": {**facts["a"], "bytes": 1}})[1]
    (tmp_path / "a").write_bytes(b"kontent")
    checkpoint = ckpt.open_checkpoint(written(tmp_path, files=facts))
    assert tiny.error_of(ckpt._verify_files, checkpoint, 0, 2) == ("", ""), (
        "the second file is hashed by the second rank"
    )
    assert "its SHA-256" in tiny.error_of(ckpt._verify_files, checkpoint, 1, 2)[1]


# Every value that JSON has, near the edges of what a manifest may hold.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.sampled_from([-5, 0, 1, 7, 2**63, 10**30]), st.floats(),
    st.text(max_size=6), st.sampled_from(["", ".", "..", "../x", "/etc/hostname", "a\x1b[31m", "f" * 32, "g" * 64]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just([[[[[[1]]]]]]),
)  # fmt: skip


OLD_NULLS = ("optimizer.betas", "model.ffn_hidden_size")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run folder with a checkpoint that has every entry, and its manifest."""
    run = tmp_path_factory.mktemp("manifest")
    config = tiny.tiny_config(run, "corpus")
    run.joinpath("config.yaml").write_text(dump_config(config))
    folder = tiny.write_manifest(
        run / "checkpoints" / "step_0000003", 3, run_id="a" * 32, settings=deciding_settings(config), consumed_samples=24,
        seed=1234, state_layout="dp_reshardable", state_form={"master_weights": "shards", "momentum": "fp32"},
        optimizer="lion", precision="fp32", buckets=[[100, 20]], config_sha256="0" * 64, state_fingerprint="1" * 32,
        optimizer_state={
            "num_steps": 3, "num_skipped": 0, "grad_scaler": {"scale": 1.0, "growth_tracker": 0, "hysteresis_tracker": 1},
        }, source="somewhere", files={".metadata": {"bytes": 1, "sha256": "0" * 64}},
    )  # fmt: skip
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    return folder, content


@examples(250)
@given(data=st.data())
def test_a_manifest_with_an_odd_value_is_refused_or_read_as_it_is(
    whole: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    """The digest fits, as in a manifest from an untrusted source; a reader may assume every type and range."""
    folder, content = whole
    changed = copy.deepcopy(content)
    *above, last = data.draw(st.sampled_from(list(places(content))))
    parent = changed
    for key in above:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(ODD)
    else:
        del parent[last]
    changed["sha256"] = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(changed))
    del changed["sha256"]
    kind, message = tiny.error_of(ckpt.open_checkpoint, folder)
    assert kind in ("", "CheckpointError"), message
    if kind:
        assert message.isprintable()
        return
    opened = ckpt.open_checkpoint(folder).manifest
    assert opened == changed
    assert opened["step"] == 3
    assert opened["consumed_samples"] == 24 or opened.get("state_layout") is None
    assert {type(size) for size in opened["layout"].values()} == {int}
    assert all(Path(name).name == name for name in opened["files"])
    assert all(type(stated["bytes"]) is int and stated["bytes"] >= 0 for stated in opened["files"].values())
    assert type(opened.get("seed", 0)) is int
    # A setting that is missing is newer than the checkpoint and has its default value. Earlier versions stored null for two.
    stated = {
        key: value for key, value in (opened.get("settings") or {}).items() if value is not None or key not in OLD_NULLS
    }
    assert all(content["settings"].get(key, value) == value for key, value in stated.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"step": 10**30}, "step must be an integer from 0 to 1000000000000, got 1000000000000000000000"),
        ({"step": "3"}, 'step must be an integer from 0 to 1000000000000, got "3"'),
        ({"step": 3.0}, "step must be an integer"),
        ({"step": True}, "step must be an integer"),
        ({"layout": None}, "layout must be an object of world_size"),
        ({"layout": {"world_size": 1}}, "layout must be an object of world_size"),
        ({"layout": {**LAYOUTS["one"][0], "more": 1}}, "layout must be an object of world_size"),
        ({"buckets": [[[[[1]]]]]}, "buckets must be null or a list of sizes"),
        ({"files": []}, "files must be an object of plain file names without folders"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "files must be an object of plain file names"),
        ({"files": {"/etc/hostname": {"bytes": 1, "sha256": "0" * 64}}}, "files must be an object of plain file names"),
        ({"files": {".metadata": {"bytes": "1", "sha256": "0" * 64}}}, "files must be"),
        ({"model": 7}, "model must be an object of kind"),
        ({"weights_fingerprint": None}, "weights_fingerprint must be 32 hexadecimal digits, got null"),
        ({"run_id": "x"}, 'run_id must be null or 32 hexadecimal digits, got "x"'),
        ({"source": "\x1b[31mred"}, "source must be a printable text"),
        ({"state_layout": "fully_reshardable"}, "consumed_samples is missing"),
        ({"state_layout": "fully_reshardable", "consumed_samples": -5}, "consumed_samples must be an integer from 0"),
        ({"state_layout": "fully_reshardable", "consumed_samples": None}, "consumed_samples must be an integer from 0"),
        ({"state_layout": "other"}, "state_layout must be null or one of fully_reshardable, dp_reshardable"),
    ],
)
def test_each_value_of_a_manifest_has_a_type_and_a_range(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {re.escape(named)}.*move this step's folder away"):
        ckpt.open_checkpoint(written(tmp_path, **changes))


def test_deeply_nested_manifests_are_refused(tmp_path: Path) -> None:
    for depth in (900, 3_000, 100_000):
        (tmp_path / "manifest.json").write_text('{"format": 1, "x": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(CheckpointError, match=r"manifest\.json: (damaged|does not match its own sha256)"):
            ckpt.open_checkpoint(tmp_path)
