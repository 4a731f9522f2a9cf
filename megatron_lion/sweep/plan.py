"""Plans the runs of a sweep from a config and its grids, and checks all settings before any run starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import known_keys
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.runs.folder import changeable, flatten
from megatron_lion.streams import say
from megatron_lion.sweep.grid import Axis, get_setting, settings_of_runs, with_settings

# A single run can be resumed with other values of these; the runs of a sweep must agree in them to be comparable.
FIXED = ("name", "data.path", "data.tokenizer", "train.stop_after")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: name of its folder, from the optimizer and the settings of the grids, such as lion-lr0.001.
        settings: values that replace those of the base config, by dotted key.
        config: all settings of the run.
    """

    name: str
    settings: dict[str, Any]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def last_step(self) -> int:
        """The step after which the run is finished."""
        train = self.config.train
        return min(train.steps, train.stop_after or train.steps)

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.last_step * self.config.train.global_batch_size * self.config.model.seq_length

    def words(self, base: Path) -> list[str]:
        """The arguments of `megatron-lion pretrain` that start or resume the run."""
        words = ["--config", str(base), "--run_dir", str(self.folder)]
        settings = dict(self.settings)
        if "optimizer.name" in settings:  # explicit, so that no conversion in `pretrain` can differ from the plan's
            for key in ("optimizer.lr", "optimizer.weight_decay"):
                settings.setdefault(key, get_setting(self.config, key))
        for key, value in settings.items():
            words += [f"--{key}", as_typed(value)]
        return words


def matters(key: str) -> bool:
    """Whether runs that differ in a key are different runs of a sweep."""
    return key in FIXED or not changeable(key)


def settings_digest(config: RunConfig) -> str:
    """SHA-256 (hexadecimal) of all settings that decide what a run computes."""
    flat = flatten(dataclasses.asdict(config))
    decisive = {key: value for key, value in flat.items() if matters(key)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def plan_runs(base: RunConfig, axes: Sequence[Axis], folder: Path, processes: int) -> list[PlannedRun]:
    """Plans the runs and checks the settings of each.

    Rates that are converted for another optimizer are reported on stderr.

    Args:
        base: the settings that all runs share.
        axes: from `parse_grids`.
        folder: the sweep's folder; each run gets a folder in it.
        processes: number of processes that train a run together.

    Raises:
        ConfigError: a run's settings are invalid, or no validation loss would be measured.
        DataError: the data does not exist.
    """
    if base.train.test_every == 0:
        raise ConfigError(
            "train.test_every: 0 measures no validation loss, by which a sweep chooses; give --train.test_every STEPS"
        )
    _need_data(base.data.path)
    planned = []
    notes: dict[str, None] = {}  # each once, in order
    for settings in settings_of_runs(axes, base.optimizer.name):
        name = run_name(settings)
        config, note = with_settings(base, settings)
        notes[note] = None
        config = dataclasses.replace(config, run_dir=str(folder / name))
        planned.append(PlannedRun(name=name, settings=settings, config=config))
    check_all(planned, processes)
    for note in filter(None, notes):
        say(note)
    return planned


def _need_data(paths: Sequence[str]) -> None:
    if not paths:
        raise ConfigError(
            "data.path: no dataset given; make one with `megatron-lion prepare` and pass --data.path '[FOLDER]'"
        )
    for path in paths:
        if not (Path(path) / "manifest.json").is_file() and not Path(f"{path}.idx").is_file():
            raise DataError(
                f"data.path: {path} is neither a folder with manifest.json nor the prefix of .bin/.idx files"
            )


def check_all(planned: Sequence[PlannedRun], processes: int) -> None:
    """Raises one ConfigError that lists the problems of all runs; a problem shared by every run is listed once."""
    problems: Counter[str] = Counter()
    first: dict[str, str] = {}
    for run in planned:
        try:
            check_config(run.config, processes)
        except ConfigError as error:
            for problem in str(error).splitlines():
                problems[problem] += 1
                first.setdefault(problem, run.name)
    if problems:
        raise ConfigError(
            "\n".join(
                problem if count == len(planned) else f"{first[problem]}: {problem}"
                for problem, count in problems.items()
            )
        )


def run_name(settings: dict[str, Any]) -> str:
    """The name of a run: the optimizer and each setting by its short key. It does not depend on the sweep's other runs.

    Example:
        >>> run_name({"optimizer.name": "lion", "optimizer.lr": 1e-3, "schedule.kind": "wsd"})
        'lion-lr0.001-schedule.kind_wsd'
    """
    parts = [str(settings["optimizer.name"])]
    for key, value in settings.items():
        if key != "optimizer.name":
            short, text = short_key(key), _as_name(value)
            parts.append(f"{short}{text}" if text[0].isdigit() else f"{short}_{text}")
    return "-".join(parts)


def short_key(key: str) -> str:
    """The last part of a key if no other setting has that name, else the whole key."""
    last = key.rpartition(".")[2]
    return last if sum(known.rpartition(".")[2] == last for known in known_keys()) == 1 else key


def _as_name(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list | tuple):
        return "_".join(map(_as_name, value)) or "none"
    return re.sub(r"[^A-Za-z0-9._+-]", "_", as_typed(value)) or "none"


def as_typed(value: Any) -> str:
    """The text of a setting on the command line.

    Example:
        >>> as_typed(1e-3), as_typed(None), as_typed((0.9, 0.95)), as_typed(True), as_typed("wsd")
        ('0.001', 'null', '[0.9, 0.95]', 'true', 'wsd')
    """
    return value if isinstance(value, str) else json.dumps(value)


def base_differences(old: RunConfig, new: RunConfig, varied: Sequence[str]) -> list[str]:
    """'key: old, now new' for each difference between two base configs that a sweep does not allow.

    Args:
        old, new: base configs.
        varied: keys of the new command's grids, whose base value no run uses.
    """
    flat = flatten(dataclasses.asdict(new))
    return [
        f"{key}: {as_typed(get_setting(old, key))}, now {as_typed(get_setting(new, key))}"
        for key in flat
        if matters(key) and key not in varied and get_setting(old, key) != get_setting(new, key)
    ]
