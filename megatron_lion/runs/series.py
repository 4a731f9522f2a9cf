"""Reads metrics.jsonl: each metric as a series over optimizer steps.

All code that reads a run uses `read_metrics`, which follows these rules:

- A line is a JSON object with a "step". Blank lines are skipped. Steps may come in any order and repeat after a resume.
- If several lines of a step have a key, the last one counts. If its value is not a finite number (null, NaN, true, text), the step
  has no value of that key, even if an earlier line had one.
- A last line without a line end is read if it is a complete object with a step: no prefix of an object is valid JSON,
  so only the line end is missing. Otherwise a job was stopped while it wrote the line, and the line is ignored. The
  `MetricsWriter` of the next job keeps or removes the line by the same test.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.errors import CheckpointError
from megatron_lion.files import read_own
from megatron_lion.plain_text import plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Series:
    """A metric over the optimizer steps at which it was written, ascending."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns steps [N] and values [N] as float64 arrays."""
        import numpy as np

        return np.array(self.steps, dtype=np.float64), np.array(self.values, dtype=np.float64)

    @property
    def last(self) -> float | None:
        """The value at the last step, or None if the series is empty."""
        return self.values[-1] if self.values else None

    def best(self) -> tuple[int, float] | None:
        """Returns (step, value) of the smallest value, or None if the series is empty."""
        pairs = list(zip(self.steps, self.values, strict=True))
        return min(pairs, key=lambda pair: pair[1]) if pairs else None

    def first_at_most(self, target: float) -> int | None:
        """Returns the first step whose value is at most `target`, or None."""
        return next((s for s, v in zip(self.steps, self.values, strict=True) if v <= target), None)

    def smoothed(self, window: int) -> Series:
        """Returns the mean over the last `window` values at each step; over fewer at the start."""
        means = (sum(self.values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(self.values)))
        return Series(self.steps, tuple(means))


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads metrics.jsonl into a series for each key that has a number, by the rules of this module.

    Raises:
        CheckpointError: the file is missing, or a line is not a JSON object with a step.
    """
    try:
        lines = read_own(path).split(b"\n")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: has no metrics.jsonl; it is not a run folder, or the run never started"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    table: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = parse_line(line)
        if entry is None:
            if number == len(lines):
                continue
            raise CheckpointError(f"{path}, line {number}: not a JSON object with a step")
        for key, value in entry.items():
            found = _finite_number(value)
            if key == "step":
                continue
            if found is not None:
                table.setdefault(key, {})[entry["step"]] = found
            else:  # an older number must not replace a value that could not be measured
                table.get(key, {}).pop(entry["step"], None)
    return {
        plain(key): Series(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for key, values in table.items()
        if values
    }


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line of metrics.jsonl, or None if it is not an object with an integer "step" ≥ 0.

    >>> parse_line(b'{"step": 1, "train/loss": 2.5}'), parse_line(b'{"step": 1, "train/l')
    ({'step': 1, 'train/loss': 2.5}, None)
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _finite_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
