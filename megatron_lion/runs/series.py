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
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, compress, groupby, repeat
from operator import lt, sub
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_lion.errors import CheckpointError
from megatron_lion.files import read_own
from megatron_lion.plain_text import plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Series:
    """A metric over the optimizer steps at which it was written, ascending; the values are kept in 8 bytes each."""

    steps: tuple[int, ...] = ()
    values: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", array("d", self.values))  # frozen outside of this method

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
        """Returns the mean over the last `window` values at each step; over fewer at the start.

        A mean is the sum of its values, rounded once, over their number. It is taken from running sums in whole numbers, so its
        cost does not depend on the window; the means of a window are computed once.
        """
        if window == 1:
            return self
        if window not in self._smoothed:
            self._smoothed[window] = Series(self.steps, _running_means(self.values, window))
        return self._smoothed[window]

    @cached_property
    def _smoothed(self) -> dict[int, Series]:
        return {}


def _running_means(values: Sequence[float], window: int) -> Sequence[float]:
    """The mean over the last `window` of finite values at each place; over fewer at the start."""
    whole, unit = _whole_numbers(values)
    sums = list(accumulate(whole, initial=0))
    totals = [*sums[1 : window + 1], *map(sub, sums[window + 1 :], sums[1:])]
    counts = chain(range(1, min(window, len(totals)) + 1), repeat(window))
    if max(map(abs, totals), default=0) >= unit << sys.float_info.max_exp - 1:  # a sum that may be no finite float
        return [total / (unit * count) for total, count in zip(totals, counts, strict=False)]
    return [total / unit / count for total, count in zip(totals, counts, strict=False)]


