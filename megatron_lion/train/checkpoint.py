"""Writes, verifies and removes checkpoints; they are written atomically and verified before they are read.

    RUN/checkpoints/step_0001000/   .metadata, *.distcp (tensors, megatron-core's torch_dist format), rng_*.safetensors,
                                    manifest.json (step, layout, counters, digest of every file and of itself,
                                    state fingerprint)
    RUN/checkpoints/latest          name of the newest one, for people and scripts

A checkpoint is written to step_0001000.tmp-ATTEMPT/ and renamed when complete. Only tensors and JSON are stored;
checkpoint_tensors.py writes and reads the tensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.errors import CheckpointError, StorageError
from megatron_lion.files import make_folder, sha256_file, storage_errors, sync_file, sync_folder, write_whole
from megatron_lion.parallel import Ranks, agree, broadcast_object
from megatron_lion.runs.checkpoint_manifest import GO_BACK_BY_HAND, manifest_bytes, read_manifest
from megatron_lion.runs.folder import record_newest
from megatron_lion.runs.identity import settle_run_id
from megatron_lion.runs.paths import checkpoints_folder
from megatron_lion.runs.steps import (
    FORMAT,
    GO_BACK,
    LATEST,
    MANIFEST,
    Checkpoint,
    find_latest,
    list_steps,
    naming_removal,
    newest_whole,
    open_checkpoint,
    step_folder,
)
from megatron_lion.train.checkpoint_tensors import Stored, check_metadata, read_tensors, write_tensors

__all__ = [
    "Stored", "layout_facts", "newest_checkpoint", "read_rng", "read_tensors", "remove_old", "save_checkpoint", "verify_checkpoint",
]  # fmt: skip


def newest_checkpoint(
    run_dir: Path, ranks: Ranks, *, fresh: bool = False, fall_back: bool = False
) -> tuple[str, Checkpoint | None]:
    """Finds the checkpoint from which a run resumes; a collective call, which takes the first rank's decision.

    Args:
        run_dir: the run folder, locked by the first rank.
        ranks: this process's ranks.
        fresh: the run starts over.
        fall_back: take the newest intact checkpoint, and move newer folders aside, instead of refusing.

    Returns:
        The run's id, and the checkpoint, or None if the run begins.

    Raises:
        CheckpointError: the newest checkpoint is incomplete, damaged, missing or not this run's.
    """
    decided: tuple[str, int | None] | None = None
    with agree("looking for a checkpoint"):
        if ranks.is_main:
            folders = [step_folder(run_dir, step) for step in list_steps(run_dir)]
            run_id = settle_run_id(run_dir, folders, fresh=fresh, fall_back=fall_back)
            found = newest_whole(run_dir, _verify_files) if fall_back else find_latest(run_dir)
            decided = run_id, None if found is None else found.step
    run_id, step = broadcast_object(decided)
    with agree("opening the checkpoint"):
        return run_id, None if step is None else open_checkpoint(step_folder(run_dir, step))


def verify_checkpoint(checkpoint: Checkpoint, ranks: Ranks | None = None) -> dict[str, Stored]:
    """Compares size and SHA-256 of every file with the manifest and checks the pickled metadata; a collective call.

    Args:
        checkpoint: from `open_checkpoint`.
        ranks: the ranks that share the hashing, or None to hash every file in this process.

    Returns:
        Dtype and shape in which every tensor was saved, by its key.

    Raises:
        CheckpointError: a file is missing, changed or unsafe; names the file; on all ranks.
    """
    stored: dict[str, Stored] = {}
    with agree("verifying the checkpoint"), naming_removal(checkpoint.folder):
        stored = _verify_files(checkpoint, *((ranks.rank, ranks.world_size) if ranks is not None else (0, 1)))
    return stored


def _verify_files(checkpoint: Checkpoint, rank: int = 0, size: int = 1) -> dict[str, Stored]:
    """Compares sizes of all files, and the SHA-256 of every `size`-th, with the manifest; no collective call."""
    files = checkpoint.manifest["files"]  # plain names, by read_manifest: each lies in the checkpoint's own folder
    if ".metadata" not in files:
        raise CheckpointError(f"{checkpoint.folder / MANIFEST}: lists no .metadata; {GO_BACK}")
    for number, (name, stated) in enumerate(sorted(files.items())):
        path = checkpoint.folder / name
        try:
            found = os.lstat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: missing; {GO_BACK}") from error
        # Judged before it is opened: a link could lead out of the folder, and a pipe would block.
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: is no plain file but a link or a device; {GO_BACK}")
        if found.st_size != stated["bytes"]:
            raise CheckpointError(
                f"{path}: {found.st_size} bytes, {MANIFEST} lists {stated['bytes']}: truncated or changed; {GO_BACK}"
            )
        # Each file is hashed on one rank only: SHA-256 runs at about 1.9 GB/s a core. Sizes are checked on every rank.
        if number % size == rank:
            try:
                digest = sha256_file(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; {GO_BACK}") from error
            if digest != stated["sha256"]:
                raise CheckpointError(f"{path}: its SHA-256 does not match {MANIFEST}: damaged or changed; {GO_BACK}")
    # On every rank: each of them unpickles this file when it reads tensors.
    return check_metadata(checkpoint.folder / ".metadata", files)


def save_checkpoint(
    run_dir: Path, step: int, sharded: dict[str, Any], rng: dict[str, torch.Tensor], facts: dict[str, Any], ranks: Ranks
) -> Checkpoint:
    """Writes and commits a checkpoint; a collective call. If the same state of this step is already there, it is kept.

    Args:
        run_dir: the run's folder.
        step: number of optimizer steps done.
        sharded: ShardedTensors of model and optimizer.
        rng: this rank's random states, uint8 tensors by name.
        facts: plain values for the manifest, equal on every rank.
        ranks: this process's ranks.

    Raises:
        CheckpointError: the step's name is taken by something else than this state of this run; nothing was written.
        StorageError: a write failed; the unfinished folder keeps its temporary name and is never read.
    """
    final = step_folder(run_dir, step)
    # Rank 0 decides for all: if ranks saw different folders, some would wait in a collective that others never enter.
    is_there = False
    with agree("looking for an earlier checkpoint of this step"):
        if ranks.is_main and os.path.lexists(final):
            _need_same_state(final, facts)
            is_there = True
    if broadcast_object(is_there):
        return open_checkpoint(final)
    # A new folder for every attempt. If two attempts shared one, a killed save could leave files of both steps in it, and
    # megatron-core would load such a mixture without an error.
    attempt = broadcast_object(f"{os.getpid()}-{os.urandom(3).hex()}" if ranks.is_main else None)
    temporary = final.with_name(f"{final.name}.tmp-{attempt}")
    with agree("making the checkpoint folder"):
        if ranks.is_main:
            make_folder(temporary.parent)
            with storage_errors(temporary, "made"):
                temporary.mkdir()
    if dist.get_world_size() > 1:
        dist.barrier()  # the folder exists before any rank writes into it
    digests = write_tensors(sharded, temporary)
    # The end of this block is the barrier before the comparison, for which a rank reads files of other ranks.
    with agree("writing the random states"):
        own = _write_rng(temporary, rng, ranks)
    of_all: list[Any] = [(digests, own)]
    if dist.get_world_size() > 1:
        of_all = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, (digests, own))
    digests = {**of_all[0][0], **dict(rng_file for _, rng_file in of_all)}
    # The end of this block is the barrier before the commit.
    with agree("comparing what was written"), storage_errors(temporary):
        _compare(temporary, digests, ranks)
    with agree("committing the checkpoint"):
        if ranks.is_main:
            with storage_errors(temporary):
                _commit(temporary, final, {"format": FORMAT, "step": step, **facts}, digests)
    return open_checkpoint(final)


def _need_same_state(folder: Path, facts: dict[str, Any]) -> None:
    """Raises CheckpointError unless a folder is a checkpoint of this run that holds the state that would be saved."""
    remedy = "it was left as it is and nothing was saved; move it away, then give the same command again"
    try:
        manifest = open_checkpoint(folder).manifest
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: cannot be saved: something else has its name ({error}); {remedy}") from error
    for key in ("run_id", "state_fingerprint", "weights_fingerprint"):
        if manifest.get(key) != facts.get(key):
            raise CheckpointError(
                f"{folder}: cannot be saved: another checkpoint has its name, with another {key}; {remedy}"
            )


def _write_rng(folder: Path, rng: dict[str, torch.Tensor], ranks: Ranks) -> tuple[str, str]:
    """Writes this rank's random states; returns the file's name and the SHA-256 of what was written."""
    from safetensors.torch import save

    name, content = f"rng_{ranks.rank:05d}.safetensors", save(rng)
    write_whole(folder / name, content)
    return name, hashlib.sha256(content).hexdigest()


def read_rng(checkpoint: Checkpoint, ranks: Ranks) -> dict[str, torch.Tensor] | None:
    """Returns this rank's random states, or None if the checkpoint was written at another layout.

    Raises:
        CheckpointError: the file is not one of the checkpoint's, or holds anything but uint8 tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if checkpoint.manifest["layout"] != layout_facts(ranks):
        return None
    path = checkpoint.folder / f"rng_{ranks.rank:05d}.safetensors"
    if path.name not in checkpoint.manifest["files"]:  # then nothing compared its digest
        raise CheckpointError(f"{path}: {MANIFEST} does not list it; {GO_BACK_BY_HAND}")
    try:
        states = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: holds no random states ({' '.join(str(error).split())}); {GO_BACK_BY_HAND}"
        ) from error
    if "torch" not in states or any(state.dtype != torch.uint8 or state.dim() != 1 for state in states.values()):
        raise CheckpointError(f"{path}: holds other tensors than random states; {GO_BACK_BY_HAND}")
    return states


