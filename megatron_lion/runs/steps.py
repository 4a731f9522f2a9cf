"""Finds and identifies a run's checkpoints without torch; train/checkpoint.py writes and verifies them.

A folder is a checkpoint if it contains manifest.json, as in RUN/checkpoints/step_0001000/manifest.json. The manifest is
written last, before the folder is renamed to its final name. Folders without it remain from failed attempts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.paths import checkpoints_folder, step_name

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
"""File that contains the name of the newest checkpoint, for people and scripts."""
GO_BACK = "copy it here again, or move this step's folder away to resume from the checkpoint before it"
_STEP_NAME = re.compile(r"step_(\d{7,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def step_folder(run_dir: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return checkpoints_folder(run_dir) / step_name(step)


def run_and_step(folder: Path) -> tuple[Path, int] | None:
    """Returns (run folder, step) of a checkpoint folder from its path alone, or None if it is not named like one.

    >>> run_and_step(Path("run/checkpoints/step_0000100")), run_and_step(Path("run"))
    ((PosixPath('run'), 100), None)
    """
    match = _STEP_NAME.match(folder.name)
    run_dir = folder.parent.parent
    return (run_dir, int(match[1])) if match and folder.parent == checkpoints_folder(run_dir) else None


def is_committed(run_dir: Path, step: int) -> bool:
    """Whether the run has a complete checkpoint of a step."""
    return (step_folder(run_dir, step) / MANIFEST).is_file()


def list_steps(run_dir: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, ascending."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    found = (
        match for entry in folder.iterdir() if (match := _STEP_NAME.match(entry.name)) and (entry / MANIFEST).is_file()
    )
    return sorted(int(match[1]) for match in found)


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
    missing = [step for step in wanted if step not in available]
    if missing:
        known = ", ".join(map(str, available))
        raise CheckpointError(f"{flag} {asked}: no complete checkpoint of step {missing[0]} (there are: {known})")
    return wanted


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its "sha256" entry, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's manifest.

    Raises:
        CheckpointError: the manifest is missing, damaged or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so the checkpoint is not complete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged ({error}); {GO_BACK}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{folder}: format {found}; this version reads format {FORMAT}")
    if manifest.pop("sha256", None) != manifest_digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: does not match its own sha256: damaged or changed; {GO_BACK}")
    return Checkpoint(folder, manifest)


def find_latest(run_dir: Path) -> Checkpoint | None:
    """Opens the newest complete checkpoint, or returns None if the run has no checkpoint folder.

    The folders are read, not the pointer `latest`, which may be older after a crash.

    Raises:
        CheckpointError: checkpoint folders exist but none is complete; a silent start from step 0 would lose the run.
    """
    steps = list_steps(run_dir)
    if steps:
        return open_checkpoint(step_folder(run_dir, steps[-1]))
    folder = checkpoints_folder(run_dir)
    broken = [entry.name for entry in folder.glob("step_*") if _STEP_NAME.match(entry.name)] if folder.is_dir() else []
    if broken:
        raise CheckpointError(f"{folder}: {broken[-1]} has no {MANIFEST}; restore it, or give --fresh to start over")
    return None
