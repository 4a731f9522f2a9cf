"""Finds and identifies a run's checkpoints without torch; train/checkpoint.py writes and verifies them.

A folder is a checkpoint if it contains manifest.json, as in RUN/checkpoints/step_0001000/manifest.json. The manifest is
written last, before the folder is renamed to its final name. Folders without it remain from failed attempts.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.files import read_own, storage_errors
from megatron_lion.logs import warn
from megatron_lion.runs.checkpoint_manifest import (
    FORMAT,
    GO_BACK,
    MANIFEST,
    MAX_STEP,
    manifest_digest,
    read_manifest,
)
from megatron_lion.runs.folder import read_config, record_newest, recorded_newest
from megatron_lion.runs.identity import check_identity, read_run_id
from megatron_lion.runs.paths import (
    LATEST,
    checkpoints_folder,
    has_config,
    metrics_file,
    step_folder,
    step_name,
)

__all__ = [
    "FORMAT", "GO_BACK", "LATEST", "MANIFEST", "Checkpoint", "choose_step", "choose_steps", "find_latest", "has_own_checkpoint",
    "is_committed", "list_steps", "manifest_digest", "naming_removal", "newest_whole",
    "open_checkpoint", "run_and_step", "set_aside", "step_folder",
]  # fmt: skip

_STEP_NAME = re.compile(r"step_(\d{7,})$")
_ANY_STEP_NAME = re.compile(r"step_(\d+)$")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def run_and_step(folder: Path) -> tuple[Path, int] | None:
    """Returns (run folder, step) of a checkpoint folder from its path alone, or None if it is not named like one.

    >>> run_and_step(Path("run/checkpoints/step_0000100")), run_and_step(Path("run"))
    ((PosixPath('run'), 100), None)
    """
    match = _STEP_NAME.match(folder.name)
    run_dir = folder.parent.parent
    return (run_dir, int(match[1])) if match and folder.parent == checkpoints_folder(run_dir) else None


def is_committed(run_dir: Path, step: int) -> bool:
    """Whether the run has a complete checkpoint of a step, whatever its run and content are."""
    return (step_folder(run_dir, step) / MANIFEST).is_file()


def has_own_checkpoint(run_dir: Path, step: int) -> bool:
    """Whether the run has a complete checkpoint of a step that `open_checkpoint` accepts as its own."""
    if not is_committed(run_dir, step):
        return False
    try:
        open_checkpoint(step_folder(run_dir, step))
    except (CheckpointError, ConfigError):  # a damaged config.yaml: the run reports it when it starts
        return False
    return True


def list_steps(run_dir: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, ascending."""
    return [step for step, name in _step_entries(run_dir) if _is_complete(run_dir, step, name)]


def _step_entries(run_dir: Path) -> list[tuple[int, str]]:
    """(number, name) of everything in the checkpoint folder that is named like a step, complete or not, ascending."""
    folder = checkpoints_folder(run_dir)
    with storage_errors(folder, "read"):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
    matches = (_ANY_STEP_NAME.match(name) for name in names)
    return sorted((int(match[1]), match[0]) for match in matches if match)


def _is_complete(run_dir: Path, step: int, name: str) -> bool:
    # step_000000004 has the number of step_0000004, but is another folder.
    return name == step_name(step) and (checkpoints_folder(run_dir) / name / MANIFEST).is_file()


def choose_step(asked: str, available: Sequence[int]) -> int:
    """Returns the step that `--step` selects: "latest" or a number; see `choose_steps`.

    >>> choose_step("latest", [10, 20])
    20
    """
    if asked == "all" or "," in asked:
        raise ConfigError(f"--step {asked}: give latest, or one step such as 10000")
    return choose_steps(asked, available, flag="--step")[0]