def layout_facts(ranks: Ranks) -> dict[str, int]:
    """Sizes of the process groups, as a manifest stores them."""
    return {
        "world_size": ranks.world_size,
        "dp_size": ranks.dp_size,
        "tp_size": ranks.tp_size,
        "pp_size": ranks.pp_size,
    }


def _compare(temporary: Path, digests: dict[str, str], ranks: Ranks) -> None:
    """Syncs this rank's share of the files and compares what is in them with what was written.

    Args:
        temporary: the folder.
        digests: SHA-256 of what the ranks wrote, by file name.
        ranks: the ranks that share the hashing.

    Raises:
        StorageError: a file holds other bytes than were written.
    """
    for number, (name, written) in enumerate(sorted(digests.items())):
        if number % ranks.world_size == ranks.rank:
            path = temporary / name
            sync_file(path)
            # Before older checkpoints are removed, and not only when this one is needed.
            if sha256_file(path) != written:
                raise StorageError(_changed(path))


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
    """Writes the manifest of files that are on the disk, and gives the folder its final name.

    Args:
        temporary, final: the folder's names before and after.
        manifest: entries of the manifest but for the files.
        digests: SHA-256 of each file, by its name.

    Raises:
        StorageError: the manifest holds other bytes than were written; nothing was committed.
        CheckpointError: the manifest has a value that no reader accepts; nothing was committed.
    """
    # The order makes a crash at any point harmless: data, manifest, rename, parent folder, pointer. A manifest that
    # reached the disk before the data would make an incomplete checkpoint look complete after a power failure.
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": written}
        for name, written in sorted(digests.items())
    }
    content = manifest_bytes({**manifest, "files": files})
    write_whole(temporary / MANIFEST, content)
    if (temporary / MANIFEST).read_bytes() != content:
        raise StorageError(_changed(temporary / MANIFEST))
    read_manifest(temporary)  # a manifest that no command accepts must not be committed, and is no fault of the disk
    os.replace(temporary, final)  # atomic: from here on list_steps sees the checkpoint
    sync_folder(final.parent)  # the rename is durable before the pointer names it
    write_whole(final.parent / LATEST, final.name.encode())
    record_newest(final.parent.parent, manifest["step"])


