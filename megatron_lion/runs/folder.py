"""Creates, locks and checks a run folder, and defines which settings may change when a run resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config, save_config
from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.files import file_lock, make_folder, read_own, remove_leftovers, storage_errors, write_whole
from megatron_lion.runs.environment import host_facts
from megatron_lion.runs.paths import (
    LATEST,
    LOCK,
    checkpoints_folder,
    config_file,
    has_begun,
    has_config,
    is_rank_log,
    lock_file,
    log_folder,
    newest_checkpoint_file,
    step_folder,
    step_name,
    tokenizer_folder,
)

# Settings that may differ between the start of a run and its continuation; all others determine what is computed.
CHANGEABLE = ("run_dir", "device", "log", "checkpoint", "parallel", "model.loss", "model.elementwise", "data.num_workers", "data.cache",
              "data.path", "train.micro_batch_size", "train.deterministic", "train.gradient_accumulation_fusion", "train.test_every",
              "train.log_every", "train.stop_after", "probe", "optimizer.max_skipped_steps", "optimizer.master_weights",
              "optimizer.momentum_dtype", "name", "data.tokenizer")  # fmt: skip


BEFORE: dict[str, Any] = {"data.masking": "megatron"}
"""Values of settings in runs of versions that did not store them, if they are not the default."""


def load_saved(path: Path) -> RunConfig:
    """Reads the config.yaml of a run; a setting that it does not store has the value that the run's version used.

    Raises:
        ConfigError: it is damaged.
    """
    config = load_config(path)
    stored = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
    if "masking" in stored:
        return config
    return replace(config, data=replace(config.data, masking=BEFORE["data.masking"]))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Locks the run folder against a second writer during the block; see `file_lock`.

    Raises:
        BusyError: another process holds the lock; the message names its host and pid.
        StorageError: the folder cannot be created or locked.
    """
    with file_lock(lock_file(run_dir), str(run_dir), "wait for it or choose another run_dir"):
        yield


def prepare_run_folder(config: RunConfig, *, fresh: bool) -> None:
    """Creates the folder of a new run, or checks that this command may continue an existing run. Call it under the lock.

    The settings of a run that has begun are not written here, because the command may still be refused; see `keep_settings`.

    Args:
        config: the resolved settings.
        fresh: move an old run aside (to RUN.old-1, …) and start over, with its imported weights if it had any.

    Raises:
        ConfigError: the folder is not empty and is not a run folder.
        CheckpointError: the folder holds a run with other settings; lists them.
        StorageError: a file or folder could not be written.
    """
    run_dir = Path(config.run_dir)
    saved = config_file(run_dir)
    if fresh and saved.is_file():
        with storage_errors(run_dir):
            _move_aside(run_dir)
    checkpoints = _entries(run_dir)
    begun = _is_trained(run_dir)
    if saved.is_file() and begun:
        check_settings(config)
    elif not saved.is_file() and any(name.startswith("step_") for name in checkpoints):
        raise CheckpointError(
            f"{run_dir}: holds checkpoints, but its {saved.name} is lost; restore it from a backup, or make it again with the "
            f"settings of the run: add --print_config > {saved} to its command (they are compared with the checkpoints)"
        )
    elif not saved.is_file() and (foreign := _foreign_entry(run_dir)) is not None:
        raise ConfigError(
            f"run_dir: {run_dir} is not empty and holds no run (no config.yaml, but {foreign!r}); choose another folder"
        )
    # The settings first: from here on the folder is a run's, and a job that is killed while it starts can start again.
    if not (saved.is_file() and begun):
        save_config(config.resolved(), saved)
    make_folder(log_folder(run_dir))
    for folder in (run_dir, checkpoints_folder(run_dir)):
        remove_leftovers(folder)


def _entries(run_dir: Path) -> set[str]:
    return {entry.name for entry in checkpoints_folder(run_dir).glob("*")}


def _is_trained(run_dir: Path) -> bool:
    """Whether a run has begun to train in the folder."""
    # Imported weights (step 0) determine only the model, which is compared with the checkpoint when it is loaded.
    # The record counts, too: the checkpoints may be on a disk that is not mounted.
    recorded = recorded_newest(run_dir) not in (None, step_name(0))
    return has_begun(run_dir) or recorded or bool(_entries(run_dir) - {LATEST, step_name(0)})


