"""One statement of the paper and the result of its reproduction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ARXIV = "arXiv 2411.07724"
JOURNAL = "Chinese Journal of Computers 2025, 10.11897/SP.J.1016.2025.02008"
NOT_THEIRS = "not in the paper"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of a reproduction.

    Attributes:
        what: the statement.
        paper: the paper's value, as text.
        ours: our value, as text.
        tolerance: criterion of agreement; "" if nothing is judged.
        holds: whether the values agree; None if they are not comparable or the measurement does not decide.
        is_resolved: whether the measurement decides; False if its error is too large, or not known.
        convention: how our value was measured.
        source: source of the paper's value.
    """

    what: str
    paper: str
    ours: str
    tolerance: str = ""
    holds: bool | None = None
    is_resolved: bool = True
    convention: str = ""
    source: str = ARXIV

    @property
    def verdict(self) -> str:
        if not self.is_resolved:
            return "not resolved"
        return {True: "holds", False: "does not hold here", None: "not comparable"}[self.holds]


def joined(values: Iterable[float], form: str = ".3f") -> str:
    """Numbers in one format, separated by spaces.

    >>> joined([1.0, 2.5])
    '1.000 2.500'
    """
    return " ".join(format(float(value), form) for value in values)


def decimals_for(gaps: Iterable[float], least: int = 3) -> str:
    """The format of numbers whose smallest non-zero gap must be visible, with `least` to 9 decimals.

    >>> decimals_for([0.2, 0.00001]), decimals_for([0.0])
    ('.5f', '.3f')
    """
    sizes = [abs(gap) for gap in gaps if gap]
    needed = max(
        [least, *(math.ceil(-math.log10(size) - 1e-9) for size in sizes)]
    )  # 1e-9: 3.01 − 3 is slightly below 0.01
    return f".{min(9, needed)}f"
