"""What the paper says beside what came out here: every line with its tolerance, convention and source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lion.reproduce.artefacts import Plan

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


def claims_of(plan: Plan) -> list[Claim]:
    """All lines of an artefact, read from its run folders.

    Raises:
        CheckpointError: a run or a result is missing.
    """
    if plan.artefact == "toy":
        from megatron_lion.reproduce.toy_claims import toy_claims

        return toy_claims()
    if plan.artefact == "rates":
        from megatron_lion.reproduce.rate_claims import rate_claims

        return rate_claims(plan)
    from megatron_lion.reproduce.language_claims import curve_claims, perplexity_claims

    return perplexity_claims(plan) if plan.artefact == "table-b1" else curve_claims(plan)


def joined(values: Iterable[float], form: str = ".3f") -> str:
    """Numbers side by side.

    >>> joined([1.0, 2.5])
    '1.000 2.500'
    """
    return " ".join(format(float(value), form) for value in values)


def as_markdown(key: str, claims: Sequence[Claim]) -> str:
    """The table of an artefact, and how many of its statements hold; `key` is "artefact/scale"."""
    artefact, _, scale = key.partition("/")
    name, _, quick = scale.partition(" ")
    lines = [
        f"## {artefact}, {name} scale{', quick: a few steps show that the path works, not how it ends' if quick else ''}",
        "",
        "| what | paper | ours | tolerance | verdict | convention | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        cells = (
            claim.what,
            claim.paper,
            claim.ours,
            claim.tolerance or "–",
            claim.verdict,
            claim.convention or "–",
            claim.source,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    judged = [claim for claim in claims if claim.holds is not None]
    held, rest = sum(bool(claim.holds) for claim in judged), len(claims) - len(judged)
    return "\n".join([*lines, "", f"{held} of {len(judged)} statements hold here; {rest} are not comparable."]) + "\n"