def check_settings(config: RunConfig, *, may_differ: bool = False) -> None:
    """Checks that a command may use its run_dir, and continue the run in it if there is one. Nothing is written.

    Args:
        config: the command's settings.
        may_differ: checks the folder alone, not the settings of a run in it.

    Raises:
        ConfigError: run_dir is a file.
        CheckpointError: the run has other settings; the message lists them.
    """
    if Path(config.run_dir).is_file():
        raise ConfigError(f"run_dir: {config.run_dir} is a file; choose a folder")
    if may_differ:
        return
    saved = config_file(Path(config.run_dir))
    if not saved.is_file() or not _is_trained(saved.parent):
        return
    old = load_saved(saved)
    if config.data.masking == "auto":
        config = replace(config, data=replace(config.data, masking=old.data.masking))
    different = differences(old, config)
    blocked = {key: text for key, text in different if not changeable(key)}
    if blocked:
        longer = (
            "; the schedule depends on train.steps, so a run keeps it: to train its weights for longer, export the run and "
            "import the export into another run_dir"
        )
        raise CheckpointError(
            f"{config.run_dir}: holds a run with other settings ({'; '.join(blocked.values())}); use them, another run_dir, "
            f"or --fresh to start over{longer if 'train.steps' in blocked else ''}"
        )


def kept_choices(config: RunConfig, world_size: int) -> RunConfig:
    """Returns the settings with what the run in the folder has chosen for auto, if one has begun there.

    Args:
        config: the command's settings.
        world_size: number of processes; a micro-batch that does not fit it is not taken.

    Raises:
        ConfigError: the run's config.yaml is damaged.
    """
    saved = config_file(Path(config.run_dir))
    if not saved.is_file() or not _is_trained(saved.parent):
        return config
    old = load_saved(saved)
    if config.data.masking == "auto":
        config = replace(config, data=replace(config.data, masking=old.data.masking))
    if config.optimizer.master_weights == "auto":
        config = replace(config, optimizer=replace(config.optimizer, master_weights=old.master_weights))
    if config.train.gradient_accumulation_fusion == "auto":
        # Other roundings of the gradient: a run of an earlier version, which stores none, keeps its own.
        fusion = old.train.gradient_accumulation_fusion is True
        config = replace(config, train=replace(config.train, gradient_accumulation_fusion=fusion))
    if config.model.elementwise == "auto":
        # Other roundings, and other elements that dropout drops: a run of an earlier version had megatron-core's.
        stored = yaml.safe_load(saved.read_text(encoding="utf-8")).get("model") or {}
        kept = stored.get("elementwise", "megatron")
        config = replace(config, model=replace(config.model, elementwise=kept))
    size = old.train.micro_batch_size
    share = config.train.global_batch_size // config.data_parallel_size(world_size)
    if config.train.micro_batch_size == "auto" and size != "auto" and share % size == 0:
        config = replace(config, train=replace(config.train, micro_batch_size=size))
    return config


def keep_settings(config: RunConfig, newest: int | None) -> None:
    """Saves the settings of a run that starts or resumes, and its newest checkpoint; call it once nothing can be refused.

    A refused command must not change config.yaml: the command with the right settings would be refused from then on. The
    record of the newest checkpoint comes first, since earlier versions wrote none; without it, a run that has an id but no
    checkpoint left would start from step 0.

    Args:
        config: the resolved settings.
        newest: the step from which the run resumes or whose weights it starts from, or None if there is none.

    Raises:
        StorageError: a file could not be written.
    """
    run_dir = Path(config.run_dir)
    # A later step in the record stays: its checkpoint is missing, and the next start warns again.
    if newest is not None and (recorded_newest(run_dir) or "") < step_name(newest):
        record_newest(run_dir, newest)
    save_config(config.resolved(), config_file(run_dir))


def recorded_newest(run_dir: Path) -> str | None:
    """Name of the checkpoint that was saved last or chosen by --fall-back, or None if no record exists.

    Raises:
        StorageError: the record cannot be read.
    """
    path = newest_checkpoint_file(run_dir)
    with storage_errors(path, "read"):  # an unreadable record is not the same as none
        try:
            return read_own(path).decode("ascii", errors="replace").strip()[:40]
        except FileNotFoundError:
            return None


def record_newest(run_dir: Path, step: int) -> None:
    """Records the newest checkpoint outside of the checkpoint folder, so that a start notices if that folder is gone."""
    write_whole(newest_checkpoint_file(run_dir), f"{step_name(step)}\n".encode())


