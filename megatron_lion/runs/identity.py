"""The identity of a run: its id and the settings that never change. A checkpoint is compared with both when it is opened.

The id is random. It is made at the first start and kept in run.json and in every manifest. A run folder may be moved or
copied as a whole; a checkpoint that is copied from another run, or under the name of another step, is refused.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.errors import CheckpointError
from megatron_lion.files import write_whole
from megatron_lion.jobs import rank_from_env
from megatron_lion.logs import warn
from megatron_lion.runs.checkpoint_manifest import GO_BACK, MANIFEST, manifest_bytes, printable, read_manifest
from megatron_lion.runs.folder import BEFORE, changeable, flatten, load_saved
from megatron_lion.runs.paths import config_file, facts_file, has_config
from megatron_lion.runs.sealed_json import read_sealed

_log = logging.getLogger(__name__)


def new_run_id() -> str:
    """Returns a new random id: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def read_run_id(run_dir: Path) -> str | None:
    """Returns the run's id, or None if it has none yet (a run of an earlier version, or one that never started).

    Raises:
        CheckpointError: run.json is damaged.
    """
    path = facts_file(run_dir)
    try:
        found = read_sealed(path).get("run_id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {_REMAKE}") from error
    if found is not None and not (
        isinstance(found, str) and len(found) == 32 and set(found) <= set("0123456789abcdef")
    ):
        raise CheckpointError(f"{path}: run_id must be 32 hexadecimal digits; {_REMAKE}")
    return found


_REMAKE = "move it away and start pretrain again: it takes the run's id from its checkpoints and writes the file again"


def settle_run_id(run_dir: Path, folders: Sequence[Path], *, fresh: bool, fall_back: bool = False) -> str:
    """Returns the id under which a run starts or resumes: its own, else that of its checkpoints, else a new one.

    Args:
        run_dir: the run folder, locked.
        folders: the checkpoints in it.
        fresh: the run starts over; imported weights, which it keeps, become part of the new run.
        fall_back: if the checkpoints belong to several runs, take the id of the newest one instead of refusing.

    Raises:
        CheckpointError: run.json is damaged, or the checkpoints belong to several runs.
    """
    own = read_run_id(run_dir)
    if own is not None:
        return own
    if fresh:
        made = new_run_id()
        for folder in folders:
            write_whole(folder / MANIFEST, manifest_bytes({**read_manifest(folder), "run_id": made}))
        return made
    by_id: dict[str | None, Path] = {}
    for folder in folders:
        with suppress(CheckpointError):  # whoever opens a damaged one reports it, or --fall-back passes it over
            by_id[read_manifest(folder).get("run_id")] = folder
    by_id.pop(None, None)
    if fall_back and by_id:
        return str(list(by_id)[-1])  # that of the newest one; those of other runs are passed over
    if len(by_id) > 1:
        raise CheckpointError(
            f"{facts_file(run_dir)}: has no run id, and {' and '.join(sorted(folder.name for folder in by_id.values()))} belong "
            "to different runs; move the checkpoints of the other run away"
        )
    return next(iter(by_id), None) or new_run_id()


_RESOLVED = ("optimizer.betas", "model.ffn_hidden_size")
"""Settings that earlier manifests store as null; see RunConfig.resolved."""


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that may not change on resume, resolved, by dotted key, as a manifest stores them."""
    return {key: value for key, value in flatten(asdict(config.resolved())).items() if not changeable(key)}


@cache
def _settings_of(text: str, path: Path) -> dict[str, Any]:
    # By content: a checkpoint is opened several times in a command, and parsing takes 0.15 s.
    return deciding_settings(load_saved(path))


def check_identity(manifest: dict[str, Any], folder: Path, run_dir: Path, step: int) -> None:
    """Compares a manifest with its folder's step and with the id and settings of the run in whose folder it is.

    Args:
        manifest: from `read_manifest`.
        folder: the checkpoint's folder, for messages.
        run_dir: the run folder that contains it.
        step: the step in the folder's name.

    Raises:
        CheckpointError: it is another step, or belongs to another run or to other settings; the message names which.
        ConfigError: the run's config.yaml is damaged.
    """
    if manifest["step"] != step:
        raise CheckpointError(
            f"{folder}: holds step {manifest['step']}, but its name is that of step {step}: it was renamed or copied; give it "
            f"its own name back, and for step {step}: {GO_BACK}"
        )
    own, theirs = read_run_id(run_dir), manifest.get("run_id")
    if own is not None and theirs is not None and own != theirs:
        raise CheckpointError(
            f"{folder}: belongs to another run (run id {theirs[:12]}, this run is {own[:12]}); {GO_BACK}"
        )
    path = config_file(run_dir)
    if has_config(run_dir):
        settings = _settings_of(path.read_text(encoding="utf-8"), path)
        if different := _different(manifest, settings):
            raise CheckpointError(
                f"{folder}: belongs to a run with other settings ({'; '.join(different[:5])}) than {path}; {GO_BACK}"
            )
    if theirs is None and rank_from_env() == 0:
        _warn_once(run_dir)


def _different(manifest: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Returns 'key: saved, now ours' for each deciding setting in which a checkpoint differs from its run."""
    if manifest.get("state_layout") is None:  # weights alone: every training may start from them
        return []
    batch, steps = settings["train.global_batch_size"], settings["train.steps"]
    expected = {"seed": (manifest.get("seed", settings["seed"]), settings["seed"])}
    if manifest.get("settings") is not None:
        # A setting that is newer than the manifest has its default or the value from before, and null the value that it stands for.
        default = {
            **deciding_settings(RunConfig()),
            **BEFORE,
            "model.ffn_hidden_size": 4 * manifest["settings"].get("model.hidden_size", 0),
        }
        before = {
            **default,
            **{key: value for key, value in manifest["settings"].items() if value is not None or key not in _RESOLVED},
        }
        expected = {key: (before.get(key), value) for key, value in settings.items()}
    different = [
        f"{key}: {printable(theirs)}, now {ours}" for key, (theirs, ours) in expected.items() if theirs != ours
    ]
    if manifest["step"] > steps:
        different.append(f"step {manifest['step']} is beyond train.steps {steps}")
    if manifest["consumed_samples"] != manifest["step"] * batch:
        different.append(
            f"consumed_samples {manifest['consumed_samples']}, but {manifest['step']} steps of {batch} samples were taken"
        )
    return different


@cache
def _warn_once(run_dir: Path) -> None:
    warn(
        _log,
        f"{run_dir}: has checkpoints without a run id, which an earlier version wrote; whether they belong to this run was "
        "not checked",
    )
