"""Reads and writes a sweep's folder: sweep.json, its base config, and the exit codes of its runs.

SWEEP/sweep.json        grids as given, digest of base.yaml, and name, settings and status of each run; the confirmation's seeds
SWEEP/base.yaml         the resolved settings that all runs share; later edits of the config file have no effect
SWEEP/exits/NAME        exit code of a run's last job, written by the process that started it
SWEEP/NAME/             a run folder

The status in sweep.json is a copy: each read derives it again from the run folders.
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
from megatron_lion.files import make_folder, write_whole
from megatron_lion.jobs import STOPPED
from megatron_lion.plain_text import is_file_name
from megatron_lion.runs.folder import write_json
from megatron_lion.runs.paths import LOCK, has_begun
from megatron_lion.runs.steps import has_own_checkpoint
from megatron_lion.sweep.grid import get_setting, with_setting
from megatron_lion.sweep.plan import PlannedRun, base_differences, settings_digest

FORMAT = 1
CONFIRMED = 2
"""Format of a file with confirmation runs: an earlier version would choose among them, so it must reject the file."""
NAME = "sweep.json"
BASE = "base.yaml"
DIVERGED = NumericsError.exit_code

Status = Literal["waiting", "interrupted", "finished", "diverged", "failed"]
"""diverged: stopped because of NaN or infinite gradients, which the same settings would give again."""


@dataclass(kw_only=True)
class Entry:
    """A run's entry in sweep.json.

    Attributes:
        name: name of its folder inside the sweep's.
        settings: values that replace those of the base config, by dotted key.
        last_step: the step after which it is finished.
        settings_sha256: digest of its decisive settings; equal digests are one run, even from different grids.
        status: status at the last refresh.
        exit_code: exit code of its last job, or None if no job has ended.
        confirms: for a confirmation run, the name of a grid run with the setting that it retrains; None for a grid run.
    """

    name: str
    settings: dict[str, Any]
    last_step: int
    settings_sha256: str
    status: Status = "waiting"
    exit_code: int | None = None
    confirms: str | None = None


@dataclass(kw_only=True)
class Sweep:
    """A sweep's folder and the content of its sweep.json.

    Attributes:
        folder: the sweep's folder.
        config: the config file as given.
        base_sha256: digest of base.yaml.
        grids: the --grid texts of each command.
        runs: the runs of all grids and the confirmation runs.
        confirm_seeds: seeds of the confirmation that was planned last; empty if none was.
    """

    folder: Path
    config: str
    base_sha256: str
    grids: list[list[str]] = field(default_factory=list)
    runs: list[Entry] = field(default_factory=list)
    confirm_seeds: list[int] = field(default_factory=list)

    @property
    def grid_runs(self) -> list[Entry]:
        """The runs that take part in the choice: all but the confirmation runs."""
        return [entry for entry in self.runs if entry.confirms is None]

    @property
    def base(self) -> Path:
        return self.folder / BASE

    def refresh(self) -> None:
        """Reads each run's exit code and derives its status from its folder."""
        for entry in self.runs:
            entry.exit_code = read_exit(self.folder, entry.name)
            entry.status = self._status(entry)

    def _status(self, entry: Entry) -> Status:
        folder = self.folder / entry.name
        started = has_begun(folder)
        # The checkpoints of a finished run may have been deleted to free space; the run stays finished.
        if has_own_checkpoint(folder, entry.last_step) or (entry.status == "finished" and started):
            return "finished"
        if entry.exit_code == DIVERGED and started:
            return "diverged"
        if entry.exit_code not in (None, 0, STOPPED):
            return "failed"
        return "interrupted" if started else "waiting"

    def save(self) -> None:
        """Refreshes the status of all runs and writes sweep.json."""
        self.refresh()
        content = dataclasses.asdict(self)
        del content["folder"]
        confirmed = any(entry.confirms is not None for entry in self.runs)
        if not confirmed:  # earlier versions read such a file
            del content["confirm_seeds"]
            for entry in content["runs"]:
                del entry["confirms"]
        write_json(self.folder / NAME, {"format": CONFIRMED if confirmed else FORMAT, **content})

    def add(self, run: PlannedRun, confirms: str | None = None) -> PlannedRun:
        """Adds a run if the sweep does not have it yet; a run that the sweep already has keeps its name.

        Args:
            run: the run.
            confirms: for a confirmation run, the name of a grid run with its setting.
        """
        # By digest, not by name: the same settings from another grid have another name, and must not be trained twice.
        digest = settings_digest(run.config)
        entry = next((entry for entry in self.runs if entry.settings_sha256 == digest), None)
        if entry is None:
            entry = Entry(
                name=run.name, settings=run.settings, last_step=run.last_step, settings_sha256=digest, confirms=confirms
            )
            self.runs.append(entry)
        elif confirms is None:
            # If a grid contains a run that confirmed a choice, the run takes part in choosing from now on.
            entry.confirms = None
        config = dataclasses.replace(run.config, run_dir=str(self.folder / entry.name))
        return dataclasses.replace(run, name=entry.name, config=config)