def choose_steps(asked: str, available: Sequence[int], *, flag: str = "--steps") -> list[int]:
    """Returns the steps that `--steps` selects, ascending.

    Args:
        asked: "all", "latest" or steps separated by commas.
        available: steps that have a complete checkpoint, ascending.
        flag: name of the flag, for messages.

    Raises:
        ConfigError: `asked` has none of these forms.
        CheckpointError: the run has no checkpoint, or none of a selected step.

    >>> choose_steps("latest", [10, 20]), choose_steps("20,10", [10, 20])
    ([20], [10, 20])
    """
    if asked in ("all", "latest"):
        wanted = list(available) if asked == "all" else list(available[-1:])
    else:
        try:
            wanted = sorted({int(part.replace("_", "")) for part in asked.split(",")})
        except ValueError:
            wish = (
                "latest, or one step such as 10000" if flag == "--step" else "all, latest, or steps such as 10000,20000"
            )
            raise ConfigError(f"{flag} {asked}: give {wish}") from None
    if not available:
        raise CheckpointError("the run has no complete checkpoint yet; wait for its first save")
    missing = sorted(set(wanted).difference(available))
    if missing:
        known = ", ".join(map(str, available))
        raise CheckpointError(f"{flag} {asked}: no complete checkpoint of step {missing[0]} (there are: {known})")
    return wanted


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's manifest and compares it with the run in whose folder it is.

    Raises:
        CheckpointError: the manifest is missing, damaged or of another format; or it is of another step than the folder's
            name, of another run, or of other settings than the run's config.yaml.
        ConfigError: the run's config.yaml is damaged.
    """
    with naming_removal(folder):
        manifest = read_manifest(folder)
    place = run_and_step(folder)
    if place is not None:
        check_identity(manifest, folder, *place)
    return Checkpoint(folder, manifest)


@contextmanager
def naming_removal(folder: Path) -> Iterator[None]:
    """Replaces a CheckpointError of the block, which reads a checkpoint, if the folder no longer exists.

    A training job removes older checkpoints, also while another command reads them. The checkpoint is then not damaged.
    """
    try:
        yield
    except CheckpointError as error:
        if os.path.lexists(folder):
            raise
        run_dir = folder.parent.parent
        keep = f"checkpoint.keep {read_config(run_dir).checkpoint.keep}" if has_config(run_dir) else "checkpoint.keep"
        raise CheckpointError(
            f"{folder}: was removed meanwhile; a run in training keeps its newest checkpoints ({keep}) and those of "
            "checkpoint.at_steps; choose one that is still there"
        ) from error


def find_latest(run_dir: Path) -> Checkpoint | None:
    """Opens the newest checkpoint, or returns None if the run never saved one.

    The folders are read, not the pointer `latest`, which may be older after a crash.

    Raises:
        CheckpointError: the newest checkpoint is incomplete, damaged or not this run's, or checkpoints were saved and none
            is here: a silent start from an older step or from step 0 would lose the run.
    """
    entries = _step_entries(run_dir)
    if not entries:
        _need_none_lost(run_dir)
        return None
    step, name = entries[-1]
    folder = checkpoints_folder(run_dir) / name
    if name != step_name(step) or step > MAX_STEP:
        raise CheckpointError(
            f"{folder}: not the name of a checkpoint of this run; move it away, or give --fall-back to have it moved aside"
        )
    if not _is_complete(run_dir, step, name):
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: the newest checkpoint is incomplete; {GO_BACK}; --fresh starts over"
        )
    found = open_checkpoint(folder)
    recorded = recorded_newest(run_dir)
    if recorded is not None and recorded != name and recorded > name:
        warn(_log, f"{run_dir}: {recorded} was saved, but is not in {checkpoints_folder(run_dir)}; using {name}")
    return found


def _need_none_lost(run_dir: Path) -> None:
    """Raises CheckpointError if the run saved checkpoints before, of which none is left."""
    trained = _last_logged_step(run_dir)
    saved = recorded_newest(run_dir)
    if saved is None and trained and read_run_id(run_dir) is None and has_config(run_dir):
        # Earlier versions kept no record. They saved before they logged the next step.
        settings = read_config(run_dir).checkpoint
        due = [step for step in (settings.every, *settings.at_steps) if 0 < step < trained]
        saved = step_name(min(due)) if due else None
    folder = checkpoints_folder(run_dir)
    if saved is not None:
        raise CheckpointError(
            f"{folder}: holds no checkpoint, but {saved if _STEP_NAME.match(saved) else 'one'} was saved; mount or restore the folder, "
            "or give --fresh to start over"
        )
    if trained:
        warn(
            _log,
            f"{run_dir}: step {trained} is in {metrics_file(run_dir).name}, but no checkpoint was saved yet: starting from step 0",
        )


def _last_logged_step(run_dir: Path) -> int:
    """The largest step with a training loss in metrics.jsonl, or 0."""
    last = 0
    try:
        lines = read_own(metrics_file(run_dir)).splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "train/loss" in values and isinstance(values.get("step"), int):
            last = max(last, values["step"])
    return last


def newest_whole(run_dir: Path, verify: Callable[[Checkpoint], object]) -> Checkpoint | None:
    """Finds the newest checkpoint that is whole and moves the newer folders aside, with a warning for each.

    A folder that was moved aside is named skipped_step_…; no command reads or deletes it.

    Args:
        run_dir: the run folder, locked.
        verify: raises CheckpointError if a file of the checkpoint is damaged.

    Returns:
        The checkpoint, or None if the run never saved one.

    Raises:
        CheckpointError: no checkpoint is whole; nothing was moved.
        StorageError: a folder could not be moved.
    """
    entries = _step_entries(run_dir)
    if not entries:
        return find_latest(run_dir)
    skipped: list[tuple[str, CheckpointError]] = []
    for step, name in reversed(entries):
        folder = checkpoints_folder(run_dir) / name
        try:
            if not _is_complete(run_dir, step, name):
                raise CheckpointError(f"{folder}: incomplete, or not named like a checkpoint")
            found = open_checkpoint(folder)
            verify(found)
        except CheckpointError as error:
            skipped.append((name, error))
            continue
        for newer, reason in skipped:
            warn(_log, f"--fall-back: resuming from {name}; moved {newer} to {set_aside(run_dir, newer)}: {reason}")
        if skipped:
            record_newest(run_dir, step)
        return found
    raise CheckpointError(
        f"{checkpoints_folder(run_dir)}: --fall-back found no whole checkpoint, and moved nothing; "
        f"{str(skipped[0][1]).replace(GO_BACK, 'restore a checkpoint from a copy')}; or give --fresh to start over"
    )


def set_aside(run_dir: Path, name: str) -> str:
    """Renames an entry of the checkpoint folder so that nothing reads it, and returns its new name."""
    folder = checkpoints_folder(run_dir)
    number = 1
    while os.path.lexists(folder / (aside := f"skipped_{name}" + (f"-{number}" if number > 1 else ""))):
        number += 1
    with storage_errors(folder / name, "moved"):
        os.replace(folder / name, folder / aside)
    return aside
