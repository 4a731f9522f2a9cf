"""metrics.jsonl, read: each metric as a series over optimizer steps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import CheckpointError


@dataclass(frozen=True)
class Series:
    """A metric over the optimizer steps at which it was written, ascending."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float | None:
        """The value at the last step."""
        return self.values[-1] if self.values else None

    def at_or_before(self, step: float) -> tuple[int, float] | None:
        """The last (step, value) that is not after `step`."""
        found = [pair for pair in zip(self.steps, self.values, strict=True) if pair[0] <= step]
        return found[-1] if found else None

    def best(self) -> tuple[int, float] | None:
        """The (step, value) of the smallest value."""
        pairs = list(zip(self.steps, self.values, strict=True))
        return min(pairs, key=lambda pair: pair[1]) if pairs else None

    def first_at_most(self, target: float) -> int | None:
        """The first step at which the value was measured to be `target` or less."""
        return next((s for s, v in zip(self.steps, self.values, strict=True) if v <= target), None)

    def smoothed(self, window: int) -> Series:
        """Mean over the last `window` values at each point."""
        means = (sum(self.values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(self.values)))
        return Series(self.steps, tuple(means))


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads metrics.jsonl: the last line of a (step, key) wins, a last line that was cut short is left out.

    Raises:
        CheckpointError: the file is missing, or a whole line is not a JSON object with a step.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no metrics.jsonl, so it is no run folder or never started") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    table: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # without its line end: a job was stopped while it wrote
                continue
            raise CheckpointError(f"{path}, line {number}: not a JSON object with a step") from None
        for key, value in entry.items():
            if key == "step" or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                table.setdefault(key, {})[step] = float(value)
            elif value is None:  # not finite when it was measured: an older number must not stand for it
                table.get(key, {}).pop(step, None)
    return {
        key: Series(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for key, values in table.items()
        if values
    }
