"""Damaged, foreign and hostile checkpoints are rejected; complete ones are read."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.errors import CheckpointError
from megatron_lion.runs import steps
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.checkpoint_tensors import check_metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trust")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture
def run_dir(trained_on_cpu: Any, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_whole_checkpoint_verifies(run_dir: Path) -> None:
    checkpoint = tiny.newest_checkpoint(run_dir)
    assert checkpoint.step == 4
    ckpt.verify_checkpoint(checkpoint)
    names = set(checkpoint.manifest["files"])
    assert names == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "rng_00000.safetensors", "rng_00001.safetensors",
    }  # fmt: skip
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_0000004"


FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "rng_00001.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_named(run_dir: Path, name: str) -> None:
    path = tiny.newest_checkpoint(run_dir).folder / name
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name}: {len(damaged)} bytes, manifest.json lists {len(content)}"):
            ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))


def test_every_flipped_bit_is_found(run_dir: Path) -> None:
    """Flips random bits of all files, including the manifest."""
    draw = random.Random(0)
    checkpoint = tiny.newest_checkpoint(run_dir)
    for _ in range(40):
        name = draw.choice([*FILES, steps.MANIFEST])
        path = checkpoint.folder / name
        position, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, position, bit)
        with pytest.raises(CheckpointError) as caught:
            ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))
        assert str(path) in str(caught.value) or name == steps.MANIFEST
        flip(path, position, bit)
    ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))


def test_swapped_shards_are_found(run_dir: Path) -> None:
    folder = tiny.newest_checkpoint(run_dir).folder
    one, other = folder / "__0_0.distcp", folder / "__1_0.distcp"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest and updates its digest, as an attacker would."""
    manifest = json.loads((folder / steps.MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = steps.manifest_digest(manifest)
    (folder / steps.MANIFEST).write_text(json.dumps(manifest))


def restate(folder: Path, name: str) -> None:
    from megatron_lion.files import sha256_file

    path = folder / name
    stated = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: stated}))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.pair = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.pair


@pytest.mark.parametrize("call", ["os.system", "builtins.exec", "builtins.eval", "pathlib.Path.touch"])
def test_hostile_metadata_is_refused_unrun(run_dir: Path, tmp_path: Path, call: str) -> None:
    """The digests match, as in a checkpoint from an untrusted source."""
    proof = tmp_path / "ran"
    attack = {
        "os.system": Hostile(os.system, f"touch {proof}"),
        "builtins.exec": Hostile(exec, f"open({str(proof)!r}, 'w')"),
        "builtins.eval": Hostile(eval, f"open({str(proof)!r}, 'w')"),
        "pathlib.Path.touch": Hostile(Path.touch, proof),
    }[call]
    folder = tiny.newest_checkpoint(run_dir).folder
    (folder / ".metadata").write_bytes(pickle.dumps(attack))
    restate(folder, ".metadata")
    with pytest.raises(CheckpointError, match=r"\.metadata: not plain checkpoint metadata"):
        ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x05", b"garbage", pickle.dumps({"a": 1}), pickle.dumps([[]]), b"(" * 3000]
)
def test_metadata_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not plain checkpoint metadata"):
        check_metadata(path, ["__0_0.distcp"])


def test_metadata_with_pickled_objects_is_refused(run_dir: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder = tiny.newest_checkpoint(run_dir).folder
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written by this test's own run
    metadata.state_dict_metadata["surprise"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    restate(folder, ".metadata")
    with pytest.raises(CheckpointError, match="holds 1 pickled objects"):
        ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))


@pytest.mark.parametrize("target", ["../../../elsewhere.distcp", "/etc/hostname", "not_listed.distcp"])
def test_metadata_that_points_outside_is_refused(run_dir: Path, target: str) -> None:
    folder = tiny.newest_checkpoint(run_dir).folder
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written by this test's own run
    next(iter(metadata.storage_data.values())).relative_path = target
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    restate(folder, ".metadata")
    with pytest.raises(CheckpointError, match=f"points to {target}"):
        ckpt.verify_checkpoint(tiny.newest_checkpoint(run_dir))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b'{"format": 2}', b'{"format": 1, "step": 4}', b"\xff\xfe", b"9" * 5000],
)
def test_manifest_that_is_something_else_is_refused(run_dir: Path, content: bytes) -> None:
    (tiny.newest_checkpoint(run_dir).folder / steps.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="step_0000004"):
        tiny.newest_checkpoint(run_dir)