def _changed(path: Path) -> str:
    return (
        f"{path}: other bytes were read back than were written, so the disk or the memory is faulty; the checkpoint was not "
        "committed; check the machine or choose a folder on another disk, then give the same command again"
    )


def remove_old(run_dir: Path, *, keep: int, always_keep: set[int]) -> list[int]:
    """Deletes all but the newest `keep` checkpoints and those listed, and unfinished folders of earlier attempts.

    Call it on one rank, after a newer checkpoint was committed. Returns the steps removed.

    Args:
        run_dir: the run's folder.
        keep: number of checkpoints to keep in addition to `always_keep`; 0 keeps all.
        always_keep: steps that are never deleted.

    Raises:
        StorageError: a folder could not be removed.
    """
    for entry in checkpoints_folder(run_dir).glob("step_*.tmp-*"):
        _remove(entry)
    if keep == 0:
        return []
    removable = [step for step in list_steps(run_dir) if step not in always_keep]
    gone = removable[:-keep]
    for step in gone:
        doomed = step_folder(run_dir, step)
        trash = doomed.with_name(doomed.name + ".tmp-removed")
        # Renamed first: if the deletion is interrupted, no half-deleted folder keeps a checkpoint's name.
        with storage_errors(doomed, "removed"):
            os.replace(doomed, trash)  # from here on list_steps no longer sees it
        _remove(trash)
    return gone


def _remove(entry: Path) -> None:
    """Removes a folder, or a link to one; the target of a link is kept."""
    if entry.is_symlink():
        with suppress(OSError):  # as below: what is left over is removed after the next save
            entry.unlink(missing_ok=True)
    else:
        shutil.rmtree(entry, ignore_errors=True)
