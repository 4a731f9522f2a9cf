"""Names, finds and reads results of `probe --smoothness`, RUN/probe/smoothness_0001000-1-32-fixed.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.runs.paths import probes_folder
from megatron_lion.runs.sealed_json import read_sealed

FORMAT = 1
_NAME = re.compile(r"smoothness_(\d{7,})-(\d+)-(\d+|all)-(fixed|fresh|test)\.json")
_WHOLE = ("step", "num_steps", "num_batches", "skipped_steps", "num_blocks")
_TEXTS = ("precision", "data", "optimizer")
_NUMBERS = ("loss_change", "first_order_change", "curvature", "curvature_standard_error")
_PART = (
    "num_parameters", "step_linf", "step_l2", "change_l1", "change_l1_low", "change_l1_high", "change_l2_corrected", "noise_share",
    "num_groups", "smoothness_linf_low", "smoothness_linf_high", "smoothness_l2", "smoothness_l2_standard_error",
)  # fmt: skip


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
    found = [content.get(key) for key in ("step", "num_steps", "data", "num_batches")]
    if named and found != [int(named[1]), int(named[2]), named[4], found[3] if named[3] == "all" else int(named[3])]:
        raise DataError(f"{path}: is a result of step {content.get('step')}, not of its name; {remedy}")
    wrong = [
        *(key for key in _WHOLE if not _is_number(content.get(key), whole=True)),
        *(key for key in _TEXTS if not isinstance(content.get(key), str)),
        *(key for key in _NUMBERS if key not in content or not (content[key] is None or _is_number(content[key]))),
        *(f"all.{key}" for key in _PART if not _is_value(content["all"], key)),
    ]
    if not isinstance(content["all"].get("is_resolved", ""), bool | None):
        wrong.append("all.is_resolved")
    if content["all"].get("smoothness_l2_standard_error") is not None and (content["all"].get("num_groups") or 0) < 2:
        wrong.append("all.num_groups")
    if wrong:
        raise DataError(f"{path}: {wrong[0]} is missing or has a value that cannot be; {remedy}")
    return content


def read_all_smoothness(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads all results of a run, in the order of their names; empty if it has none.

    Raises:
        DataError: a result is damaged.
    """
    paths = sorted(probes_folder(Path(run_dir)).glob("smoothness_*.json"))
    return [read_smoothness(path) for path in paths if _NAME.fullmatch(path.name)]


def _is_number(value: Any, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _is_value(part: dict[str, Any], key: str) -> bool:
    """Whether a part has the key, with null or a number of at least 0; a noise share may be negative."""
    if key not in part:
        return False
    value = part[key]
    return value is None or (_is_number(value) and (value >= 0 or key == "noise_share"))
