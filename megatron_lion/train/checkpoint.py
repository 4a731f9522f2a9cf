"""Checkpoints that are either whole or not there: written beside, digested, renamed; verified before they are read.

    RUN/checkpoints/step_0001000/   .metadata, *.distcp (tensors, megatron-core's torch_dist format), rng_*.safetensors,
                                    manifest.json (step, layout, counters, digest of every file and of itself,
                                    state fingerprint)
    RUN/checkpoints/latest          name of the newest one, for people and scripts

Only tensors and JSON are stored; checkpoint_tensors.py does the tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.errors import CheckpointError
from megatron_lion.files import sha256_file, storage_errors, sync_folder, write_whole
from megatron_lion.parallel import Ranks, agree, broadcast_object
from megatron_lion.runs.paths import checkpoints_folder
from megatron_lion.runs.steps import (
    FORMAT,
    GO_BACK,
    LATEST,
    MANIFEST,
    Checkpoint,
    is_committed,
    list_steps,
    manifest_digest,
    open_checkpoint,
    step_folder,
)
from megatron_lion.train.checkpoint_tensors import check_metadata, read_tensors, write_tensors

__all__ = [
    "layout_facts", "read_rng", "read_tensors", "remove_old", "save_checkpoint", "verify_checkpoint",
]  # fmt: skip


def verify_checkpoint(checkpoint: Checkpoint, ranks: Ranks | None = None) -> None:
    """Compares size and SHA-256 of every file, shared out over the ranks, and looks through the pickled metadata.

    Raises:
        CheckpointError: names the file that is missing, changed or unsafe; on all ranks.
    """
    rank, size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    with agree("verifying the checkpoint"):
        for number, (name, stated) in enumerate(sorted(checkpoint.manifest["files"].items())):
            path = checkpoint.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; {GO_BACK}")
            if path.stat().st_size != stated["bytes"]:
                raise CheckpointError(
                    f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {stated['bytes']}: cut short or changed; {GO_BACK}"
                )
            if number % size == rank and sha256_file(path) != stated["sha256"]:
                raise CheckpointError(
                    f"{path}: its SHA-256 is not the one in {MANIFEST}: damaged or changed; {GO_BACK}"
                )
        check_metadata(checkpoint.folder / ".metadata", checkpoint.manifest["files"])


def save_checkpoint(
    run_dir: Path, step: int, sharded: dict[str, Any], rng: dict[str, torch.Tensor], facts: dict[str, Any], ranks: Ranks
) -> Checkpoint:
    """Writes and commits a checkpoint; a collective call.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        sharded: ShardedTensors of model and optimizer.
        rng: this rank's random states.
        facts: plain values for the manifest, equal on every rank.
        ranks: this process's place.

    Raises:
        StorageError: the disk refused; the unfinished folder stays under its temporary name and is never read.
    """
    final = step_folder(run_dir, step)
    if broadcast_object(is_committed(run_dir, step) if ranks.is_main else None):
        return open_checkpoint(final)
    attempt = broadcast_object(f"{os.getpid()}-{os.urandom(3).hex()}" if ranks.is_main else None)
    temporary = final.with_name(f"{final.name}.tmp-{attempt}")
    with agree("making the checkpoint folder"):
        if ranks.is_main:
            with storage_errors(temporary, "made"):
                temporary.mkdir(parents=True)
    if dist.get_world_size() > 1:
        dist.barrier()
    write_tensors(sharded, temporary)
    with agree("writing the random states"):
        _write_rng(temporary, rng, ranks)
    with agree("committing the checkpoint"):
        if ranks.is_main:
            with storage_errors(temporary):
                _commit(temporary, final, {"format": FORMAT, "step": step, **facts})
    return open_checkpoint(final)


def _write_rng(folder: Path, rng: dict[str, torch.Tensor], ranks: Ranks) -> None:
    from safetensors.torch import save

    write_whole(folder / f"rng_{ranks.rank:05d}.safetensors", save(rng))


def read_rng(checkpoint: Checkpoint, ranks: Ranks) -> dict[str, torch.Tensor] | None:
    """This rank's random states, or None where the checkpoint was written at another layout."""
    from safetensors.torch import load_file

    if checkpoint.manifest["layout"] != layout_facts(ranks):
        return None
    path = checkpoint.folder / f"rng_{ranks.rank:05d}.safetensors"
    return load_file(path) if path.is_file() else None


def layout_facts(ranks: Ranks) -> dict[str, int]:
    return {
        "world_size": ranks.world_size,
        "dp_size": ranks.dp_size,
        "tp_size": ranks.tp_size,
        "pp_size": ranks.pp_size,
    }


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    content = {**manifest, "files": files}
    write_whole(temporary / MANIFEST, json.dumps({**content, "sha256": manifest_digest(content)}, indent=1).encode())
    os.replace(temporary, final)
    sync_folder(final.parent)
    write_whole(final.parent / LATEST, final.name.encode())


def remove_old(run_dir: Path, *, keep: int, always_keep: set[int]) -> list[int]:
    """Deletes all but the newest `keep` checkpoints and those listed, and unfinished folders of earlier attempts.

    Call it after a newer checkpoint was committed. Returns the steps removed.

    Raises:
        StorageError: the file system does not let go of them.
    """
    for entry in checkpoints_folder(run_dir).glob("step_*.tmp-*"):
        shutil.rmtree(entry, ignore_errors=True)
    if keep == 0:
        return []
    removable = [step for step in list_steps(run_dir) if step not in always_keep]
    gone = removable[:-keep]
    for step in gone:
        doomed = step_folder(run_dir, step)
        trash = doomed.with_name(doomed.name + ".tmp-removed")
        with storage_errors(doomed, "removed"):
            os.replace(doomed, trash)  # from here on list_steps no longer sees it
        shutil.rmtree(trash, ignore_errors=True)
    return gone
