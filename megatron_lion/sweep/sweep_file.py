"""sweep.json: what a sweep's folder holds. Whether a run is finished is read from its own folder, never from here alone.

SWEEP/sweep.json        grids as given, digest of base.yaml, and name, settings and status of each run
SWEEP/base.yaml         what all runs share, resolved: a config file that is edited meanwhile changes nothing
SWEEP/exits/NAME        exit code of a run's last job, written by whatever started it
SWEEP/NAME/             a run folder
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config, save_config
from megatron_lion.errors import CheckpointError, ConfigError, NumericsError
from megatron_lion.files import storage_errors, write_whole
from megatron_lion.jobs import STOPPED
from megatron_lion.runs.folder import write_json
from megatron_lion.runs.paths import LOCK, has_begun
from megatron_lion.runs.steps import is_committed
from megatron_lion.sweep.grid import get_setting, with_setting
from megatron_lion.sweep.plan import PlannedRun, base_differences, settings_digest

FORMAT = 1
NAME = "sweep.json"
BASE = "base.yaml"
DIVERGED = NumericsError.exit_code

Status = Literal["waiting", "interrupted", "finished", "diverged", "failed"]
"""diverged: given up because of NaN or infinite gradients, which the same settings would meet again."""


@dataclass(kw_only=True)
class Entry:
    """A run as sweep.json holds it.

    Attributes:
        name: of its folder in the sweep's.
        settings: what it sets beyond the base config.
        last_step: the step after which it is finished.
        settings_sha256: of all its decisive settings; equal settings are one run, whatever grids they come from.
        status: when the file was written.
        exit_code: of its last job, where one has ended.
    """

    name: str
    settings: dict[str, Any]
    last_step: int
    settings_sha256: str
    status: Status = "waiting"
    exit_code: int | None = None


@dataclass(kw_only=True)
class Sweep:
    """A sweep's folder and what it holds."""

    folder: Path
    config: str
    base_sha256: str
    grids: list[list[str]] = field(default_factory=list)
    runs: list[Entry] = field(default_factory=list)

    @property
    def base(self) -> Path:
        return self.folder / BASE

    def refresh(self) -> None:
        """Looks into the run folders for each run's status."""
        for entry in self.runs:
            entry.exit_code = read_exit(self.folder, entry.name)
            entry.status = self._status(entry)

    def _status(self, entry: Entry) -> Status:
        folder = self.folder / entry.name
        started = has_begun(folder)
        # Checkpoints of a finished run may have been removed to make room.
        if is_committed(folder, entry.last_step) or (entry.status == "finished" and started):
            return "finished"
        if entry.exit_code == DIVERGED and started:
            return "diverged"
        if entry.exit_code not in (None, 0, STOPPED):
            return "failed"
        return "interrupted" if started else "waiting"

    def save(self) -> None:
        """Writes sweep.json with the status of now."""
        self.refresh()
        content = dataclasses.asdict(self)
        del content["folder"]
        write_json(self.folder / NAME, {"format": FORMAT, **content})


def read_sweep(folder: Path) -> Sweep | None:
    """Reads a sweep's folder; None where there is none.

    Raises:
        CheckpointError: sweep.json is damaged or of another format, or base.yaml is not the one it was made with.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise CheckpointError(f"{path}: format {found}, this version reads format {FORMAT}")
        runs = [Entry(**entry) for entry in content.pop("runs")]
        sweep = Sweep(folder=folder, runs=runs, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); move it away and give the sweep's command again: the runs beside it are kept"
        ) from error
    sweep.refresh()
    return sweep


def open_sweep(
    folder: Path, config_file: str, base: RunConfig, grids: Sequence[str], planned: Sequence[PlannedRun]
) -> tuple[Sweep, list[PlannedRun]]:
    """Takes the runs of a command into the sweep of a folder, or makes a new one; writes nothing.

    Returns:
        The sweep, and the runs of this command; one that the sweep has already keeps the name it has there.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it holds a sweep whose runs have other settings in common; lists them.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        known = {run.name for run in planned} | {LOCK, "exits", "cache", BASE}
        if folder.is_dir() and (other := [entry.name for entry in folder.iterdir() if entry.name not in known]):
            raise ConfigError(f"--output {folder}: holds {other[0]} and no sweep ({NAME}); choose another folder")
        sweep = Sweep(folder=folder, config=config_file, base_sha256=settings_digest(base))
    else:
        _need_same_base(sweep, base, planned)
    if list(grids) not in sweep.grids:
        sweep.grids.append(list(grids))
    by_digest = {entry.settings_sha256: entry for entry in sweep.runs}
    taken = []
    for run in planned:
        digest = settings_digest(run.config)
        entry = by_digest.get(digest)
        if entry is None:
            entry = Entry(name=run.name, settings=run.settings, last_step=run.last_step, settings_sha256=digest)
            sweep.runs.append(entry)
        config = dataclasses.replace(run.config, run_dir=str(folder / entry.name))
        taken.append(dataclasses.replace(run, name=entry.name, config=config))
    sweep.refresh()
    return sweep, taken


def _need_same_base(sweep: Sweep, base: RunConfig, planned: Sequence[PlannedRun]) -> None:
    """Refuses a command whose runs could not be compared with those that the sweep has."""
    saved = load_config(sweep.base)
    if settings_digest(saved) != sweep.base_sha256:
        raise CheckpointError(
            f"{sweep.base}: was changed after the sweep began; put it back, or give another --output and start over"
        )
    varied = set.intersection(*(set(run.settings) for run in planned))
    different = base_differences(saved, base, sorted(varied))
    if different:
        raise CheckpointError(
            f"{sweep.folder}: holds a sweep with other settings ({'; '.join(different)}); use them, make them a --grid, "
            "or give another --output"
        )


def write_base(sweep: Sweep, base: RunConfig, planned: Sequence[PlannedRun]) -> None:
    """Makes the folder and writes base.yaml anew: settings that only say how to run may have changed.

    A setting that this command's grids give a value keeps its old one there: runs of earlier grids may take it.
    """
    if sweep.base.is_file():
        saved = load_config(sweep.base)
        for key in set.intersection(*(set(run.settings) for run in planned)):
            base = with_setting(base, key, get_setting(saved, key))
    with storage_errors(sweep.folder, "made"):
        (sweep.folder / "exits").mkdir(parents=True, exist_ok=True)
        save_config(base, sweep.base)


def read_exit(folder: Path, name: str) -> int | None:
    """Exit code of a run's last job; None where none has ended."""
    try:
        return int((folder / "exits" / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def write_exit(folder: Path, name: str, code: int) -> None:
    """Notes how a run's job ended."""
    write_whole(folder / "exits" / name, f"{code}\n".encode())