def test_folders_decide_not_the_pointer(run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest"
    for torn in (b"", b"step_00", b"step_9999999", b"\0\0"):
        latest.write_bytes(torn)
        assert tiny.newest_checkpoint(run_dir).step == 4
    latest.unlink()
    assert tiny.newest_checkpoint(run_dir).step == 4


def test_unfinished_folders_are_never_read(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step_0000004", folder / "step_0000009.tmp-77-abcdef")
    (folder / "step_0000003").mkdir()
    (folder / "step_0000003" / "__0_0.distcp").write_bytes(b"half")
    (folder / "notes").mkdir()
    assert steps.list_steps(run_dir) == [2, 4]
    assert tiny.newest_checkpoint(run_dir).step == 4


def test_never_a_silent_start_from_zero(run_dir: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        (steps.step_folder(run_dir, step) / steps.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step_000000\d has no manifest.json"):
        steps.find_latest(run_dir)
    assert steps.find_latest(tmp_path / "nothing") is None


def test_retention_keeps_the_newest_and_those_asked_for(on_device: Path, corpus: str, device: str) -> None:
    config = tiny.tiny_config(
        on_device / "retention", corpus, device=device, train__steps=7, checkpoint__every=1, checkpoint__keep=2,
        checkpoint__at_steps=[1, 3],
    )  # fmt: skip
    leftover = Path(config.run_dir, "checkpoints", "step_0000005.tmp-1-aaaaaa")
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, stop_after=2))
    run_distributed(tiny.train_each, 1, {"": half}, device=device)
    leftover.mkdir()
    run_distributed(tiny.train_each, 1, {"": config}, device=device)
    assert steps.list_steps(Path(config.run_dir)) == [1, 3, 5, 6, 7]
    assert not list(Path(config.run_dir, "checkpoints").glob("*.tmp-*"))
    for step in (1, 3, 5, 6, 7):
        ckpt.verify_checkpoint(steps.open_checkpoint(steps.step_folder(Path(config.run_dir), step)))


def test_resume_reads_nothing_damaged(trained: Any, on_device: Path, device: str, size: int) -> None:
    """The whole command stops at a damaged file, and its message states how to resume from the previous checkpoint."""
    jobs = {}
    for name in FILES if size == 2 else FILES[:2]:
        copy = Path(shutil.copytree(trained.run_dir, on_device / f"damaged{name}"))
        flip(tiny.newest_checkpoint(copy).folder / name, 100, 3)
        jobs[name] = dataclasses.replace(trained, run_dir=str(copy))
    for rank in run_distributed(tiny.errors_of_each, size, jobs, device=device):
        for name, (kind, message) in rank.items():
            assert kind == "CheckpointError", message
            assert f"step_0000004/{name}" in message
            assert "move this step's folder away" in message
    copy = on_device / "damaged__0_0.distcp"
    shutil.move(tiny.newest_checkpoint(copy).folder, on_device / "away")
    resumed = run_distributed(tiny.train_each, size, {"": jobs["__0_0.distcp"]}, device=device)[0][""]
    assert (
        resumed["manifest"]["state_fingerprint"]
        == tiny.newest_checkpoint(Path(trained.run_dir)).manifest["state_fingerprint"]
    )


def test_another_model_optimizer_or_data_is_refused(trained: Any, on_device: Path, corpus: str, device: str) -> None:
    """Without the run's config.yaml: the manifest alone identifies model, optimizer and data."""
    other = tiny.write_corpus(on_device / "other-corpus", seed=1)
    changes = {
        "hidden": ({"model__hidden_size": 64}, "hidden_size 32 (now 64)"),
        "layers": ({"model__num_layers": 4}, "num_layers 2 (now 4)"),
        "vocabulary": ({"model__vocab_size": 121}, "vocab_size 120 (now 121)"),
        "optimizer": ({"optimizer__name": "sgd"}, "was written by lion, optimizer.name is sgd"),
        "data": ({"data__path": [other]}, "was trained on other data"),
    }
    jobs = {}
    for name, (change, _) in changes.items():
        copy = Path(shutil.copytree(trained.run_dir, on_device / f"other-{name}"))
        (copy / "config.yaml").unlink()
        (copy / "metrics.jsonl").unlink()
        shutil.move(copy / "checkpoints", copy.with_name(copy.name + "-checkpoints"))
        shutil.rmtree(copy)
        settings = {**tiny.CHECKPOINTED, "device": device, **change}
        jobs[name] = tiny.tiny_config(copy, corpus, **settings), copy.with_name(copy.name + "-checkpoints")
    found = run_distributed(refusals, 1, jobs, device=device)[0]
    for name, (_, expected) in changes.items():
        kind, message = found[name]
        assert kind == "CheckpointError", message
        assert expected in message


def refusals(rank: int, jobs: dict[str, tuple[Any, Path]]) -> dict[str, tuple[str, str]]:
    from megatron_lion.train.restore import restore_run

    found = {}
    for name, (config, checkpoints) in jobs.items():
        with tiny.opened_run(config) as run:
            found[name] = tiny.error_of(restore_run, run, steps.open_checkpoint(checkpoints / "step_0000004"))
    return found


def test_run_folder_with_other_settings_is_refused(trained: Any, on_device: Path, device: str) -> None:
    copy = Path(shutil.copytree(trained.run_dir, on_device / "settings"))
    base = dataclasses.replace(trained, run_dir=str(copy))
    other_lr = dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, lr=2e-3), seed=5)
    harmless = dataclasses.replace(base, train=dataclasses.replace(base.train, log_every=3))
    foreign = on_device / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    jobs = {"lr": other_lr, "log": harmless, "foreign": dataclasses.replace(base, run_dir=str(foreign))}
    found = run_distributed(tiny.errors_of_each, 1, jobs, device=device)[0]
    assert found["lr"][0] == "CheckpointError"
    assert "seed: 1234, now 5; optimizer.lr: 0.001, now 0.002" in found["lr"][1]
    assert "--fresh" in found["lr"][1]
    assert found["log"] == ("", "")
    assert found["foreign"][0] == "ConfigError"
    assert "is not empty and holds no run" in found["foreign"][1]
    assert sorted(path.name for path in foreign.iterdir()) == ["lock", "thesis.tex"]