def _whole_numbers(values: Sequence[float]) -> tuple[list[int], int]:
    """Returns finite values as whole numbers, and the power of two by which they are multiplied."""
    sizes = list(filter(None, map(abs, values)))
    bits = max(0, sys.float_info.mant_dig - math.frexp(min(sizes, default=1.0))[1])
    if max(bits, bits + math.frexp(max(sizes, default=0.0))[1]) < sys.float_info.max_exp:
        return list(map(int, map((2.0**bits).__mul__, values))), 1 << bits
    ratios = [value.as_integer_ratio() for value in values]  # a power of two that is no float
    unit = max(denominator for _, denominator in ratios)
    return [number * (unit // denominator) for number, denominator in ratios], unit


BLOCK = 1 << 16
"""Bytes of metrics.jsonl that are decoded at once, to the end of their last line."""
SharedSteps = dict[tuple[int, ...], tuple[int, ...]]
"""Steps by themselves, so that series with equal steps hold them once: they take more memory than the values."""


def read_metrics(path: Path, shared: SharedSteps | None = None) -> dict[str, Series]:
    """Reads metrics.jsonl into a series for each key that has a number, by the rules of this module.

    Args:
        path: the file.
        shared: the steps of files read before, which are used for equal ones; those of this file are added.

    Raises:
        CheckpointError: the file is missing, or a line is not a JSON object with a step.
    """
    shared = {} if shared is None else shared
    tables: dict[tuple[str, ...], _Table] = {}
    for number, entries in _entries(path):
        for keys, group in groupby(entries, tuple):
            if (table := tables.get(keys)) is None:
                table = tables[keys] = _Table(keys)
            number = table.add(number, list(group))
    parts: dict[str, list[_Table]] = {}
    for table in tables.values():
        table.find_steps(shared)
        for key in table.keys:
            parts.setdefault(key, []).append(table)
    found = ((plain(key), _merged(key, having, shared)) for key, having in parts.items() if key != "step")
    return {key: series for key, series in found if series}


class _Table:
    """The lines of metrics.jsonl that have the same keys, so that a column is read at once.

    Attributes:
        keys: the keys of each line, in order.
        lines: the line numbers, ascending.
        columns: of each key but "step" the values of all lines, as floats; NaN for what is not a finite number.
        steps: the step of each line.
        is_ascending: whether each step is larger than the one before.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.lines = array("q")
        self.columns = {key: array("d") for key in keys if key != "step"}
        self.steps: tuple[int, ...] = ()
        self._steps: list[int] = []
        self.is_ascending = True

    def add(self, number: int, entries: Sequence[dict[str, Any]]) -> int:
        """Adds the objects of lines with these keys; returns the number of the line after them.

        Args:
            number: line number of the first one.
            entries: the objects of consecutive lines.
        """
        end = number + len(entries)
        self.lines.extend(range(number, end))
        for key, column in zip(self.keys, zip(*map(dict.values, entries), strict=True), strict=True):
            if key == "step":
                self._steps += column
            else:
                self.columns[key].extend(_numbers(column))
        return end

    def find_steps(self, shared: SharedSteps) -> None:
        """Sets `steps` and `is_ascending`, when all lines are there."""
        found = tuple(self._steps)
        self._steps.clear()
        self.steps = shared.setdefault(found, found)
        self.is_ascending = all(map(lt, found, found[1:]))


def _merged(key: str, tables: Sequence[_Table], shared: SharedSteps) -> Series:
    """The series of a key that some tables have: at each step the value of its last line, if this is a finite number."""
    columns = [table.columns[key] for table in tables]
    if len(tables) == 1 and tables[0].is_ascending:
        (steps,), (values,) = [table.steps for table in tables], columns
    else:
        lines, every, cells = (
            list(chain(*parts))
            for parts in ([table.lines for table in tables], [table.steps for table in tables], columns)
        )
        order = sorted(range(len(lines)), key=lines.__getitem__)
        latest = dict(zip(map(every.__getitem__, order), map(cells.__getitem__, order), strict=True))
        steps = tuple(sorted(latest))
        values = array("d", map(latest.__getitem__, steps))
    if not math.isfinite(sum(values)):
        finite = list(map(math.isfinite, values))
        steps, values = tuple(compress(steps, finite)), array("d", compress(values, finite))
    return Series(steps if steps is tables[0].steps else shared.setdefault(steps, steps), values)


def _numbers(column: Sequence[Any]) -> array[float]:
    """The values of a column as floats; NaN for what is not a finite number."""
    kinds = set(map(type, column))
    if kinds <= {float, int, type(None)}:
        if type(None) in kinds:
            column = [math.nan if value is None else value for value in column]
        try:
            return array("d", column)
        except OverflowError:  # a whole number beyond the largest float
            pass
    return array("d", [math.nan if (number := _finite_number(value)) is None else number for value in column])


def _entries(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields objects of consecutive lines, with the line number of the first.

    Raises:
        CheckpointError: the file is missing, or a line is not a JSON object with a step.
    """
    try:
        text = read_own(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: has no metrics.jsonl; it is not a run folder, or the run never started"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    start, number, last = 0, 1, text.count(b"\n") + 1
    size = len(text) - text.endswith(b"\n")
    while start < size:
        end = text.find(b"\n", start + BLOCK, size)
        block = text[start : size if end < 0 else end]
        start += len(block) + 1
        if (entries := _block(block)) is not None:
            yield number, entries
            number += len(entries)
            continue
        for line in block.split(b"\n"):
            if line.strip():
                if (entry := parse_line(line)) is not None:
                    yield number, [entry]
                elif number < last:
                    raise CheckpointError(f"{path}, line {number}: not a JSON object with a step")
            number += 1


def _block(block: bytes) -> list[dict[str, Any]] | None:
    """Returns the objects of whole lines if these are as `MetricsWriter` writes them: one flat object a line, with a step.

    They are decoded as one array. Each line has a brace at its begin and one at its end, and there are no others. So if there
    are as many objects as lines, each is one line.
    """
    count = block.count(b"\n") + 1
    text = block.replace(b"}\n{", b"},{")
    if not (text.isascii() and text.startswith(b"{") and text.endswith(b"}")) or b"\n" in text:
        return None
    if not text.count(b"{") == text.count(b"}") == count:
        return None
    try:
        entries = orjson.loads(b"[%b]" % text)
    except orjson.JSONDecodeError:
        return None
    if len(entries) != count or set(map(type, entries)) != {dict}:
        return None
    steps = [entry.get("step") for entry in entries]
    return entries if set(map(type, steps)) == {int} and min(steps) >= 0 else None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line of metrics.jsonl, or None if it is not an object with an integer "step" ≥ 0.

    >>> parse_line(b'{"step": 1, "train/loss": 2.5}'), parse_line(b'{"step": 1, "train/l')
    ({'step': 1, 'train/loss': 2.5}, None)
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if _has_step(entry) else None


def _has_step(entry: Any) -> bool:
    step = entry.get("step") if isinstance(entry, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _finite_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