def _foreign_entry(run_dir: Path) -> str | None:
    """Returns the name of an entry of a folder without config.yaml that is not left over from a job that could not start."""
    if not run_dir.is_dir():
        return None
    log = log_folder(run_dir)
    for entry in sorted(run_dir.iterdir()):
        ours = entry.name == LOCK or entry.name.startswith(f".{config_file(run_dir).name}.tmp")
        # Earlier versions made log/ before config.yaml.
        ours = ours or (entry == log and entry.is_dir() and all(is_rank_log(file.name) for file in entry.iterdir()))
        if not ours:
            return entry.name
    return None


def _move_aside(run_dir: Path) -> None:
    """Moves a run into the next free RUN.old-N; an imported run keeps what it starts from: step 0, tokenizer and settings.

    config.yaml leaves last: if the job is killed on the way, the folder is still a run, and the same command continues.
    If a call fails, everything is moved back.
    """
    # Through a link: the folder's own parent is on its own file system, and "." has no name.
    run_dir = run_dir.resolve()
    if not run_dir.name:
        raise ConfigError(f"run_dir: {run_dir} cannot be moved aside; choose another folder, or move its files by hand")
    if run_dir in Path.cwd().parents:  # which would move too, and with it the meaning of every relative path
        raise ConfigError(
            f"run_dir: the current folder is inside {run_dir}, which is to be moved; leave it, then try again"
        )
    aside = _free_name(run_dir)
    kept = {LOCK, config_file(run_dir).name}  # this job holds the lock; moved, it would no longer protect run_dir
    imported = step_folder(run_dir, 0)
    checkpoints, tokenizer = checkpoints_folder(run_dir), tokenizer_folder(run_dir)
    with ExitStack() as undo:
        _make(aside, undo)
        if imported.is_dir():
            kept |= {checkpoints.name, tokenizer.name}
            if checkpoints.is_symlink():  # perhaps to another file system, to which nothing can be renamed
                place = _free_name(checkpoints.resolve())
                _make(place, undo)
                checkpoints_folder(aside).symlink_to(place)
                undo.callback(os.unlink, checkpoints_folder(aside))
            else:
                _make(checkpoints_folder(aside), undo)
            for entry in checkpoints.iterdir():
                if entry != imported:
                    _move(entry, checkpoints_folder(aside) / entry.name, undo)
            if tokenizer.is_dir():
                undo.callback(shutil.rmtree, tokenizer_folder(aside), ignore_errors=True)
                shutil.copytree(tokenizer, tokenizer_folder(aside))
        for entry in run_dir.iterdir():
            if entry.name not in kept:
                _move(entry, aside / entry.name, undo)
        if imported.is_dir():
            undo.callback(config_file(aside).unlink, missing_ok=True)
            shutil.copyfile(config_file(run_dir), config_file(aside))
        else:
            os.replace(config_file(run_dir), config_file(aside))
        undo.pop_all()


def _free_name(folder: Path) -> Path:
    """The first of FOLDER.old-1, FOLDER.old-2, … that does not exist."""
    number = 1
    while os.path.lexists(free := folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    return free


def _make(folder: Path, undo: ExitStack) -> None:
    folder.mkdir()
    undo.callback(os.rmdir, folder)


def _move(path: Path, target: Path, undo: ExitStack) -> None:
    os.replace(path, target)
    undo.callback(os.replace, target, path)


def read_config(run_dir: Path) -> RunConfig:
    """Reads the settings of a run folder.

    Raises:
        CheckpointError: the folder is not a run folder.
        ConfigError: its config.yaml is damaged.
    """
    if not has_config(run_dir):
        raise CheckpointError(
            f"{run_dir}: not a run folder (no config.yaml); give the run_dir of a `megatron-lion pretrain`"
        )
    return load_saved(config_file(run_dir))


def changeable(key: str) -> bool:
    """Whether a setting, named by its dotted key, may change when a run resumes."""
    return any(key == allowed or key.startswith(allowed + ".") for allowed in CHANGEABLE)


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, str]]:
    """Returns (dotted key, 'key: old, now new') of each setting whose value differs; null equals the value it stands for."""
    before, after = flatten(asdict(old.resolved())), flatten(asdict(new.resolved()))
    return [(key, f"{key}: {before.get(key)}, now {after[key]}") for key in after if before.get(key) != after[key]]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dictionary to dotted keys.

    Example:
        >>> flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
        StorageError: the file could not be written.
    """
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def environment_facts(device_name: str, world_size: int) -> dict[str, Any]:
    """Returns versions, hardware and git state for environment.json and bug reports.

    Environment variables are left out, because they may contain secrets.
    """
    return {**host_facts(), "device": device_name, "world_size": world_size}