def read_sweep(folder: Path) -> Sweep | None:
    """Reads a sweep's folder; returns the sweep, or None if the folder has no sweep.json.

    Raises:
        CheckpointError: sweep.json is damaged or has another format.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found not in (FORMAT, CONFIRMED):
            raise CheckpointError(f"{path}: format {found}, this version reads formats {FORMAT} and {CONFIRMED}")
        runs = [Entry(**entry) for entry in content.pop("runs")]
        for entry in runs:  # sweep.json may come from elsewhere: a path in it must not lead out of the folder
            for name in (entry.name, entry.confirms):
                if name is not None and not is_file_name(name):
                    raise ValueError(f"{name!r} is no folder in it")
        sweep = Sweep(folder=folder, runs=runs, **content)
        if not all(isinstance(seed, int) for seed in sweep.confirm_seeds):
            raise ValueError(f"confirm_seeds {sweep.confirm_seeds!r} are not whole numbers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); move it away and give the sweep's command again: its run folders are kept"
        ) from error
    sweep.refresh()
    return sweep


def open_sweep(
    folder: Path, config_file: str, base: RunConfig, grids: Sequence[str], planned: Sequence[PlannedRun]
) -> tuple[Sweep, list[PlannedRun]]:
    """Adds the runs of a command to the sweep of a folder, or creates a new sweep; writes nothing.

    Args:
        folder: the sweep's folder.
        config_file: the config file as given.
        base: the settings that all runs share.
        grids: the --grid texts.
        planned: the runs of the command, from `plan_runs`.

    Returns:
        The sweep, and the runs of this command; a run that the sweep already has keeps its name.

    Raises:
        ConfigError: the folder contains files but no sweep.
        CheckpointError: the folder's sweep is damaged, or its runs share other settings; the message lists them.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        known = {run.name for run in planned} | {LOCK, "exits", "cache", BASE}
        if folder.is_dir() and (other := [entry.name for entry in folder.iterdir() if entry.name not in known]):
            raise ConfigError(f"--output {folder}: contains {other[0]} but no sweep ({NAME}); choose another folder")
        sweep = Sweep(folder=folder, config=config_file, base_sha256=settings_digest(base))
    else:
        _need_same_base(sweep, base, planned)
    if list(grids) not in sweep.grids:
        sweep.grids.append(list(grids))
    taken = [sweep.add(run) for run in planned]
    sweep.refresh()
    return sweep, taken


def _need_same_base(sweep: Sweep, base: RunConfig, planned: Sequence[PlannedRun]) -> None:
    """Raises CheckpointError if a command's runs are not comparable with those of the sweep."""
    saved = load_config(sweep.base)
    if settings_digest(saved) != sweep.base_sha256:
        raise CheckpointError(
            f"{sweep.base}: was changed after the sweep began; restore it, or give another --output and start again"
        )
    varied = set.intersection(*(set(run.settings) for run in planned))
    different = base_differences(saved, base, sorted(varied))
    if different:
        raise CheckpointError(
            f"{sweep.folder}: contains a sweep with other settings ({'; '.join(different)}); use them, make them a --grid, "
            "or give another --output"
        )


def write_base(sweep: Sweep, base: RunConfig, planned: Sequence[PlannedRun]) -> None:
    """Creates the folder and rewrites base.yaml, since settings that do not change the result may differ from last time.

    A setting that this command's grids vary keeps its old value in base.yaml, which runs of earlier grids may use.

    Raises:
        StorageError: the file system refused.
    """
    if sweep.base.is_file():
        saved = load_config(sweep.base)
        for key in set.intersection(*(set(run.settings) for run in planned)):
            base = with_setting(base, key, get_setting(saved, key))
    make_folder(sweep.folder / "exits")
    save_config(base, sweep.base)


def read_exit(folder: Path, name: str) -> int | None:
    """Exit code of a run's last job, or None if no job has ended."""
    try:
        return int((folder / "exits" / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def write_exit(folder: Path, name: str, code: int) -> None:
    """Records the exit code of a run's job."""
    write_whole(folder / "exits" / name, f"{code}\n".encode())
