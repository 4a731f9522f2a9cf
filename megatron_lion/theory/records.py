"""What the theory needs of a run folder: its probes, its training norms, d, and the settings it ran with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_lion.errors import CheckpointError
from megatron_lion.theory.symbols import Array


@dataclass(frozen=True)
class RunRecord:
    """Numbers of one run.

    Attributes:
        path: the run folder.
        optimizer: 'lion', 'sgd' or 'adamw'; '' where config.yaml does not tell.
        settings: contents of config.yaml, nested; empty where there is none.
        num_parameters: d, with the padded vocabulary.
        metrics: for each key of metrics.jsonl, optimizer steps done (ascending) and the values there.
    """

    path: Path
    optimizer: str
    settings: dict[str, Any] = field(repr=False)
    num_parameters: int
    metrics: dict[str, tuple[Array, Array]] = field(repr=False)

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps and values of a key.

        Raises:
            CheckpointError: the run never wrote that key; says what would write it.
        """
        if key not in self.metrics:
            raise CheckpointError(
                f"{self.path}: metrics.jsonl has no '{key}'; train with --probe.every, or run `megatron-lion "
                f"probe {self.path}`"
                if key.startswith("probe/")
                else f"{self.path}: metrics.jsonl has no '{key}'"
            )
        return self.metrics[key]

    def setting(self, section: str, key: str) -> Any:
        """One value of config.yaml, or None."""
        part = self.settings.get(section)
        return part.get(key) if isinstance(part, dict) else None

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole schedule, where config.yaml tells."""
        steps = self.setting("train", "steps")
        return int(steps) if isinstance(steps, int) else None


def read_metrics(path: Path) -> dict[str, tuple[Array, Array]]:
    """Reads metrics.jsonl into steps and values of each key.

    After a resume steps repeat: the last line of a (step, key) wins. A last line without its end is ignored,
    and so is a value that is not a number.

    Raises:
        CheckpointError: the file is missing, or a line before the last is not a JSON object with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the run_dir of a `megatron-lion pretrain`"
        ) from error
    table: dict[str, dict[int, float]] = {}
    # What follows the last line end is empty, or a line that was cut short.
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}, line {number}: not a JSON object with a step") from error
        for key, value in entry.items():
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
                table.setdefault(key, {})[step] = float(value)
    return {
        key: (np.array(sorted(values), dtype=np.float64), np.array([values[step] for step in sorted(values)]))
        for key, values in table.items()
    }


def read_run(path: str | Path) -> RunRecord:
    """Reads a run folder.

    Args:
        path: RUN, with metrics.jsonl; run.json and config.yaml where there are.

    Raises:
        CheckpointError: no metrics.jsonl, a damaged file, or d is nowhere to be found.
    """
    folder = Path(path)
    metrics = read_metrics(folder / "metrics.jsonl")
    facts = _read_mapping(folder / "run.json")
    settings = _read_mapping(folder / "config.yaml")
    optimizer = facts.get("optimizer") or (settings.get("optimizer") or {}).get("name") or ""
    dimension = facts.get("num_parameters")
    if dimension is None and "probe/num_parameters" in metrics:
        dimension = metrics["probe/num_parameters"][1][-1]
    if not isinstance(dimension, int | float) or dimension < 1:
        raise CheckpointError(f"{folder}: neither run.json nor a probe says num_parameters")
    return RunRecord(folder, str(optimizer), settings, int(dimension), metrics)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, found a {type(content).__name__}")
    return content
