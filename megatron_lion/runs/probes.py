"""Names, finds and reads probe results, RUN/probe/step_0001000.json; gradient/probe_result.py has their content.

The run's own probe of a step is step_0001000.json. Results with other settings at that step have the settings in their
name, such as step_0001000-64-fixed.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.runs.paths import probes_folder, step_name
from megatron_lion.runs.sealed_json import read_sealed

FORMAT = 1


def probe_file(run_dir: str | Path, step: int) -> Path:
    """Path of the run's own result at a step."""
    return probes_folder(Path(run_dir)) / f"{step_name(step)}.json"


def read_probe(path: str | Path) -> dict[str, Any]:
    """Reads a probe result.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    try:
        content = read_sealed(Path(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `megatron-lion probe RUN`") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}; delete it and probe again") from error
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: not a probe result of format {FORMAT}")
    return content


def has_probes(run_dir: str | Path) -> bool:
    """Whether the run has a result of its own."""
    return any(re.fullmatch(r"step_\d+\.json", path.name) for path in probes_folder(Path(run_dir)).glob("step_*.json"))


def read_probes(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads the run's own results, ascending by step.

    Raises:
        DataError: the run has no result, or one is damaged.
    """
    paths = [
        path
        for path in sorted(probes_folder(Path(run_dir)).glob("step_*.json"))
        if re.fullmatch(r"step_\d+\.json", path.name)
    ]
    if not paths:
        raise DataError(
            f"{run_dir}: no probe results; train with --probe.every, or run `megatron-lion probe {run_dir}`"
        )
    return [read_probe(path) for path in paths]


def longest_ladder(run_dir: str | Path, probe: dict[str, Any]) -> dict[str, Any]:
    """Returns the result over the most batches among those comparable with `probe`.

    Comparable results have the same step, mode, data, dropout and global batch size.

    Raises:
        DataError: a result is damaged.
    """
    alike = ("mode", "data", "dropout", "global_batch_size")
    others = (read_probe(path) for path in probes_folder(Path(run_dir)).glob(f"{step_name(probe['step'])}-*.json"))
    found = [other for other in others if other["ladder"] and all(other[key] == probe[key] for key in alike)]
    return max([probe, *found], key=lambda result: int(result["num_batches"]))
