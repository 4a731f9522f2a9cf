"""After a kill or a full disk during a save, the older checkpoint remains and the run resumes from it."""

from __future__ import annotations

import dataclasses
import io
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.errors import CheckpointError
from megatron_lion.runs import steps
from megatron_lion.train import checkpoint as ckpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


def full_disk(rank: int, config: Any, limit: int) -> list[Any]:
    """Trains with a limit on file sizes on rank 1 only (EFBIG, which is handled like a full disk)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return list(tiny.error_of(tiny.train, config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_on_one_rank_ends_all_and_leaves_the_older_checkpoint(trained_on_cpu: Any, folder: Path) -> None:
    trained = trained_on_cpu  # the limit would also apply to NCCL's shared memory
    copy = Path(shutil.copytree(trained.run_dir, folder / "full"))
    shutil.rmtree(steps.step_folder(copy, 4))
    config = dataclasses.replace(trained, run_dir=str(copy))
    for rank, (kind, message) in enumerate(run_distributed(full_disk, 2, config, 20_000)):
        assert kind == "StorageError", message
        assert "make room there" in message
        assert "rank 1" in message or rank == 1
    assert steps.list_steps(copy) == [2]
    ckpt.verify_checkpoint(tiny.newest_checkpoint(copy))
    resumed = run_distributed(tiny.train_each, 2, {"": config})[0][""]
    assert (
        resumed["manifest"]["state_fingerprint"]
        == tiny.newest_checkpoint(Path(trained.run_dir)).manifest["state_fingerprint"]
    )


def full_at_each_write(rank: int, jobs: dict[str, tuple[Any, int]]) -> dict[str, tuple[str, str]]:
    """Trains while the n-th file that the saver opens for writing fails with ENOSPC."""
    import builtins
    import errno
    import io

    real_open = builtins.open  # pathlib and torch reach the same function as io.open
    real_descriptor = os.open
    found = {}
    for name, (config, refused) in jobs.items():
        count = 0

        def shim_descriptor(path: Any, flags: int, *args: Any, refused: int = refused, **kwargs: Any) -> int:
            nonlocal count
            if flags & os.O_WRONLY and "checkpoints" in str(path):
                count += 1
                if count == refused:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real_descriptor(path, flags, *args, **kwargs)

        def shim(path: Any, mode: str = "r", *args: Any, refused: int = refused, **kwargs: Any) -> Any:
            nonlocal count
            if any(letter in mode for letter in "wxa") and "checkpoints" in str(path):
                count += 1
                if count == refused:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real_open(path, mode, *args, **kwargs)

        builtins.open = io.open = shim
        os.open = shim_descriptor  # the project's own files
        try:
            found[name] = tiny.error_of(tiny.train, config)
        finally:
            builtins.open = io.open = real_open
            os.open = real_descriptor
    return found


def test_no_space_at_any_write_of_the_saver(trained: Any, on_device: Path, device: str) -> None:
    """Tensors, metadata, random states, manifest: an incomplete checkpoint is never listed."""
    jobs = {}
    for refused in range(1, 7):
        copy = Path(shutil.copytree(trained.run_dir, on_device / f"space-{refused}"))
        shutil.rmtree(steps.step_folder(copy, 4))
        jobs[str(refused)] = dataclasses.replace(trained, run_dir=str(copy)), refused
    found = run_distributed(full_at_each_write, 1, jobs, device=device)[0]
    for name, (config, _) in jobs.items():
        kind, message = found[name]
        # Tensors, their metadata, random states, manifest; the pointer is written after the folder is renamed.
        assert steps.list_steps(Path(config.run_dir)) == ([2] if int(name) <= 4 else [2, 4]), name
        assert kind == ("StorageError" if int(name) <= 5 else ""), (name, message)
        assert name == "6" or "No space left on device" in message
        ckpt.verify_checkpoint(tiny.newest_checkpoint(Path(config.run_dir)))


def killed_at(rank: int, config: Any, victim: int, moment: int) -> None:
    """Trains; the victim is killed with SIGKILL at the given file-system call of its next save."""
    count = 0

    def kill_there(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        mode = arguments[1] if event == "open" else ""
        writes = any(letter in mode for letter in "wxa") if isinstance(mode, str) else arguments[2] & os.O_WRONLY
        if (writes or event in ("os.rename", "os.mkdir", "os.remove")) and "checkpoints" in str(arguments[0]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        import sys

        sys.addaudithook(kill_there)
    tiny.train(config)


# Moments of rank 0: 1 to 3 mkdir, 4 tensors, 5 and 6 metadata and its rename, 7 and 8 random states, 9 and 10 manifest,
# 11 rename of the folder, 12 and 13 the pointer.
@pytest.mark.parametrize(("victim", "moment"), [(0, 4), (0, 6), (0, 10), (0, 11), (0, 12), (1, 1)])
def test_kill_during_a_save_leaves_no_half_checkpoint(
    trained_on_cpu: Any, tmp_path: Path, victim: int, moment: int
) -> None:
    trained = trained_on_cpu  # with NCCL, the peer of a killed process waits until the timeout
    copy = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    shutil.rmtree(steps.step_folder(copy, 4))
    config = dataclasses.replace(trained, run_dir=str(copy))
    with pytest.raises(AssertionError):
        run_distributed(killed_at, 2, config, victim, moment)
    assert steps.list_steps(copy) == ([2, 4] if moment >= 12 else [2])
    ckpt.verify_checkpoint(tiny.newest_checkpoint(copy))
    resumed = run_distributed(tiny.train_each, 2, {"": config})[0][""]
    assert resumed["manifest"]["step"] == 4
    assert (
        resumed["manifest"]["state_fingerprint"]
        == tiny.newest_checkpoint(Path(trained.run_dir)).manifest["state_fingerprint"]
    )


class Flipping(io.FileIO):
    """A file that stores another bit than was written: a fault between the memory and the disk."""

    def write(self, content: Any) -> int:
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        return super().write(changed)


def flipped_on_the_way(rank: int, jobs: dict[str, tuple[Any, str]]) -> dict[str, tuple[str, str]]:
    """Trains; a bit flips in each write to the file of the new checkpoint whose name contains a word, on its rank."""
    import builtins

    real_open = builtins.open  # pathlib and torch reach the same function as io.open
    found = {}
    for name, (config, word) in jobs.items():

        def shim(path: Any, mode: str = "r", *args: Any, word: str = word, **kwargs: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            if mode == "wb" and "checkpoints" in place and word in Path(place).name:
                return io.BufferedWriter(Flipping(path, "w"))
            return real_open(path, mode, *args, **kwargs)

        builtins.open = io.open = shim
        try:
            found[name] = tiny.error_of(tiny.train, config)
        finally:
            builtins.open = io.open = real_open
    return found


def test_bits_that_flip_on_their_way_to_the_disk_are_found_before_the_commit(
    trained_on_cpu: Any, tmp_path: Path
) -> None:
    """Retention would remove the older checkpoint right after the commit."""
    words = {
        "tensors": "__0_0.distcp",
        "of rank 1": "__1_0.distcp",
        "metadata": ".metadata",
        "rng": "rng_00001",
        "manifest": "manifest.json",
    }
    jobs = {}
    for name, word in words.items():
        copy = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / name))
        shutil.rmtree(steps.step_folder(copy, 4))
        config = dataclasses.replace(trained_on_cpu, run_dir=str(copy))
        jobs[name] = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep=1)), word
    for rank, found in enumerate(run_distributed(flipped_on_the_way, 2, jobs)):
        for name, (config, word) in jobs.items():
            kind, message = found[name]
            assert kind == "StorageError", (name, message)
            assert word in message or rank == 1
            assert "other bytes were read back than were written" in message, name
            assert steps.list_steps(Path(config.run_dir)) == [2], name
            ckpt.verify_checkpoint(tiny.newest_checkpoint(Path(config.run_dir)))


def test_a_manifest_that_no_reader_accepts_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_0000001.tmp-a"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError):
        ckpt._commit(folder, folder.with_name("step_0000001"), {"seed": -5, "step": 1}, {})
    assert not folder.with_name("step_0000001").exists()
