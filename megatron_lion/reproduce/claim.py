"""One statement of the paper beside what came out here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ARXIV = "arXiv 2411.07724"
JOURNAL = "Chinese Journal of Computers 2025, 10.11897/SP.J.1016.2025.02008"
NOT_THEIRS = "not in the paper"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of a reproduction.

    Attributes:
        what: is said.
        paper: what the paper has, as text.
        ours: what came out here, as text.
        tolerance: what counts as the same; "" where nothing is judged.
        holds: whether it does; None where the two do not compare.
        convention: how ours was measured.
        source: where the paper's comes from.
    """

    what: str
    paper: str
    ours: str
    tolerance: str = ""
    holds: bool | None = None
    convention: str = ""
    source: str = ARXIV

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold here", None: "not comparable"}[self.holds]


def joined(values: Iterable[float], form: str = ".3f") -> str:
    """Numbers side by side.

    >>> joined([1.0, 2.5])
    '1.000 2.500'
    """
    return " ".join(format(float(value), form) for value in values)
