"""Names, finds and reads results of `probe --smoothness`, RUN/probe/smoothness_0001000-1-32-fixed.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from megatron_lion.errors import DataError
from megatron_lion.runs.paths import probes_folder
from megatron_lion.runs.sealed_json import read_sealed

FORMAT = 1
_NAME = re.compile(r"smoothness_(\d{7,})-(\d+)-(\d+|all)-(fixed|fresh|test)\.json")
_KINDS: dict[str, Any] = {
    "precision": str, "data": str, "optimizer": str, "step": int, "num_steps": int, "num_batches": int,
    "loss_change": int | float | None, "first_order_change": int | float | None, "curvature": int | float | None,
    "curvature_standard_error": int | float | None,
}  # fmt: skip
_NUMBERS = (
    "num_parameters", "step_linf", "step_l2", "change_l1_low", "change_l1_high", "change_l2_corrected", "noise_share",
    "is_resolved", "num_groups", "smoothness_linf_low", "smoothness_linf_high", "smoothness_l2", "smoothness_l2_standard_error",
)  # fmt: skip


def smoothness_file(
    run_dir: str | Path, step: int, num_steps: int, num_batches: int | Literal["all"], data: str
) -> Path:
    """Path of the result of `num_steps` steps from a checkpoint."""
    return probes_folder(Path(run_dir)) / f"smoothness_{step:07d}-{num_steps}-{num_batches}-{data}.json"


def read_smoothness(path: str | Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        DataError: the file is missing, damaged, of another format, or of another step than its name states.
    """
    path = Path(path)
    remedy = "delete it, and run `megatron-lion probe RUN --smoothness N` again"
    try:
        content = read_sealed(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `megatron-lion probe`") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}; {remedy}") from error
    named = _NAME.fullmatch(path.name)
    if content.get("format") != FORMAT or not isinstance(content.get("all"), dict):
        raise DataError(f"{path}: not a smoothness result of format {FORMAT}; {remedy}")
    if named and [content.get("step"), content.get("num_steps"), content.get("data")] != [
        int(named[1]), int(named[2]), named[4],
    ]:  # fmt: skip
        raise DataError(f"{path}: is a result of step {content.get('step')}, not of its name; {remedy}")
    for key, kind in _KINDS.items():
        if not isinstance(content.get(key, ""), kind) or key not in content:
            raise DataError(f"{path}: {key} is missing or of another type; {remedy}")
    for key in _NUMBERS:
        if not isinstance(content["all"].get(key, ""), int | float | None):
            raise DataError(f"{path}: all.{key} is missing or not a number; {remedy}")
    return content


def read_all_smoothness(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads all results of a run, in the order of their names; empty if it has none.

    Raises:
        DataError: a result is damaged.
    """
    paths = sorted(probes_folder(Path(run_dir)).glob("smoothness_*.json"))
    return [read_smoothness(path) for path in paths if _NAME.fullmatch(path.name)]
