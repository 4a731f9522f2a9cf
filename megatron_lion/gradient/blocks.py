"""Mean and standard error of a value that is known of the running mean over the first k batches, at several k.

The values of the blocks of batches between two reads follow by subtraction. They are independent, and their scatter gives
the error of the mean. There is one read at each rung of the ladder, so blocks differ in size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from megatron_lion.gradient.noise import unseen

Read = tuple[int, int, float]
"""(batches so far, what the loss counted over them, value of their mean)."""
FEWEST_BLOCKS = 4
"""Fewest blocks of batches from which a standard error is computed."""


def blocks_of(reads: Sequence[Read]) -> list[tuple[int, float]]:
    """Returns (batches, value) of each block between two reads.

    Example:
        >>> blocks_of([(1, 10, 3.0), (2, 20, 4.0), (4, 40, 5.0)])
        [(1, 5.0), (2, 6.0)]
    """
    return [
        (after[0] - before[0], (after[1] * after[2] - before[1] * before[2]) / max(1, after[1] - before[1]))
        for before, after in pairwise(reads)
    ]


def error_of(blocks: Sequence[tuple[int, float]], mean: float) -> float | None:
    """Standard error of the mean over all blocks, for an unlimited data set; None below `FEWEST_BLOCKS` blocks.

    A block of n batches has a variance of σ²/n: the weighted scatter of the blocks estimates σ².
    """
    if len(blocks) < FEWEST_BLOCKS:
        return None
    of_batch = math.fsum(size * (value - mean) ** 2 for size, value in blocks) / (len(blocks) - 1)
    return math.sqrt(of_batch / sum(size for size, _ in blocks))


def mean_and_error(reads: Sequence[Read], population: float | None) -> tuple[float, float | None]:
    """Returns the value over all batches and its standard error.

    Args:
        reads: ascending in the number of batches.
        population: number of batches in the data set; None for an unlimited one.
    """
    batches, _, mean = reads[-1]
    error = error_of(blocks_of([(0, 0, 0.0), *reads]), mean)
    return mean, None if error is None else error * math.sqrt(unseen(batches, population))
